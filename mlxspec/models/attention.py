"""What kind of attention a model has, seen from the caches that mlx-lm would give it."""

import mlx.nn as nn
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlxspec.errors import UnsupportedModelError


def attention_windows(model: nn.Module) -> list[int | None]:
    """A cache a layer: None for attention over all positions, else the size of the sliding window in tokens.

    Raises UnsupportedModelError for a model whose state cannot be rewound to an earlier token, which is what a
    rejected draft needs: state-space, linear-attention, chunked and compressed caches.
    """
    windows = []
    for cache in make_prompt_cache(model):
        if type(cache) is KVCache:
            windows.append(None)
        elif type(cache) is RotatingKVCache and cache.keep == 0:
            windows.append(cache.max_size)
        else:
            raise UnsupportedModelError(
                f"{model_type(model)} keeps its past in a {type(cache).__name__}, which cannot be rewound to an "
                "earlier token; speculative decoding needs plain, grouped-query or sliding-window attention"
            )
    return windows


def context_length(model: nn.Module) -> int | None:
    """The positions that the model was made for, by its config; None where the config does not say."""
    return getattr(getattr(model, "args", None), "max_position_embeddings", None)


def model_type(model: nn.Module) -> str:
    return getattr(model, "model_type", None) or type(model).__name__
