import itertools
import random
from fractions import Fraction

import mlx.core as mx
import pytest

from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.verification import FAILED, RULES, verifier
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


def failing_pairs(vocab_size, count=4):
    return [
        (oracle.FailingModel(target, f"p fails {seed}", True), oracle.FailingModel(drafter, f"q fails {seed}", False))
        for seed, (target, drafter) in enumerate(pairs(vocab_size, count))
    ]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("vocab_size", "draft_length"), SHAPES)
def test_emitted_distribution_is_exactly_the_targets_where_models_fail_after_some_prefixes(
    rule, vocab_size, draft_length
):
    failures = 0
    for target, drafter in failing_pairs(vocab_size):
        emitted, _ = oracle.emitted_joint(rule, target, drafter, draft_length)
        assert emitted == oracle.target_joint(target, draft_length + 1)
        failures += sum(target.failed in text for text in emitted)
    assert failures


NAN, INF = float("nan"), float("inf")
FAILURES = {  # what stands in a row of logits, or of q, that is not a distribution
    "NaN everywhere": lambda row: [NAN for _ in row],
    "one NaN": lambda row: [NAN, *row[1:]],
    "one infinity": lambda row: [*row[:-1], INF],
}


def as_fractions(p):
    return [[Fraction(x) for x in row] for row in p.tolist()]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_code_decides_as_the_rational_oracle_does_where_rows_are_nan_or_infinite(rule, dtype):
    rng, vocab_size, draft_length = random.Random(f"{rule}{dtype}"), 3, 3
    verify, sampling = verifier(rule, Sampling(1.0), draft_length), Sampling(1.0)
    seen = set()
    for target, drafter in failing_pairs(vocab_size, 60):
        drafted = tuple(rng.choices(range(vocab_size), k=draft_length))
        uniforms = [Fraction(rng.randrange(2**20), 2**20) for _ in range(draft_length + 1)]
        exact_p, exact_q = oracle.rows(target, drafter, drafted)
        broken_p = [row[-1] == 1 for row in exact_p]
        broken_q = [not any(row) for row in exact_q[:-1]]
        if any(not broken and row[x] == 0 for broken, row, x in zip(broken_q, exact_q, drafted, strict=False)):
            continue  # cannot be drafted
        logits = mx.log(mx.array([[float(x) for x in row[:-1]] for row in exact_p])).astype(dtype)
        p = as_fractions(sampling.probs(mx.where(mx.array(broken_p)[:, None], 0, logits)))
        p = [
            exact if broken else [*(x / sum(row) for x in row), Fraction(0)]
            for broken, exact, row in zip(broken_p, exact_p, p, strict=True)
        ]
        expected, margin = oracle.outcome_at(rule, p, exact_q, drafted, uniforms)
        if margin < 1e-5:
            continue
        spoil = FAILURES[rng.choice(list(FAILURES))]
        given_logits = [spoil(row) if bad else row for bad, row in zip(broken_p, logits.tolist(), strict=True)]
        given_q = [[float(x) for x in row[:-1]] for row in exact_q[:-1]]
        given_q = [spoil(row) if bad else row for bad, row in zip(broken_q, given_q, strict=True)]
        accepted, next_token = verify(
            mx.array(given_logits, dtype),
            mx.array(given_q),
            mx.array(drafted, mx.int32),
            mx.array([float(u) for u in uniforms]),
        )
        token = target.failed if next_token.item() == FAILED else next_token.item()
        assert (accepted.item(), token) == expected
        seen.add((token == target.failed, any(broken_q), accepted.item() > 0))
    assert len(seen) > 5


@pytest.mark.parametrize("rule", RULES)
def test_a_drafter_that_computes_nan_leaves_the_distribution_of_the_target(rule):
    p, steps = mx.array([[0.1, 0.2, 0.3, 0.4]] * 2), 20
    drawn = [0] * 4
    for check, draw in itertools.product(range(steps), repeat=2):
        uniforms = mx.array([(check + 0.5) / steps, (draw + 0.5) / steps])
        accepted, next_token = RULES[rule](p, mx.full((1, 4), NAN), mx.array([0]), uniforms)
        drawn[0 if accepted.item() else next_token.item()] += 1
    assert drawn == [steps**2 // 10 * n for n in (1, 2, 3, 4)]


def test_a_drafter_that_computes_nan_in_the_middle_leaves_the_checks_before_it_as_they_were():
    mx.random.seed(1)
    p = mx.softmax(2 * mx.random.normal((4, 6)), axis=-1)
    q = mx.softmax(2 * mx.random.normal((3, 6)), axis=-1)
    spoiled = mx.concatenate([q[:1], mx.full((1, 6), NAN), q[2:]])
    for _ in range(300):
        drafted = mx.random.categorical(mx.log(q)).astype(mx.int32)
        uniforms = mx.random.uniform(shape=(4,))
        for rule in RULES.values():
            shorter = mx.concatenate([uniforms[:1], uniforms[-1:]])
            accepted, token = rule(p[:2], q[:1], drafted[:1], shorter if rule is not RULES["match"] else uniforms[:2])
            found, found_token = rule(p, spoiled, drafted, uniforms)
            if rule is RULES["match"]:
                assert min(found.item(), 1) == accepted.item()
            else:
                assert (found.item(), found_token.item()) == (accepted.item(), token.item())


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_greedy_verification_fails_at_the_row_where_plain_decoding_would_and_only_there(failing, dtype):
    logits = mx.array([[0.0, 1, 2, 3], [9, 1, 2, 3], [0, 7, 2, 3]], dtype)
    for spoil in ([NAN] * 4, [0, NAN, 2, 3], [-INF] * 4):
        spoiled = mx.array([spoil if i == failing else row for i, row in enumerate(logits.tolist())], dtype)
        verify = verifier("block", Sampling(0.0), 2)
        accepted, token = verify(spoiled, mx.zeros((2, 4)), mx.array([3, 0]), mx.zeros(3))
        assert (accepted.item(), token.item()) == (failing, FAILED)  # all rows are reached
        accepted, token = verify(spoiled, mx.zeros((2, 4)), mx.array([2, 0]), mx.zeros(3))
        assert (accepted.item(), token.item()) == (0, FAILED if failing == 0 else 3)
