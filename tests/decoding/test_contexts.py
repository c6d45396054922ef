"""No model is asked for positions beyond its context: a table of positions would be read beyond its end."""

import mlx.core as mx
import pytest
from mlx_lm.models import gpt2

from mlxspec import ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding import calibration
from mlxspec.decoding.drafting import MODEL, IdleStates
from tests.conftest import decoded, plain_greedy, random_llama

VOCAB = 50


def tiny_gpt2(context: int) -> gpt2.Model:
    """A model with a learned table of positions."""
    mx.random.seed(context)
    args = gpt2.ModelArgs(model_type="gpt2", n_ctx=context, n_embd=32, n_head=4, n_layer=2, n_positions=context,
                          layer_norm_epsilon=1e-5, vocab_size=VOCAB)  # fmt: skip
    model = gpt2.Model(args)
    mx.eval(model.parameters())
    return model


@pytest.fixture
def asked(monkeypatch):
    """Record (target's positions, drafter's positions) that blocks and prefills need at most."""
    positions = {"target": 0, "drafter": 0}
    launch, take = SpeculativeDecoder._launch, IdleStates.take

    def recorded(self, choice, in_flight):
        end = self._longest(in_flight) + choice.length
        positions["target"] = max(positions["target"], end)
        if choice.proposer == MODEL:
            positions["drafter"] = max(positions["drafter"], end - 1)  # the last drafted token is not read
        return launch(self, choice, in_flight)

    def recorded_take(self, name, tokens, *rest):
        if name == MODEL:
            positions["drafter"] = max(positions["drafter"], len(tokens) - 2)
        return take(self, name, tokens, *rest)

    monkeypatch.setattr(SpeculativeDecoder, "_launch", recorded)
    monkeypatch.setattr(IdleStates, "take", recorded_take)
    return positions


@pytest.mark.parametrize("draft_length", [1, 4, 20, "auto"])
@pytest.mark.parametrize("length", [1, 40, 60, 62, 63, 64, 65, 200])
def test_a_drafter_is_never_asked_beyond_its_own_context(asked, length, draft_length):
    target, drafter = random_llama(vocab_size=VOCAB, scale=4), tiny_gpt2(64)
    prompt = [(7 * n) % VOCAB for n in range(length)]
    pair = ModelPair(target, drafter, drafter_context_length=64)
    decoder = SpeculativeDecoder(pair, None, draft_length)
    assert decoded(decoder, prompt, 90) == plain_greedy(target, prompt, 90)
    assert asked["drafter"] <= 64
    if draft_length in (1, 4) and length < 59:
        assert asked["drafter"] > 55  # it drafts as long as it can


@pytest.mark.parametrize("draft_length", [0, 1, 4, 20, "auto"])
@pytest.mark.parametrize("length", [1, 30, 43, 60, 62, 63])
def test_a_target_is_never_asked_beyond_its_own_context_in_any_row(asked, length, draft_length):
    target = tiny_gpt2(64)
    prompt = [(7 * n) % VOCAB for n in range(length)]
    decoder = SpeculativeDecoder(ModelPair(target, target, context_length=64), None, draft_length)
    expected = plain_greedy(target, prompt, 64 - length)
    assert decoded(decoder, prompt, -1) == expected
    assert decoded(decoder, prompt, 1000) == expected
    assert asked["target"] <= 64


def test_prompt_lookup_drafts_where_the_text_has_outgrown_the_drafter(asked):
    target = random_llama(vocab_size=VOCAB, scale=4)
    pair = ModelPair(target, tiny_gpt2(64), drafter_context_length=64, lookup=PromptLookup())
    decoder = SpeculativeDecoder(pair)
    prompt = [1, 2, 3, 4, 5] * 40
    assert decoded(decoder, prompt, 60) == plain_greedy(target, prompt, 60)
    assert asked["drafter"] == 0
    assert MODEL not in decoder.stats.blocks_by


def test_a_short_text_after_a_long_one_is_drafted_again(asked):
    target = tiny_gpt2(1024)
    pair = ModelPair(target, tiny_gpt2(64), context_length=1024, drafter_context_length=64)
    decoder = SpeculativeDecoder(pair, Sampling(0.0), 3)
    for prompt in ([1] * 30, [2] * 200, [1] * 30):
        assert decoded(decoder, prompt, 20) == plain_greedy(target, prompt, 20)
        assert (MODEL in decoder.stats.blocks_by) == (len(prompt) < 64)


@pytest.mark.parametrize("context", [5, 20, 64, 200, 1024])
def test_costs_are_measured_within_the_contexts(monkeypatch, context):
    """The positions that a timer reaches: those of all steps that it queues."""
    reached = {"target": 0, "drafter": 0}
    states = {"block_state": ("target", 4), "draft_state": ("drafter", 3)}
    for function, (model, argument) in states.items():
        original = getattr(calibration, function)

        def recorded(*arguments, original=original, model=model, argument=argument):
            reached[model] = max(reached[model], arguments[argument - 1])
            return original(*arguments)

        monkeypatch.setattr(calibration, function, recorded)
    model = tiny_gpt2(max(context, 8))
    pair = ModelPair(model, model, context_length=context, drafter_context_length=context)
    compiled = SpeculativeDecoder(pair).compiled
    for name in calibration.names(compiled):
        length = calibration.text_length(compiled, name)
        steps = calibration.QUEUED * max(1, calibration.number_in(name))
        assert max(2, length) + steps <= max(context, 5)
    calibration.calibrate(compiled, again=True)
    assert 0 < reached["target"] < max(context, 3)


@pytest.mark.slow
def test_a_gpt2_of_full_size_drafts_for_a_prompt_far_beyond_its_table():
    args = gpt2.ModelArgs(model_type="gpt2", n_ctx=1024, n_embd=768, n_head=12, n_layer=2, n_positions=1024,
                          layer_norm_epsilon=1e-5, vocab_size=VOCAB)  # fmt: skip
    drafter, target = gpt2.Model(args), random_llama(vocab_size=VOCAB, scale=4, max_position_embeddings=40_000)
    prompt = [(7 * n) % VOCAB for n in range(12_000)]
    pair = ModelPair(target, drafter, drafter_context_length=1024)
    for length in (4, "auto"):
        assert decoded(SpeculativeDecoder(pair, None, length), prompt, 20) == plain_greedy(target, prompt, 20)
