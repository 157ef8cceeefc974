"""Log lines of a training process."""

from __future__ import annotations

import logging
import sys
import warnings

_FORMAT = "%(asctime)s %(levelname)s rank{rank} %(name)s: %(message)s"
_OWN_LOGGERS = ("rxt_dist", "data_prep", "launch")

# Warnings of the engines about their own choices: nothing a user can act on, some of them at every step.
_NOISY_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # megatron-core, four times a rank on import; nothing here uses what would be missing.
    (r"Transformer Engine and Apex are not installed", UserWarning),
    # torch's checkpoint reader, when a rank reads by itself on purpose.
    (r"torch\.distributed is disabled, unavailable or uninitialized", UserWarning),
    # DeepSpeed's collectives call the names that torch renamed.
    (r".*torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated", FutureWarning),
)


class _LineFormatter(logging.Formatter):
    """Keeps a record on one line; a traceback still follows on lines of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return " ".join(super().formatMessage(record).splitlines())


class _LineHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """The one handler of a process; a class of its own so that a second set-up replaces it."""


def setup_logging(rank: int) -> None:
    """Send log records to standard error, one line each: time, level, rank, logger, message.

    Rank 0 shows its INFO records and other ranks only their warnings, so that a run reads like one
    process. Libraries show warnings and errors only. Calling it again replaces the earlier set-up.

    Args:
        rank: global rank of this process.
    """
    handler = _LineHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(_FORMAT.format(rank=rank), datefmt="%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    for installed in list(root.handlers):
        if isinstance(installed, _LineHandler):
            root.removeHandler(installed)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if rank == 0 else logging.WARNING)

    logging.captureWarnings(True)
    for message, category in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
