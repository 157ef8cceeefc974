"""How DeepSpeed learns that a module has experts; imports DeepSpeed, so import it late."""

from __future__ import annotations

from deepspeed.moe.layer import MoE
from torch import nn


class ExpertMark(MoE):  # type: ignore[misc]
    """A module without parameters that makes the engine hand the expert groups to ZeRO.

    The engine looks for instances of its own mixture of experts. Nothing of that is used here: routing,
    exchange and experts are ours, and the groups exist already.
    """

    def __init__(self, num_experts: int, expert_size: int) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size = num_experts, expert_size

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        pass
