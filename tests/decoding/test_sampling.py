import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_sampler

import mlxspec
from mlxspec import Sampling
from mlxspec.decoding import sampling as sampling_module
from mlxspec.decoding.sampling import COLDEST, HOTTEST, draw


def reference_probs(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Top-p, min-p, top-k on the model's own probabilities, then temperature: one row, in float64."""
    logits = logits.astype(np.float64)
    if sampling.temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    if sampling.top_p < 1:
        mass_above = np.cumsum(probs[order]) - probs[order]
        probs[order[mass_above >= sampling.top_p]] = 0
    probs[probs < sampling.min_p * probs.max()] = 0
    if sampling.top_k:
        probs[order[sampling.top_k :]] = 0
    with np.errstate(divide="ignore"):
        scaled = np.log(probs) / sampling.temperature
    kept = np.exp(scaled - scaled.max())
    return kept / kept.sum()


CASES = [
    Sampling(),
    Sampling(1.0),
    Sampling(0.7),
    Sampling(1.5, top_p=0.8),
    Sampling(1.0, top_k=3),
    Sampling(0.5, min_p=0.1),
    Sampling(0.9, top_p=0.9, top_k=5, min_p=0.05),
    Sampling(1.0, top_k=1),
    Sampling(1e-4),
    Sampling(50.0),
]


@pytest.mark.parametrize("sampling", CASES, ids=str)
def test_probs_are_those_of_the_plain_formula(sampling):
    logits = np.random.default_rng(0).normal(size=(20, 40), scale=3).astype(np.float32)
    expected = np.stack([reference_probs(row, sampling) for row in logits])
    np.testing.assert_allclose(np.array(sampling.probs(mx.array(logits))), expected, atol=1e-5)


def test_filtered_probs_are_those_that_mlx_lm_samples_from():
    sampling = Sampling(0.8, top_p=0.9, top_k=6, min_p=0.05)
    logits = mx.random.normal((1, 12), key=mx.random.key(3)) * 2
    sampler = make_sampler(temp=0.8, top_p=0.9, top_k=6, min_p=0.05)
    mx.random.seed(0)
    logprobs = mx.broadcast_to(logits - mx.logsumexp(logits), (40000, 12))
    counts = np.bincount(np.array(sampler(logprobs)), minlength=12) / 40000
    np.testing.assert_allclose(counts, np.array(sampling.probs(logits))[0], atol=0.01)


def test_temperature_zero_is_one_hot_even_when_logits_tie():
    assert Sampling().probs(mx.array([1.0, 3.0, 3.0])).tolist() == [0, 1, 0]


def test_the_coldest_and_hottest_temperatures_do_not_overflow():
    assert Sampling(COLDEST).probs(mx.array([1e4, 2e4, -1e4])).tolist() == [0, 1, 0]
    assert Sampling(HOTTEST, top_p=0.9).probs(mx.array([1.0, 2.0, 3.0])).sum().item() == pytest.approx(1)


def test_draw_follows_the_weights():
    weights = mx.array([0.0, 0.2, 0.0, 0.5, 0.3])
    uniforms = (mx.arange(10000) + 0.5) / 10000
    drawn = np.array(draw(mx.broadcast_to(weights, (10000, 5)), uniforms))
    assert (np.bincount(drawn, minlength=5) / 10000).tolist() == [0, 0.2, 0, 0.5, 0.3]


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24, math.nextafter(1, 0), 1.0])
def test_draw_never_takes_a_token_of_weight_zero(uniform):
    for weights in ([0, 0, 1e-30, 0], [0.1] * 7 + [0], [0, 1, 0], [3e-39, 0.0]):
        weights = mx.array(weights, mx.float32)
        assert weights[draw(weights, mx.array(uniform))].item() > 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 1e-46),
        ("temperature", 1e39),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", -0.1),
        ("min_p", 1.01),
        ("seed", -1),
        ("seed", 2**64),
    ],
)
def test_a_value_out_of_range_is_named(option, value):
    with pytest.raises(mlxspec.InvalidRequestError, match=option.replace("_", "-")):
        Sampling(**{option: value})


def test_every_sampling_field_explains_itself():
    assert all(field.metadata["help"] for field in sampling_module.fields(Sampling))
