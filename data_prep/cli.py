"""The command line of `rxt-data`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from data_prep import head, rewrite, shard, stats, synth, train_tokenizer
from data_prep.sources import EXTENSIONS
from data_prep.split_writer import DEFAULT_SHARD_BYTES
from rxt_dist.data.cutter import BLOCK_DOCUMENTS
from rxt_dist.data.manifest import SPLITS, Manifest
from rxt_dist.data.verify import verify_dataset
from rxt_dist.errors import USER_ERROR_EXIT_CODE, DataError, exit_with_message

DAMAGED_EXIT_CODE = 1

_INPUT_HELP = (
    f"file ({' '.join(EXTENSIONS)}), folder, glob, URL, hf:NAME[:SPLIT] or wds:TARS; "
    "may be given several times"
)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one sentence, like every other user error."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR_EXIT_CODE, f"error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `rxt-data`; returns 0, 1 (a dataset is damaged) or 2 (a user error, one sentence on stderr)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    arguments = _parser().parse_args(argv)

    def run() -> int:
        try:
            return int(arguments.run(arguments))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise DataError(f"{where}{error.strerror or error}") from error

    return exit_with_message(run)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rxt-data", description="Prepare tokenizers and datasets for rxt-dist.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_tokenizer(commands.add_parser("tokenizer", help="train a byte-level BPE tokenizer"))
    _add_shard(commands.add_parser("shard", help="tokenise text or conversations into a dataset"))
    _add_merge(commands.add_parser("merge", help="join datasets of one tokenizer into one"))
    _add_reshard(commands.add_parser("reshard", help="write a dataset again with shards of another size"))
    _add_head(commands.add_parser("head", help="show the first documents, special tokens visible"))
    _add_verify(commands.add_parser("verify", help="look for damage in a dataset"))
    _add_stats(commands.add_parser("stats", help="show what a dataset holds"))
    _add_synth(commands.add_parser("synth", help="generate a corpus whose answers need memory"))
    return parser


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", action="append", required=True, help=_INPUT_HELP)
    parser.add_argument("--vocab-size", type=int, required=True, help="entries, special tokens included")
    parser.add_argument(
        "--sample-documents",
        type=int,
        default=None,
        metavar="N",
        help="train on N documents drawn by hash (default: on all)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for tokenizer.json")
    parser.set_defaults(run=_run_tokenizer)


def _run_tokenizer(arguments: argparse.Namespace) -> int:
    size = train_tokenizer.train_tokenizer(
        arguments.input, arguments.vocab_size, arguments.output, arguments.sample_documents
    )
    print(f"{arguments.output}: tokenizer with {size} entries")
    return 0


def _add_shard(parser: argparse.ArgumentParser) -> None:
    defaults = shard.ShardOptions
    parser.add_argument("kind", choices=("text", "conversations"), help="what the records are")
    parser.add_argument("--input", action="append", required=True, help=_INPUT_HELP)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--workers", type=int, default=shard.default_workers(), help="processes (default: the CPUs)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=defaults.val_fraction,
        help="share of documents, by hash of their id, held out for validation (default %(default)s)",
    )
    limits = {
        "max-tokens": "truncate longer documents or interactions (default: keep everything)",
        "split-documents": "make several of at most N tokens of a longer document (text only; default: none)",
        "min-tokens": "drop documents (pieces, conversations) of fewer tokens (default: none)",
        "drop-longer": "drop records of more tokens, before any is truncated or split (default: none)",
    }
    for name, text in limits.items():
        parser.add_argument(f"--{name}", type=int, default=None, metavar="N", help=text)
    parser.add_argument(
        "--dedup",
        action="store_true",
        help="keep the first of records that are equal but for case, white space and compatible characters",
    )
    _add_sizes(parser)
    parser.set_defaults(run=_run_shard)


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shard-bytes",
        type=int,
        default=DEFAULT_SHARD_BYTES,
        help="begin a new shard at this size (default %(default)s)",
    )
    parser.add_argument(
        "--block-documents",
        type=int,
        default=BLOCK_DOCUMENTS,
        help="documents of a block (default %(default)s)",
    )


def _run_shard(arguments: argparse.Namespace) -> int:
    fields = {key: value for key, value in vars(arguments).items() if key not in ("run", "input")}
    manifest = shard.build_dataset(shard.ShardOptions(inputs=arguments.input, **fields))
    dropped = ", ".join(f"{count} {reason}" for reason, count in manifest.filters.dropped.items() if count)
    if dropped:
        print(f"{arguments.output}: dropped: {dropped}")
    _print_result(arguments.output, manifest)
    return 0


def _print_result(output: Path, manifest: Manifest) -> None:
    for split, counts in manifest.counts.items():
        print(
            f"{output}: {split}: {counts.documents} documents, {counts.tokens} tokens, "
            f"{counts.truncated} truncated, {counts.split} pieces of longer documents"
        )
    print(f"{output}: fingerprint {manifest.fingerprint}")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("datasets", type=Path, nargs="+", metavar="DATASET", help="dataset folders, in order")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    _add_sizes(parser)
    parser.set_defaults(run=_run_rewrite)


def _add_reshard(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("datasets", type=Path, nargs=1, metavar="DATASET", help="dataset folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    _add_sizes(parser)
    parser.set_defaults(run=_run_rewrite)


def _run_rewrite(arguments: argparse.Namespace) -> int:
    manifest = rewrite.rewrite_datasets(
        arguments.datasets, arguments.output, arguments.shard_bytes, arguments.block_documents
    )
    _print_result(arguments.output, manifest)
    return 0


def _add_head(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="dataset folder")
    parser.add_argument(
        "-n", type=int, default=3, metavar="K", help="documents to show (default %(default)s)"
    )
    parser.add_argument("--split", choices=SPLITS, default="train", help="default %(default)s")
    parser.set_defaults(run=_run_head)


def _run_head(arguments: argparse.Namespace) -> int:
    for text in head.head(arguments.dataset, arguments.split, arguments.n):
        print(text)
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="dataset folder")
    parser.add_argument("--deep", action="store_true", help="read every byte: hashes, blocks, token ids")
    parser.set_defaults(run=_run_verify)


def _run_verify(arguments: argparse.Namespace) -> int:
    if not arguments.dataset.is_dir():
        raise DataError(f"{arguments.dataset} is not a dataset: no such folder")
    problems = verify_dataset(arguments.dataset, deep=arguments.deep)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"{arguments.dataset}: sound")
    return DAMAGED_EXIT_CODE if problems else 0


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="dataset folder")
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the histograms into FILE as well")
    parser.set_defaults(run=_run_stats)


def _run_stats(arguments: argparse.Namespace) -> int:
    found = stats.dataset_stats(arguments.dataset)
    if arguments.png is not None:
        stats.draw_stats(found, arguments.png)
    print(json.dumps(found, indent=2) if arguments.json else stats.format_stats(found))
    return 0


def _add_synth(parser: argparse.ArgumentParser) -> None:
    defaults = synth.SynthOptions
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--profile",
        choices=synth.PROFILES,
        default=defaults.profile,
        help="recall: closed vocabulary, one question one fact; rich: little stories (default %(default)s)",
    )
    parser.add_argument(
        "--distance-weights", choices=synth.DISTANCE_WEIGHTS, default=defaults.distance_weights
    )
    numbers = {
        "conversations": "conversations to write",
        "stories": "stories to write",
        "seed": "same seed, same corpus",
        "facts_per_statement": "facts in a statement (recall only)",
        "min_interactions": "shortest conversation",
        "max_interactions": "longest conversation",
        "max_distance": "how many interactions back a question may reach",
        "kinds": "kinds of facts in a conversation (recall only)",
    }
    for name, text in numbers.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(
            option, type=int, default=getattr(defaults, name), help=f"{text} (default %(default)s)"
        )
    shares = {
        "state_share": "share of the interactions after the first that state facts",
        "overwrite": "share of later statements that change a fact stated before (recall only)",
    }
    for name, text in shares.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=getattr(defaults, name),
            metavar="SHARE",
            help=f"{text} (default %(default)s)",
        )
    parser.set_defaults(run=_run_synth)


def _run_synth(arguments: argparse.Namespace) -> int:
    fields = {key: value for key, value in vars(arguments).items() if key not in ("run", "output")}
    options = synth.SynthOptions(**fields)
    synth.write_corpus(arguments.output, options)
    print(f"{arguments.output}: {options.stories} stories, {options.conversations} conversations")
    return 0
