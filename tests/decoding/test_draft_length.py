"""The choice of who drafts how many tokens is the best one by what was measured, and never changes the text."""

import itertools
import random
from dataclasses import replace

import mlx.core as mx
import pytest

from mlxspec import ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding.choice import (
    LONGEST_CHOICE,
    LOOKUP,
    MODEL,
    PLAIN,
    STEPWISE,
    Acceptance,
    BlockCosts,
    Choice,
    expected_blocks,
    expected_tokens,
)
from mlxspec.decoding.draft_length import PROBE_BLOCKS, PROBE_SHARE, Automatic, Fixed
from mlxspec.decoding.drafting import LookupProposer, ModelProposer
from mlxspec.decoding.lookup_watch import LookupWatch
from tests.conftest import decoded, plain_greedy, random_llama

CHEAP_ROWS = tuple(1 + 0.05 * rows for rows in range(LONGEST_CHOICE + 1))
LINEAR_ROWS = tuple(1.0 * (rows + 1) for rows in range(LONGEST_CHOICE + 1))


def costs(draft: float, verify=CHEAP_ROWS, trace=0.5) -> BlockCosts:
    return BlockCosts(verify, {MODEL: 0.01, LOOKUP: 0.0}, {MODEL: draft, LOOKUP: 0.0}, {MODEL: 0.01}, trace, 0.01)


def simulated(chooser: Automatic, rate: float, blocks: int, seed: int = 0) -> tuple[list[Choice], float]:
    """What a chooser chooses while each drafted token is accepted with probability ``rate``, which the drafter knows.

    -> the choices, tokens per second
    """
    rng, chosen, behind, tokens, seconds = random.Random(seed), [], 0, 0, 0.0
    chooser.begin([1, 2, 3], blocks, 0)
    for _ in range(blocks):
        choice, draft = chooser.choice, None
        if choice == STEPWISE:
            draft = chooser.draft(LONGEST_CHOICE)
            while count := draft.wanted:
                draft.take([rate] * count)
            seconds += chooser.costs.stepwise(draft.length, draft.steps, draft.reads)
        else:
            seconds += chooser.costs.block(choice)
        length = draft.length if draft else choice.length
        accepted = next((i for i in range(length) if rng.random() >= rate), length)
        tokens += accepted + 1
        chosen.append(choice)
        behind = 0 if choice.proposer == MODEL else behind + accepted + 1
        chooser.observe(choice, [0] * (accepted + 1), accepted, behind, draft)
    return chosen, tokens / seconds


@pytest.mark.parametrize(("rate", "draft"), [(0.9, 0.02), (0.7, 0.1), (0.5, 0.05), (0.3, 0.3), (0.0, 0.1), (0.6, 1.0)])
@pytest.mark.parametrize("verify", [CHEAP_ROWS, LINEAR_ROWS], ids=["cheap rows", "linear rows"])
def test_it_settles_within_a_few_percent_of_the_best_length(rate, draft, verify):
    table = costs(draft, verify)
    chooser = Automatic(table, [MODEL])
    simulated(chooser, rate, 100)
    best = max(expected_tokens([rate] * 16, n) / table.block(Choice(MODEL, n)) for n in range(17))
    assert simulated(chooser, rate, 2000)[1] > 0.95 * best


def test_a_hopeless_drafter_costs_next_to_nothing():
    chooser = Automatic(costs(0.1), [MODEL])
    simulated(chooser, 0.0, 20)
    chosen, rate = simulated(chooser, 0.0, 3000)
    assert rate > 0.97
    assert STEPWISE in chosen[20:]  # it is tried again now and then


def test_a_drafter_that_could_not_win_if_it_were_always_right_is_never_tried_again():
    assert set(simulated(Automatic(costs(0.5, LINEAR_ROWS), [MODEL]), 1.0, 500)[0]) == {PLAIN}


def test_a_drafter_that_has_become_good_is_found_out():
    chooser = Automatic(costs(0.1), [MODEL])
    assert simulated(chooser, 0.0, 300)[0][-100:].count(PLAIN) > 80
    assert simulated(chooser, 0.95, 3000)[0][-1] == STEPWISE


def test_a_long_prompt_is_not_read_by_the_drafter_for_a_short_answer():
    chooser = Automatic(costs(0.02), [MODEL])
    chooser.begin([1] * 4000, 8, 4000)
    for _ in range(8):
        assert chooser.choice == PLAIN
        chooser.observe(PLAIN, [5], 0, 4000)
    chooser.begin([1] * 4000, 2000, 4000)
    assert chooser.choice.proposer == MODEL


