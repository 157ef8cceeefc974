"""Fixtures of the tests that train: small datasets, made once a session with the data commands."""

from __future__ import annotations

import os

import pytest
import torch
from helpers.datasets import Datasets, build_datasets

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where Triton is imported


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Datasets:
    """A text and a conversation dataset that share a tokenizer, and a text dataset with another one."""
    return build_datasets(tmp_path_factory.mktemp("datasets"))
