"""Decoding with EAGLE heads. The oracle drafts from scratch, without a cache, for every block."""

import itertools

import mlx.core as mx
import pytest

from mlxspec import ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding.drafting import LOOKUP, MODEL, PLAIN, Choice
from mlxspec.decoding.policy import Fixed
from mlxspec.decoding.verification import RULES
from mlxspec.models.eagle import EAGLE1, EAGLE3
from tests.conftest import decoded, plain_greedy, random_llama
from tests.decoding.test_decoder import (
    SAMPLINGS,
    assert_emits_the_targets_distribution,
    assert_memory_is_bounded,
    assert_no_buffer_is_copied,
    count_host_reads,
    markov_target,
    small_buffers,
)
from tests.models.test_eagle import oracle, random_head, states_of

LAYOUTS = [EAGLE1, EAGLE3]


def few_tokens():
    """A target of so few tokens that a random head is often right."""
    return random_llama(11, vocab_size=4, num_hidden_layers=6)


class InTurn(Fixed):
    """Makes each choice of a list in turn."""

    def __init__(self, *choices):
        super().__init__(choices[0])
        self.choices, self.made = itertools.cycle(choices), []
        self.next = next(self.choices)

    def choose(self, missing):
        return self.next

    def observe(self, choice, tokens, accepted, unread):
        self.made.append((choice, accepted))
        self.next = next(self.choices)

    def expected_tokens(self, choice):
        return float("inf")  # so that one block is in flight, and the choices come in turn


def expected_acceptance(reference, model, head, text, made):
    """How many drafted tokens of each block with the head are accepted, at temperature 0."""
    states, accepted, end = states_of(model, head, text), [], len(text) - sum(count + 1 for _, count in made)
    for choice, count in made:
        if choice.proposer == MODEL:
            drafted, _ = reference.draft(text[:end], states, choice.length)
            matches = [ours == theirs for ours, theirs in zip(drafted, text[end:], strict=False)]
            accepted.append(len(list(itertools.takewhile(bool, matches))))
        end += count + 1
    return accepted


