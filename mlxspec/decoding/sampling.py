"""Sampling turns logits into the distribution that tokens are drawn from, and draws them.

Target and draft model use the same ``Sampling``. The emitted text has exactly the distribution that it computes from
the target's logits. The filters run in mlx-lm's order: top-p, min-p and top-k on the model's own probabilities, then
temperature.
"""

from dataclasses import dataclass, fields

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlxspec.errors import InvalidRequestError
from mlxspec.settings import option

COLDEST, HOTTEST = 1e-4, 1e4  # outside this range, logits / temperature overflow or become equal in float32

# mx.random.uniform can return a number so close to 1 that its product with a total is rounded up to the total.
LARGEST_UNIFORM = 1 - 2**-23


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing the next token.

    Attributes:
        temperature: 0 takes the most likely token. 1 draws from the model's own distribution.
        top_p: Draw from the most likely tokens that together have this probability, in (0, 1].
        top_k: Draw from this many of the most likely tokens. 0 means all.
        min_p: Leave out tokens less likely than this fraction of the most likely one, in [0, 1].
        seed: Seed of the random numbers. None for a random seed.

    Raises:
        InvalidRequestError: A value is outside its range.
    """

    temperature: float = option(0.0, "0 takes the most likely token; 1 draws from the model's own distribution.")
    top_p: float = option(1.0, "Draw from the most likely tokens that together have this probability, in (0, 1].")
    top_k: int = option(0, "Draw from this many of the most likely tokens; 0 means all.")
    min_p: float = option(0.0, "Leave out tokens less likely than this fraction of the most likely one, in [0, 1].")
    seed: int | None = option(None, "With the same seed and a fixed draft length, a run repeats exactly.")

    def __post_init__(self):
        if self.temperature != 0 and not COLDEST <= self.temperature <= HOTTEST:
            raise InvalidRequestError(
                f"temperature is {self.temperature}; use 0, or a number from {COLDEST} to {HOTTEST}"
            )
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError(f"top-p is {self.top_p}; use a number in (0, 1]")
        if self.top_k < 0:
            raise InvalidRequestError(f"top-k is {self.top_k}; use 0 (all tokens) or more")
        if not 0 <= self.min_p <= 1:
            raise InvalidRequestError(f"min-p is {self.min_p}; use a number in [0, 1]")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise InvalidRequestError(f"seed is {self.seed}; use a number in [0, 2**64)")

    def probs(self, logits: mx.array) -> mx.array:
        """Compute probabilities [..., V] float32 from logits [..., V].

        At temperature 0 the largest logit gets probability 1.
        """
        logits = logits.astype(mx.float32)
        if self.temperature == 0:
            return one_hot(mx.argmax(logits, axis=-1), logits.shape[-1])
        if self.top_p < 1 or self.min_p > 0 or 0 < self.top_k < logits.shape[-1]:
            logits = self._filtered(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        return mx.softmax(logits / self.temperature, axis=-1)

    def _filtered(self, logprobs: mx.array) -> mx.array:
        if self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p > 0:
            logprobs = apply_min_p(logprobs, self.min_p)
        if 0 < self.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, self.top_k)
        return logprobs

    def to_dict(self) -> dict[str, float | int | None]:
        """Return the settings by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def one_hot(tokens: mx.array, vocab_size: int) -> mx.array:
    """Return tokens [...] as one-hot vectors [..., V], float32."""
    return (tokens[..., None] == mx.arange(vocab_size)).astype(mx.float32)


def draw(weights: mx.array, uniforms: mx.array) -> mx.array:
    """Draw tokens by inverting the cumulative distribution.

    A token of weight 0 is never drawn, because its entry in the cumulative sum is set to 0. The resolution is 2**-24 of
    the total, as for every sampler in float32.

    Args:
        weights: Nonnegative weights [..., V]. They need not be normalized.
        uniforms: Independent draws from [0, 1), [...].

    Returns:
        Token ids [...], int32.
    """
    cumulative = mx.where(weights > 0, mx.cumsum(weights, axis=-1), 0)
    threshold = mx.minimum(uniforms, LARGEST_UNIFORM)[..., None] * mx.max(cumulative, axis=-1, keepdims=True)
    return mx.argmax(cumulative > threshold, axis=-1).astype(mx.int32)
