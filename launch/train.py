"""The script that the deepspeed launcher, torchrun or srun starts on every rank."""

import sys
from pathlib import Path

# A launcher starts this file by its path: make the package importable from a source tree too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rxt_dist.train.run import main

if __name__ == "__main__":
    sys.exit(main())
