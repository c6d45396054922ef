"""Objectives of a training step: the loss on the next token, or the divergence from the target's distribution."""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

from mlxspec.models.drafter import Drafter
from mlxspec.models.eagle import Eagle
from mlxspec.models.vocabulary import places
from mlxspec.training.chunked_loss import Positions, weighted_loss
from mlxspec.training.documents import document_masks
from mlxspec.training.losses import Loss
from mlxspec.training.teachers import Teacher

AnyDrafter = Drafter | Eagle
DRAFT_STEPS = 3  # on which an EAGLE head is trained
STEP_DECAY = 0.8  # weight of a draft step relative to the one before


class Batch(NamedTuple):
    """The rows of a step on the device: B rows of L positions."""

    ids: mx.array  # [B, L + 1]
    documents: mx.array  # [B, L] number of the document at each position
    weights: mx.array  # [B, L] weights of the loss on ids[:, 1:]; they sum to 1 over the whole step
    teacher: tuple[mx.array, ...]  # [B, L, ...] what a cached teacher has stored for these rows, else ()
    temperature: mx.array  # []
    key: mx.array  # random key


# (drafter, batch) -> Σ weights · loss, and the values at each position, [1 + rates, B, L]: the loss and the acceptance
# rate. For an EAGLE head, there is one rate for each draft step.
Objective = Callable[[Any, Batch], tuple[mx.array, mx.array]]


def objective(loss: Loss, teacher: Teacher | None = None, recompute: bool = False) -> Objective:
    """Return the function that a step minimizes.

    Args:
        loss: The loss at each position.
        teacher: Source of the target's probabilities. None to learn the next token of the text.
        recompute: Whether to compute each layer's activations again in the backward pass instead of keeping them.

    Returns:
        A function of the drafter and a batch. It returns the weighted sum of the loss. It also returns the loss and the
        acceptance rate at each position, [2, B, L].
    """

    def weighted(drafter: Drafter, batch: Batch) -> tuple[mx.array, mx.array]:
        inputs, columns = batch.ids[:, :-1], drafter.output_tokens
        tokens, known = learnable(loss, batch.ids[:, 1:].flatten(), columns, drafter.config.vocab_size)
        weights = batch.weights.flatten()
        if known is not None:
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
        total, values = weighted_loss(
            loss,
            hidden.flatten(0, 1),
            head_weights(drafter),
            positions,
            teacher.probs(batch.temperature, columns) if teacher else None,
        )
        if known is not None:
            values = mx.where(known, values, 0)
        return total, values.reshape(2, *inputs.shape)

    return weighted


def learnable(
    loss: Loss, tokens: mx.array, columns: mx.array | None, vocab_size: int
) -> tuple[mx.array, mx.array | None]:
    """Return the column of each token in the drafter's head [N], and whether there is one [N]. None if all have one.

    Args:
        loss: The loss. Only ce needs the columns.
        tokens: Token ids [N].
        columns: The tokens of the drafter's smaller vocabulary. None for all tokens.
        vocab_size: Size of the full vocabulary.
    """
    if columns is None or loss.needs_target:
        return tokens, None
    return places(tokens, columns, vocab_size)


def weighted_sums(batch: Batch, values: mx.array) -> mx.array:
    """Return the sums over the positions of a batch, [1 + rates], of the values that an objective returned."""
    return (batch.weights * values).sum((1, 2))


def head_weights(drafter: Drafter) -> mx.array:
    """Return the weights of the drafter's head [V, H]."""
    return drafter.model.embed_tokens.weight if drafter.config.tie_word_embeddings else drafter.lm_head.weight


def objective_for(
    drafter: AnyDrafter, loss: Loss, teacher: Teacher | None, recompute: bool = False, draft_steps: int = DRAFT_STEPS
) -> Objective:
    """Return the function that a step of this drafter minimizes, ``objective`` or ``eagle_objective``."""
    if not isinstance(drafter, Eagle):
        return objective(loss, teacher, recompute)
    assert teacher
    return eagle_objective(loss, teacher, draft_steps)


def layers_read(drafter: AnyDrafter, target: Any) -> tuple[int, ...] | None:
    """Return the numbers of the target's layers whose inputs a head reads, as ``OnlineTeacher`` takes them."""
    return drafter.layers_read(len(target.layers)) if isinstance(drafter, Eagle) else None


