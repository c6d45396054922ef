"""The kind of attention that a model has, derived from the caches that mlx-lm creates for it."""

import re

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlxspec.errors import UnsupportedModelError
from mlxspec.models.config import CONTEXT_NAMES, declared_context

POSITION_TABLE = re.compile(r"wpe|pos")  # in the names of modules


def attention_windows(model: nn.Module) -> list[int | None]:
    """Return for each layer the size of its sliding window in tokens, or None if it attends to all positions.

    Raises:
        UnsupportedModelError: The model's state cannot be rewound to an earlier token, which a rejected draft requires.
            State-space, linear-attention, chunked and compressed caches cannot be rewound.
    """
    windows: list[int | None] = []
    for cache in make_prompt_cache(model):
        if type(cache) is KVCache:
            windows.append(None)
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            windows.append(cache.max_size)
        else:
            raise UnsupportedModelError(
                f"{model_type(model)} keeps its past in a {type(cache).__name__}, which cannot be rewound to an "
                "earlier token; choose a model with plain, grouped-query or sliding-window attention"
            )
    return windows


def context_length(model: nn.Module) -> int | None:
    """Return the maximum number of positions that the model's config declares, or None if it declares none."""
    args = getattr(model, "args", None)
    return declared_context({name: getattr(args, name, None) for name in (*CONTEXT_NAMES, "rope_scaling")})


def position_table(model: nn.Module) -> int | None:
    """Return the number of rows of the model's learned position table, or None if there is no such table.

    Positions beyond the table cannot be read. If there are several tables, the smallest counts.
    """
    tables = [
        module.weight.shape[0]
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) and POSITION_TABLE.search(name.split(".")[-1])
    ]
    return min(tables, default=None)


def model_type(model: nn.Module) -> str:
    """Return mlx-lm's name for the architecture, or the class name if there is none."""
    return getattr(model, "model_type", None) or type(model).__name__
