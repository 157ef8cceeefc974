"""What is used of Megatron-core, imported without the warnings about its optional packages.

All of it is handed process groups and makes parameters on the device of the surrounding context, so that it
runs on machines without CUDA as it is.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )
    from megatron.core.utils import get_pg_size

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "get_pg_size",
]
