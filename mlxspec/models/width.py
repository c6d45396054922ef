"""Width pruning: which hidden channels, heads and neurons of a Llama model a narrower copy keeps.

A calibration runs the model on text. The parts whose activations have the largest mean square are kept.

Source: Muralidharan et al. 2024, arXiv 2407.14679, importance estimation from activations.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxspec.errors import InvalidRequestError

RECORDED = (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "gate_proj"), ("mlp", "down_proj"))


class Width(NamedTuple):
    """The parts of a model that its narrower copy keeps, each in increasing order."""

    channels: np.ndarray  # [H'] channels of the hidden states, the same in all layers
    groups: list[np.ndarray]  # per layer [G']: key-value heads, each with its query heads
    neurons: list[np.ndarray]  # per layer [I']: neurons of the MLP


class Recorder(nn.Module):
    """A linear layer that sums the squares of its inputs, [H], over all positions."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.squares = mx.array(0.0)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the layer's output for x [B, L, H]."""
        self.squares = self.squares + x.astype(mx.float32).square().sum((0, 1))
        return self.inner(x)


def choose_width(
    model: Any,
    layers: Sequence[int],
    hidden_size: int | None,
    intermediate_size: int | None,
    documents: Iterable[np.ndarray],
) -> Width:
    """Choose the parts of some layers that a narrower copy keeps.

    Args:
        model: A Llama model of mlx-lm. It is run on the documents and left unchanged.
        layers: Numbers of the layers.
        hidden_size: Number of channels to keep. None for all.
        intermediate_size: Number of neurons to keep in each layer. None for all.
        documents: The token ids of each document. Without documents, the first parts are kept.

    Raises:
        InvalidRequestError: A size is out of range, or hidden_size is not a whole number of head groups.
    """
    args = model.args
    groups = args.num_key_value_heads or args.num_attention_heads
    group_size = args.hidden_size // groups  # channels for each key-value head and its query heads
    channels, neurons = hidden_size or args.hidden_size, intermediate_size or args.intermediate_size
    if not 0 < channels <= args.hidden_size or channels % group_size:
        sizes = ", ".join(str(count * group_size) for count in range(1, groups + 1))
        raise InvalidRequestError(f"hidden_size is {channels}; use one of {sizes}, so that whole heads are kept")
    if not 0 < neurons <= args.intermediate_size:
        raise InvalidRequestError(f"intermediate_size is {neurons}; use 1 to {args.intermediate_size}")
    recorded = record(model, layers, documents)
    return Width(
        largest(sum(layer["q_proj"] + layer["gate_proj"] for layer in recorded), args.hidden_size, channels),
        [largest(layer["o_proj"], groups, channels // group_size) for layer in recorded],
        [largest(layer["down_proj"], args.intermediate_size, neurons) for layer in recorded],
    )


def record(model: Any, layers: Sequence[int], documents: Iterable[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Return the sums of squares of the inputs of each layer's projections, by the projection's name.

    Args:
        model: A Llama model of mlx-lm.
        layers: Numbers of the layers.
        documents: The token ids of each document.
    """
    numbers = dict.fromkeys(layers)
    places = [(getattr(model.layers[number], part), name) for number in numbers for part, name in RECORDED]
    recorders = [Recorder(getattr(part, name)) for part, name in places]
    try:
        for (part, name), recorder in zip(places, recorders, strict=True):
            setattr(part, name, recorder)
        for tokens in documents:
            model(mx.array(tokens)[None])
            mx.eval([recorder.squares for recorder in recorders])
        return [
            {name: np.array(getattr(getattr(model.layers[number], part), name).squares) for part, name in RECORDED}
            for number in layers
        ]
    finally:
        for (part, name), recorder in zip(places, recorders, strict=True):
            setattr(part, name, recorder.inner)


def largest(squares: np.ndarray, parts: int, count: int) -> np.ndarray:
    """Return the numbers of the parts with the largest sums, in increasing order.

    Args:
        squares: Sums of squares [H], or a scalar 0 if nothing was recorded.
        parts: Number of equal parts of H.
        count: Number of parts to return.
    """
    sums = squares.reshape(parts, -1).sum(-1) if squares.ndim else np.zeros(parts)
    return np.sort(np.argsort(-sums, kind="stable")[:count])


def narrow(name: str, weight: mx.array, width: Width, layer: int, group_count: int) -> mx.array:
    """Return the kept part of a layer's weight.

    Args:
        name: Name of the weight within the layer, such as "mlp.up_proj.weight".
        weight: The weight.
        width: What is kept.
        layer: Number of the layer in ``width``.
        group_count: Number of key-value heads before.
    """
    channels, groups, neurons = (mx.array(part) for part in (width.channels, width.groups[layer], width.neurons[layer]))
    if weight.ndim == 1:
        return weight[channels]

    def rows(weight: mx.array) -> mx.array:  # the rows of the kept heads
        return weight.reshape(group_count, -1, weight.shape[-1])[groups].reshape(-1, weight.shape[-1])

    match name.split(".")[-2]:
        case "gate_proj" | "up_proj":
            return weight[neurons][:, channels]
        case "down_proj":
            return weight[channels][:, neurons]
        case "o_proj":
            return rows(weight.T).T[channels]
    return rows(weight)[:, channels]  # q, k and v
