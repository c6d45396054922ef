"""The automatic policy chooses what is fastest by cost and acceptance, and no policy ever changes the text."""

import itertools
import random
from dataclasses import replace

import mlx.core as mx
import pytest

from mlxspec import InvalidRequestError, ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding.acceptance import MENU, expected_tokens
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import LOOKUP, MODEL, PLAIN, Choice, ModelProposer
from mlxspec.decoding.policy import PROBE_SHARE, READ_SHARE, Automatic, Fixed
from tests.conftest import decoded, plain_greedy, random_llama

CHEAP_ROWS = {1: 1.0, 17: 1.8}
LINEAR_ROWS = {1: 1.0}
JUMP = {1: 1.0, 2: 1.6, 17: 1.7}  # the first row more is dear, as where another kernel takes over


def costs(step: float, rows=CHEAP_ROWS, trace=0.5) -> BlockCosts:
    return BlockCosts(rows, 0.01, step, 0.001, trace)


def simulated(policy: Automatic, rate: float, blocks: int, seed: int = 0) -> tuple[list[Choice], float]:
    """Let a policy decide while each drafted token is accepted with probability ``rate``.

    Returns:
        the choices, and tokens per second
    """
    rng, chosen, unread, tokens, seconds = random.Random(seed), [], 0, 0, 0.0
    policy.start([1, 2, 3], 10**6, 0)
    for _ in range(blocks):
        choice = policy.choose(10**6)
        seconds += policy.costs.block(choice)
        accepted = next((i for i in range(choice.length) if rng.random() >= rate), choice.length)
        tokens += accepted + 1
        chosen.append(choice)
        unread = 0 if choice.proposer == MODEL else unread + accepted + 1
        policy.observe(choice, [0] * (accepted + 1), accepted, unread)
    return chosen, tokens / seconds


@pytest.mark.parametrize(("rate", "step"), [(0.9, 0.02), (0.7, 0.1), (0.5, 0.05), (0.3, 0.3), (0.0, 0.1), (0.6, 1.0)])
@pytest.mark.parametrize(
    ("rows", "share"), [(CHEAP_ROWS, 0.95), (LINEAR_ROWS, 0.95), (JUMP, 0.93)], ids=["cheap", "linear", "a jump"]
)
def test_it_settles_within_a_few_percent_of_the_best_length(rate, step, rows, share):
    policy = Automatic(costs(step, rows), [MODEL])
    simulated(policy, rate, 100)
    expected = expected_tokens([rate] * 16)
    best = max(expected[n] / policy.costs.block(Choice(MODEL, n) if n else PLAIN) for n in MENU)
    assert simulated(policy, rate, 2000)[1] > share * best


def test_a_hopeless_drafter_costs_next_to_nothing_and_is_still_tried_now_and_then():
    policy = Automatic(costs(0.1), [MODEL])
    simulated(policy, 0.0, 20)
    chosen, rate = simulated(policy, 0.0, 3000)
    assert rate > 0.98
    assert any(choice.proposer == MODEL for choice in chosen[20:])


def test_a_drafter_that_would_lose_if_it_were_always_right_is_never_tried_again():
    assert set(simulated(Automatic(costs(0.5, LINEAR_ROWS), [MODEL]), 1.0, 500)[0]) == {PLAIN}


def test_a_drafter_that_has_become_good_is_found_out():
    policy = Automatic(costs(0.1), [MODEL])
    assert simulated(policy, 0.0, 300)[0][-100:].count(PLAIN) > 80
    assert simulated(policy, 0.95, 1000)[0][-1].length > 4


def test_probes_take_no_more_than_their_share_of_the_time():
    policy = Automatic(costs(0.1, trace=0.0), [MODEL])
    simulated(policy, 0.0, 500)
    chosen, _ = simulated(policy, 0.0, 20_000)
    drafting = sum(policy.costs.block(choice) - 1.0 for choice in chosen[100:])
    assert 0 < drafting < 1.2 * (PROBE_SHARE + READ_SHARE) * len(chosen)


