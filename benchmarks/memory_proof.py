"""Does a model learn to use its memory? Train on synthetic conversations and measure recall by distance.

Makes the data, trains configs/runs/recall.yaml once for every seed, and evaluates each run on held-out
conversations like the trained ones, on conversations about twice as long, on conversations whose facts are
overwritten, and on conversations with many facts of a single kind, in which it does not help to know which
values were said: only which object has which. Finished steps are skipped, so an interrupted benchmark can
simply be started again. Prints the share of marked words recalled with the true, a fresh and a foreign
memory, and writes it as JSON.

    python benchmarks/memory_proof.py --output runs/memory-proof --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rxt_dist.arguments import add_overrides
from rxt_dist.demo import prepare, training_command
from rxt_dist.errors import FAILED_EXIT_CODE

DISTANCES = (1, 2, 3, 4)
_ONE_KIND = ("--kinds", "1", "--state-share", "0.45")
# Name of an evaluated dataset -> what its conversations have that the trained ones have not.
EVALUATED = {
    "held-out": (),
    "longer": ("--min-interactions", "14", "--max-interactions", "20"),
    "overwritten": ("--overwrite", "0.5"),
    "one-kind": _ONE_KIND,
}
_TRAINED_SEED, _HELD_OUT_SEED, _ONE_KIND_SEED = 1, 2, 3


def main() -> int:
    """Run the benchmark; returns 0, or 1 when a run failed."""
    arguments = _arguments()
    data = arguments.output / "data"
    _prepare_data(data, arguments)
    with ThreadPoolExecutor(arguments.at_once) as pool:
        started = list(enumerate(arguments.seeds))
        codes = list(pool.map(lambda place: _train(data, arguments, *place), started))
    results = {
        str(seed): {name: _evaluate(data, arguments, seed, name) for name in EVALUATED}
        for seed, code in zip(arguments.seeds, codes, strict=True)
        if code == 0
    }
    (arguments.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    _report(results, arguments)
    return FAILED_EXIT_CODE if any(codes) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/memory-proof"), help="default: %(default)s")
    parser.add_argument("--config", default="recall", help="run file or name (default: %(default)s)")
    parser.add_argument("--facts", type=int, default=1, help="facts a statement (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument(
        "--conversations",
        type=int,
        default=60_000,
        help="trained on, half of them of one kind (default: %(default)s)",
    )
    parser.add_argument("--stories", type=int, default=20_000, help="trained on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=2_000, help="of each kind (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side (default: %(default)s)")
    add_overrides(parser, "batch.lanes=512")
    return parser.parse_args()


def _prepare_data(data: Path, arguments: argparse.Namespace) -> None:
    shape = ["--distance-weights", "linear", "--facts-per-statement", str(arguments.facts)]
    # Half of what is trained on is of one kind: in the rest binding pays too seldom to be learned.
    trained = ["--max-interactions", "10", "--conversations", str(arguments.conversations // 2)]
    held_out = ["--conversations", str(arguments.held_out), "--stories", "1", "--max-interactions", "10"]
    stories = ["--stories", str(arguments.stories)]
    raw = {
        "trained": [*trained, *stories, "--seed", str(_TRAINED_SEED)],
        "trained-one-kind": [*trained, "--stories", "1", *_ONE_KIND, "--seed", str(_ONE_KIND_SEED)],
    }
    for name, special in EVALUATED.items():
        raw[name] = [*held_out, *special, "--seed", str(_HELD_OUT_SEED)]
    for name, options in raw.items():
        _data(data / name / "raw", "synth", *shape, *options)
    stories = f"--input={data / 'trained' / 'raw' / 'stories.jsonl'}"
    conversations = {name: f"--input={data / name / 'raw' / 'conversations.jsonl'}" for name in raw}
    _data(data / "tokenizer", "tokenizer", stories, conversations["trained"], "--vocab-size", "512")
    tokenizer = ["--tokenizer", str(data / "tokenizer")]
    _data(data / "text", "shard", "text", stories, *tokenizer)
    both = [conversations["trained"], conversations["trained-one-kind"]]
    sources = {"trained": both, **{name: [conversations[name]] for name in EVALUATED}}
    for name, inputs in sources.items():
        fraction = ["--val-fraction", "0.01" if name == "trained" else "0"]
        _data(data / name / "shards", "shard", "conversations", *inputs, *tokenizer, *fraction)


def _data(output: Path, *arguments: str) -> None:
    prepare(output, *arguments, "--output", output)  # rxt-data publishes a folder whole or not at all


def _train(data: Path, arguments: argparse.Namespace, index: int, seed: int) -> int:
    import torch

    run_dir = _run_dir(arguments, seed)
    devices = torch.cuda.device_count()
    environment = dict(os.environ)
    place = [f"--include=localhost:{index % devices}"] if devices else ["--num_gpus", "1"]
    if not devices:
        environment |= {"DS_ACCELERATOR": "cpu"}
    settings = [f"seed={seed}", f"data.text={data / 'text'}"]
    settings += [f"data.conversations={data / 'trained' / 'shards'}", *arguments.overrides]
    command = training_command(place, arguments.config, run_dir, settings)
    begin = time.perf_counter()
    with (arguments.output / f"seed-{seed}.log").open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    print(f"seed {seed}: exit code {code.returncode} after {time.perf_counter() - begin:.0f} s", flush=True)
    return code.returncode


def _run_dir(arguments: argparse.Namespace, seed: int) -> Path:
    return Path(arguments.output.resolve() / f"seed-{seed}")


def _evaluate(data: Path, arguments: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    from rxt_dist.train.evaluate_checkpoint import evaluate_checkpoint

    # Nothing of these datasets was trained on, so their larger split serves.
    overrides = [f"data.conversations={data / name / 'shards'}"]
    return evaluate_checkpoint(_run_dir(arguments, seed), overrides, split="train", memory=True)


def _report(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    print(f"\n{arguments.config}, {arguments.facts} fact(s) a statement {' '.join(arguments.overrides)}")
    header = "".join(f"{f'd={d}':>8}" for d in DISTANCES)
    print(f"{'seed':>4}  {'conversations':<14}{'memory':<9}{'loss':>8}{'recall':>8}{header}{'marked':>9}")
    for seed, evaluated in results.items():
        for name, record in evaluated.items():
            for memory, values in record["memory"].items():
                pairs = values["recall_by_distance"]
                cells = "".join(f"{_share(pairs.get(str(d))):>8}" for d in DISTANCES)
                marked = sum(count for _, count in pairs.values())
                print(
                    f"{seed:>4}  {name:<14}{memory:<9}{values['answer_loss']:>8.3f}"
                    f"{values['recall']:>8.1%}{cells}{marked:>9.0f}"
                )


def _share(pair: Sequence[float] | None) -> str:
    return f"{pair[0] / pair[1]:.1%}" if pair else "-"


if __name__ == "__main__":
    sys.exit(main())
