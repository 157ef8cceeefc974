"""Triton kernels on a CPU, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rxt_dist.kernels import triton_support


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have functions that use Triton on a GPU use it here too, while a test runs."""
    if torch.cuda.is_available():
        pytest.skip("Triton is imported for the GPU, not for its interpreter")
    assert triton_support.HAS_TRITON, "the tests need Triton, which `make setup` installs"
    interpret(monkeypatch)


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fixture does, for a process without fixtures."""
    monkeypatch.setattr(triton_support, "interpreted", True)
    _let_numbers_bound_loops(monkeypatch)


def _let_numbers_bound_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 asks NumPy for the int of an array of one number, which NumPy 2.4 refuses."""
    from triton.runtime import interpreter as module

    patch = module._patch_lang_tensor

    def patch_index_too(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(module, "_patch_lang_tensor", patch_index_too)
