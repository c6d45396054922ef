"""A draft that goes on for as long as the drafter seems sure is exact, and faster than one of any fixed length."""

import itertools
import random

import mlx.core as mx
import pytest

from mlxspec import ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding.block import StepwiseBlock
from mlxspec.decoding.choice import (
    LENGTHS,
    LONGEST_CHOICE,
    LOOKUP,
    MODEL,
    PLAIN,
    STEPWISE,
    BlockCosts,
    Choice,
    expected_tokens,
)
from mlxspec.decoding.draft_length import PROBE_BLOCKS, Automatic
from mlxspec.decoding.drafting import ModelProposer
from mlxspec.decoding.stepwise import Confidence, Draft, Stepwise
from mlxspec.decoding.verification import RULES
from tests.conftest import decoded, plain_greedy, random_llama
from tests.decoding import oracle
from tests.decoding.test_decoder import assert_emits_the_targets_distribution

ROWS = range(LONGEST_CHOICE + 1)  # drafted, so one more to verify
CHEAP_ROWS = tuple(1 + 0.1 * rows for rows in ROWS)


def costs(step=0.05, verify=CHEAP_ROWS, once=0.0, read=0.0) -> BlockCosts:
    return BlockCosts(verify, {MODEL: once}, {MODEL: step}, {MODEL: 0.0}, 0.0, once, read)


def drafted(draft: Draft, confidences) -> int:
    """The length of a draft whose tokens the drafter is so sure of."""
    confidences = iter(confidences)
    while count := draft.wanted:
        draft.take(list(itertools.islice(confidences, count)))
    return draft.length


# ----------------------------------------------------------------------- exact


def length_by_confidence(drafter, most, row, opening):
    """What a ``Draft`` verifies of a drafted text; it sees how likely the likeliest token was, before each."""

    def length_of(tokens) -> int:
        draft = Draft(costs(verify=tuple(1 + row * rows for rows in ROWS)), Confidence(), 0.8, most, opening)
        return drafted(draft, (float(max(drafter(tokens[:i]))) for i in range(most)))

    return length_of


def length_by_own_probability(drafter, most):
    """The trap: a token is dropped because it turned out to be an unlikely one."""

    def length_of(tokens) -> int:
        return next((i for i in range(most) if drafter(tokens[:i])[tokens[i]] < 0.3), most)

    return length_of


def stepwise_pairs():
    for vocab_size, most, seed in itertools.product((2, 3), (2, 3, 4), "abc"):
        yield (
            oracle.RandomContextModel(vocab_size, f"p{seed}"),
            oracle.RandomContextModel(vocab_size, f"q{seed}"),
            most,
        )


@pytest.mark.parametrize("rule", RULES)
def test_emitted_distribution_is_exactly_the_targets(rule):
    lengths = set()
    for (target, drafter, most), row, opening in itertools.product(stepwise_pairs(), (0.3, 1.2), (1, 4)):
        length_of = length_by_confidence(drafter, most, row, opening)
        emitted, _ = oracle.emitted_joint(rule, target, drafter, most, verified=length_of)
        assert emitted == oracle.target_joint(target, most + 1)  # rational numbers: an error of exactly 0
        lengths |= {length_of(tokens) for tokens in itertools.product(range(target.vocab_size), repeat=most)}
    assert lengths == {0, 1, 2, 4}


@pytest.mark.parametrize("rule", ["token", "block"])  # whatever "match" emits is the target's own
def test_the_enumeration_catches_dropping_a_token_for_being_unlikely(rule):
    assert any(
        oracle.emitted_joint(rule, target, drafter, most, verified=length_by_own_probability(drafter, most))[0]
        != oracle.target_joint(target, most + 1)
        for target, drafter, most in stepwise_pairs()
    )


# ----------------------------------------------------------------------- as long as it is worth it


