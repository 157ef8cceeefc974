"""Triton kernels on a CPU, in Triton's interpreter."""

from __future__ import annotations

import pytest

from rxt_dist.kernels import triton_support


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have functions that use Triton on a GPU use it here too, while a test runs."""
    assert triton_support.HAS_TRITON, "the tests need Triton, which `make setup` installs"
    monkeypatch.setattr(triton_support, "interpreted", True)
