"""``launch/train.py`` on a CPU with the Triton kernels that a GPU runs, in Triton's interpreter."""

from __future__ import annotations

import runpy

import pytest
from helpers.interpreter import interpret
from helpers.launch import PROGRAM

if __name__ == "__main__":
    interpret(pytest.MonkeyPatch())
    runpy.run_path(str(PROGRAM), run_name="__main__")
