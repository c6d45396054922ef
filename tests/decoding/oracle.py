"""The verification rules once more, in rational numbers and as slowly as you like.

A draft is judged through two functions of (p rows, q rows, drafted tokens): the thresholds against which the uniforms
are held, and the weights from which the next token is drawn. Enumerating over them gives the exact distribution of
what a rule emits; plugging uniforms in gives the outcome that the MLX code has to reproduce.
"""

import itertools
import random
from fractions import Fraction

ZERO, ONE = Fraction(0), Fraction(1)


class RandomContextModel:
    """A language model with an unrelated random distribution after every prefix; some probabilities are 0."""

    def __init__(self, vocab_size: int, seed: str):
        self.vocab_size, self.seed, self.rows = vocab_size, seed, {}

    def __call__(self, prefix: tuple[int, ...]) -> list[Fraction]:
        if prefix not in self.rows:
            rng = random.Random(f"{self.seed}{prefix}")
            weights = [rng.choice([0, 1, 1, 2, 3, 5, 8]) for _ in range(self.vocab_size)]
            weights[rng.randrange(self.vocab_size)] += 1
            self.rows[prefix] = [Fraction(w, sum(weights)) for w in weights]
        return self.rows[prefix]


class FailingModel:
    """A model that computes no distribution after some prefixes.

    As a drafter it returns a row of zeros there. As a target it gives probability 1 to one more symbol, "failed", after
    which nothing else follows.
    """

    def __init__(self, model, seed: str, is_target: bool):
        self.model, self.seed, self.is_target = model, seed, is_target
        self.failed = model.vocab_size
        self.vocab_size = model.vocab_size + 1

    def fails(self, prefix):
        return self.failed in prefix or random.Random(f"{self.seed}{prefix}").random() < 0.3

    def __call__(self, prefix):
        if not self.fails(prefix):
            return [*self.model(prefix), ZERO]
        return [ZERO] * self.failed + [ONE if self.is_target else ZERO]


def rows(target, drafter, drafted):
    p = [target(drafted[:i]) for i in range(len(drafted) + 1)]
    q = [drafter(drafted[:i]) for i in range(len(drafted))]
    return p, [*q, [ZERO] * target.vocab_size]


def ratios(p, q, drafted):
    return [p[i][x] / q[i][x] if q[i][x] else ZERO for i, x in enumerate(drafted)]


def positive(weights):
    return [max(ZERO, w) for w in weights]


def token_judgement(p, q, drafted):
    """-> thresholds of the checks, and for each accepted length the weights of the next token."""
    thresholds = [min(ONE, ratio) for ratio in ratios(p, q, drafted)]
    weights = [positive(a - b for a, b in zip(p[n], q[n], strict=True)) for n in range(len(p))]
    return thresholds, weights


def block_judgement(p, q, drafted):
    big_p = [ONE]
    for ratio in ratios(p, q, drafted):
        big_p.append(min(ONE, big_p[-1] * ratio))
    weights = [positive(big_p[n] * a - b for a, b in zip(p[n], q[n], strict=True)) for n in range(len(p))]
    thresholds = []
    for n in range(1, len(p)):
        mass = sum(weights[n])
        thresholds.append(ONE if mass + 1 - big_p[n] == 0 else mass / (mass + 1 - big_p[n]))
    return thresholds, weights


def first_failure(passed):
    return next((i for i, ok in enumerate(passed) if not ok), len(passed))


def last_success(passed):
    return max((i + 1 for i, ok in enumerate(passed) if ok), default=0)


RULES = {"token": (token_judgement, first_failure), "block": (block_judgement, last_success)}


def length_probabilities(thresholds, accepted_length):
    """The distribution of the accepted length when every check has a uniform of its own."""
    probabilities = [ZERO] * (len(thresholds) + 1)
    for passed in itertools.product([False, True], repeat=len(thresholds)):
        chance = ONE
        for ok, threshold in zip(passed, thresholds, strict=True):
            chance *= threshold if ok else 1 - threshold
        probabilities[accepted_length(passed)] += chance
    return probabilities


def match_outcomes(p, drafted):
    """(accepted, next token) -> probability under the match rule."""
    outcomes, reached = {}, ONE
    for n, row in enumerate(p):
        for y, chance in enumerate(row):
            if n == len(drafted) or y != drafted[n]:
                outcomes[n, y] = reached * chance
        if n < len(drafted):
            reached *= row[drafted[n]]
    return outcomes


def outcomes(rule, p, q, drafted, length_probabilities=length_probabilities):
    """(accepted, next token) -> probability, for one draft."""
    if rule == "match":
        return match_outcomes(p, drafted)
    judgement, accepted_length = RULES[rule]
    thresholds, weights = judgement(p, q, drafted)
    result = {}
    for n, chance in enumerate(length_probabilities(thresholds, accepted_length)):
        if chance:
            total = sum(weights[n])
            result.update({(n, y): chance * w / total for y, w in enumerate(weights[n])})
    return result


def emitted_joint(rule, target, drafter, draft_length, **variant):
    """The joint distribution of the first γ+1 tokens: a block, completed by the target where it was shorter."""
    vocab, joint, accepted = range(target.vocab_size), {}, ZERO
    for drafted in itertools.product(vocab, repeat=draft_length):
        chance = ONE
        for i, x in enumerate(drafted):
            row = drafter(drafted[:i])
            chance *= row[x] if any(row) else ONE * (x == 0)  # what is drawn from no distribution does not matter
        if not chance:
            continue
        for (n, y), outcome in outcomes(rule, *rows(target, drafter, drafted), drafted, **variant).items():
            accepted += chance * outcome * n
            complete(joint, target, (*drafted[:n], y), chance * outcome, draft_length + 1)
    return joint, accepted


def complete(joint, target, prefix, chance, length):
    if not chance:
        return
    if len(prefix) == length:
        joint[prefix] = joint.get(prefix, ZERO) + chance
        return
    for y, p in enumerate(target(prefix)):
        complete(joint, target, (*prefix, y), chance * p, length)


def target_joint(target, length):
    joint = {}
    complete(joint, target, (), ONE, length)
    return joint


def outcome_at(rule, p, q, drafted, uniforms):
    """(accepted, next token) for given uniforms, and the distance to the nearest knife's edge."""
    if rule == "match":
        own, margins = zip(*(inverse_cdf(row, u) for row, u in zip(p, uniforms, strict=True)), strict=True)
        n = first_failure([a == b for a, b in zip(own, drafted, strict=False)])
        return (n, own[n]), min(margins)
    judgement, accepted_length = RULES[rule]
    thresholds, weights = judgement(p, q, drafted)
    n = accepted_length([u < h for u, h in zip(uniforms, thresholds, strict=False)])
    y, margin = inverse_cdf(weights[n], uniforms[-1])
    edges = [abs(u - h) for u, h in zip(uniforms, thresholds, strict=False) if 0 < h < 1]
    return (n, y), min([margin, *edges])


def inverse_cdf(weights, uniform):
    threshold, total, margin = uniform * sum(weights), ZERO, ONE
    drawn = None
    for y, w in enumerate(weights):
        total += w
        margin = min(margin, abs(total - threshold))
        if drawn is None and w and total > threshold:
            drawn = y
    return drawn, margin
