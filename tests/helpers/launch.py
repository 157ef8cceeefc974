"""Start the training program on several ranks, the way launchers start it.

:func:`start_ranks` forks the ranks from a server process that has torch and DeepSpeed loaded already, so
that a run costs its own seconds only; each rank runs ``launch/train.py`` as ``__main__`` with the variables
that torchrun and srun set. :func:`python` runs any other program in this way. :func:`deepspeed` and
:func:`shell` start a program from the shell, as a user does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Self

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PROGRAM = REPOSITORY / "launch" / "train.py"
TIMEOUT_SECONDS = 180.0
_GRACE_SECONDS = 20.0  # for the other ranks when one has failed, as launchers end them too
_SHOWN_CHARACTERS = 6000
_PRELOADED = [
    "torch",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "deepspeed.runtime.zero.muon.original_muon",
    "hypothesis.strategies",
    "pytest",
    "safetensors.torch",
    "rxt_dist.cli",
    "rxt_dist.interchange.pretrained",
    "rxt_dist.train.run",
    "rxt_dist.train.trainer",
    "helpers.preload",
    "rxt_dist.parallel.megatron",
]

_server = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Result:
    """How a run ended: the exit code of every process (negative: the signal), and all they printed."""

    codes: list[int]
    output: str

    def check(self) -> Self:
        """Fail the test unless every process ended well."""
        assert set(self.codes) == {0}, f"exit codes {self.codes}\n{self.output[-_SHOWN_CHARACTERS:]}"
        return self


class Ranks:
    """A started run; as a context manager it leaves no process behind."""

    def __init__(self, processes: list[ForkServerProcess], log: Path) -> None:
        self._processes = processes
        self._log = log

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def kill(self) -> None:
        """End every rank at once and without warning, as a power failure does."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> Result:
        """Wait for the end. Ranks that hang, or go on long after another has failed, are killed."""
        deadline = time.monotonic() + timeout
        failed = False
        while self.alive() and time.monotonic() < deadline:
            if not failed and any(process.exitcode for process in self._processes):
                failed = True
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            time.sleep(0.02)
        self.kill()
        return Result([int(process.exitcode or 0) for process in self._processes], self.output)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(*, gpus: bool = False) -> dict[str, str]:
    """Variables of a run, started from the repository by the interpreter of the tests; on the CPU unless
    ``gpus``."""
    distributed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = {name: value for name, value in os.environ.items() if name not in distributed}
    values["OMP_NUM_THREADS"] = "1"
    if gpus:
        values.pop("DS_ACCELERATOR", None)
    else:
        values |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    values["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{values.get('PATH', '')}"
    return values


def start_ranks(
    count: int, arguments: list[str], folder: Path, *, launcher: bool = True, program: Path = PROGRAM
) -> Ranks:
    """Start ``count`` ranks of ``program`` in the working folder ``folder``; see the module's description.

    Without ``launcher`` the variables of a launcher are not set: a single process is a world of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"log-{time.monotonic_ns()}.txt"
    log.touch()
    shared = environment()
    if launcher:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared |= address | {"WORLD_SIZE": str(count)}
    processes = []
    for rank in range(count):
        variables = shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if launcher else {})
        processes.append(_fork(_run_program, (program, arguments, variables, folder, log)))
    return Ranks(processes, log)


def _fork(function: Callable[..., None], arguments: tuple[object, ...]) -> ForkServerProcess:
    """Start a process from the server; the first call starts the server too."""
    own = dict(os.environ)
    _server.set_forkserver_preload(_PRELOADED)
    process = _server.Process(target=function, args=arguments)
    folders = (str(REPOSITORY), str(REPOSITORY / "tests"), own.get("PYTHONPATH", ""))
    try:
        os.environ.update(environment() | {"PYTHONPATH": os.pathsep.join(folders)})  # the server inherits it
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(own)
    return process


def run_ranks(
    count: int,
    arguments: list[str],
    folder: Path,
    timeout: float = TIMEOUT_SECONDS,
    *,
    launcher: bool = True,
    program: Path = PROGRAM,
) -> Result:
    """Run ``program`` on ``count`` ranks to its end."""
    with start_ranks(count, arguments, folder, launcher=launcher, program=program) as ranks:
        return ranks.wait(timeout)


def _run_program(
    program: Path, arguments: list[str], variables: Mapping[str, str], folder: Path, log: Path
) -> None:
    """What a forked rank does instead of ``python PROGRAM ARGUMENTS``."""
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    stream = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.argv = [str(program), *arguments]
    runpy.run_path(str(program), run_name="__main__")


def deepspeed(
    count: int,
    arguments: list[str],
    folder: Path,
    timeout: float = TIMEOUT_SECONDS,
    *,
    gpus: bool = False,
) -> Result:
    """Run the program on ``count`` ranks under the deepspeed launcher."""
    launcher = ["deepspeed", "--num_gpus", str(count), "--master_port", str(free_port()), str(PROGRAM)]
    return shell([*launcher, *arguments], folder, timeout, gpus=gpus)


def shell(
    command: list[str], folder: Path, timeout: float = TIMEOUT_SECONDS, *, gpus: bool = False
) -> Result:
    """Run a command to its end; it is killed with its children after ``timeout`` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(gpus=gpus),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return Result([process.returncode], output.decode(errors="replace"))


def python(*arguments: str, timeout: float = TIMEOUT_SECONDS) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS`` (a script or ``-m MODULE``) in the repository, forked from the server.

    The program finds torch loaded already, so it has started at once; its memory is not that of a fresh
    process.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _fork(_run_python, (list(arguments), files))
        process.join(timeout)
        process.kill()
        process.join()
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    return subprocess.CompletedProcess(arguments, int(process.exitcode or 0), *texts)


def _run_python(arguments: list[str], files: list[Path]) -> None:
    for stream, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ.clear()
    os.environ.update(environment())
    os.chdir(REPOSITORY)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.modules.pop(arguments[1], None)
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def run_function(
    count: int,
    function: Callable[..., None],
    *arguments: object,
    timeout: float = TIMEOUT_SECONDS,
) -> list[int]:
    """Call ``function(*arguments)`` on ``count`` ranks of a gloo group; their exit codes."""
    port = free_port()
    processes = [_fork(_run_function, (function, arguments, rank, count, port)) for rank in range(count)]
    for process in processes:
        process.join(timeout)
        process.kill()
        process.join()
    return [int(process.exitcode or 0) for process in processes]


def _run_function(
    function: Callable[..., None], arguments: tuple[object, ...], rank: int, count: int, port: int
) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    function(*arguments)
    dist.destroy_process_group()
