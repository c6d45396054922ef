import itertools
import random
from fractions import Fraction

import mlx.core as mx
import pytest

from mlxspec.decoding.verification import RULES
from tests.decoding import oracle

SHAPES = [(2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3), (4, 2)]  # vocabulary, γ


def pairs(vocab_size, count=4):
    return [
        (oracle.RandomContextModel(vocab_size, f"p{seed}"), oracle.RandomContextModel(vocab_size, f"q{seed}"))
        for seed in range(count)
    ]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("vocab_size", "draft_length"), SHAPES)
def test_emitted_distribution_is_exactly_the_targets(rule, vocab_size, draft_length):
    for target, drafter in pairs(vocab_size):
        emitted, _ = oracle.emitted_joint(rule, target, drafter, draft_length)
        assert emitted == oracle.target_joint(target, draft_length + 1)  # rational numbers: an error of exactly 0


@pytest.mark.parametrize(("vocab_size", "draft_length"), SHAPES)
def test_block_never_accepts_less_than_token(vocab_size, draft_length):
    gains = []
    for target, drafter in pairs(vocab_size, 8):
        accepted = {
            rule: oracle.emitted_joint(rule, target, drafter, draft_length)[1] for rule in ("token", "block", "match")
        }
        assert accepted["block"] >= accepted["token"] >= accepted["match"]
        gains.append(accepted["block"] - accepted["token"])
    assert draft_length == 1 or max(gains) > 0


def one_uniform_for_all(thresholds, accepted_length):
    """The accepted length when one uniform is held against every threshold: piecewise constant between them."""
    edges = sorted({Fraction(0), Fraction(1), *thresholds})
    probabilities = [Fraction(0)] * (len(thresholds) + 1)
    for low, high in itertools.pairwise(edges):
        probabilities[accepted_length([(low + high) / 2 < h for h in thresholds])] += high - low
    return probabilities


def stop_at_first_failure(thresholds, accepted_length):
    return oracle.length_probabilities(thresholds, oracle.first_failure)


@pytest.mark.parametrize("trap", [one_uniform_for_all, stop_at_first_failure])
def test_the_enumeration_catches_the_two_traps_of_block_verification(trap):
    assert any(
        oracle.emitted_joint("block", target, drafter, 2, length_probabilities=trap)[0]
        != oracle.target_joint(target, 3)
        for target, drafter in pairs(3)
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("vocab_size", "draft_length"), [(2, 1), (3, 2), (4, 3), (5, 0)])
def test_the_code_decides_as_the_rational_oracle_does(rule, vocab_size, draft_length):
    rng = random.Random(f"{rule}{vocab_size}")
    compared, lengths = 0, set()
    for target, drafter in pairs(vocab_size, 20):
        for _ in range(15):
            drafted = ()
            for _ in range(draft_length):
                drafted += tuple(rng.choices(range(vocab_size), [float(w) for w in drafter(drafted)]))
            uniforms = [Fraction(rng.randrange(2**20), 2**20) for _ in range(draft_length + 1)]
            p, q = oracle.rows(target, drafter, drafted)
            expected, margin = oracle.outcome_at(rule, p, q, drafted, uniforms)
            if margin < 1e-5:
                continue  # float32 may fall on either side
            accepted, next_token = RULES[rule](
                mx.array([[float(x) for x in row] for row in p]),
                mx.array([[float(x) for x in row] for row in q[:-1]]).reshape(draft_length, vocab_size),
                mx.array(drafted, mx.int32),
                mx.array([float(u) for u in uniforms]),
            )
            assert (accepted.item(), next_token.item()) == expected
            compared += 1
            lengths.add(expected[0])
    assert compared > 200
    assert lengths == set(range(draft_length + 1))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_drafter_equal_to_the_target_is_accepted_whole_whatever_the_uniforms(rule):
    mx.random.seed(0)
    p = mx.softmax(mx.random.normal((5, 50)), axis=-1)
    for _ in range(200):
        drafted = mx.random.categorical(mx.log(p[:4])).astype(mx.int32)
        accepted, _ = RULES[rule](p, p[:4], drafted, mx.random.uniform(shape=(5,)))
        assert accepted.item() == 4
