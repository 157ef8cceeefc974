"""`rxt chat`, `rxt complete` and `rxt fill-mask`."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from inference_samples import EOS, FIRST_WORD, bytes_tokenizer, model_config, prefer, sample_model, sample_stm

from rxt_dist.cli import main
from rxt_dist.inference import Conversation, Sampling
from rxt_dist.inference.conversation import ReplyStream
from rxt_dist.interchange.pretrained import load_pretrained, save_pretrained

REPOSITORY = Path(__file__).parents[2]
COMPONENTS = ("encoder", "decoder", "mlm_head", "memory_attention")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A native folder whose model answers some ASCII letters."""
    config = model_config(vocab_size=267, stm_init={"distribution": "standard", "shared": True})
    model = sample_model(config)
    prefer(model, EOS, -1.0)
    ascii_tokens = torch.tensor([t for t in range(267) if bytes_tokenizer().decode([t]).isalpha()])
    with torch.no_grad():
        model.decoder.lm_head.bias[ascii_tokens] += 2.0
    path = tmp_path_factory.mktemp("model") / "native"
    stm = sample_stm(1)
    save_pretrained(path, model, tokenizer=bytes_tokenizer(), components=COMPONENTS, stm=stm)
    return path


class Terminal(io.StringIO):
    """Lines typed at a terminal."""

    def isatty(self) -> bool:
        return True


def run(monkeypatch: pytest.MonkeyPatch, lines: list[str], *arguments: object, typed: bool = False) -> int:
    stdin = (Terminal if typed else io.StringIO)("".join(f"{line}\n" for line in lines))
    monkeypatch.setattr("sys.stdin", stdin)
    return main(["chat", *(str(argument) for argument in arguments)])


def answers(folder: Path, queries: list[str], sampling: Sampling, system: str | None = None) -> list[str]:
    conversation = Conversation.begin(load_pretrained(folder), 3)
    if system is not None:
        conversation.init_stm(system)
    return [conversation.ask(query, sampling=sampling, max_tokens=9).text for query in queries]


QUERIES = ["hello", "größe 日本", "[EOS][Q]"]
OPTIONS = ("--seed", 3, "--max-tokens", 9, "--temperature", 0.9, "--top-k", 40, "--top-p", 0.95)
SAMPLING = Sampling(temperature=0.9, top_k=40, top_p=0.95)


def test_piped_queries_are_answered_one_a_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answers(folder, QUERIES, SAMPLING)
    assert run(monkeypatch, [QUERIES[0], "", *QUERIES[1:]], "--model", folder, *OPTIONS) == 0
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)
    with_system = answers(folder, QUERIES[:1], SAMPLING, "be brief")
    lines = [QUERIES[0], "/reset", QUERIES[0], "/quit", "not asked"]
    assert run(monkeypatch, lines, "--model", folder, "--system", "be brief", *OPTIONS) == 0
    assert capsys.readouterr().out == f"{with_system[0]}\n" * 2, "the system prompt survives a reset"
    assert with_system[0] != expected[0]


