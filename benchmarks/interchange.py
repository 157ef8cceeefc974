"""Import and export of a published model: seconds, and peak memory over the size of the model.

    python benchmarks/interchange.py [--model alpha] [--vocab-size 20000] [--dtype fp32] [--folder DIR]

A model with random weights is written as a published full model, imported, and exported, each by the command
in a process of its own. Memory is the largest resident size of that process, mapped pages of files included;
``program`` is what the process takes before it has seen a model, so ``peak - program`` is the model's share.
The files stay in the page cache: nothing is read from a disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MEGABYTE = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="alpha", help="name or file of a model (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, help="default: that of the model's card")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step is not None:
        _measure(arguments)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        _table(Path(folder))


def _table(folder: Path) -> None:
    rows = {}
    for step in STEPS:
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--step", step]
        output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
        rows[step] = json.loads(output.splitlines()[-1])
    program = rows.pop("program")["peak"]
    size = (folder / "native" / "model.safetensors").stat().st_size
    rows.pop("make")
    print(f"model: {size / MEGABYTE:.0f} MiB, program: {program / MEGABYTE:.0f} MiB")
    print("command  seconds  peak MiB  peak / model  (peak - program) / model")
    for step, row in rows.items():
        peak = row["peak"]
        shares = f"{peak / size:12.2f}  {(peak - program) / size:24.2f}"
        print(f"{step:7}  {row['seconds']:7.2f}  {peak / MEGABYTE:8.0f}  {shares}")


def _measure(arguments: argparse.Namespace) -> None:
    """Do one step in this process and print its seconds and the largest resident size."""
    sys.path.insert(0, str(REPOSITORY))
    from rxt_dist.cli import main as rxt
    from rxt_dist.interchange import export_folders, import_folders  # noqa: F401 (part of the program)

    started = time.perf_counter()
    STEPS[arguments.step](arguments, lambda *words: _check(rxt([str(word) for word in words])))
    seconds = time.perf_counter() - started
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"seconds": seconds, "peak": peak}))


def _check(code: int) -> None:
    if code != 0:
        sys.exit(code)


Run = Callable[..., None]


def _program(arguments: argparse.Namespace, run: Run) -> None:
    """Nothing: what is imported is what the program takes."""


def _make(arguments: argparse.Namespace, run: Run) -> None:
    import torch

    from rxt_dist import save_pretrained
    from rxt_dist.config import load_model_config
    from rxt_dist.model import build_model

    config = load_model_config(arguments.model)
    vocabulary = arguments.vocab_size or config.card_vocab_size or 1000
    model = build_model(config.model_copy(update={"vocab_size": vocabulary}), seed=0)
    model.to(torch.bfloat16 if arguments.dtype == "bf16" else torch.float32)
    components = ("encoder", "decoder", "memory_attention")
    save_pretrained(arguments.folder / "start", model, tokenizer=None, components=components)
    run(
        "export",
        arguments.folder / "start",
        "--output",
        arguments.folder / "published",
        "--components",
        "full",
    )


def _import(arguments: argparse.Namespace, run: Run) -> None:
    run("import", arguments.folder / "published", "--output", arguments.folder / "native")


def _export(arguments: argparse.Namespace, run: Run) -> None:
    run("export", arguments.folder / "native", "--output", arguments.folder / "out", "--components", "full")


STEPS: dict[str, Callable[[argparse.Namespace, Run], None]] = {
    "program": _program,
    "make": _make,
    "import": _import,
    "export": _export,
}

if __name__ == "__main__":
    main()
