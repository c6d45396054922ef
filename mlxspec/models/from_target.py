"""A drafter that starts from the weights of a larger model, usually its target.

Some of the model's layers are copied, with its embedding, its last normalization and its head. Such a drafter needs
far less training than one with random weights.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.llama import ModelArgs

from mlxspec.errors import InvalidRequestError, ModelLoadError
from mlxspec.models.attention import model_type
from mlxspec.models.drafter import EMBEDDING, Drafter, DrafterConfig
from mlxspec.models.eagle import EAGLE3, Eagle
from mlxspec.models.width import Width, narrow


def drafter_from_target(
    model: nn.Module,
    config: dict[str, Any],
    layers: Sequence[int],
    tokens: np.ndarray | None = None,
    share_embedding: bool = False,
    width: Width | None = None,
) -> Drafter:
    """Return a drafter with some of a model's layers.

    Args:
        model: A Llama model with float weights, usually the target.
        config: The content of its config.json.
        layers: Numbers of the layers to copy, counted from 0. Negative numbers count from the last layer.
        tokens: Token ids [K] of a smaller output vocabulary, in increasing order. None for that of the model.
        share_embedding: Whether the drafter uses the target's input embedding instead of a copy.
        width: The channels, heads and neurons to keep. None for all.

    Returns:
        The drafter, in the precision of the model. Its weights are lazy.

    Raises:
        InvalidRequestError: The model is not a Llama or has no such layer, or two of the arguments exclude each other.
    """
    check_layers(model, layers)
    weights = dict(tree_flatten(model.parameters()))
    if tokens is not None and "d2t" in weights:
        raise InvalidRequestError("the model to copy from has a smaller vocabulary already; leave out vocabulary_size")
    try:
        drafter = Drafter(DrafterConfig.from_dict(shape(model, config, layers, tokens, share_embedding, width)))
    except ModelLoadError as error:  # for example rope_scaling
        reason = str(error).split(";")[0]
        raise InvalidRequestError(f"its layers cannot be copied: {reason}; use a drafter with random weights") from None
    head = weights.get("lm_head.weight", weights[EMBEDDING])
    if tokens is not None:
        head = head[mx.array(tokens)]
        weights["d2t"] = mx.array((tokens - np.arange(len(tokens))).astype(np.int32))
    outer = {"model.norm.weight": weights["model.norm.weight"], "lm_head.weight": head, EMBEDDING: weights[EMBEDDING]}
    if width is not None:
        outer = {name: weight[..., mx.array(width.channels)] for name, weight in outer.items()}
    copied = {**outer, **({"d2t": weights["d2t"]} if "d2t" in weights else {})}
    for number, layer in enumerate(layers):
        prefix = f"model.layers.{layer % len(model.layers)}."
        for name, weight in weights.items():
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                if width is not None:
                    weight = narrow(name, weight, width, number, key_value_heads(config))
                copied[f"model.layers.{number}.{name}"] = weight
    # Objects of their own over the same memory. mx.compile fails if two models hold the same object.
    drafter.load_weights([(name, mx.stop_gradient(weight)) for name, weight in copied.items()])
    return drafter


def eagle_from_target(
    model: Any, layer: int = -1, read_layers: Sequence[int] | None = None, tokens: np.ndarray | None = None
) -> Eagle:
    """Return an EAGLE-3 head with the weights of one of the target's layers.

    At the start, the attention reads the sum of the embedding and the last of the states that the head reads.

    Args:
        model: The target, a Llama model with float weights.
        layer: Number of the layer to copy, counted from 0, or from the last layer if negative.
        read_layers: Numbers of the layers whose inputs the head reads. None for layers 2, L/2 and L − 3 of L.
        tokens: Token ids [K] of a smaller output vocabulary, in increasing order. None for that of the target.

    Returns:
        The head, in the precision of the target. Its weights are lazy.

    Raises:
        InvalidRequestError: The target is not a Llama or has no such layer.
    """
    check_layers(model, [layer])
    shape = {"num_hidden_layers": 1, "layer_types": None, "tie_word_embeddings": False}
    args = ModelArgs.from_dict({**vars(model.args), **shape})
    head = Eagle(args, EAGLE3, read_layers or None, None if tokens is None else len(tokens))
    copied = dict(tree_flatten(model.layers[layer].parameters()))
    norm = copied.pop("input_layernorm.weight")
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = copied[f"self_attn.{name}.weight"] / 2**0.5  # the sum of two normalized vectors is so much longer
        copied[f"self_attn.{name}.weight"] = mx.concatenate([weight, weight], axis=1)
    states = head.fc.weight.shape[1] // args.hidden_size
    nothing, same = mx.zeros((args.hidden_size, (states - 1) * args.hidden_size)), mx.eye(args.hidden_size)
    output = model.model.embed_tokens.weight if model.args.tie_word_embeddings else model.lm_head.weight
    weights = {
        **{f"midlayer.{name}": weight for name, weight in copied.items()},
        "midlayer.input_layernorm.weight": norm,
        "midlayer.hidden_norm.weight": norm,
        "norm.weight": model.model.norm.weight,
        "fc.weight": mx.concatenate([nothing, same], axis=1),
        "lm_head.weight": output if tokens is None else output[mx.array(tokens)],
    }
    if tokens is not None:
        weights["d2t"] = mx.array((tokens - np.arange(len(tokens))).astype(np.int32))
    # Objects of their own over the same memory. mx.compile fails if two models hold the same object.
    head.load_weights([(name, mx.stop_gradient(weight)) for name, weight in weights.items()])
    return head


def check_layers(model: Any, layers: Sequence[int]) -> None:
    """Check that layers can be copied. Raises InvalidRequestError if the model is not a Llama or has no such layer."""
    if model_type(model) != "llama" and not isinstance(model, Drafter):
        raise InvalidRequestError(f"this is a {model_type(model)} model; only layers of Llama models can be copied")
    count = len(model.layers)
    if not layers or not all(-count <= layer < count for layer in layers):
        raise InvalidRequestError(f"layers are {list(layers)}; use numbers from {-count} to {count - 1}")


def shape(
    model: Any,
    config: dict[str, Any],
    layers: Sequence[int],
    tokens: np.ndarray | None,
    share_embedding: bool,
    width: Width | None,
) -> dict[str, Any]:
    """Return the config of the drafter that ``drafter_from_target`` makes."""
    own = {
        **config,
        "num_hidden_layers": len(layers),
        "tie_word_embeddings": False,
        "draft_vocab_size": config.get("draft_vocab_size") if tokens is None else len(tokens),
        "shared_embedding": share_embedding,
    }
    if width is None:
        return own
    heads = config["num_attention_heads"] // key_value_heads(config) * len(width.groups[0])
    return {
        **own,
        "hidden_size": len(width.channels),
        "intermediate_size": len(width.neurons[0]),
        "num_attention_heads": heads,
        "num_key_value_heads": len(width.groups[0]),
    }


def key_value_heads(config: dict[str, Any]) -> int:
    """Return the number of key-value heads that a config.json states."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])