@pytest.mark.parametrize("prompt", [[2], [1, 3], [0, 1, 2, 3] * 5], ids=len)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_draft_is_the_one_that_a_head_without_a_cache_would_make(tmp_path, layout, prompt):
    model = few_tokens()
    head = random_head(model, layout, seed=9)
    policy = InTurn(Choice(MODEL, 3), Choice(MODEL, 1), Choice(MODEL, 5))
    decoder = SpeculativeDecoder(ModelPair(model, head), policy=policy)
    answer = decoded(decoder, prompt, 60)
    assert answer == plain_greedy(model, prompt, 60)
    made = policy.made[:-1]  # the last one is cut
    text = [*prompt, *answer][: len(prompt) + sum(accepted + 1 for _, accepted in made)]
    expected = expected_acceptance(oracle(head, model, tmp_path), model, head, text, made)
    assert [accepted for _, accepted in made] == expected
    assert 0 < sum(expected) < 3 * len(expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_that_was_idle_drafts_as_if_it_had_never_been(tmp_path, layout):
    model = few_tokens()
    head = random_head(model, layout, seed=9)
    turns = [Choice(MODEL, 2), PLAIN, Choice(LOOKUP, 3), Choice(MODEL, 3), Choice(LOOKUP, 1), PLAIN, PLAIN]
    policy = InTurn(*turns)
    decoder = SpeculativeDecoder(ModelPair(model, head, lookup=PromptLookup()), policy=policy)
    for prompt in ([1, 2], [1, 2, 3, 0, 1], [3] * 300, [3] * 290 + [1]):
        policy.made.clear()
        answer = decoded(decoder, prompt, 80)
        assert answer == plain_greedy(model, prompt, 80)
        made = policy.made[:-1]
        text = [*prompt, *answer][: len(prompt) + sum(accepted + 1 for _, accepted in made)]
        expected = expected_acceptance(oracle(head, model, tmp_path), model, head, text, made)
        assert [accepted for choice, accepted in made if choice.proposer == MODEL] == expected


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", ["none", "NaN", "zeros"])
@pytest.mark.parametrize("rule", RULES)
def test_greedy_text_equals_plain_decoding_with_any_head(rule, damage, layout):
    model = random_llama(5, vocab_size=60, num_hidden_layers=6, scale=4)
    head = random_head(model, layout, seed=9)
    if damage != "none":
        head.fc.weight = mx.full(head.fc.weight.shape, mx.nan if damage == "NaN" else 0.0)
    for draft_length in (1, 4, "auto"):
        decoder = SpeculativeDecoder(ModelPair(model, head), None, draft_length, rule)
        for prompt in ([5], list(range(40)), [7, 8, 9] * 200):
            assert decoded(decoder, prompt, 50) == plain_greedy(model, prompt, 50)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("draft_length", [1, 3, 8, "auto"])
@pytest.mark.parametrize("rule", RULES)
def test_greedy_text_of_the_story_model_equals_plain_decoding(stories, stories_greedy, rule, draft_length, layout):
    head = random_head(stories, layout, read_layers=[0, 2, 4] if layout == EAGLE3 else None)
    decoder = SpeculativeDecoder(ModelPair(stories, head), None, draft_length, rule)
    assert decoded(decoder, [1], 500) == stories_greedy


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_the_emitted_distribution_is_the_targets(rule, layout):
    head = random_head(markov_target(), layout, seed=4, read_layers=[0, 0, 0] if layout == EAGLE3 else None)
    assert_emits_the_targets_distribution(rule, SAMPLINGS[0], head, 3, 2500)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_the_emitted_distribution_is_the_targets_for_every_combination(rule, sampling):
    head = random_head(markov_target(), EAGLE3, seed=4, tokens=[0, 2, 3], read_layers=[0, 0, 0])
    assert_emits_the_targets_distribution(rule, sampling, head, 4, 3500)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_host_read_per_block(monkeypatch, layout):
    model = random_llama(vocab_size=50, num_hidden_layers=6)
    decoder = SpeculativeDecoder(ModelPair(model, random_head(model, layout)), Sampling(1.0, seed=0), 3)
    blocks = decoder.blocks([1, 2, 3], 400)
    next(blocks)
    reads = count_host_reads(monkeypatch)
    assert reads == {"tolist": sum(1 for _ in blocks)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_prompt_on_the_same_decoder_equals_a_fresh_one(layout):
    model = random_llama(vocab_size=6, num_hidden_layers=6)
    pair = ModelPair(model, random_head(model, layout))
    sampling = Sampling(1.0, seed=5)
    used = SpeculativeDecoder(pair, sampling, 3)
    long, short = [n % 6 for n in range(300)], [3, 4, 5]
    for prompt in (long, short, long[:250] + short, long, [1]):
        fresh = SpeculativeDecoder(pair, sampling, 3)
        assert decoded(used, prompt, 90) == decoded(fresh, prompt, 90)
        assert used.stats.accepted == fresh.stats.accepted


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_beyond_the_buffers_does_not_grow_over_5000_tokens(layout):
    model = small_buffers(num_hidden_layers=6)
    pair = ModelPair(model, random_head(model, layout))
    assert_memory_is_bounded(SpeculativeDecoder(pair, Sampling(1.0, seed=0), 4), count=5000)


def test_a_head_that_replaces_another_drafter_of_a_pair_drafts():
    model = few_tokens()
    pair = ModelPair(model, None)
    pair.drafter = random_head(model, EAGLE3, seed=9)
    decoder = SpeculativeDecoder(pair, None, 3)
    assert decoded(decoder, [1, 2], 30) == plain_greedy(model, [1, 2], 30)
    assert decoder.stats.drafted > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_head_trained_further_drafts_with_its_new_weights(layout):
    model = few_tokens()
    head = random_head(model, layout, seed=9)
    decoder = SpeculativeDecoder(ModelPair(model, head), None, 3)
    decoded(decoder, [1, 2], 60)
    head.update(random_head(model, layout, seed=2).parameters())
    decoded(decoder, [1, 2], 60)
    fresh = SpeculativeDecoder(ModelPair(model, random_head(model, layout, seed=2)), None, 3)
    decoded(fresh, [1, 2], 60)
    assert decoder.stats.accepted == fresh.stats.accepted


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_block_copies_neither_a_cache_nor_the_hidden_states(layout):
    model = random_llama(hidden_size=256, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=6)
    head = random_head(model, layout)
    assert_no_buffer_is_copied(lambda: SpeculativeDecoder(ModelPair(model, head), None, 3))