def test_a_long_prompt_is_not_read_by_the_drafter_for_a_short_answer():
    policy = Automatic(replace(costs(0.02), draft_read=0.002), [MODEL])
    policy.start([1] * 4000, 8, 4000)
    for missing in range(8, 0, -1):
        assert policy.choose(missing) == PLAIN
        policy.observe(PLAIN, [5], 0, 4000)
    policy.start([1] * 4000, 2000, 4000)
    assert policy.choose(2000).proposer == MODEL


def test_a_draft_model_reads_a_prompt_only_for_an_answer_that_is_expected_to_pay_for_it(
    stories, stories_drafters, stories_greedy, monkeypatch
):
    read, original = [], ModelProposer.start

    def start(self, kept, tokens, covered, *others):
        read.append(len(tokens) - covered)
        return original(self, kept, tokens, covered, *others)

    monkeypatch.setattr(ModelProposer, "start", start)
    policy = Automatic(replace(costs(0.02), draft_read=0.06), [MODEL])
    decoder = SpeculativeDecoder(ModelPair(stories, stories_drafters["a noised copy"]), policy=policy)
    prompt, answer = stories_greedy[:300], stories_greedy[300:]
    assert decoded(decoder, prompt, 8) == answer[:8]
    assert read == []
    decoder.forget()
    assert decoded(decoder, prompt, 150) == answer[:150]
    assert read == [300]
    for _ in range(5):  # answers that end early, although they may be long
        decoder.forget()
        stream, tokens = decoder.blocks(prompt, 150), []
        while len(tokens) < 8:
            tokens += next(stream).tokens
        stream.close()
    read.clear()
    decoder.forget()
    assert next(decoder.blocks(prompt, 150)).tokens == answer[:1]
    assert read == []


def test_a_change_is_made_when_staying_has_lost_as_much_as_it_costs():
    """Ski rental: the first choice is left when its regret has reached the price of tracing the best one."""
    policy = Automatic(costs(0.1, trace=20.0), [LOOKUP])
    policy.start([5, 6, 7], 1000, 0)
    first = policy.choose(1000)
    for replay in policy.replay.replays:
        replay.blocks, replay.tokens = 1e6, 1e6 * (replay.length + 1)  # as if the text were one long copy
    rates = policy.rates()
    lost = 0.0
    for _ in range(500):
        if policy.choose(1000) != first:
            break
        lost += policy.costs.block(first) * (1 - rates[first] / max(rates.values()))
        policy.observe(first, [0], 0, 0)
    assert policy.choose(1000) == Choice(LOOKUP, 16)
    assert 20 <= lost < 22


def test_a_drafter_that_pays_behind_a_short_text_is_left_behind_a_long_one():
    table = replace(costs(0.1), position=0.001, position_row=0.002)  # each row costs as much as a pass does, then
    policy = Automatic(table, [MODEL])
    assert simulated(policy, 0.7, 100)[0][-1].proposer == MODEL
    policy.start([1] * 4000, 1000, 0)
    assert policy.costs.block(PLAIN) == pytest.approx(1 + 0.001 * (4096 - 256))
    for _ in range(100):
        choice = policy.choose(1000)
        policy.observe(choice, [0, 0], min(1, choice.length), 0)
    assert policy.choose(1000) == PLAIN
    policy.start([1, 2], 1000, 0)
    assert policy.costs == table


def test_the_same_past_gives_the_same_choice():
    assert simulated(Automatic(costs(0.1), [MODEL]), 0.6, 300) == simulated(Automatic(costs(0.1), [MODEL]), 0.6, 300)


