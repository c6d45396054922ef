"""Losses between the target's distribution p and the drafter's distribution q, as formulas.

Every loss maps distributions over the vocabulary to two arrays:

- ``value`` [N]: the loss L at each of N positions,
- ``slope`` [N, V]: q ⊙ ∂L/∂q. The gradient with respect to the drafter's logits is slope − q Σ_v slope.

The second formula applies the Jacobian of the softmax. It needs no exponential beyond those of p and q, and no division
by a q that may be 0.

TVD is a policy gradient: ∇TVD = E_{x~q}[∇log q(x) · (−r(x))], with the reward r(x) = 1 where p(x) > q(x), else 0.
TVD++ normalizes the reward as policy gradient methods normalize advantages: (r − μ)/σ.

Source: Goel et al., arXiv 2403.00858 (KLD, TVD, TVD++).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlxspec.errors import InvalidRequestError
from mlxspec.settings import option

SMALLEST_ACCEPTANCE = 1e-4  # lower limit of α in nla
HYBRID_DECAY = 3.0  # lk-hybrid: λ = exp(−3 α)


class Distributions(NamedTuple):
    """The input of a loss: N positions, a vocabulary of V tokens, probabilities after temperature."""

    p: mx.array  # [N, V] the target's; empty if the loss does not need the target
    log_p: mx.array  # [N, V]
    q: mx.array  # [N, V] the drafter's
    log_q: mx.array  # [N, V]
    tokens: mx.array  # [N] the next token in the data
    key: mx.array  # random key, for losses that draw samples
    reward_mean: mx.array | None = None  # [] μ over the whole batch, if the loss needs batch statistics


class Divergence(NamedTuple):
    """The output of a loss."""

    value: mx.array  # [N]
    slope: mx.array  # [N, V] q ⊙ ∂L/∂q


def cross_entropy(d: Distributions) -> Divergence:
    """Cross-entropy −log q(x), where x is the next token in the data."""
    x = d.tokens[:, None]
    value = -mx.take_along_axis(d.log_q, x, axis=-1)[:, 0]
    return Divergence(value, mx.put_along_axis(mx.zeros_like(d.q), x, mx.array(-1.0), axis=-1))


def kl_divergence(d: Distributions) -> Divergence:
    """Kullback-Leibler divergence (KLD) Σ p log(p/q)."""
    return Divergence((d.p * masked(d.log_p - d.log_q, d.p)).sum(-1), -d.p)


def reverse_kl_divergence(d: Distributions) -> Divergence:
    """Reverse Kullback-Leibler divergence Σ q log(q/p)."""
    weighted = d.q * masked(d.log_q - d.log_p, d.q)
    return Divergence(weighted.sum(-1), weighted + d.q)


def jensen_shannon(d: Distributions) -> Divergence:
    """Jensen-Shannon divergence ½ KL(p‖m) + ½ KL(q‖m), with m = (p + q)/2."""
    log_m = mx.logaddexp(d.log_p, d.log_q) - mx.log(mx.array(2.0))
    from_q = d.q * masked(d.log_q - log_m, d.q)
    value = (d.p * masked(d.log_p - log_m, d.p) + from_q).sum(-1) / 2
    return Divergence(value, from_q / 2)


def total_variation(d: Distributions) -> Divergence:
    """Total variation distance (TVD) ½ Σ |p − q| = 1 − Σ min(p, q) = 1 − α."""
    return Divergence(1 - acceptance(d), -d.q * reward(d))


def negative_log_acceptance(d: Distributions) -> Divergence:
    """Negative logarithm of the acceptance rate, −log α. α is at least ``SMALLEST_ACCEPTANCE``."""
    alpha = mx.maximum(acceptance(d), SMALLEST_ACCEPTANCE)
    return Divergence(-mx.log(alpha), total_variation(d).slope / alpha[:, None])


def likelihood_hybrid(d: Distributions) -> Divergence:
    """Mixture λ·KLD + (1 − λ)·TVD, with λ = exp(−3 α) at each position. λ is not differentiated."""
    kld, tvd = kl_divergence(d), total_variation(d)
    share = mx.exp(-HYBRID_DECAY * acceptance(d))
    value = share * kld.value + (1 - share) * tvd.value
    return Divergence(value, share[:, None] * kld.slope + (1 - share[:, None]) * tvd.slope)


def acceptance(d: Distributions) -> mx.array:
    """Acceptance rate α = Σ min(p, q) [N]: the probability that a drafted token is accepted."""
    return mx.minimum(d.p, d.q).sum(-1)


def reward(d: Distributions) -> mx.array:
    """Reward r [N, V] of the policy gradient: 1 where p > q, else 0."""
    return (d.p > d.q).astype(d.q.dtype)


def masked(difference: mx.array, weight: mx.array) -> mx.array:
    """Replace a difference by 0 where its weight is 0, since 0·log 0 is 0."""
    return mx.where(weight > 0, difference, 0)


@dataclass(frozen=True)
class Loss:
    """A loss by name, with the options of tvd++. Raises InvalidRequestError for an invalid combination."""

    name: str = option(
        "tvd++",
        "Divergence between the drafter's and the target's distribution.",
        choices=lambda: list(LOSSES),
        key="loss",
    )
    estimator: str = option(
        "expectation",
        "For tvd++: `expectation` computes the gradient exactly. A number N estimates it from N samples.",
    )
    statistics: str = option(
        "position",
        "For tvd++: normalize the reward over the vocabulary at each position, or over the batch. The reward is 1 for "
        "tokens to which the drafter gives less probability than the target, otherwise 0.",
        choices=lambda: ["position", "batch"],
    )
    weighting: str = option(
        "drafter",
        "For tvd++: weight tokens by the drafter's probabilities, or all tokens equally.",
        choices=lambda: ["drafter", "vocabulary"],
    )
    epsilon: float = option(0.1, "For tvd++: added to the standard deviation when the reward is normalized.")

    def __post_init__(self) -> None:
        for name, known in (
            ("name", LOSSES),
            ("statistics", ("position", "batch")),
            ("weighting", ("drafter", "vocabulary")),
        ):
            if getattr(self, name) not in known:
                raise InvalidRequestError(f"loss: {name} is {getattr(self, name)!r}; use one of {', '.join(known)}")
        if self.estimator != "expectation" and not (self.estimator.isdecimal() and int(self.estimator) > 0):
            raise InvalidRequestError(
                f'loss: estimator is {self.estimator!r}; use "expectation" or a number of samples'
            )
        if self.samples and self.weighting == "vocabulary":
            raise InvalidRequestError("loss: samples are drawn from the drafter's distribution; use weighting drafter")
        if self.samples == 1 and self.statistics == "position":
            raise InvalidRequestError("loss: one sample has no deviation; use statistics batch, or more samples")
        if not self.epsilon > 0:
            raise InvalidRequestError(f"loss: epsilon is {self.epsilon}; use a small positive number")

    @property
    def samples(self) -> int:
        """Number of samples for each position. 0 for the exact expectation."""
        return 0 if self.estimator == "expectation" else int(self.estimator)

    @property
    def needs_target(self) -> bool:
        """Whether the loss depends on p."""
        return self.name != "ce"

    @property
    def needs_batch_statistics(self) -> bool:
        """Whether ``Distributions.reward_mean`` is required."""
        return self.name == "tvd++" and self.statistics == "batch"

    @property
    def is_surrogate(self) -> bool:
        """Whether only the gradient has a meaning: a lower value of the loss does not say that q is closer to p."""
        return self.name == "tvd++"

    def __call__(self, d: Distributions) -> Divergence:
        """Return the loss and its slope."""
        divergence = LOSSES[self.name]
        return divergence(d) if divergence else self._normalized_total_variation(d)

    def _normalized_total_variation(self, d: Distributions) -> Divergence:
        """TVD++: −Σ_x w(x) (r(x) − μ)/σ · log q(x), where only log q is differentiated.

        The weight w is q ("drafter"), 1/V ("vocabulary") or the frequency of x among samples from q. Sampling leaves
        the gradient unbiased up to σ. With w = 1/V the result is not the gradient of TVD. That option exists for
        comparison.
        """
        weight = self.weights(d)
        r = reward(d)
        if self.statistics == "batch":
            assert d.reward_mean is not None
            mean = d.reward_mean
        else:
            mean = (weight * r).sum(-1, keepdims=True)
        deviation = mx.sqrt(mx.maximum(mean * (1 - mean), 0)) + self.epsilon  # of a reward that is 0 or 1
        slope = -weight * (r - mean) / deviation
        return Divergence((slope * masked(d.log_q, weight)).sum(-1), slope)

    def weights(self, d: Distributions) -> mx.array:
        """Return the distribution over tokens [N, V] for which tvd++ takes its expectation."""
        if self.samples:
            return sample_frequencies(d.q, self.samples, d.key)
        return d.q if self.weighting == "drafter" else mx.full(d.q.shape, 1 / d.q.shape[-1])


def sample_frequencies(q: mx.array, count: int, key: mx.array) -> mx.array:
    """Draw tokens from q at each position and return their frequencies.

    Args:
        q: Probabilities [N, V].
        count: Number of samples for each position.
        key: Random key.

    Returns:
        The frequency of each token among the samples [N, V]. The frequencies of a position sum to 1.
    """
    heights = mx.cumsum(q, axis=-1)
    frequencies = mx.zeros_like(q)
    draws = mx.random.uniform(shape=(count, q.shape[0], 1), key=key)
    for i in range(count):  # iterating over draws splits it, and mx.compile fails on two equal splits
        token = mx.minimum((heights <= draws[i] * heights[:, -1:]).sum(-1, keepdims=True), q.shape[-1] - 1)
        ones = mx.put_along_axis(mx.zeros_like(q), token, mx.array(1 / count), axis=-1)
        frequencies = frequencies + ones
    return frequencies


LOSSES: dict[str, Callable[[Distributions], Divergence] | None] = {
    "ce": cross_entropy,
    "kld": kl_divergence,
    "rkl": reverse_kl_divergence,
    "jsd": jensen_shannon,
    "tvd": total_variation,
    "tvd++": None,  # computed by Loss, since it has options
    "nla": negative_log_acceptance,
    "lk-hybrid": likelihood_hybrid,
}
