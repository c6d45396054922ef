"""How far a drafter's distribution q is from the target's p, position by position, and which way is down.

Every loss here maps distributions over the vocabulary to two things:

- ``value``  [N]     the loss L at each of N positions,
- ``slope``  [N, V]  q ⊙ ∂L/∂q, from which the gradient on the drafter's logits z is slope − q Σ_v slope.

The second form is the softmax's Jacobian applied by hand: it needs no exponential beyond those of p and q, and no
division by a q that may be 0. Formulas: Goel et al., arXiv 2403.00858 (KLD, TVD, TVD++), and the lemma below.

**TVD as a policy gradient.** ∇TVD = E_{x~q}[∇log q(x) · (−r(x))], with the reward r(x) = 1 where p(x) > q(x), else 0.
TVD++ normalises the reward as a policy gradient normalises advantages: (r − μ)/σ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from mlxspec.errors import InvalidRequestError
from mlxspec.settings import option

SMALLEST_ACCEPTANCE = 1e-4  # where log α of nla is clamped
HYBRID_DECAY = 3.0  # lk-hybrid: λ = exp(−3 α)


class Distributions(NamedTuple):
    """What the losses are functions of, at N positions of a vocabulary of V, after temperature."""

    p: mx.array | None  # [N, V] the target's; None where only the data's tokens count
    log_p: mx.array | None  # [N, V]
    q: mx.array  # [N, V] the drafter's
    log_q: mx.array  # [N, V]
    tokens: mx.array  # [N] what the data has there
    key: mx.array  # for losses that draw samples
    reward_mean: mx.array | None = None  # μ over the whole batch, if the loss asked for it


class Divergence(NamedTuple):
    value: mx.array  # [N]
    slope: mx.array  # [N, V]


def cross_entropy(d: Distributions) -> Divergence:
    """−log q(x), x the data's token."""
    x = d.tokens[:, None]
    value = -mx.take_along_axis(d.log_q, x, axis=-1)[:, 0]
    return Divergence(value, mx.put_along_axis(mx.zeros_like(d.q), x, mx.array(-1.0), axis=-1))


def kl_divergence(d: Distributions) -> Divergence:
    """Σ p log(p/q)."""
    return Divergence((d.p * finite(d.log_p - d.log_q, d.p)).sum(-1), -d.p)


def reverse_kl_divergence(d: Distributions) -> Divergence:
    """Σ q log(q/p)."""
    weighted = d.q * finite(d.log_q - d.log_p, d.q)
    return Divergence(weighted.sum(-1), weighted + d.q)


def jensen_shannon(d: Distributions) -> Divergence:
    """½ KL(p‖m) + ½ KL(q‖m), m = (p + q)/2."""
    log_m = mx.logaddexp(d.log_p, d.log_q) - mx.log(mx.array(2.0))
    from_q = d.q * finite(d.log_q - log_m, d.q)
    value = (d.p * finite(d.log_p - log_m, d.p) + from_q).sum(-1) / 2
    return Divergence(value, from_q / 2)


def total_variation(d: Distributions) -> Divergence:
    """½ Σ |p − q| = 1 − Σ min(p, q) = 1 − α."""
    return Divergence(1 - acceptance(d), -d.q * reward(d))


def negative_log_acceptance(d: Distributions) -> Divergence:
    """−log α."""
    alpha = mx.maximum(acceptance(d), SMALLEST_ACCEPTANCE)
    return Divergence(-mx.log(alpha), total_variation(d).slope / alpha[:, None])


def likelihood_hybrid(d: Distributions) -> Divergence:
    """λ·KLD + (1 − λ)·TVD with λ = exp(−3 α) at each position, α not differentiated."""
    kld, tvd = kl_divergence(d), total_variation(d)
    share = mx.exp(-HYBRID_DECAY * acceptance(d))
    value = share * kld.value + (1 - share) * tvd.value
    return Divergence(value, share[:, None] * kld.slope + (1 - share[:, None]) * tvd.slope)