def test_a_new_length_is_traced_when_it_has_cost_as_much_not_to():
    chooser = Automatic(costs(0.1, trace=20.0), [LOOKUP], LookupWatch(3))
    chooser.begin([5, 6, 7], 1000, 0)
    first = chooser.choice
    chooser.watch.acceptance.prior = 0.9, 1e9  # as if the text had turned out to be one long copy
    best, lost = chooser.rate(Choice(LOOKUP, 16)), 0.0
    for _ in range(500):
        if chooser.choice != first:
            break
        lost += chooser.costs.block(first) * (1 - chooser.rate(first) / best)
        chooser.observe(first, [0], 0, 0)
    assert chooser.choice == Choice(LOOKUP, 16)
    assert 20 <= lost < 22


def test_a_drafter_that_pays_behind_a_short_text_is_left_when_the_rows_cost_too_much_behind_a_long_one():
    table = replace(costs(0.1), longer=(0.001, 0.001, 0.0))  # two rows cost nearly what two passes do then
    chooser = Automatic(table, [MODEL])
    assert simulated(chooser, 0.7, 100)[0][-1] == STEPWISE
    chooser.begin([1] * 4000, 1000, 0)
    assert chooser.costs.verify[0] == pytest.approx(1 + 0.001 * (4096 - 256))
    for _ in range(100):
        draft = chooser.draft(8) if chooser.choice == STEPWISE else None
        while draft and draft.wanted:
            draft.take([0.7] * draft.wanted)
        chooser.observe(chooser.choice, [0, 0], 0, 0, draft)
    assert chooser.choice == PLAIN
    chooser.begin([1, 2], 1000, 0)
    assert chooser.costs == costs(0.1)


def test_the_same_past_gives_the_same_choice():
    assert simulated(Automatic(costs(0.1), [MODEL]), 0.6, 300) == simulated(Automatic(costs(0.1), [MODEL]), 0.6, 300)


def test_acceptance_is_counted_by_position_given_those_before():
    acceptance = Acceptance(rate=0.5, weight=1e-9)
    for accepted in (0, 1, 3, 3):
        acceptance.observe(3, accepted)
    first, second, third, *_ = acceptance.rates
    assert first == pytest.approx(3 / 4, abs=0.02)
    assert second == pytest.approx(2 / 3, abs=0.02)
    assert third == pytest.approx(1, abs=0.02)


def test_expected_tokens_of_equal_rates_is_the_geometric_sum():
    for rate, length in itertools.product([0.0, 0.3, 0.9], [0, 1, 4, 16]):
        assert expected_tokens([rate] * 16, length) == pytest.approx((1 - rate ** (length + 1)) / (1 - rate))


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


def test_the_watch_replays_prompt_lookup_block_after_block():
    """Its tally is that of a decoder that drafts 16 tokens a block by lookup and is right where the text says so."""
    rng = random.Random(3)
    text = [rng.randrange(4) for _ in range(30)] + [5, 6, 7, 8, 9] * 6 + [rng.randrange(4) for _ in range(30)]
    watch, proposer, tally = LookupWatch(3), LookupProposer(PromptLookup(3), 10), []
    watch.acceptance.observe = lambda drafted, accepted: tally.append((drafted, accepted))
    watch.begin(text[:5])
    watch.extend(text[5:])
    expected, end = [], 6  # the first token tells nothing: it was not drafted
    while end < len(text):
        state = proposer.start([], text[:end], 0, lambda tokens: None)
        drafted, _, _ = proposer.propose(state, mx.array(text[end - 2 : end]), mx.array(end), mx.zeros(16))
        following = text[end : end + 16]
        accepted = next((i for i, (a, b) in enumerate(zip(drafted.tolist(), following, strict=False)) if a != b), 16)
        end += accepted + 1
        expected.append((16, accepted))
    assert tally == expected[: len(tally)]
    assert len(expected) - len(tally) <= 1
    assert (16, 16) in tally


def test_the_watch_knows_a_repetition_from_noise():
    rng = random.Random(0)
    noise, repeating = LookupWatch(3), LookupWatch(3)
    noise.extend([rng.randrange(10_000) for _ in range(200)])
    repeating.begin(range(20))
    repeating.extend(list(range(20)) * 10)
    assert noise.acceptance.rates[0] < 0.05
    assert min(repeating.acceptance.rates) > 0.9


