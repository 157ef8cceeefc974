from __future__ import annotations

import subprocess
import sys
import textwrap


def stderr_of(body: str) -> list[str]:
    """Lines on standard error of a fresh process: logging is state of the whole process."""
    code = "import logging, warnings\nfrom rxt_dist.observe.logging import setup_logging\n"
    result = subprocess.run(
        [sys.executable, "-c", code + textwrap.dedent(body)], capture_output=True, text=True, check=True
    )
    assert result.stdout == ""
    return result.stderr.splitlines()


def test_rank_0_shows_info_on_one_line() -> None:
    (line,) = stderr_of("""
        setup_logging(0)
        logging.getLogger("rxt_dist.train").info("step 1\\nloss 2")
        logging.getLogger("rxt_dist.train").debug("hidden")
    """)
    assert line.endswith("INFO rank0 rxt_dist.train: step 1 loss 2")


def test_other_ranks_show_warnings_only() -> None:
    (line,) = stderr_of("""
        setup_logging(3)
        logging.getLogger("rxt_dist.train").info("hidden")
        logging.getLogger("rxt_dist.train").warning("seen")
    """)
    assert line.endswith("WARNING rank3 rxt_dist.train: seen")


def test_libraries_show_warnings_only() -> None:
    (line,) = stderr_of("""
        setup_logging(0)
        logging.getLogger("somebody.else").info("hidden")
        logging.getLogger("somebody.else").warning("seen")
    """)
    assert line.endswith("WARNING rank0 somebody.else: seen")


def test_second_setup_replaces_the_first() -> None:
    (line,) = stderr_of("""
        setup_logging(0)
        setup_logging(1)
        logging.getLogger("rxt_dist").warning("once")
    """)
    assert "rank1" in line


def test_a_traceback_follows_its_line() -> None:
    lines = stderr_of("""
        setup_logging(0)
        try:
            1 / 0
        except ZeroDivisionError:
            logging.getLogger("rxt_dist").exception("failed")
    """)
    assert lines[0].endswith("ERROR rank0 rxt_dist: failed")
    assert lines[-1] == "ZeroDivisionError: division by zero"


def test_known_noise_is_silent_and_other_warnings_are_log_lines() -> None:
    (line,) = stderr_of("""
        setup_logging(0)
        warnings.warn("Transformer Engine and Apex are not installed. Falling back", UserWarning)
        warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Please use", FutureWarning)
        warnings.warn("`torch.distributed.reduce_scatter_tensor` is deprecated. Please use", FutureWarning)
        warnings.warn("torch.distributed is disabled, unavailable or uninitialized, assuming", UserWarning)
        warnings.warn("something is wrong", UserWarning)
    """)
    assert "WARNING rank0 py.warnings:" in line
    assert "something is wrong" in line