def test_a_sure_drafter_drafts_as_far_as_it_may_and_an_unsure_one_hardly():
    stepwise = Stepwise(costs())
    for _ in range(20):
        stepwise.confidence.observe([1.0, 0.1], 1)
        stepwise.confidence.observe([1.0] * 8, 8)
    assert drafted(stepwise.draft(8), [1.0] * 8) == 8
    assert drafted(stepwise.draft(8), [0.1] * 8) == 0
    assert drafted(stepwise.draft(8), [1.0, 1.0, *[0.1] * 6]) == 2


@pytest.mark.parametrize("most", [*range(9), 15, 16, 17])
def test_no_more_is_drafted_than_there_is_room_for(most):
    draft = Stepwise(costs()).draft(most)
    assert drafted(draft, [1.0] * 16) == max(length for length in LENGTHS if length <= most)
    assert draft.steps == draft.length


@pytest.mark.parametrize("opening", LENGTHS[1:])
@pytest.mark.parametrize("sure", [0, 1, 2, 3, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("step", [1e-9, 0.1])
def test_what_is_verified_does_not_depend_on_how_many_are_drafted_at_once(opening, sure, step):
    learnt = Stepwise(costs(step, STEEP_ROWS))
    for _ in range(50):
        learnt.confidence.observe([1.0] * 16, 16)
        learnt.confidence.observe([0.1], 0)
    draft = Draft(learnt.costs, learnt.confidence, 1.5, LONGEST_CHOICE, opening)
    length = drafted(draft, [*[1.0] * sure, *[0.1] * (16 - sure)])
    assert length == min(length for length in LENGTHS if length >= sure)
    assert (draft.steps, draft.reads) == draft.work(opening)


def test_a_draft_with_room_for_fewer_tokens_than_were_made_takes_as_many_as_it_may():
    draft = Stepwise(costs()).draft(2)
    assert draft.take([1.0] * 16) == 2
    assert (draft.wanted, draft.length, draft.steps) == (0, 2, 16)


def test_a_draft_opens_with_as_many_tokens_as_were_mostly_worth_it_lately():
    stepwise = Stepwise(costs(step=0.02, read=0.015))
    assert stepwise.draft(16).opening == 1
    for sure, opening in ((16, 16), (2, 2), (4, 4), (0, 1)):
        for _ in range(200):
            draft = stepwise.draft(16)
            drafted(draft, [*[1.0] * sure, *[0.01] * (16 - sure)])
            stepwise.observe(draft, min(draft.length, sure))
        assert draft.length == sure
        assert draft.opening == opening


def test_a_drafter_that_costs_much_drafts_nothing_on_the_off_chance():
    stepwise = Stepwise(costs(step=0.3, read=0.01))
    for number, sure in enumerate([4, 1] * 100):
        draft = stepwise.draft(16)
        drafted(draft, [*[1.0] * sure, *[0.01] * (16 - sure)])
        assert draft.opening <= 2 or number < 20  # the second is drafted anyway, to see whether to go on
        stepwise.observe(draft, min(draft.length, sure))


def test_what_confidence_is_worth_is_learnt():
    confidence = Confidence()
    assert confidence.rate(0.4) < 0.8 < 0.95 < confidence.rate(1.0)
    for _ in range(300):
        confidence.observe([0.4, 0.97], 1)  # the modest one is right, the sure one is not
    assert confidence.rate(0.4) > 0.95
    assert confidence.rate(0.97) < 0.05


def test_tokens_behind_the_first_rejected_one_tell_nothing():
    confidence = Confidence()
    confidence.observe([0.4, 0.6, 0.97], 1)
    assert sum(confidence.tried) == 2


def test_a_level_that_was_given_up_is_tried_again_when_the_evidence_is_old():
    confidence = Confidence()
    for _ in range(50):
        confidence.observe([0.1], 0)
    assert confidence.rate(0.1) < 0.05
    for _ in range(500):
        confidence.observe([0.9], 1)
    assert confidence.rate(0.1) > 0.4


def test_a_drafter_whose_guesses_are_good_is_not_given_up_for_being_unsure():
    """At a high temperature nothing is likely, and what is drawn from much the same distribution is accepted."""
    chooser, rng = Automatic(costs(), [MODEL]), random.Random(0)
    chooser.begin([1, 2], 1000, 0)
    lengths = []
    for _ in range(200):
        draft = chooser.draft(8)
        lengths.append(drafted(draft, [0.15] * 8))
        accepted = next((i for i in range(lengths[-1]) if rng.random() >= 0.85), lengths[-1])
        chooser.observe(chooser.choice, [0] * (accepted + 1), accepted, 0, draft)
    assert sum(lengths[100:]) > 3 * 100


def simulated(chooser: Automatic, rng: random.Random, rates: list[float], blocks: int) -> float:
    """Tokens per second while the chance of each token is drawn from ``rates``, and the drafter knows it."""
    chooser.begin([1, 2], blocks, 0)
    tokens = seconds = 0.0
    for _ in range(blocks):
        choice, draft = chooser.choice, None
        chances = [rng.choice(rates) for _ in range(16)]
        if choice.proposer == MODEL:
            draft = chooser.draft(16)
            drafted(draft, chances)
            seconds += chooser.costs.stepwise(draft.length, draft.steps, draft.reads)
        else:
            seconds += chooser.costs.block(choice)
        length = draft.length if draft else 0
        accepted = next((i for i in range(length) if rng.random() >= chances[i]), length)
        tokens += accepted + 1
        chooser.observe(choice, [0] * (accepted + 1), accepted, 0, draft)
    return tokens / seconds


def best_fixed(table: BlockCosts, rates: list[float]) -> float:
    mean = sum(rates) / len(rates)
    return max(expected_tokens([mean] * 16, n) / table.stepwise(n, n, n > 0) for n in ROWS)


STEEP_ROWS = tuple(1 + 0.3 * rows for rows in ROWS)
# The first row more is dear and the others are cheap, as where another kernel takes over.
JUMPS = {"at 1": (1, *[1.6] * 16), "at 1, high": (1, *[2.0] * 16), "at 4": (1, 1.05, 1.1, 1.15, *[1.7] * 13)}


@pytest.mark.parametrize("verify", [CHEAP_ROWS, STEEP_ROWS], ids=["cheap", "steep"])
@pytest.mark.parametrize("step", [0.02, 0.1])
def test_it_is_faster_than_every_fixed_length_where_the_drafter_knows_what_it_knows(verify, step):
    table, rates = costs(step, verify), [0.99, 0.97, 0.97, 0.3]
    chooser, rng = Automatic(table, [MODEL]), random.Random(0)
    simulated(chooser, rng, rates, 200)
    assert simulated(chooser, rng, rates, 3000) > 1.05 * best_fixed(table, rates)


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("step", [0.02, 0.1])
def test_it_is_hardly_slower_where_confidence_tells_nothing(rate, step):
    table = costs(step)
    chooser, rng = Automatic(table, [MODEL]), random.Random(0)
    simulated(chooser, rng, [rate], 200)
    assert simulated(chooser, rng, [rate], 3000) > 0.95 * best_fixed(table, [rate])


@pytest.mark.parametrize("step", [0.02, 0.15, 0.3])
@pytest.mark.parametrize("read", [0.0, 0.02, 0.1])
def test_long_drafts_that_paid_are_given_up_where_they_no_longer_do(step, read):
    """Their openings too: that the tokens are there already must not make them look right."""
    table = costs(step, tuple(1 + 0.02 * rows for rows in ROWS), read=read)
    chooser, rng = Automatic(table, [MODEL]), random.Random(0)
    simulated(chooser, rng, [1.0], 200)
    assert chooser.opening() == (16 if read else 1)
    simulated(chooser, rng, [0.85], 200)
    assert simulated(chooser, rng, [0.85], 2000) > 0.93 * best_fixed(table, [0.85])


@pytest.mark.parametrize("verify", JUMPS.values(), ids=JUMPS)
@pytest.mark.parametrize("rate", [0.8, 0.95])
def test_it_is_hardly_slower_where_only_long_drafts_pay(verify, rate):
    table = costs(0.02, verify)
    chooser, rng = Automatic(table, [MODEL]), random.Random(0)
    simulated(chooser, rng, [rate], 200)
    assert simulated(chooser, rng, [rate], 3000) > 0.93 * best_fixed(table, [rate])


def test_probes_that_are_never_seen_through_leave_the_estimates_as_they_are():
    stepwise = Stepwise(costs())
    rate, seconds = stepwise.rate, stepwise.seconds
    for _ in range(2000):
        stepwise.doubt(4)
    assert (stepwise.rate, stepwise.seconds) == pytest.approx((rate, seconds))


@pytest.mark.parametrize(("missing", "probed"), [(PROBE_BLOCKS, True), (PROBE_BLOCKS - 1, False)])
def test_no_probe_begins_that_the_answer_has_no_room_for(missing, probed):
    chooser = Automatic(costs(), [MODEL])
    chooser.begin([1], missing + 1, 0)
    chooser.choice, chooser.saved_up = PLAIN, float("inf")
    chooser.stepwise.tokens = 0.0  # as of a drafter that was hopeless
    chooser.observe(PLAIN, [0], 0, 0)
    assert (chooser.choice == STEPWISE) is probed


# ----------------------------------------------------------------------- the decoder


def stepwise_decoder(target, drafter, sampling=None, rule="block") -> SpeculativeDecoder:
    decoder = SpeculativeDecoder(ModelPair(target, drafter), sampling, "auto", rule)
    decoder._chooser = Automatic(costs(step=1e-6, verify=tuple(1 + 1e-6 * rows for rows in ROWS)), [MODEL])
    return decoder


@pytest.mark.parametrize("rule", RULES)
def test_greedy_text_equals_plain_decoding(rule):
    target = random_llama(vocab_size=60, scale=4)
    decoder = stepwise_decoder(target, random_llama(1, vocab_size=60), rule=rule)
    for prompt in ([3], list(range(40)), list(range(30)), [1] * 300):
        assert decoded(decoder, prompt, 80) == plain_greedy(target, prompt, 80)
    assert decoder.stats.blocks_by[MODEL] > 0


class FickleDraft(Draft):
    """Drops tokens as it pleases."""

    rng = random.Random(0)

    @property
    def wanted(self):
        if self.ended or self.length == self.lengths[-1] or (self.steps and self.rng.random() < 0.1):
            return 0
        return self.rng.randint(1, min(3, self.lengths[-1] - self.length))

    def take(self, confidences):
        self.steps += len(confidences)
        kept = len(confidences) if self.rng.random() < 0.7 else self.rng.randrange(len(confidences))
        kept = min(kept, self.lengths[-1] - self.length)
        self.ended = kept < len(confidences)
        self.confidences += confidences[:kept]
        return kept


class Fickle(Automatic):
    """Always drafts step by step, with such drafts."""

    def __init__(self):
        super().__init__(costs(), [MODEL])
        self.choice = STEPWISE

    def begin(self, prompt, max_tokens, behind):
        pass

    def draft(self, most):
        return FickleDraft(self.costs, Confidence(), 0.0, most)

    def opening(self):
        return FickleDraft.rng.choice([0, 1, 2, 4, 8, 16])

    def observe(self, choice, tokens, accepted, behind, draft=None):
        pass


def test_the_target_drafting_for_itself_is_always_right_whatever_was_dropped():
    """So both caches hold the text."""
    target = random_llama(vocab_size=60)
    decoder = SpeculativeDecoder(ModelPair(target, target), Sampling(1.0, seed=0))
    decoder._chooser = Fickle()
    for prompt in ([3, 4], list(range(40)), [*range(40), *[9] * 10]):
        blocks = list(decoder.blocks(prompt, 200))
        assert all(block.accepted == block.drafted for block in blocks)
    assert {block.drafted for block in blocks} >= {0, 1, 2, 3}
    assert decoder.stats.drafted_by[MODEL] > decoder.stats.drafted + 10


class Wavering(Automatic):
    """Always opens with as many tokens as it may, and leaves the drafter now and then."""

    def __init__(self, choices, opening: int = 16):
        super().__init__(costs(step=1e-6, verify=tuple(1 + 1e-6 * rows for rows in ROWS)), [MODEL])
        self.choices, self.opened = itertools.cycle(choices), opening
        self.choice = next(self.choices)

    def begin(self, prompt, max_tokens, behind):
        pass

    def draft(self, most):
        return Draft(self.costs, Confidence(), 1e-3, most, self.opened)

    def opening(self):
        return self.opened

    def chance_of(self, choice, tokens):
        return 0.0  # that the answer ends with the block in flight

    def observe(self, choice, tokens, accepted, behind, draft=None):
        self.choice = next(self.choices)


def self_drafting(choices, sampling=None) -> SpeculativeDecoder:
    """The target drafting for itself is always right, if both caches hold the text."""
    target = random_llama(vocab_size=60)
    decoder = SpeculativeDecoder(ModelPair(target, target, lookup=PromptLookup()), sampling or Sampling(1.0, seed=0))
    decoder._chooser = Wavering(choices)
    return decoder


@pytest.mark.parametrize("other", [PLAIN, Choice(LOOKUP, 2)])
def test_a_draft_that_was_opened_in_vain_does_no_harm(other):
    decoder = self_drafting([STEPWISE, STEPWISE, other, STEPWISE, other, other])
    for prompt in ([3, 4], list(range(40)), [*range(40), *[9] * 10]):
        drafts = [block for block in decoder.blocks(prompt, 200) if block.drafted > 2]
        assert len(drafts) > 5
        assert all(block.accepted == block.drafted for block in drafts)


def test_a_stream_that_is_left_with_an_opened_draft_leaves_both_caches_whole():
    decoder = self_drafting([STEPWISE])
    text = [3, 4, 5, 6]
    for _ in range(4):
        for number, block in enumerate(decoder.blocks(text, 300)):
            text += block.tokens
            assert block.accepted == block.drafted
            if number == 2:
                assert "opened" in decoder._state
                break
        text += [7, 8]
    assert decoder.stats.prompt_tokens_reused > 100


@pytest.mark.parametrize("count", [17, 18, 19, 20, 21, 34, 35, 36, 37, 38, 53, 54])
def test_an_answer_is_as_long_as_asked_for_and_nothing_is_opened_that_it_has_no_room_for(count, monkeypatch):
    decoder, passes = self_drafting([STEPWISE]), []
    original = StepwiseBlock._steps
    monkeypatch.setattr(
        StepwiseBlock, "_steps", lambda self, count, cursor: (passes.append(count), original(self, count, cursor))[1]
    )
    blocks = list(decoder.blocks([3, 4], count))
    assert sum(len(block.tokens) for block in blocks) == count
    assert all(len(block.tokens) == block.accepted + 1 for block in blocks)
    assert sum(passes) == sum(block.drafted for block in blocks)  # each was used


def test_the_next_draft_is_opened_before_the_host_reads_a_block(monkeypatch):
    decoder, order = self_drafting([STEPWISE]), []
    original, read = StepwiseBlock._steps, mx.array.tolist
    monkeypatch.setattr(
        StepwiseBlock, "_steps", lambda self, count, cursor: (order.append(count), original(self, count, cursor))[1]
    )
    monkeypatch.setattr(
        mx.array, "tolist", lambda self: (order.append("sure" if self.dtype == mx.float32 else "read"), read(self))[1]
    )
    list(decoder.blocks([3, 4], 5 * 17))
    assert order == [16, "sure", *[16, "read", "sure"] * 4, "read"]


@pytest.mark.parametrize("count", [1, 9, 10, 11, 17, 18, 19, 20, 36])
def test_the_next_turn_finds_both_caches_whole_whatever_the_last_answer_ended_with(count):
    target = random_llama(vocab_size=60)
    decoder = stepwise_decoder(target, target, Sampling(1.0, seed=0))
    text = [3, 4, 5, 6]
    text += decoded(decoder, text, count)
    blocks = list(decoder.blocks([*text, 7, 8], 90))
    assert decoder.stats.prompt_tokens_reused > 1
    assert all(block.accepted == block.drafted for block in blocks)


@pytest.mark.parametrize(
    "rule", ["block", *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES if rule != "block")]
)
def test_the_decoder_emits_the_targets_distribution_whatever_was_dropped(rule):
    drafter = random_llama(4, vocab_size=5, scale=2)
    assert_emits_the_targets_distribution(rule, Sampling(1.0, seed=1), drafter, "auto", 2500, Fickle())


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(0.7, top_p=0.9)])
def test_how_sure_a_drafter_is_does_not_depend_on_what_is_drawn(sampling):
    proposer = ModelProposer(random_llama(vocab_size=60), sampling, 60)
    steps = [
        proposer.step(proposer.run.empty(1), mx.array([3]), mx.array(0), mx.array(uniform))
        for uniform in (0.01, 0.5, 0.99)
    ]
    assert len({token.item() for token, *_ in steps}) == 3
    assert len({confidence.item() for _, _, confidence, _ in steps}) == 1
    _, q, confidence, _ = steps[0]
    assert confidence.item() == q.max().item()