def eagle_objective(loss: Loss, teacher: Teacher, draft_steps: int = DRAFT_STEPS) -> Objective:
    """Return the function that a step of an EAGLE-3 head minimizes.

    From every position, the head takes ``draft_steps`` steps along the text. The first step reads the target's hidden
    states, later steps the head's own outputs. The losses of the steps are added. Each step has ``STEP_DECAY`` times
    the weight of the one before. Step j skips the first j predictions of each document, and the other weights stay the
    same. So later steps report a slightly low rate, most of all for short documents.

    Args:
        loss: The loss at each position.
        teacher: Source of the target's probabilities and hidden states.
        draft_steps: Number of draft steps γ.

    Returns:
        A function of the head and a batch. It returns the weighted sum of the loss. It also returns the loss and the
        acceptance rate of each step at each position, [1 + γ, B, L].

    Source: Li et al., arXiv 2503.01840, section 3.2 ("training-time test").
    """

    parts = teacher.parts
    assert parts

    def weighted(head: Eagle, batch: Batch) -> tuple[mx.array, mx.array]:
        # Row t reads token t + 1 and predicts token t + 2. So the last row predicts nothing.
        inputs, following, documents = batch.ids[:, :-1], batch.ids[:, 1:], batch.documents
        *shown, states = (mx.stop_gradient(part) for part in teacher.states(inputs, documents, batch.teacher))
        embedded = mx.stop_gradient(parts.embedding(following))
        features, cache = head.features(states), DraftRows(documents)
        targets = tuple(part[:, 1:].flatten(0, 1) for part in shown)
        tokens, known = learnable(loss, following[:, 1:].flatten(), head.output_tokens, head.args.vocab_size)
        total, losses, rates = mx.array(0.0), mx.array(0.0), []
        for share, key in zip(step_shares(draft_steps), mx.random.split(batch.key, draft_steps), strict=True):
            features = head(embedded, features, cache, cache.mask())
            valid = cache.valid() if known is None else cache.valid() & known.reshape(cache.valid().shape)
            counted = mx.where(valid, batch.weights[:, 1:], 0)
            positions = Positions(tokens, counted.flatten(), targets, batch.temperature, key)
            value, values = weighted_loss(
                loss,
                head.outputs(features)[:, :-1].flatten(0, 1),
                head.lm_head.weight,
                positions,
                teacher.probs(batch.temperature, head.output_tokens),
            )
            total = total + share * value
            values = mx.where(valid, values.reshape(2, *valid.shape), 0)
            losses = losses + share * values[0]
            rates.append(values[1])
            features = mx.concatenate([features[:, :1], features[:, :-1]], axis=1)  # row t + 1 reads row t's output
        return total, mx.pad(mx.stack([losses, *rates]), [(0, 0), (0, 0), (1, 0)])

    return weighted


class DraftRows:
    """The keys and values of the draft steps of all rows, in the place of a KV cache.

    In step j, counted from 0, row t attends to rows 0 to t − j of step 0, which read the target's hidden states, and to
    row t − j + i of step i, for i = 1 to j. These are the rows that are in the cache when the head drafts its token
    j + 1.

    Args:
        documents: Number of the document at each position [B, L].
    """

    offset = 0  # row t keeps its position in every step

    def __init__(self, documents: mx.array):
        self.documents = documents
        self.keys: list[mx.array] = []
        self.values: list[mx.array] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Add the keys and values of a step, and return those of all steps so far, [B, H, steps · L, D]."""
        self.keys.append(keys)
        self.values.append(values)
        return mx.concatenate(self.keys, axis=2), mx.concatenate(self.values, axis=2)

    def mask(self) -> mx.array:
        """Return the mask of the next step, bool [B, 1, L, steps · L]."""
        place, step = mx.arange(self.documents.shape[1]), len(self.keys)
        same = self.documents[:, :, None] == self.documents[:, None, :]
        distance = place[:, None] - place  # [L, L] from a row back to a column
        masks = [distance >= step, *(distance == step - i for i in range(1, step + 1))]
        return mx.concatenate([same & mask for mask in masks], axis=-1)[:, None]

    def valid(self) -> mx.array:
        """Return which rows of the last step predict a token of the document that their draft began in: [B, L − 1]."""
        step = len(self.keys) - 1
        first = self.documents[:, : self.documents.shape[1] - 1 - step]
        same = self.documents[:, step + 1 :] == first
        return mx.concatenate([mx.zeros((len(first), step), mx.bool_), same], axis=1)


def step_shares(draft_steps: int) -> list[float]:
    """Return the weight of each draft step. They sum to 1."""
    weights = [STEP_DECAY**step for step in range(draft_steps)]
    return [weight / sum(weights) for weight in weights]
