"""Exceptions for mistakes a user can make, and the one place that turns them into an exit code.

A message names the field or file, what was found, and what is valid. Internal invariants use
``assert``; everything that a person can get wrong uses one of these classes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

FAILED_EXIT_CODE = 1
USER_ERROR_EXIT_CODE = 2


class RxtError(Exception):
    """Base of all errors whose message is written for the user; printed without a traceback."""


class ConfigError(RxtError):
    """The configuration is wrong: unknown key, invalid value, or values that contradict each other."""


class MeshError(ConfigError):
    """The requested parallel layout is not possible on this number of ranks."""


class DataError(RxtError):
    """Input text, a dataset, a shard or a tokenizer is missing, damaged or of the wrong kind."""


class CheckpointError(RxtError):
    """A checkpoint or run folder is missing, damaged, or does not fit this run."""


class TrainingError(Exception):
    """Training cannot go on (for example a non-finite loss); not a user error, exit code 1."""


def exit_with_message(main: Callable[[], int | None]) -> int:
    """Run ``main`` and return its exit code; an :class:`RxtError` becomes one line and code 2."""
    try:
        return main() or 0
    except RxtError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
