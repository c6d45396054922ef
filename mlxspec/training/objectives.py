"""What a step minimises: next-token prediction, or distance from a target's distribution."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlxspec.models.drafter import Drafter
from mlxspec.training.cached_teacher import CachedTeacher
from mlxspec.training.chunked import Positions, weighted_loss
from mlxspec.training.losses import Loss
from mlxspec.training.teachers import OnlineTeacher

Teacher = OnlineTeacher | CachedTeacher


class Batch(NamedTuple):
    """Rows of a step, on the device."""

    ids: mx.array  # [B, L + 1]
    weights: mx.array  # [B, L] of the loss on ids[:, 1:]; over the whole step they sum to 1
    teacher: tuple[mx.array, ...]  # [B, L, ...] what a cached teacher has stored for these rows; else ()
    temperature: mx.array  # []
    key: mx.array


# (drafter, batch) -> Σ weights · loss, Σ weights · acceptance rate
Objective = Callable[[Drafter, Batch], tuple[mx.array, mx.array]]


def objective(loss: Loss, teacher: Teacher | None = None, recompute: bool = False) -> Objective:
    """The drafter's ``loss`` against the teacher; without one, against the next token of the text.

    With ``recompute`` the backward pass computes each layer's activations again instead of keeping them.
    """

    def weighted(drafter: Drafter, batch: Batch) -> tuple[mx.array, mx.array]:
        inputs, tokens = batch.ids[:, :-1], batch.ids[:, 1:].flatten()
        hidden = drafter.model(inputs, recompute=recompute)
        states = teacher.states(inputs, batch.teacher) if teacher else ()
        positions = Positions(
            tokens,
            batch.weights.flatten(),
            tuple(mx.stop_gradient(state).flatten(0, 1) for state in states),
            batch.temperature if teacher else mx.array(1.0),
            batch.key,
        )
        return weighted_loss(
            loss,
            hidden.flatten(0, 1),
            head_weights(drafter),
            positions,
            teacher.probs(batch.temperature) if teacher else None,
        )

    return weighted


def head_weights(drafter: Drafter) -> mx.array:
    """[V, H]: what makes logits of the drafter's last hidden states."""
    head: nn.Module = drafter.model.embed_tokens if drafter.config.tie_word_embeddings else drafter.lm_head
    return head.weight