@pytest.mark.parametrize("missing", range(1, 20))
def test_the_last_block_drafts_no_more_than_it_pays(missing):
    policy = Automatic(costs(0.02), [MODEL])
    simulated(policy, 1.0, 200)
    assert policy.choice == Choice(MODEL, 16)
    lengths = [n for n in MENU if n + 1 >= missing]
    assert policy.choose(missing).length == (0 if missing == 1 else min(lengths, default=16))


def test_lookup_is_chosen_where_the_text_repeats_itself_and_left_where_it_does_not():
    policy = Automatic(costs(0.1), [LOOKUP])
    policy.start([5, 6, 7], 1000, 0)
    rng = random.Random(0)
    for _ in range(60):
        policy.observe(policy.choose(1000), [rng.randrange(10_000)], 0, 0)
    assert policy.choose(1000) == PLAIN
    for token in list(range(12)) * 6:
        policy.observe(policy.choose(1000), [token], 0, 0)
    assert policy.choose(1000).proposer == LOOKUP
    assert policy.choose(1000).length > 4


# ----------------------------------------------------------------------- the decoder, whatever is chosen


class Scripted(Fixed):
    """Goes round a list of choices."""

    def __init__(self, choices):
        super().__init__(choices[0])
        self.choices = itertools.cycle(choices)

    def observe(self, choice, tokens, accepted, unread):
        self.choice = next(self.choices)


SCHEDULE = [
    *[Choice(MODEL, 3)] * 3, *[PLAIN] * 5, Choice(LOOKUP, 4), Choice(MODEL, 1), *[Choice(LOOKUP, 2)] * 3,
    Choice(MODEL, 8), PLAIN, Choice(MODEL, 2),
]  # fmt: skip


def scripted(target, drafter, sampling=None) -> SpeculativeDecoder:
    pair = ModelPair(target, drafter, lookup=PromptLookup())
    return SpeculativeDecoder(pair, sampling, policy=Scripted(SCHEDULE))


def test_changing_proposers_and_lengths_within_a_text_leaves_greedy_text_alone():
    target, drafter = random_llama(vocab_size=60, scale=4), random_llama(1, vocab_size=60)
    decoder = scripted(target, drafter)
    for prompt in ([3], list(range(40)), list(range(30)), [1] * 300):
        assert decoded(decoder, prompt, 150) == plain_greedy(target, prompt, 150)
    assert set(decoder.stats.blocks_by) == {"model", "lookup", "none"}


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=0), Sampling(0.7, seed=1)])
def test_a_drafter_that_drafts_again_has_read_what_it_missed(sampling):
    """The target drafting for itself is always right, if its cache holds the text."""
    target = random_llama(vocab_size=60)
    decoder = scripted(target, target, sampling)
    for prompt in ([3, 4], list(range(40)), list(range(40)) + [9] * 10):
        by_model = [block for block in decoder.blocks(prompt, 200) if block.drafted in (1, 3, 8)]
        assert len(by_model) > 10
        assert all(block.accepted == block.drafted for block in by_model)


@pytest.mark.parametrize("count", [1, 2, 9, 10, 17, 18, 36])
def test_the_next_turn_finds_all_caches_whole_whatever_the_last_answer_ended_with(count):
    target = random_llama(vocab_size=60)
    policy = Automatic(BlockCosts({1: 1.0, 17: 1.0}, draft_step=1e-6), [MODEL])
    decoder = SpeculativeDecoder(ModelPair(target, target), Sampling(1.0, seed=0), policy=policy)
    text = [3, 4, 5, 6]
    for _ in range(3):
        text += decoded(decoder, text, count)
        text += [7, 8]
    blocks = list(decoder.blocks(text, 90))
    assert decoder.stats.prompt_tokens_reused > 1
    assert all(block.accepted == block.drafted for block in blocks)