def test_a_memory_file_carries_the_conversation_to_the_next_day(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answers(folder, QUERIES, SAMPLING, "be brief")
    memory, saved = tmp_path / "memory", tmp_path / "saved"
    arguments = ("--model", folder, "--memory", memory, "--system", "be brief", *OPTIONS)
    assert run(monkeypatch, [QUERIES[0], f"/save {saved}"], *arguments) == 0
    assert saved.read_bytes() == memory.read_bytes()
    assert run(monkeypatch, QUERIES[1:], *arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{answer}\n" for answer in expected)
    assert f"{memory}: 2 interactions remembered" in captured.err


def test_a_person_gets_another_try_and_a_pipe_ends_with_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["x" * 99, "/what now", "hello"]
    assert run(monkeypatch, lines, "--model", folder, *OPTIONS) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("error: the query has")) == ("", 1)
    assert run(monkeypatch, lines, "--model", folder, *OPTIONS, typed=True) == 0
    captured = capsys.readouterr()
    assert captured.out == f"> > > {answers(folder, ['hello'], SAMPLING)[0]}\n> \n"
    assert captured.err.count("error: the query has") == 1
    assert "unknown command: /what now; valid: /reset" in captured.err


def test_an_interrupted_answer_is_not_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = answers(folder, ["again"], SAMPLING)
    pieces = ReplyStream.__next__
    count = 0

    def interrupted(stream: ReplyStream) -> str:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return pieces(stream)

    monkeypatch.setattr(ReplyStream, "__next__", interrupted)
    memory = tmp_path / "memory"
    arguments = ("--model", folder, "--memory", memory, *OPTIONS)
    assert run(monkeypatch, ["hello", "again"], *arguments, typed=True) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1] == f"> {expected[0]}"
    assert "stopped; this interaction is not remembered" in captured.err
    count = 0
    assert run(monkeypatch, ["hello", "again"], "--model", folder, *OPTIONS) == 130
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.fixture
def waiting(folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A chat that has answered one query and waits for the next."""
    command = [sys.executable, "-m", "rxt_dist.cli", "chat", "--model", str(folder), "--max-tokens", "3"]
    process = subprocess.Popen(
        [*command, "--memory", str(tmp_path / "memory")],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and so would this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    assert process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_ends_a_waiting_chat_cleanly_and_keeps_its_memory(
    waiting: subprocess.Popen[str], tmp_path: Path
) -> None:
    waiting.send_signal(signal.SIGINT)
    _, errors = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert "Traceback" not in errors
    assert (tmp_path / "memory").is_file()


def test_bytes_that_are_no_text_are_refused_by_name(waiting: subprocess.Popen[str]) -> None:
    assert waiting.stdin is not None
    waiting.stdin.buffer.write(b"caf\xe9\n")  # type: ignore[attr-defined]
    _, errors = waiting.communicate(timeout=60)
    assert waiting.returncode == 2
    assert errors.splitlines()[-1] == r"error: query: found '\udce9' at character 3; valid: UTF-8 text"


def test_complete_and_fill_mask_print_what_the_library_gives(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rxt_dist.inference import complete, fill_mask

    found = load_pretrained(folder)
    assert main(["complete", "--model", str(folder), "once", "--tokens", "8"]) == 0
    assert capsys.readouterr().out == "once" + "".join(complete(found, "once", max_tokens=8)) + "\n"
    assert main(["complete", "--model", str(folder), "once", "--tokens", "8", "--no-memory"]) == 0
    skipped = "".join(complete(found, "once", max_tokens=8, memory=False))
    assert capsys.readouterr().out == f"once{skipped}\n"
    assert main(["fill-mask", "--model", str(folder), "a[MASK]b [MASK]", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    candidates = fill_mask(found, "a[MASK]b [MASK]", 3)
    assert lines[0::4] == ["[MASK] 1", "[MASK] 2"]
    assert lines[1].split() == [f"{candidates[0][0].probability:.1%}", repr(candidates[0][0].text)]
    assert len(lines) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["chat", "--model", "{decoder}"],
            "{decoder} has no encoder and no memory_attention, which this needs",
        ),
        (["fill-mask", "--model", "{decoder}", "[MASK]"], "{decoder} has no encoder and no mlm_head"),
        (["complete", "--model", "/nowhere", "once"], "/nowhere is not a folder"),
        (["complete", "--model", "{folder}", "once", "--top-p", "2"], "top_p: found 2.0; valid: more than 0"),
        (
            ["complete", "--model", "{folder}", "once", "--tokens", "-1"],
            "max_tokens: found -1; valid: 1 or more",
        ),
        (["complete", "--model", "{folder}", "once", "--device", "abacus"], "--device: found 'abacus'"),
        (["chat", "--model", "{folder}", "--memory", "{folder}"], "memory file {folder}: "),
        (
            ["chat", "--model", "{folder}", "--memory", "/nowhere/m"],
            "memory file /nowhere/m cannot be written",
        ),
        (["chat", "--model", "{folder}", "--seed", "-4"], "seed: found -4; valid: 0 to 2^63 - 1"),
        (["fill-mask", "--model", "{folder}", "nothing hidden"], "the text has no [MASK]"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    places = {"folder": folder, "decoder": tmp_path / "decoder"}
    if "{decoder}" in arguments:
        found = load_pretrained(folder)
        save_pretrained(places["decoder"], found.model, tokenizer=found.tokenizer, components=("decoder",))
    assert main([argument.format(**places) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(**places)}"), error
    assert error.count("\n") == 1


def test_a_decoder_alone_can_complete(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = load_pretrained(folder)
    save_pretrained(tmp_path / "d", found.model, tokenizer=found.tokenizer, components=("decoder",))
    assert main(["complete", "--model", str(tmp_path / "d"), "once", "--precision", "bf16"]) == 0
    assert len(capsys.readouterr().out) > len("once\n") + FIRST_WORD // 11
