"""A loss and its gradient from hidden states and the head's weights, computed in chunks of positions.

The logits [positions, vocabulary] limit the size of a batch. 2048 × 32000 logits in float32 take 262 MB, and a plain
loss keeps five such arrays or more. Here the logits of a chunk are freed once its gradient has been added to the sum.
The gradient is computed in the forward pass, where p and q are available. The backward pass only scales it.
"""

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from mlxspec.models.memory import device_limit
from mlxspec.training.losses import Distributions, Loss, acceptance, reward

# Logits in a chunk. On the CPU, 4 MB fit into its caches. A GPU reads the head once for each chunk, so it prefers large
# chunks.
FEW_LOGITS, MANY_LOGITS = 2**20, 2**24
MEMORY_SHARE = 16  # on a GPU, the arrays of a chunk may take this fraction of the memory
CHUNK_ARRAYS = 24  # arrays of a chunk's size, of 4 bytes for each logit, that MLX holds at once
FEWEST_ROWS = 32  # in a chunk. Chunks are unrolled, and with a large vocabulary there would be thousands of them.

# (a chunk of the teacher's arrays, the drafter's log q [n, V]) -> p and log p [n, V]
TeacherProbs = Callable[[tuple[mx.array, ...], mx.array], tuple[mx.array, mx.array]]


class Positions(NamedTuple):
    """The N positions over which a loss is summed."""

    tokens: mx.array  # [N] the next token in the data
    weights: mx.array  # [N] weight of each position; 0 to ignore it
    teacher: tuple[mx.array, ...]  # [N, ...] arrays from which the teacher computes p
    temperature: mx.array  # [] temperature of q
    key: mx.array  # random key


def weighted_loss(
    loss: Loss,
    hidden: mx.array,
    head: mx.array,
    positions: Positions,
    teacher_probs: TeacherProbs | None = None,
    chunk: int | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute a loss L and the acceptance rate α at each position, and the sum Σ w·L.

    The sum can be differentiated with respect to ``hidden`` and ``head``.

    Args:
        loss: The loss L.
        hidden: The drafter's last hidden states [N, H].
        head: Weights of the drafter's head [V, H].
        positions: Tokens, weights w, the teacher's arrays and the temperature.
        teacher_probs: Computes p from the teacher's arrays. Required if the loss needs the target.
        chunk: Positions in a chunk. None for ``chunk_rows``.

    Returns:
        Σ w·L, a scalar, and the values of L and α at each position, [2, N]. α is 0 if the loss does not need the
        target.
    """
    chunk = chunk or chunk_rows(head.shape[0])
    slices = [slice(start, start + chunk) for start in range(0, hidden.shape[0], chunk)]
    keys = mx.random.split(positions.key, len(slices))

    def distributions(part: int, hidden: mx.array, head: mx.array) -> Distributions:
        where = slices[part]
        logits = (hidden[where] @ head.T).astype(mx.float32) / positions.temperature  # [n, V]
        log_q, q = log_softmax(logits)
        p = log_p = mx.zeros((0, 0))
        if loss.needs_target:
            assert teacher_probs is not None
            p, log_p = teacher_probs(tuple(array[where] for array in positions.teacher), log_q)
        return Distributions(p, log_p, q, log_q, positions.tokens[where], keys[part])

    @mx.custom_function
    def forward(hidden: mx.array, head: mx.array) -> tuple[mx.array, ...]:
        mean = reward_mean(hidden, head) if loss.needs_batch_statistics else None
        total, head_gradient = mx.array(0.0), mx.zeros(head.shape)
        values: list[mx.array] = []
        hidden_gradients: list[mx.array] = []
        for part, where in enumerate(slices):
            d = distributions(part, hidden, head)._replace(reward_mean=mean)
            weights = positions.weights[where]
            value, slope = loss(d)
            alpha = acceptance(d) if loss.needs_target else mx.zeros_like(value)
            total = total + (weights * value).sum()
            values.append(mx.stack([value, alpha]))
            # [n, V]: the Jacobian of the softmax, the same for all losses
            logits_gradient = (weights / positions.temperature)[:, None] * (slope - d.q * slope.sum(-1, keepdims=True))
            logits_gradient = logits_gradient.astype(head.dtype)
            hidden_gradients.append(logits_gradient @ head)
            # Everything else that needs this chunk's logits comes before the next chunk, so that they can be freed.
            (logits_gradient,) = mx.depends([logits_gradient], [total, values[-1], hidden_gradients[-1]])
            head_gradient = mx.addmm(head_gradient, logits_gradient.T, hidden[where])  # in place
        results = [total, mx.concatenate(values, axis=1), mx.concatenate(hidden_gradients)]
        return *mx.depends(results, [head_gradient]), head_gradient

    def reward_mean(hidden: mx.array, head: mx.array) -> mx.array:
        """Return μ, the mean of tvd++'s reward over all positions of weight above 0. This takes a separate pass."""
        total, count = mx.array(0.0), mx.array(0.0)
        for part, where in enumerate(slices):
            d = distributions(part, hidden, head)
            counts = (positions.weights[where] > 0).astype(mx.float32)
            total = total + (counts * (loss.weights(d) * reward(d)).sum(-1)).sum()
            count = count + counts.sum()
        return total / mx.maximum(count, 1)

    @forward.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array]:
        hidden, head = primals
        *_, hidden_gradient, head_gradient = outputs
        scale = cotangents[0]
        return (scale * hidden_gradient).astype(hidden.dtype), (scale * head_gradient).astype(head.dtype)

    total, values = forward(hidden, head)[:2]  # type: ignore[index]
    return total, values


def chunk_rows(vocab_size: int) -> int:
    """Return the number of positions in a chunk on the current device."""
    logits = FEW_LOGITS
    if mx.default_device().type != mx.cpu:
        logits = min(max(logits, device_limit() // (MEMORY_SHARE * CHUNK_ARRAYS * 4)), MANY_LOGITS)
    return max(FEWEST_ROWS, logits // vocab_size)


def log_softmax(logits: mx.array) -> tuple[mx.array, mx.array]:
    """Return (log q, q), each [N, V], with one exponential for each logit.

    The normalizer is computed from q itself: log Σ exp z = max z − log max q.
    """
    q = mx.softmax(logits, axis=-1, precise=True)
    log_sum = logits.max(-1, keepdims=True) - mx.log(q.max(-1, keepdims=True))
    return logits - log_sum, q
