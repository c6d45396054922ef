"""A drafter that starts from its target's own weights.

Some of the target's layers are copied, with its embedding, its last normalization and its head. Such a drafter needs
far less training than one with random weights.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxspec.errors import InvalidRequestError
from mlxspec.models.attention import model_type
from mlxspec.models.drafter import EMBEDDING, Drafter, DrafterConfig


def drafter_from_target(
    target: nn.Module,
    config: dict[str, Any],
    layers: Sequence[int],
    tokens: np.ndarray | None = None,
    share_embedding: bool = False,
) -> Drafter:
    """Return a drafter with some of the target's layers.

    Args:
        target: A Llama model with float weights.
        config: The content of its config.json.
        layers: Numbers of the layers to copy, counted from 0. Negative numbers count from the last layer.
        tokens: Token ids [K] of a smaller output vocabulary, in increasing order. None for all tokens.
        share_embedding: Whether the drafter uses the target's input embedding instead of a copy.

    Returns:
        The drafter, in the precision of the target.

    Raises:
        InvalidRequestError: The target is not a Llama, or has no such layer.
    """
    if model_type(target) != "llama":
        raise InvalidRequestError(
            f"the target is a {model_type(target)} model; only layers of Llama models can be copied"
        )
    count = len(target.layers)
    if not layers or not all(-count <= layer < count for layer in layers):
        raise InvalidRequestError(f"layers are {list(layers)}; use numbers from {-count} to {count - 1}")
    shape = {
        **config,
        "num_hidden_layers": len(layers),
        "tie_word_embeddings": False,
        "draft_vocab_size": None if tokens is None else len(tokens),
        "shared_embedding": share_embedding,
    }
    drafter = Drafter(DrafterConfig.from_dict(shape))
    weights = dict(tree_flatten(target.parameters()))
    copied = {"model.norm.weight": weights["model.norm.weight"]}
    head = weights.get("lm_head.weight", weights[EMBEDDING])
    for number, layer in enumerate(layers):
        prefix = f"model.layers.{layer % count}."
        for name, weight in weights.items():
            if name.startswith(prefix):
                copied[f"model.layers.{number}.{name.removeprefix(prefix)}"] = weight
    if tokens is not None:
        copied["d2t"] = mx.array((tokens - np.arange(len(tokens))).astype(np.int32))
        head = head[mx.array(tokens)]
    copied["lm_head.weight"] = head
    copied[EMBEDDING] = weights[EMBEDDING]
    # Objects of their own over the same memory. mx.compile fails if two models hold the same object.
    drafter.load_weights([(name, mx.array(weight)) for name, weight in copied.items()])
    mx.eval(drafter.parameters())
    return drafter
