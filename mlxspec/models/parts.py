"""The parts of a target: its input embedding, its body and its output head. And the hidden states inside its body."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn


class Parts(NamedTuple):
    """The parts of a model of mlx-lm: logits = head(body(tokens))."""

    embedding: nn.Module  # token ids [B, L] -> [B, L, D], before any scaling that the body does
    body: Any  # token ids [B, L] -> the last hidden states [B, L, D], normalized
    head: Any  # hidden states [B, L, D] -> logits [B, L, V]


def parts_of(model: nn.Module) -> Parts | None:
    """Return the parts of a model, or None if its logits are not those of its output head on its body.

    A trial on a few tokens decides. It fails for models that scale or cap their logits.
    """
    body: Any = getattr(model, "model", None)
    embedding = getattr(body, "embed_tokens", None)
    head = getattr(model, "lm_head", None) or getattr(embedding, "as_linear", None)
    if embedding is None or head is None:
        return None
    tokens = mx.array([[0, 1, 1, 0]])
    try:
        same = mx.allclose(head(body(tokens)), model(tokens), rtol=1e-3, atol=1e-3, equal_nan=True).item()
    except (TypeError, ValueError, AttributeError):  # the body takes other arguments
        return None
    return Parts(embedding, body, head) if same else None


class Recorder:
    """Wraps a module during one pass, and records its input or its output.

    Args:
        module: The module. The model may ask for its attributes.
        output: Whether to keep what the module returns.
    """

    def __init__(self, module: nn.Module, output: bool):
        self.module, self.output = module, output
        self.seen: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __call__(self, x: mx.array, *args: Any, **options: Any) -> Any:
        """Run the module."""
        result = self.module(x, *args, **options)
        self.seen = result if self.output else x
        return result


def run_with_states(model: Any, layers: Sequence[int], run: Callable[[], mx.array]) -> tuple[mx.array, mx.array]:
    """Run a model, or its body, and return the result and the hidden states [B, L, F] of this pass.

    Args:
        model: A model with the parts that ``parts_of`` finds.
        layers: Numbers of the layers whose inputs are returned, next to each other: F = D · number of layers. Without
            layers, the last hidden states are returned, F = D.
        run: Runs the model. With layers, it may run the body alone.
    """
    body = model.model
    if not layers:
        recorder = Recorder(body, output=True)
        try:
            model["model"] = recorder  # a module is a dictionary of its parts
            return run(), recorder.seen
        finally:
            model["model"] = body
    originals = list(body.layers)
    try:
        body.layers[:] = [Recorder(layer, False) if n in layers else layer for n, layer in enumerate(originals)]
        result = run()
        return result, mx.concatenate([body.layers[number].seen for number in layers], axis=-1)
    finally:
        body.layers[:] = originals
