"""Every loss, in chunks from hidden states, against its plain formula in float64: value and gradient."""

import mlx.core as mx
import numpy as np
import pytest

from mlxspec import InvalidRequestError
from mlxspec.training.chunked_loss import Positions, chunk_rows, log_softmax, weighted_loss
from mlxspec.training.losses import LOSSES, Distributions, Loss, sample_frequencies
from mlxspec.training.teachers import OnlineTeacher, probs_from_top_k
from tests.conftest import random_llama

N, H, V = 11, 3, 7


def softmax64(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def advantage(p, fixed, weight, over_batch, epsilon):
    """tvd++'s normalized reward; ``fixed`` is q, not differentiated."""
    r = (p > fixed).astype(np.float64)
    mean = (weight * r).sum(-1).mean() if over_batch else (weight * r).sum(-1, keepdims=True)
    return (r - mean) / (np.sqrt(mean * (1 - mean)) + epsilon)


# p, q, q held fixed, the data's tokens -> the loss [N]. METHOD's table, word for word.
PLAIN = {
    Loss("ce"): lambda p, q, fixed, x: -np.log(q[np.arange(N), x]),
    Loss("kld"): lambda p, q, fixed, x: (p * np.log(p / q)).sum(-1),
    Loss("rkl"): lambda p, q, fixed, x: (q * np.log(q / p)).sum(-1),
    Loss("jsd"): lambda p, q, fixed, x: (p * np.log(2 * p / (p + q)) + q * np.log(2 * q / (p + q))).sum(-1) / 2,
    Loss("tvd"): lambda p, q, fixed, x: np.abs(p - q).sum(-1) / 2,
    Loss("nla"): lambda p, q, fixed, x: -np.log(np.minimum(p, q).sum(-1)),
    Loss("lk-hybrid"): lambda p, q, fixed, x: (
        (share := np.exp(-3 * np.minimum(p, fixed).sum(-1))) * (p * np.log(p / q)).sum(-1)
        + (1 - share) * np.abs(p - q).sum(-1) / 2
    ),
    **{
        Loss("tvd++", statistics=statistics, weighting=weighting, epsilon=0.1): (
            lambda p, q, fixed, x, w=weighting, s=statistics: (
                -(
                    (weight := fixed if w == "drafter" else np.full_like(fixed, 1 / V))
                    * advantage(p, fixed, weight, s == "batch", 0.1)
                    * np.log(q)
                ).sum(-1)
            )
        )
        for statistics in ("position", "batch")
        for weighting in ("drafter", "vocabulary")
    },
}


def describe(loss: Loss) -> str:
    return "-".join([loss.name, loss.estimator, loss.statistics, loss.weighting][: 4 if loss.name == "tvd++" else 1])


@pytest.fixture(scope="module")
def example():
    random = np.random.default_rng(0)
    return {
        "hidden": random.normal(size=(N, H)),
        "head": random.normal(size=(V, H)),
        "teacher": random.normal(size=(N, V)) * 2,
        "tokens": random.integers(0, V, N),
        "weights": np.r_[random.uniform(0.1, 1, N - 1), 0.0],
    }


def ours(loss, example, temperature, chunk, key=0):
    """(value, gradient on hidden, gradient on head)."""

    def probs(states, log_q):
        log_p, p = log_softmax(states[0] / temperature)
        return p, log_p

    def value(hidden, head):
        positions = Positions(
            mx.array(example["tokens"]),
            mx.array(example["weights"].astype(np.float32)),
            (mx.array(example["teacher"].astype(np.float32)),),
            mx.array(temperature),
            mx.random.key(key),
        )
        return weighted_loss(loss, hidden, head, positions, probs, chunk)[0]

    arguments = [mx.array(example[name].astype(np.float32)) for name in ("hidden", "head")]
    result, gradients = mx.value_and_grad(value, argnums=(0, 1))(*arguments)
    return result.item(), *(np.array(gradient) for gradient in gradients)


def plain(formula, example, temperature):
    """The same in float64; the gradient by central differences."""
    weights = example["weights"]
    p = softmax64(example["teacher"] / temperature)
    fixed = softmax64(example["hidden"] @ example["head"].T / temperature)
    counted = {**example}

    def value():
        q = softmax64(counted["hidden"] @ counted["head"].T / temperature)
        return (weights * formula(p, q, fixed, example["tokens"])).sum()

    gradients = []
    for name in ("hidden", "head"):
        gradient = np.zeros_like(example[name])
        for place in np.ndindex(gradient.shape):
            sides = []
            for step in (1e-6, -1e-6):
                counted[name] = example[name].copy()
                counted[name][place] += step
                sides.append(value())
            gradient[place] = (sides[0] - sides[1]) / 2e-6
        counted[name] = example[name]
        gradients.append(gradient)
    return value(), *gradients


def batch_mean_counts_what_has_weight(example):
    """The plain formulas take the mean over all N positions, ours over those that count: make all count."""
    return {**example, "weights": np.where(example["weights"] == 0, 0.5, example["weights"])}


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("loss", PLAIN, ids=describe)
def test_a_loss_is_its_plain_formula_in_value_and_gradient(loss, chunk, temperature, example):
    if loss.needs_batch_statistics:
        example = batch_mean_counts_what_has_weight(example)
    for found, expected in zip(
        ours(loss, example, temperature, chunk), plain(PLAIN[loss], example, temperature), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("loss", PLAIN, ids=describe)
def test_the_values_at_each_position_are_those_of_the_formulas(loss, example):
    example = batch_mean_counts_what_has_weight(example)
    hidden, head, weights, teacher = (
        mx.array(example[name].astype(np.float32)) for name in ("hidden", "head", "weights", "teacher")
    )
    positions = Positions(mx.array(example["tokens"]), weights, (teacher,), mx.array(0.6), mx.random.key(0))

    def probs(states, log_q):
        log_p, p = log_softmax(states[0] / 0.6)
        return p, log_p

    _, (values, rates) = weighted_loss(loss, hidden, head, positions, probs, 4)
    p, q = softmax64(example["teacher"] / 0.6), softmax64(example["hidden"] @ example["head"].T / 0.6)
    np.testing.assert_allclose(np.array(values), PLAIN[loss](p, q, q, example["tokens"]), rtol=1e-4, atol=2e-5)
    alpha = np.minimum(p, q).sum(-1) if loss.needs_target else np.zeros(N)
    np.testing.assert_allclose(np.array(rates), alpha, rtol=1e-4, atol=2e-5)


def test_every_loss_has_its_plain_formula():
    assert {loss.name for loss in PLAIN} == set(LOSSES)


def test_the_gradient_of_tvd_is_the_policy_gradient_of_the_lemma(example):
    p, q = (softmax64(example[name]) for name in ("teacher", "teacher"))
    q = np.roll(q, 1, axis=-1)
    r = (p > q).astype(float)
    expected = -q * (r - (q * r).sum(-1, keepdims=True))
    d = distributions(p, q)
    slope = np.array(Loss("tvd")(d).slope)
    np.testing.assert_allclose(slope - np.array(d.q) * slope.sum(-1, keepdims=True), expected, atol=1e-6)


def distributions(p, q, key=0, reward_mean=None):
    p, q = (mx.array(array.astype(np.float32)) for array in (p, q))
    return Distributions(p, mx.log(p), q, mx.log(q), mx.zeros(p.shape[:1], mx.int32), mx.random.key(key), reward_mean)


@pytest.mark.parametrize("statistics", ["position", "batch"])
def test_the_sampled_estimator_comes_out_at_the_exact_one_on_average(statistics, example):
    p, q = softmax64(example["teacher"]), softmax64(example["hidden"] @ example["head"].T)
    mean = mx.array((q * (p > q)).sum(-1).mean())
    exact, sampled = (Loss("tvd++", estimator, statistics, epsilon=1.0) for estimator in ("expectation", "4000"))
    slopes = [np.array(loss(distributions(p, q, reward_mean=mean)).slope) for loss in (exact, sampled)]
    np.testing.assert_allclose(slopes[1], slopes[0], atol=0.03)


def test_samples_are_drawn_from_the_drafter():
    q = mx.array([[0.5, 0.0, 0.3, 0.2, 0.0]])
    frequencies = sample_frequencies(q, 4000, mx.random.key(1))
    np.testing.assert_allclose(np.array(frequencies), np.array(q), atol=0.03)
    assert frequencies[0, 1] == frequencies[0, 4] == 0


def test_a_distribution_that_is_zero_in_places_gives_finite_losses():
    p, q = np.array([[1.0, 0, 0]]), np.array([[0, 1.0, 0]])
    for loss in PLAIN:
        if loss.name in ("jsd", "tvd", "nla") or loss == Loss("tvd++", epsilon=0.1):  # the others are infinite there
            value, slope = loss(distributions(p, q, reward_mean=mx.array(0.5)))
            assert mx.isfinite(value).all()
            assert mx.isfinite(slope).all()


def test_the_top_k_and_the_tails_mass_make_a_distribution_that_agrees_where_it_is_known(example):
    p, q = softmax64(example["teacher"]), softmax64(example["hidden"] @ example["head"].T)
    ids = np.argsort(-p)[:, :3]
    top = np.take_along_axis(p, ids, axis=-1)
    states = mx.array(ids), mx.array(np.log(top).astype(np.float32))
    found, log_found = probs_from_top_k(*states, mx.log(mx.array(q.astype(np.float32))))
    np.testing.assert_allclose(np.array(found).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(np.array(found), ids, axis=-1), top, atol=1e-6)
    np.testing.assert_allclose(np.exp(np.array(log_found)), np.array(found), atol=1e-6)


@pytest.mark.parametrize("scale", [1, 30, 300])
def test_the_tail_is_a_distribution_also_if_the_drafter_is_almost_sure_of_a_stored_token(scale):
    ids = mx.array([[0, 1, 2], [3, 1, 0]])
    top = mx.log(mx.array([[0.6, 0.2, 0.1], [0.5, 0.3, 0.1]]))
    logits = mx.array([[9.0, 1, 0.5, 0.2, 0.1, 0.0], [0.1, 0.2, 0.0, 5, 0.3, 0.4]]) * scale
    log_q = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    p, _ = probs_from_top_k(ids, top, log_q)
    np.testing.assert_allclose(np.array(p).sum(-1), 1, atol=1e-5)
    tails = [[3, 4, 5], [2, 4, 5]]
    for row, tail in enumerate(tails):  # in proportion to q, computed in float64
        shares = np.exp(np.array(logits[row], np.float64)[tail] - np.array(logits[row], np.float64)[tail].max())
        np.testing.assert_allclose(np.array(p)[row, tail], 0.1 * shares / shares.sum(), atol=1e-5)


def test_the_targets_logits_are_made_from_its_hidden_states_where_that_is_the_same():
    teacher = OnlineTeacher(random_llama(vocab_size=V))
    assert teacher.parts
    tokens = mx.array([[1, 2, 3]])
    states = teacher.states(tokens, mx.zeros((1, 3), mx.int32), ())
    assert states[0].shape == (1, 3, 16)
    p, _ = teacher.probs(mx.array(1.0))((states[0][0],), mx.zeros((3, V)))
    np.testing.assert_allclose(np.array(p), np.array(mx.softmax(teacher.target(tokens)[0], axis=-1)), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "tdv"}, "name is 'tdv'; use one of ce, kld"),
        ({"estimator": "0"}, "a number of samples"),
        ({"estimator": "4", "weighting": "vocabulary"}, "drawn from the drafter's distribution"),
        ({"estimator": "1"}, "one sample has no deviation"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, complaint):
    with pytest.raises(InvalidRequestError, match=complaint):
        Loss(**options)


@pytest.mark.parametrize("vocab_size", [512, 32_000, 128_256, 151_936])
def test_the_default_batch_has_at_most_256_chunks_whatever_the_vocabulary(vocab_size):
    assert 16 * 512 / chunk_rows(vocab_size) <= 256
