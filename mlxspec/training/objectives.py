"""Objectives of a training step: the loss on the next token, or the divergence from the target's distribution."""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlxspec.models.drafter import Drafter
from mlxspec.models.vocabulary import places
from mlxspec.training.chunked_loss import Positions, weighted_loss
from mlxspec.training.documents import document_masks
from mlxspec.training.losses import Loss
from mlxspec.training.teachers import Teacher


class Batch(NamedTuple):
    """The rows of a step on the device: B rows of L positions."""

    ids: mx.array  # [B, L + 1]
    documents: mx.array  # [B, L] number of the document at each position
    weights: mx.array  # [B, L] weights of the loss on ids[:, 1:]; they sum to 1 over the whole step
    teacher: tuple[mx.array, ...]  # [B, L, ...] what a cached teacher has stored for these rows, else ()
    temperature: mx.array  # []
    key: mx.array  # random key


# (drafter, batch) -> Σ weights · loss, Σ weights · acceptance rate
Objective = Callable[[Drafter, Batch], tuple[mx.array, mx.array]]


def objective(loss: Loss, teacher: Teacher | None = None, recompute: bool = False) -> Objective:
    """Return the function that a step minimizes.

    Args:
        loss: The loss at each position.
        teacher: Source of the target's probabilities. None to learn the next token of the text.
        recompute: Whether to compute each layer's activations again in the backward pass instead of keeping them.

    Returns:
        A function of the drafter and a batch. It returns the weighted sums of the loss and of the acceptance rate.
    """

    def weighted(drafter: Drafter, batch: Batch) -> tuple[mx.array, mx.array]:
        inputs, tokens, weights = batch.ids[:, :-1], batch.ids[:, 1:].flatten(), batch.weights.flatten()
        columns = drafter.output_tokens
        if columns is not None and not loss.needs_target:
            tokens, known = places(tokens, columns, drafter.config.vocab_size)
            weights = mx.where(known, weights, 0)
        masks = document_masks([None] * len(drafter.layers), batch.documents)
        hidden = drafter.model(inputs, masks, recompute)
        states = teacher.states(inputs, batch.documents, batch.teacher) if teacher else ()
        positions = Positions(
            tokens,
            weights,
            tuple(mx.stop_gradient(state).flatten(0, 1) for state in states),
            batch.temperature if teacher else mx.array(1.0),
            batch.key,
        )
        return weighted_loss(
            loss,
            hidden.flatten(0, 1),
            head_weights(drafter),
            positions,
            teacher.probs(batch.temperature, columns) if teacher else None,
        )

    return weighted


def head_weights(drafter: Drafter) -> mx.array:
    """Return the weights of the drafter's head [V, H]."""
    return drafter.model.embed_tokens.weight if drafter.config.tie_word_embeddings else drafter.lm_head.weight
