"""What a new run may start from: the weights of another run, of a checkpoint, or of a native model folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rxt_dist.checkpoint import CheckpointReader, locate_checkpoint
from rxt_dist.config import ModelConfig, load_config
from rxt_dist.data.tokens import TOKENIZER_FILE, load_tokenizer, tokenizer_sha256
from rxt_dist.errors import ConfigError
from rxt_dist.interchange.files import CONFIG_FILE as MODEL_FILE
from rxt_dist.interchange.native import COMPONENTS, NativeReader, is_native
from rxt_dist.model import RxTModel
from rxt_dist.train.run_dir import CONFIG_FILE

logger = logging.getLogger(__name__)

# Fields of all components that change what their weights compute; sizes show in the weights' shapes.
_SHARED = ("norm", "rope_base", "rope_layout", "rope_angle_dtype")
# Fields of a component that matter before or while it is trained, not to weights that exist.
_TRAINING_ONLY = {
    "expert_init",
    "aux_loss",
    "aux_loss_scale",
    "z_loss_weight",
    "bias_update_rate",
    "init",
    "bias_init",
    "norm_gate_init",
}


def open_weights(path: Path, *, verified: bool = False) -> CheckpointReader | NativeReader:
    """Weights to start from; ``path`` is a native folder, a run or a checkpoint.

    Raises :class:`CheckpointError` when it is none, or damaged. ``verified`` as in CheckpointReader.
    """
    if (path / MODEL_FILE).is_file() and is_native(path):
        return NativeReader(path)
    return CheckpointReader(locate_checkpoint(path), verified=verified)


def check_weights(path: Path, config: ModelConfig, tokenizer: Path) -> Path:
    """Check that a run of ``config`` can start from the weights in ``path``.

    A setting that changes what the weights compute may differ, with a warning: it may be what the new run
    is about. ``tokenizer`` is the folder of the run's tokenizer.

    Returns:
        The native or checkpoint folder that the weights are in.

    Raises:
        CheckpointError: there is none, it is damaged, or a tensor has another shape than in ``config``.
        ConfigError: its tokenizer gives other numbers to the tokens than the run's, or it has selection
            biases and ``config`` none.
    """
    reader = open_weights(path)
    if isinstance(reader, NativeReader):
        theirs, components = reader.config, reader.components
    else:
        theirs = load_config(reader.path / CONFIG_FILE, require_data=False).model
        components = frozenset(COMPONENTS)
    if "decoder" in components and _selects_by_bias(theirs) and not _selects_by_bias(config):
        raise ConfigError(
            f"model.decoder.moe.bias_update_rate: {reader.path} chooses experts with selection biases, found "
            "null; valid: 0 to keep them, or a rate above 0 to go on moving them"
        )
    with torch.device("meta"):
        reader.check_shapes(RxTModel(config))
    _check_tokenizer(reader.path, tokenizer)
    for field, before, now in _differences(
        _mathematics(theirs, components), _mathematics(config, components)
    ):
        logger.warning("model.%s: %s was made with %r, this run has %r", field, reader.path, before, now)
    return reader.path


def _check_tokenizer(weights: Path, tokenizer: Path) -> None:
    if not (weights / TOKENIZER_FILE).is_file():
        logger.warning(
            "%s has no %s: it is not known whether the tokens are the same", weights, TOKENIZER_FILE
        )
        return
    if tokenizer_sha256(weights) == tokenizer_sha256(tokenizer):
        return
    if load_tokenizer(weights).get_vocab() != load_tokenizer(tokenizer).get_vocab():
        raise ConfigError(
            f"--init-from: the weights in {weights} were made with another tokenizer than the datasets; "
            "shard the data again with the tokenizer of that folder"
        )


def _selects_by_bias(config: ModelConfig) -> bool:
    moe = config.decoder.moe
    return moe is not None and moe.bias_update_rate is not None


def _mathematics(config: ModelConfig, components: frozenset[str]) -> dict[str, Any]:
    """The settings that decide what the weights of ``components`` compute."""
    values = config.model_dump(mode="json")
    return {name: values[name] for name in (*_SHARED, *sorted(components)) if name in values}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(field, value before, value now) of what both set, to different values."""
    for name in before.keys() & now.keys() - _TRAINING_ONLY:
        old, new = before[name], now[name]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for field, *pair in _differences(old, new):
                yield f"{name}.{field}", *pair
        elif old != new and old is not None and new is not None:
            yield name, old, new
