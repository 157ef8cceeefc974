"""`python -m data_prep` is `rxt-data`."""

import sys

from data_prep.cli import main

if __name__ == "__main__":  # worker processes import this module again
    sys.exit(main())
