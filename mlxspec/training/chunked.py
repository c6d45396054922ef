"""A loss and its gradient straight from hidden states and the head's weights, a chunk of positions at a time.

The logits of a batch, [positions, vocabulary], are what bounds the batch: 2048 x 32000 in float32 is 262 MB, and a
plain loss keeps five of them or more. Here a chunk's logits live until its share of the gradient is added up, so that
the chunk bounds the memory. The gradient is taken in the forward pass, since both its factors are at hand there; the
backward pass only scales it.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlxspec.training.losses import Distributions, Loss, acceptance, reward

CHUNK_ELEMENTS = 2**20  # of logits: 4 MB, of which an evaluation has some dozens under way

# One chunk's share of the teacher's arrays, and log q [n, V] of the drafter -> p and log p [n, V].
TeacherProbs = Callable[[tuple[mx.array, ...], mx.array], tuple[mx.array, mx.array]]


class Positions(NamedTuple):
    """What a loss is summed over, N positions of a batch."""

    tokens: mx.array  # [N] the data's next token
    weights: mx.array  # [N] of each position's loss in the sum; 0 where none is wanted
    teacher: tuple[mx.array, ...]  # [N, ...] whatever the teacher's probabilities are made of
    temperature: mx.array  # [] of the drafter's distribution
    key: mx.array


def weighted_loss(
    loss: Loss,
    hidden: mx.array,
    head: mx.array,
    positions: Positions,
    teacher_probs: TeacherProbs | None = None,
    chunk: int | None = None,
) -> tuple[mx.array, mx.array]:
    """(Σ w·L, Σ w·α) over the positions; the first can be differentiated with respect to ``hidden`` and ``head``.

    ``hidden`` [N, H] are the drafter's last hidden states, ``head`` [V, H] the weights that make logits of them. α is
    the acceptance rate; 0 for a loss that does not look at the target.
    """
    chunk = chunk or max(1, CHUNK_ELEMENTS // head.shape[0])
    slices = [slice(start, start + chunk) for start in range(0, hidden.shape[0], chunk)]
    keys = mx.random.split(positions.key, len(slices))

    def distributions(part: int, hidden: mx.array, head: mx.array) -> Distributions:
        where = slices[part]
        logits = (hidden[where] @ head.T).astype(mx.float32) / positions.temperature  # [n, V]
        log_q, q = log_softmax(logits)
        p = log_p = None
        if loss.needs_target:
            p, log_p = teacher_probs(tuple(array[where] for array in positions.teacher), log_q)
        return Distributions(p, log_p, q, log_q, positions.tokens[where], keys[part])

    @mx.custom_function
    def forward(hidden: mx.array, head: mx.array) -> tuple[mx.array, ...]:
        mean = reward_mean(hidden, head) if loss.needs_batch_statistics else None
        totals, to_hidden, to_head = mx.zeros(2), [], mx.zeros(head.shape)
        for part, where in enumerate(slices):
            d = distributions(part, hidden, head)._replace(reward_mean=mean)
            weights = positions.weights[where]
            value, slope = loss(d)
            alpha = acceptance(d) if loss.needs_target else mx.zeros_like(value)
            totals = totals + mx.stack([weights * value, weights * alpha]).sum(-1)
            # [n, V]: the softmax's Jacobian, once for all losses
            to_logits = (weights / positions.temperature)[:, None] * (slope - d.q * slope.sum(-1, keepdims=True))
            to_logits = to_logits.astype(head.dtype)
            to_hidden.append(to_logits @ head)
            # What else is made of this chunk's logits comes before the next chunk: else they would all be kept for it.
            (to_logits,) = mx.depends([to_logits], [totals, to_hidden[-1]])
            to_head = mx.addmm(to_head, to_logits.T, hidden[where])  # in place
        return *mx.depends([totals, mx.concatenate(to_hidden)], [to_head]), to_head

    def reward_mean(hidden: mx.array, head: mx.array) -> mx.array:
        """μ of tvd++'s reward over all positions that count: a pass of its own, before the one that needs it."""
        rewarded, counted = mx.array(0.0), mx.array(0.0)
        for part, where in enumerate(slices):
            d = distributions(part, hidden, head)
            counts = (positions.weights[where] > 0).astype(mx.float32)
            rewarded = rewarded + (counts * (loss.weights(d) * reward(d)).sum(-1)).sum()
            counted = counted + counts.sum()
        return rewarded / mx.maximum(counted, 1)

    @forward.vjp
    def backward(primals, cotangents, outputs):
        hidden, head = primals
        _, to_hidden, to_head = outputs
        return (cotangents[0][0] * to_hidden).astype(hidden.dtype), (cotangents[0][0] * to_head).astype(head.dtype)

    return tuple(forward(hidden, head)[0])


def log_softmax(logits: mx.array) -> tuple[mx.array, mx.array]:
    """(log q, q) [N, V] with one exponential an element: log Σ exp is max z − log max q."""
    q = mx.softmax(logits, axis=-1, precise=True)
    normaliser = logits.max(-1, keepdims=True) - mx.log(q.max(-1, keepdims=True))
    return logits - normaliser, q
