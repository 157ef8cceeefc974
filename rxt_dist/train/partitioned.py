"""Weights that ZeRO 3 cuts over the ranks: cutting them, whole copies, and what a graph keeps of them.

DeepSpeed gathers the parameters of a module before its forward and its backward pass and drops them after it;
those of a layer, of the memory write and of a head with all their parts. So a parameter may be read in the
forward pass of the module only with which it is gathered.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rxt_dist.model.heads import MLMHead
from rxt_dist.model.layer import Layer
from rxt_dist.model.memory_attention import MemoryAttention


def cut_weights(module: nn.Module, settings: Mapping[str, Any], device: torch.device) -> None:
    """Leave on every rank its part of each parameter of ``module``, on ``device``. Collective.

    One parameter at a time is whole on the device, so the module may be larger than its memory.
    """
    import deepspeed
    from deepspeed.runtime.zero import utils

    # It warns of results that are no tensors; those modules of ours have no parameters of their own.
    utils.warned = True
    dtype = torch.bfloat16 if settings.get("bf16", {}).get("enabled") else torch.float32
    for parameter in module.parameters():  # buffers keep theirs, as with the other stages
        parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(module=module, config_dict_or_path=dict(settings))
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def gather_at_once(module: nn.Module) -> None:
    """Have DeepSpeed gather what is compiled as a whole before it runs, instead of part by part: call before
    the engine is made, and :func:`reduce_each_gradient` after it.

    Its hooks on every part cost the host more than the parts, and a compiled layer could not stop for them.
    """
    import deepspeed

    whole = [Layer, MemoryAttention, MLMHead]
    deepspeed.utils.set_z3_leaf_modules(module, whole, raise_if_not_found=False)


def reduce_each_gradient(optimizer: Any) -> None:
    """Have DeepSpeed's ``optimizer`` sum gradients as they become ready.

    It would sum those of a module that is gathered at once behind each of its backward passes, of which a
    window of interactions has many.
    """
    for hook in (*optimizer._leaf_module_hooks, *optimizer._grad_acc_hooks):
        hook.remove()
    optimizer._leaf_module_hooks.clear()
    optimizer._grad_acc_hooks.clear()
    for group in optimizer.fp16_groups:
        for parameter in group:
            if hasattr(parameter, "ds_z3_leaf_module"):
                del parameter.ds_z3_leaf_module
    optimizer.create_reduce_and_remove_grad_hooks()


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Give ``target``, a module of the same structure without values, the whole weights of ``source``, a
    module whose weights are cut. Collective."""
    import deepspeed

    for name, parameter in source.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            _owner(target, name)._parameters[_leaf(name)] = nn.Parameter(parameter.data.clone(), False)
    for name, buffer in source.named_buffers():
        _owner(target, name)._buffers[_leaf(name)] = buffer.clone()


def drop_weights(module: nn.Module) -> None:
    """Let go of weights and optimizer of an engine that has ended: DeepSpeed keeps ``module`` in global
    variables and caches, and ``module`` would keep them."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK.clear()
    for parameter in module.parameters():
        parameter.ds_tensor.data = parameter.data = parameter.data.new_empty(0)  # type: ignore[attr-defined]
        del parameter._z3_optimizer  # type: ignore[attr-defined]


def weights_not_kept() -> saved_tensors_hooks:
    """Inside, a graph does not keep gathered weights alive until its backward pass, which gathers them again.

    What operators save of a weight is often a view of it, as its transpose, which would hold its memory.
    """
    return saved_tensors_hooks(_pack, _unpack)


Saved = torch.Tensor | tuple[nn.Parameter, torch.Size, tuple[int, ...], int]


def _pack(values: torch.Tensor) -> Saved:
    base = values._base
    if base is None or not hasattr(base, "ds_id"):
        return values
    offset = values.storage_offset() - base.storage_offset()
    return base, values.size(), values.stride(), int(offset)  # type: ignore[return-value]


def _unpack(saved: Saved) -> torch.Tensor:
    if isinstance(saved, torch.Tensor):
        return saved
    parameter, size, stride, offset = saved
    whole = parameter.detach()
    return whole.as_strided(size, stride, whole.storage_offset() + offset)


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
