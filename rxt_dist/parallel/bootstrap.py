"""Start of the process group, and the process-wide switches that must precede it.

Import this module before ``deepspeed``: it selects DeepSpeed's CPU accelerator where there is no CUDA
device and keeps DeepSpeed from compiling C++ helpers, so that a machine without a compiler can train.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import distributed_c10d

from rxt_dist.errors import ConfigError

logger = logging.getLogger(__name__)

# Where launchers say how many ranks a node has: torchrun, DeepSpeed, Slurm.
_RANKS_OF_NODE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")

# Ops that DeepSpeed would build with a C++ compiler on first use; none is needed here.
_JIT_BUILT_OPS = ("deepspeed_shm_comm",)


@dataclass(frozen=True)
class World:
    """This process among all processes of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    tensor_size: int = 1
    """Consecutive ranks that share tensors, and with them their part of the batch."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tensor_size

    @property
    def dp_size(self) -> int:
        return self.size // self.tensor_size

    @property
    def is_first_of_tensor_group(self) -> bool:
        return self.rank % self.tensor_size == 0


def world_from_environment() -> World:
    """Read rank, local rank and world size as set by the deepspeed launcher, torchrun or srun wrappers.

    A process started without a launcher is a world of one. Raises :class:`ConfigError` when a variable
    is not a number.
    """
    values: dict[str, int] = {}
    for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)):
        text = os.environ.get(name, str(default))
        if not text.isdigit():
            raise ConfigError(f"environment variable {name} is {text!r}; expected a whole number")
        values[name] = int(text)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", values["LOCAL_RANK"] % torch.cuda.device_count())
    return World(values["RANK"], values["LOCAL_RANK"], values["WORLD_SIZE"], device)


def configure_deepspeed() -> None:
    """Choose the accelerator and switch off JIT-built ops; call before anything imports deepspeed."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    warnings.filterwarnings("ignore", message=r".*_(all_gather|reduce_scatter)_base.*")
    import deepspeed

    for name in _JIT_BUILT_OPS:
        deepspeed.ops.__compatible_ops__[name] = False


def share_cores() -> None:
    """Give this rank its share of the node's cores for work on the host, unless OMP_NUM_THREADS is set.

    Else every rank starts as many threads as there are cores, and they wait for each other: two ranks on two
    cores draw initial weights 13 times as slowly.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    stated = (os.environ.get(name, "") for name in _RANKS_OF_NODE)
    ranks = next((int(text) for text in stated if text.isdigit()), 1)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // max(1, ranks)))


def start_process_group(world: World, timeout_seconds: int) -> None:
    """Join the process group (NCCL on CUDA, else gloo).

    The timeout is also made torch's default because DeepSpeed creates its own groups without one, and
    those would wait 30 minutes for a dead peer whatever was asked for here.
    """
    share_cores()
    configure_deepspeed()
    import deepspeed

    timeout = timedelta(seconds=timeout_seconds)
    distributed_c10d.default_pg_timeout = timeout
    if hasattr(distributed_c10d, "default_pg_nccl_timeout"):
        distributed_c10d.default_pg_nccl_timeout = timeout
    for name, value in (("RANK", world.rank), ("LOCAL_RANK", world.local_rank), ("WORLD_SIZE", world.size)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if world.size == 1:
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        # Else a message waits for a place on the device until all kernels that started before have theirs.
        os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False, auto_mpi_discovery=False)


def free_port() -> int:
    """A TCP port of this machine that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