def test_lookup_is_chosen_where_the_text_repeats_itself_and_left_where_it_does_not():
    chooser = Automatic(costs(0.1), [LOOKUP], LookupWatch(3))
    chooser.begin([5, 6, 7], 1000, 0)
    rng = random.Random(0)
    for _ in range(60):
        chooser.observe(chooser.choice, [rng.randrange(10_000)], 0, 0)
    assert chooser.choice == PLAIN
    for token in list(range(12)) * 6:
        chooser.observe(chooser.choice, [token], 0, 0)
    assert chooser.choice.proposer == LOOKUP


def test_probes_take_no_more_than_their_share_of_the_time():
    chooser, time, probing, behind = Automatic(costs(0.1, trace=0.0), [MODEL]), 0.0, 0.0, 0
    chooser.begin([1], 10**6, 0)
    for number in range(20_000):
        choice = chooser.choice
        behind = 0 if choice != PLAIN else behind + 1
        draft = chooser.draft(8) if choice == STEPWISE else None
        while draft and draft.wanted:
            draft.take([0.9] * draft.wanted)  # it is sure, and wrong
        chooser.observe(choice, [0], 0, behind, draft)
        if number > 500:
            seconds = chooser.costs.stepwise(draft.length, draft.steps, draft.reads) if draft else 1.0
            time += seconds
            probing += seconds - 1.0
    assert 0 < probing < 1.2 * PROBE_SHARE * time


# ----------------------------------------------------------------------- the decoder, whatever is chosen


class Scripted(Fixed):
    """Goes round a list of choices."""

    def __init__(self, choices):
        super().__init__(choices[0])
        self.choices = itertools.cycle(choices)

    def observe(self, choice, tokens, accepted, behind, draft=None):
        self.choice = next(self.choices)


SCHEDULE = [
    *[Choice(MODEL, 3)] * 3, *[PLAIN] * 5, Choice(LOOKUP, 4), Choice(MODEL, 1), *[Choice(LOOKUP, 2)] * 3,
    Choice(MODEL, 8), PLAIN, Choice(MODEL, 2),
]  # fmt: skip


def scripted(target, drafter, sampling=None) -> SpeculativeDecoder:
    decoder = SpeculativeDecoder(ModelPair(target, drafter, lookup=PromptLookup()), sampling)
    decoder._chooser = Scripted(SCHEDULE)
    return decoder


def test_changing_drafters_and_lengths_within_a_text_leaves_greedy_text_alone():
    target, drafter = random_llama(vocab_size=60, scale=4), random_llama(1, vocab_size=60)
    decoder = scripted(target, drafter)
    for prompt in ([3], list(range(40)), list(range(30)), [1] * 300):
        assert decoded(decoder, prompt, 150) == plain_greedy(target, prompt, 150)
    assert set(decoder.stats.blocks_by) == {"model", "lookup", "none"}


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=0), Sampling(0.7, seed=1)])
def test_a_drafter_that_drafts_again_has_read_what_it_missed(sampling):
    """The target drafting for itself is always right, if its cache holds the text."""
    target = random_llama(vocab_size=60)
    decoder = SpeculativeDecoder(ModelPair(target, target, lookup=PromptLookup()), sampling)
    decoder._chooser = Scripted(SCHEDULE)
    for prompt in ([3, 4], list(range(40)), list(range(40)) + [9] * 10):
        blocks = list(decoder.blocks(prompt, 200))
        by_model = [block for block in blocks if block.drafted in (1, 3, 8)]
        assert len(by_model) > 10
        assert all(block.accepted == block.drafted for block in by_model)


def test_the_distribution_is_the_targets_while_the_choice_follows_the_past():
    """Counts of the third token, given a chooser whose choice depends on what was accepted."""
    target, drafter = random_llama(vocab_size=4, scale=3), random_llama(1, vocab_size=4, scale=3)

    class Nervous(Fixed):
        def observe(self, choice, tokens, accepted, behind, draft=None):
            self.choice = Choice(MODEL, 3) if accepted else PLAIN if choice.length else Choice(MODEL, 1)

    decoder = SpeculativeDecoder(ModelPair(target, drafter), Sampling(1.0))
    decoder._chooser = Nervous(Choice(MODEL, 1))
    counts, runs = [0] * 4, 1000
    for seed in range(runs):
        tokens = [token for block in decoder.blocks([1], 4, seed=seed) for token in block.tokens]
        counts[tokens[3]] += 1
    expected = mx.array([1.0])
    states = {(1,): 1.0}
    for _ in range(4):
        following = {}
        for text, chance in states.items():
            p = mx.softmax(target(mx.array([text]))[0, -1], axis=-1).tolist()
            for token, probability in enumerate(p):
                following[(*text, token)] = following.get((*text, token), 0) + chance * probability
        states = following
    expected = [sum(chance for text, chance in states.items() if text[-1] == token) for token in range(4)]
    for count, probability in zip(counts, expected, strict=True):
        assert abs(count / runs - probability) < 4.5 * (probability * (1 - probability) / runs) ** 0.5


