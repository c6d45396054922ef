"""The parts of a block add up to it, and the speed at each draft length is measured, and predicted."""

import mlx.core as mx
import pytest

from mlxspec import InvalidRequestError, ModelPair, Sampling
from mlxspec.decoding.acceptance import MENU
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import MODEL, PLAIN, Choice
from mlxspec.evaluation import profile as profiling
from mlxspec.evaluation.profile import PARTS, calibrated, predicted, profile
from tests.conftest import random_llama

VERIFICATION, DEVICE, DRAFTING = 0.010, 0.016, 0.004  # seconds, in the order in which they are timed


@pytest.mark.parametrize("block", [0.017, 0.015])  # the second by noise: the host's remainder is negative
def test_a_profile_has_the_parts_that_were_measured_and_they_add_up_to_the_block(demo, monkeypatch, block):
    taken = iter([VERIFICATION, DEVICE, DRAFTING])

    class Timer:
        def __init__(self, step, state, group=None):
            self.seconds = next(taken)

        def __call__(self):
            return self.seconds

    monkeypatch.setattr(profiling, "Timer", Timer)
    monkeypatch.setattr(profiling, "seconds_per_block", lambda decoder, length: block)
    found = profile(demo, Sampling(), 3)
    expected = {"drafting": 0.004, "verification": 0.010, "acceptance": 0.002, "host": block - 0.016, "block": block}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert sum(found[part] for part in PARTS) == pytest.approx(found["block"])
    assert found["overhead"] == pytest.approx((block - 0.014) / block)


def test_the_parts_of_a_measured_block_add_up_to_it(record):
    found = record["profile"]
    assert sum(found[part] for part in PARTS) == pytest.approx(found["block"])
    assert min(found[name] for name in ("drafting", "verification", "block")) > 0


def test_a_profile_is_of_whole_blocks_whatever_the_context_and_whenever_the_text_ends(demo):
    """A target that says EOS at once, with room for 20 tokens."""
    ending = random_llama(vocab_size=2048, max_position_embeddings=20)
    ending.lm_head.weight = mx.zeros_like(ending.lm_head.weight)  # token 0 at temperature 0
    found = profile(ModelPair(ending, random_llama(1, vocab_size=2048), demo.tokenizer), Sampling(), 3, rounds=2)
    assert found["block"] > 0.5 * found["verification"] > 0


def test_without_a_drafter_there_is_nothing_to_profile(demo):
    with pytest.raises(InvalidRequestError, match="there is no drafter to measure"):
        profile(ModelPair(demo.target, None, demo.tokenizer), Sampling(), 3)
    with pytest.raises(InvalidRequestError, match="there is no drafter to measure"):
        calibrated(ModelPair(demo.target, None, demo.tokenizer), [[1]], Sampling(), 1, 4)


def test_the_calibration_has_every_length_and_is_1_without_a_draft(record):
    lengths = record["calibration"]["lengths"]
    assert [entry["draft_length"] for entry in lengths] == list(MENU)
    assert lengths[0]["predicted"] == lengths[0]["measured"] == 1
    assert all(entry["predicted"] > 0 and entry["measured"] > 0 and entry["verify"] > 0 for entry in lengths)
    assert record["calibration"]["auto"]["measured"] > 0


def test_the_prediction_is_tokens_over_the_time_of_the_blocks():
    costs = BlockCosts(rows={1: 1.0, 17: 1.0}, draft_once=0.5, draft_step=0.25)
    assert predicted(costs, PLAIN, [], 12) == 1
    # Always accepted: 4 blocks of 3 tokens, each 1 + 0.5 + 2 * 0.25 seconds.
    assert predicted(costs, Choice(MODEL, 2), [1.0, 1.0], 12) == pytest.approx(12 / (4 * 2.0))
