"""What a block is expected to yield follows from the blocks and the text so far."""

import itertools
import random

import mlx.core as mx
import pytest

from mlxspec import PromptLookup
from mlxspec.decoding.acceptance import (
    LONGEST,
    MENU,
    POSITION_WEIGHT,
    Acceptance,
    LookupReplay,
    Replay,
    expected_blocks,
    expected_tokens,
)
from mlxspec.decoding.drafting import LookupProposer


def test_acceptance_is_counted_by_position_given_those_before():
    acceptance = Acceptance(memory=1.0)
    for accepted in (0, 1, 3, 3) * 1000:
        acceptance.observe(3, accepted)
    assert acceptance.rates()[:3] == pytest.approx([3 / 4, 2 / 3, 1], abs=0.002)


def test_a_position_that_was_never_tried_has_the_average_of_the_others():
    acceptance = Acceptance(memory=1.0)
    for accepted in (0, 1) * 1000:
        acceptance.observe(1, accepted)
    assert acceptance.rates() == pytest.approx([0.5] * LONGEST, abs=0.001)


def test_before_anything_was_drafted_every_position_has_the_prior():
    assert Acceptance(rate=0.6).rates() == pytest.approx([0.6] * LONGEST)


def test_old_blocks_fade():
    acceptance = Acceptance(memory=0.9)
    for _ in range(100):
        acceptance.observe(4, 4)
    for _ in range(50):
        acceptance.observe(4, 0)
    assert acceptance.rates()[0] < 0.2
    assert sum(acceptance.tried) < 4 * 10 + POSITION_WEIGHT


def test_expected_tokens_of_equal_rates_is_the_geometric_sum():
    for rate in (0.0, 0.3, 0.9):
        expected = [(1 - rate ** (length + 1)) / (1 - rate) for length in range(LONGEST + 1)]
        assert expected_tokens([rate] * LONGEST) == pytest.approx(expected)
        assert Acceptance(rate).expected() == pytest.approx(dict(enumerate(expected)))


@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("length", [0, 1, 4, 8])
def test_expected_blocks_are_those_of_many_drafted_answers(length, tokens):
    rng, rates, blocks = random.Random(length), [0.9, 0.5, 0.8, 0.7, *[0.9] * 4], 0
    for _ in range(4000):
        missing = tokens
        while missing > 0:
            missing -= 1 + next((i for i in range(length) if rng.random() >= rates[i]), length)
            blocks += 1
    assert expected_blocks(rates, length, tokens) == pytest.approx(blocks / 4000, rel=0.03)


@pytest.mark.parametrize("length", MENU[1:])
def test_the_replay_decodes_the_text_as_the_proposer_would(length, monkeypatch):
    """Block by block, each tally is that of a decoder that drafts by lookup and is right where the text says so."""
    monkeypatch.setattr("mlxspec.decoding.acceptance.TOKEN_MEMORY", 1.0)
    rng = random.Random(3)
    text = [rng.randrange(4) for _ in range(30)] + [5, 6, 7, 8, 9] * 6 + [rng.randrange(4) for _ in range(30)]
    replay, proposer = LookupReplay(3), LookupProposer(PromptLookup(3), 10)
    replay.start(text[:5])
    replay.extend(text[5:])
    lengths, end = [], 6  # the first token after the prompt was not drafted: it tells nothing
    while end < len(text):
        state = proposer.start([], text[:end], 0, lambda tokens: None, [])
        drafted, _, _ = proposer.propose(state, mx.array(text[end - 2 : end]), mx.array(end), mx.zeros(length))
        following = text[end : end + length]
        wrong = (i for i, (a, b) in enumerate(itertools.zip_longest(drafted.tolist(), following)) if a != b)
        lengths.append(next(wrong, length) + 1)
        end += lengths[-1]
    finished = lengths if end == len(text) else lengths[:-1]
    (mine,) = (one for one in replay.replays if one.length == length)
    prior = Replay(length)
    assert mine.blocks - prior.blocks == len(finished)
    assert mine.tokens - prior.tokens == pytest.approx(sum(finished))
    assert max(finished) == length + 1


def test_the_replay_knows_a_repetition_from_noise():
    rng = random.Random(0)
    noise, repeating = LookupReplay(3), LookupReplay(3)
    noise.extend([rng.randrange(10_000) for _ in range(200)])
    repeating.start(range(20))
    repeating.extend(list(range(20)) * 10)
    assert max(noise.expected().values()) < 1.05
    assert all(tokens > 0.9 * (length + 1) for length, tokens in repeating.expected().items())


def test_short_drafts_are_worth_something_where_phrases_recur_between_new_words():
    """The failures of long drafts say nothing about short ones: phrases of 12 tokens, 4 new words between them."""
    rng, phrase, text = random.Random(1), list(range(100, 112)), []
    for _ in range(30):
        text += [*phrase, *(rng.randrange(1000, 9999) for _ in range(4))]
    replay = LookupReplay(3)
    replay.extend(text)
    expected = replay.expected()
    assert expected[4] == pytest.approx(16 / 8, abs=0.5)
    assert expected[1] > 1.4
