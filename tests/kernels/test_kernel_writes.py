"""What compiled code believes that kernels write to.

It copies whatever it believes to be written before each call, inputs too, and splits graphs wrongly around
an input that is. It believes so where a number from an argument comes out of a function and tells where to
write.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import rxt_dist

HELPER = Path(__file__).parent.parent / "helpers" / "kernel_writes.py"
RESULTS = {
    "activation._activate_backward": [["grad_hidden", "segments"]],
    "activation._activate_forward": [["out"]],
    "attention._backward": [["grad_k", "grad_q", "grad_v"]],
    "attention._forward": [["level", "out"]],
    "combine._combine_backward": [["grad_rows", "grad_weights", "segments"]],
    "combine._combine_forward": [["out"]],
    "combine._spread": [["out"]],
    "cross_entropy._gradient_of_part": [["logits"]],
    "cross_entropy._part_of_rows": [["numbers"]],
    "cross_entropy._whole_rows": [["hits", "logits", "losses"]],
    "memory_mix._mix_and_norm": [["inverse", "mixed", "normed", "sums"]],
    "memory_mix._mix_and_norm_backward": [["grad", "grad_value", "parts"]],
    "memory_mix._mix_into": [["after"]],
    "memory_sources._mixed_rows": [["mixed", "normed"]],
    "memory_sources._mixed_rows_backward": [["grad_value", "parts"]],
    "memory_sources._norm_sums": [["inverse", "mean", "mean_inverse", "mean_total", "plain", "total"]],
    "memory_sources._weighted_rows": [["parts"]],
    "norm._norm_backward": [["out", "parts"]],
    "norm._sum_parts": [["sums"]],
    "order._add_blocks": [["ends", "starts"]],
    "order._count": [["upto"]],
    "order._place": [["inverse", "order", "ordered"]],
    "random._add_normals": [["out"]],
    "random._with_draws": [["out"]],
    "rotary._rotate": [["out"]],
    "rotary._rotate_heads": [["k", "q", "v"], ["heads"]],
    "router._choose": [["experts", "mass", "weights"]],
    "router._choose_backward": [["grad_logits"]],
    "segments._sum_segments": [["sums"]],
    "write_losses._backward": [["grad_after", "grad_before"]],
    "write_losses._forward": [["parts"]],
}


def test_kernels_write_to_their_results_only() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    package, samples = Path(rxt_dist.__file__).parent.parent, HELPER.parent.parent / "model"
    environment["PYTHONPATH"] = f"{package}{os.pathsep}{samples}"
    done = subprocess.run(
        [sys.executable, HELPER], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == RESULTS


def test_every_kernel_is_known() -> None:
    launched = {
        f"{file.stem.removesuffix('_triton')}.{name}"
        for file in (Path(rxt_dist.__file__).parent / "kernels").glob("*_triton.py")
        for name in re.findall(
            r"^ +(_[a-z]\w*)\[(?:\(|grid\])", file.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    assert launched == set(RESULTS)
