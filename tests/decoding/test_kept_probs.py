"""The target's distributions that a decoder keeps, against passes of the target over the finished text."""

import mlx.core as mx
import numpy as np
import pytest

from mlxspec import InvalidRequestError, ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.models.eagle import EAGLE3
from tests.conftest import decoded, random_llama
from tests.decoding.test_decoder import assert_no_buffer_is_copied, count_host_reads
from tests.models.test_eagle import random_head

K = 5


def target(**shape):
    return random_llama(7, vocab_size=40, num_hidden_layers=6, **shape)


def pairs():
    model = target()
    return {
        "nothing": ModelPair(model, None),
        "itself": ModelPair(model, model),
        "another": ModelPair(model, random_llama(8, vocab_size=40)),
        "a head": ModelPair(model, random_head(model, EAGLE3)),
        "lookup": ModelPair(model, PromptLookup()),
    }


def assert_kept_are_the_targets(model, decoder, prompt, answer):
    kept = decoder.kept_probs()
    assert (kept.prompt, kept.answer) == (prompt, answer)
    logits = np.array(model(mx.array([[*prompt, *answer]]))[0], np.float64)[len(prompt) - 1 : -1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for ids, logprobs, row in zip(kept.ids, kept.logprobs, log_p, strict=True):
        assert set(ids) == set(np.argsort(-row)[:K])
        np.testing.assert_allclose(logprobs, row[ids], atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("drafter", pairs())
def test_the_kept_distributions_are_those_of_the_target_where_each_token_was_drawn(drafter, temperature):
    pair = pairs()[drafter]
    length = 0 if drafter == "nothing" else 3
    decoder = SpeculativeDecoder(pair, Sampling(temperature, top_p=0.9, seed=1), length, keep_top_k=K)
    for prompt in ([3], list(range(30)), [*range(30), 5, 6], [2, 2]):  # some share a prefix with the one before
        answer = decoded(decoder, prompt, 50)
        assert_kept_are_the_targets(pair.target, decoder, prompt, answer)


def test_keeping_distributions_changes_no_token():
    model = target()
    for sampling in (None, Sampling(1.0, seed=3)):
        texts = [
            decoded(SpeculativeDecoder(ModelPair(model, model), sampling, 3, keep_top_k=k), [1, 2], 60) for k in (0, K)
        ]
        assert texts[0] == texts[1]


def test_a_stream_that_is_abandoned_or_in_another_turn_keeps_what_was_emitted():
    model = target()
    decoder = SpeculativeDecoder(ModelPair(model, model), None, 3, keep_top_k=K)
    blocks, answer = decoder.blocks([1, 2, 3], 100), []
    for _ in range(5):
        answer += next(blocks).tokens
    blocks.close()
    assert_kept_are_the_targets(model, decoder, [1, 2, 3], answer)
    second = [1, 2, 3, *answer, 7, 8]
    assert_kept_are_the_targets(model, decoder, second, decoded(decoder, second, 20))
    blocks = decoder.blocks(second, 10)
    blocks.close()
    decoder.forget()
    kept = decoder.kept_probs()
    assert (kept.prompt, kept.answer, kept.ids.shape) == ([], [], (0, K))


def test_one_host_read_per_block_while_distributions_are_kept(monkeypatch):
    model = target()
    blocks = SpeculativeDecoder(ModelPair(model, model), Sampling(1.0, seed=0), 3, keep_top_k=K).blocks([1, 2, 3], 300)
    next(blocks)
    reads = count_host_reads(monkeypatch)
    assert reads == {"tolist": sum(1 for _ in blocks)}


def test_a_block_copies_no_buffer_while_distributions_are_kept():
    model = random_llama(hidden_size=256, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=4)
    assert_no_buffer_is_copied(lambda: SpeculativeDecoder(ModelPair(model, model), None, 3, keep_top_k=64))


@pytest.mark.parametrize("count", [-1, 1])
def test_a_number_of_tokens_that_cannot_be_trained_on_is_refused(count):
    with pytest.raises(InvalidRequestError, match="keep_top_k is"):
        SpeculativeDecoder(ModelPair(target(), None), keep_top_k=count)


def test_at_most_all_tokens_but_one_are_kept():
    decoder = SpeculativeDecoder(ModelPair(target(), None), keep_top_k=100)
    answer = decoded(decoder, [1], 5)
    assert decoder.kept_probs().ids.shape == (len(answer), 39)


def test_a_decoder_that_keeps_nothing_says_so():
    with pytest.raises(InvalidRequestError, match="make it with keep_top_k"):
        SpeculativeDecoder(ModelPair(target(), None)).kept_probs()
