"""``launch/train.py`` on ranks that have one GPU between them: torchrun ... one_gpu.py ARGUMENTS.

NCCL refuses such ranks, so gloo brings their messages; they may write into each other's memory.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch.distributed as dist

PROGRAM = Path(__file__).resolve().parent.parent.parent / "launch" / "train.py"

if __name__ == "__main__":
    os.environ["LOCAL_RANK"] = "0"  # of the device
    os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    dist.init_process_group("gloo")
    sys.argv[0] = str(PROGRAM)
    runpy.run_path(str(PROGRAM), run_name="__main__")