def test_the_distribution_is_the_targets_while_the_choice_follows_the_past():
    """Counts of the third token, given a policy whose choice depends on what was accepted."""
    target, drafter = random_llama(vocab_size=4, scale=3), random_llama(1, vocab_size=4, scale=3)

    class Nervous(Fixed):
        def observe(self, choice, tokens, accepted, unread):
            self.choice = Choice(MODEL, 3) if accepted else PLAIN if choice.length else Choice(MODEL, 1)

    decoder = SpeculativeDecoder(ModelPair(target, drafter), Sampling(1.0), policy=Nervous(Choice(MODEL, 1)))
    counts, runs = [0] * 4, 1000
    for seed in range(runs):
        tokens = [token for block in decoder.blocks([1], 4, seed=seed) for token in block.tokens]
        counts[tokens[3]] += 1
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
    decoders = [
        SpeculativeDecoder(pair, Sampling(1.0, seed=5), policy=Automatic(costs(0.05, trace=0.0), [MODEL, LOOKUP]))
        for _ in range(3)
    ]
    answers = [decoded(decoder, [1, 2, 3], 300) for decoder in decoders]
    assert answers[0] == answers[1] == answers[2]
    assert len([drafted for drafted in decoders[0].stats.drafted_at if drafted]) > 1  # of several lengths


def test_nothing_is_measured_where_nothing_can_draft(monkeypatch):
    monkeypatch.setattr("mlxspec.decoding.calibration.calibrate", lambda *_: pytest.fail("measured"))
    target = random_llama(vocab_size=50)
    decoder = SpeculativeDecoder(ModelPair(target))
    assert decoder.calibrated
    assert decoded(decoder, [1], 20) == plain_greedy(target, [1], 20)


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


def test_an_interrupted_change_of_proposers_leaves_a_decoder_that_starts_from_nothing(monkeypatch):
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


def test_no_block_is_queued_that_will_probably_be_thrown_away(monkeypatch):
    """The target drafting for itself one token a block: four blocks for eight tokens, once that is known."""
    target = random_llama(vocab_size=60)
    decoder = SpeculativeDecoder(ModelPair(target, target), None, 1)
    decoded(decoder, [1, 2], 200)
    queued, queue = [], mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (queued.append(1), queue(*arrays))[1])
    for _ in range(3):
        assert len(decoded(decoder, [5, 6], 8)) == 8
    assert len(queued) == 3 * 4


def test_without_costs_a_policy_says_that_they_are_not_known():
    target = random_llama(vocab_size=60)
    decoder = SpeculativeDecoder(ModelPair(target, target))
    with pytest.raises(ValueError, match=r"call calibrate\(\) first"):
        _ = decoder.policy


def test_a_policy_that_wants_a_drafter_that_the_pair_lacks_is_told_which_there_are():
    decoder = SpeculativeDecoder(ModelPair(random_llama(vocab_size=60)), policy=Fixed(Choice(MODEL, 3)))
    with pytest.raises(InvalidRequestError, match="chose 'model' to draft, and this pair has only none"):
        decoded(decoder, [1], 5)


@pytest.mark.parametrize("choice", [Choice(MODEL, 0), Choice(MODEL, -1), Choice(MODEL, 65), Choice("none", 3)])
def test_a_choice_that_no_block_can_be_is_named(choice):
    target = random_llama(vocab_size=60)
    decoder = SpeculativeDecoder(ModelPair(target, target), policy=Fixed(choice))
    with pytest.raises(InvalidRequestError, match=f"chose to draft {choice.length} tokens by '{choice.proposer}'"):
        decoded(decoder, [1], 5)


def test_no_probe_begins_that_the_answer_has_no_room_for():
    policy = Automatic(costs(0.4), [MODEL])
    simulated(policy, 0.0, 300)
    policy.savings = 1e9
    policy.start([1], 3, 0)
    assert policy.choice == PLAIN
    policy.observe(PLAIN, [0], 0, 0)
    assert policy.choice == PLAIN
    policy.start([1], 1000, 0)
    policy.observe(PLAIN, [0], 0, 0)
    assert policy.choice.proposer == MODEL