def test_seeded_automatic_runs_repeat_exactly():
    target, drafter = random_llama(vocab_size=50), random_llama(1, vocab_size=50)
    pair = ModelPair(target, drafter, lookup=PromptLookup())
    decoders = [SpeculativeDecoder(pair, Sampling(1.0, seed=5)) for _ in range(3)]
    for decoder in decoders:
        decoder._chooser = Automatic(costs(0.05, trace=0.0), [MODEL, LOOKUP], LookupWatch(3))
    answers = [decoded(decoder, [1, 2, 3], 300) for decoder in decoders]
    assert answers[0] == answers[1] == answers[2]
    assert len({drafted for drafted in decoders[0].stats.drafted_at if drafted}) > 1  # of several lengths


def test_nothing_is_measured_where_nothing_can_draft(monkeypatch):
    monkeypatch.setattr("mlxspec.decoding.draft_length.known_costs", lambda decoder: pytest.fail("measured"))
    target = random_llama(vocab_size=50)
    assert decoded(SpeculativeDecoder(ModelPair(target)), [1], 20) == plain_greedy(target, [1], 20)


def test_a_decoder_that_forgets_reuses_nothing_and_says_the_same():
    target, drafter = random_llama(vocab_size=60, scale=4), random_llama(1, vocab_size=60)
    decoder = scripted(target, drafter)
    prompt = list(range(50))
    first = decoded(decoder, prompt, 60)
    assert decoded(decoder, prompt, 60) == first
    assert decoder.stats.prompt_tokens_reused == 48
    decoder.forget()
    assert decoded(decoder, prompt, 60) == first
    assert decoder.stats.prompt_tokens_reused == 0


@pytest.mark.parametrize(("confidence", "accepted", "after"), [(0.99, 8, STEPWISE), (0.1, 0, PLAIN)])
def test_a_probe_ends_with_whoever_was_better(confidence, accepted, after):
    chooser = Automatic(costs(0.1), [MODEL])
    simulated(chooser, 0.0, 50)
    assert chooser.choice == PLAIN
    chooser.saved_up, chooser.budget = float("inf"), 1000
    chooser.observe(PLAIN, [1], 0, 1)
    for _ in range(PROBE_BLOCKS):
        assert chooser.choice == STEPWISE
        draft = chooser.draft(8)
        while draft.wanted:
            draft.take([confidence] * draft.wanted)
        chooser.observe(STEPWISE, [1] * (accepted + 1), accepted, 0, draft)
    assert chooser.choice == after


def test_an_interrupted_catching_up_leaves_a_decoder_that_starts_from_nothing(monkeypatch):
    target, drafter = random_llama(vocab_size=60, scale=4), random_llama(1, vocab_size=60)
    decoder = scripted(target, drafter)
    original, calls = ModelProposer.start, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(ModelProposer, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoded(decoder, [3, 4, 5], 100)
    assert decoded(decoder, [3, 4, 5], 60) == plain_greedy(target, [3, 4, 5], 60)


def test_no_block_is_queued_that_will_probably_be_thrown_away():
    """The target drafting for itself one token a block: four blocks for eight tokens, once that is known."""
    target = random_llama(vocab_size=60)
    decoder = SpeculativeDecoder(ModelPair(target, target), None, 1)
    decoded(decoder, [1, 2], 200)
    launched, original = [], decoder._launch
    decoder._launch = lambda *arguments: (launched.append(1), original(*arguments))[1]
    for _ in range(3):
        assert len(decoded(decoder, [5, 6], 8)) == 8
    assert len(launched) == 3 * 4


def test_a_block_that_may_fall_short_is_not_the_last_one_queued():
    chooser = Fixed(Choice(MODEL, 3))
    chooser.acceptance = Acceptance(rate=0.8, weight=1e9)
    assert chooser.chance_of(chooser.choice, 1) == 1
    assert chooser.chance_of(chooser.choice, 3) == pytest.approx(0.64, abs=0.01)
    assert chooser.chance_of(chooser.choice, 5) == 0


def test_a_block_that_drafts_nothing_costs_a_pass_whoever_does_not_draft():
    table = costs(0.3)
    assert table.block(PLAIN) == table.block(Choice(MODEL, 0)) == table.verify[0]
