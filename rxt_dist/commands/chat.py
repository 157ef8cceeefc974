"""`rxt chat`: talk to a model, which remembers."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rxt_dist.commands.generation import add_model_arguments, add_sampling_arguments, sampling_of
from rxt_dist.errors import RxtError

if TYPE_CHECKING:
    from rxt_dist.inference import Conversation, Sampling

_COMMANDS = "/reset (forget everything), /save FILE (write the memory), /quit"
_INTERRUPTED = 130  # exit code of a program that Ctrl-C ended


def add_parser(commands: Any) -> None:
    """Declare the command in ``commands``, an argparse subparsers object."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model, which remembers",
        description="Answers each line of the standard input, typed or piped. Lines that begin with / are "
        f"commands: {_COMMANDS}. Ctrl-C stops an answer, which is then not remembered, or ends the chat.",
    )
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="written into a new memory before the first query")
    parser.add_argument(
        "--memory",
        type=Path,
        metavar="FILE",
        help="continue from the memory in FILE, where it exists, and write it there in the end",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="most tokens of an answer (default: up to seq_len)"
    )
    add_sampling_arguments(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rxt_dist.inference import Conversation
    from rxt_dist.inference.conversation import COMPONENTS
    from rxt_dist.inference.models import open_model

    sampling = sampling_of(arguments)
    pretrained = open_model(
        arguments.model, COMPONENTS, device=arguments.device, precision=arguments.precision
    )
    conversation = Conversation.begin(pretrained, arguments.seed)
    if arguments.memory is not None and arguments.memory.exists():
        conversation.load(arguments.memory)
        _say(f"{arguments.memory}: {conversation.writes} interactions remembered")
    if arguments.system is not None and not conversation.writes:
        conversation.init_stm(arguments.system)
    if arguments.memory is not None:
        conversation.save(arguments.memory)  # if that is not possible, better now than in the end
    chat = _Chat(conversation, sampling, arguments.max_tokens, arguments.system)
    try:
        return chat.run()
    finally:
        if arguments.memory is not None:
            conversation.save(arguments.memory)


class _Chat:
    """The loop over the lines of the standard input; a person at a terminal gets another try after an
    error or Ctrl-C, while a pipe ends with it."""

    def __init__(
        self, conversation: Conversation, sampling: Sampling, max_tokens: int | None, system: str | None
    ) -> None:
        self._conversation, self._sampling = conversation, sampling
        self._max_tokens, self._system = max_tokens, system
        self._typed = sys.stdin.isatty()

    def run(self) -> int:
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):  # bytes that are no text: a query is refused by name
                stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
        while True:
            try:
                line = input("> " if self._typed else "").strip()
            except EOFError:
                print(end="\n" if self._typed else "")
                return 0
            except KeyboardInterrupt:
                print()
                return _INTERRUPTED
            if line == "/quit":
                return 0
            try:
                self._answer(line)
            except RxtError as error:
                if not self._typed:
                    raise
                _say(f"error: {error}")
            except KeyboardInterrupt:
                print()
                if not self._typed:
                    return _INTERRUPTED
                _say("stopped; this interaction is not remembered")

    def _answer(self, line: str) -> None:
        if line.startswith("/"):
            self._command(*line.split(maxsplit=1))
        elif line:
            stream = self._conversation.stream(line, sampling=self._sampling, max_tokens=self._max_tokens)
            for piece in stream:
                print(piece, end="", flush=True)
            print(flush=True)
            if stream.reply is not None and not stream.reply.complete:
                _say(f"stopped after {len(stream.reply.tokens)} tokens")

    def _command(self, name: str, argument: str = "") -> None:
        if name == "/reset" and not argument:
            self._conversation.reset()
            if self._system is not None:
                self._conversation.init_stm(self._system)
        elif name == "/save" and argument:
            self._conversation.save(Path(argument).expanduser())
        else:
            _say(f"unknown command: {f'{name} {argument}'.strip()}; valid: {_COMMANDS}")


def _say(message: str) -> None:
    """What is not part of an answer."""
    print(message, file=sys.stderr, flush=True)