def acceptance(d: Distributions) -> mx.array:
    """α = Σ min(p, q) [N]: how likely a drafted token is to be accepted."""
    return mx.minimum(d.p, d.q).sum(-1)


def reward(d: Distributions) -> mx.array:
    """r = 1 where p > q [N, V]."""
    return (d.p > d.q).astype(d.q.dtype)


def finite(difference: mx.array, weight: mx.array) -> mx.array:
    """0 where the weight is 0: 0·log 0 counts nothing."""
    return mx.where(weight > 0, difference, 0)


@dataclass(frozen=True)
class Loss:
    """Which divergence, and for tvd++ how its expectation and its normalisation are taken.

    Raises InvalidRequestError for a combination that has no meaning.
    """

    name: str = option("tvd++", "The divergence.", choices=lambda: list(LOSSES), key="loss")
    estimator: str = option("expectation", 'tvd++: "expectation" over q, exactly, or a number of samples a position.')
    statistics: str = option(
        "position", "tvd++: mean and spread of the reward over what.", choices=lambda: ["position", "batch"]
    )
    weighting: str = option(
        "drafter", "tvd++: tokens weigh as q has them, or all the same.", choices=lambda: ["drafter", "vocabulary"]
    )
    epsilon: float = option(0.1, "tvd++: added to the spread that divides the reward.")

    def __post_init__(self):
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
            raise InvalidRequestError("loss: samples are drawn from the drafter; use weighting drafter with them")
        if self.samples == 1 and self.statistics == "position":
            raise InvalidRequestError("loss: one sample has no spread; use statistics batch, or more samples")
        if not self.epsilon > 0:
            raise InvalidRequestError(f"loss: epsilon is {self.epsilon}; use a small positive number")

    @property
    def samples(self) -> int:
        """Samples a position; 0: the expectation is exact."""
        return 0 if self.estimator == "expectation" else int(self.estimator)

    @property
    def needs_target(self) -> bool:
        return self.name != "ce"

    @property
    def needs_batch_statistics(self) -> bool:
        """Whether ``Distributions.reward_mean`` must be there."""
        return self.name == "tvd++" and self.statistics == "batch"

    def __call__(self, d: Distributions) -> Divergence:
        divergence = LOSSES[self.name]
        return divergence(d) if divergence else self._normalised_total_variation(d)

    def _normalised_total_variation(self, d: Distributions) -> Divergence:
        """TVD++: −Σ_x w(x) (r(x) − μ)/σ · log q(x), where only log q is differentiated.

        w is q ("drafter"), 1/V ("vocabulary") or the frequency of x among the samples. Drawn from q, the samples keep
        the gradient unbiased up to σ; with w = 1/V it is not TVD's gradient, and here for comparison.
        """
        weight = self.weights(d)
        r = reward(d)
        mean = d.reward_mean if self.statistics == "batch" else (weight * r).sum(-1, keepdims=True)
        spread = mx.sqrt(mx.maximum(mean * (1 - mean), 0)) + self.epsilon  # r is 0 or 1
        slope = -weight * (r - mean) / spread
        return Divergence((slope * finite(d.log_q, weight)).sum(-1), slope)

    def weights(self, d: Distributions) -> mx.array:
        """The distribution over tokens [N, V] under which tvd++ takes its expectation."""
        if self.samples:
            return sample_frequencies(d.q, self.samples, d.key)
        return d.q if self.weighting == "drafter" else mx.full(d.q.shape, 1 / d.q.shape[-1])


def sample_frequencies(q: mx.array, count: int, key: mx.array) -> mx.array:
    """How often each token is among ``count`` draws from q, as fractions [N, V]."""
    heights = mx.cumsum(q, axis=-1)
    frequencies = mx.zeros_like(q)
    draws = mx.random.uniform(shape=(count, q.shape[0], 1), key=key)
    for i in range(count):  # not by iterating, which splits: mx.compile cannot merge two splits that are the same
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
    "tvd++": None,  # has options: Loss knows
    "nla": negative_log_acceptance,
    "lk-hybrid": likelihood_hybrid,
}
