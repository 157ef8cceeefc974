"""The benchmark of import and export measures both, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_directions_are_measured(tmp_path: Path, dtype: str) -> None:
    command = [sys.executable, "benchmarks/interchange.py", "--model", "micro", "--vocab-size", "60000"]
    result = subprocess.run(
        [*command, "--dtype", dtype, "--folder", str(tmp_path)],
        cwd=REPOSITORY,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert result.returncode == 0, result.stderr
    head, _, *lines = result.stdout.splitlines()
    size, program = (float(part.split()[1]) for part in head.split(", "))
    rows = {line.split()[0]: [float(cell) for cell in line.split()[1:]] for line in lines}
    assert rows.keys() == {"import", "export"}
    for seconds, peak, share, own in rows.values():
        assert 0 < seconds < 60
        assert peak > program > 100
        assert share == pytest.approx(peak / size, rel=0.05)
        assert own == pytest.approx((peak - program) / size, abs=0.1)
        assert own > 0.8, "a command that has seen a model holds at least its size"
    assert list(tmp_path.iterdir()) == []