def test_at_temperature_0_it_is_the_probability_of_the_likeliest_token():
    model = random_llama(vocab_size=60)
    proposer = ModelProposer(model, Sampling(), 64)
    token, _, confidence, _ = proposer.step(proposer.run.empty(1), mx.array([3]), mx.array(0), mx.array(0.5))
    p = mx.softmax(model(mx.array([[3]]))[0, -1])
    assert token.item() == mx.argmax(p).item()
    assert confidence.item() == pytest.approx(mx.max(p).item(), rel=1e-5)


@pytest.mark.parametrize("count", range(1, 12))
def test_an_answer_is_as_long_as_asked_for(count):
    target = random_llama(vocab_size=60)
    decoder = stepwise_decoder(target, target)
    blocks = list(decoder.blocks([3, 4], count))
    assert sum(len(block.tokens) for block in blocks) == count
    assert all(len(block.tokens) == block.accepted + 1 for block in blocks)  # nothing was drafted to be cut off


def test_seeded_runs_repeat_exactly():
    target, drafter = random_llama(vocab_size=60), random_llama(1, vocab_size=60)
    answers = [decoded(stepwise_decoder(target, drafter, Sampling(1.0, seed=5)), [1, 2], 200) for _ in range(2)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("when", [1, 2, 4])
def test_an_interruption_in_a_draft_leaves_a_decoder_that_starts_from_nothing(monkeypatch, when):
    target, drafter = random_llama(vocab_size=60, scale=4), random_llama(1, vocab_size=60)
    decoder = stepwise_decoder(target, drafter)
    original, calls = Draft.take, []

    def interrupted(self, confidences):
        calls.append(confidences)
        if len(calls) == when:
            raise KeyboardInterrupt
        return original(self, confidences)

    monkeypatch.setattr(Draft, "take", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoded(decoder, [3, 4, 5], 100)
    assert decoded(decoder, [3, 4, 5], 60) == plain_greedy(target, [3, 4, 5], 60)


def test_the_host_reads_once_for_each_decision_and_once_a_block(monkeypatch):
    target = random_llama(vocab_size=60)
    decoder = stepwise_decoder(target, target)
    decoded(decoder, [1, 2], 40)  # traced
    reads, parts = [], []
    take = Draft.take
    monkeypatch.setattr(Draft, "take", lambda self, drafted: (parts.append(len(drafted)), take(self, drafted))[1])
    for name in ("item", "tolist"):
        original = getattr(mx.array, name)
        monkeypatch.setattr(mx.array, name, lambda self, read=original: (reads.append(1), read(self))[1])
    decoded(decoder, [1, 2], 40)
    assert len(reads) == len(parts) + decoder.stats.blocks
    assert parts[:8] == [1, 1, 1, 1, 1, 3, 1, 7]  # 1, 2, 4, 8, 16
