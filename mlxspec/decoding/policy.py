"""Who drafts the next block, and how many tokens: whatever yields the most tokens per second.

A policy decides from what was committed before. It never sees the draft that it decides about, so the emitted text
stays distributed as the target's own whatever it decides.
"""

from collections.abc import Sequence
from typing import Protocol

from mlxspec.decoding.acceptance import LONGEST, MENU, Acceptance, LookupReplay, Yield
from mlxspec.decoding.cache import capacity_for
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import LOOKUP, MODEL, PLAIN, Choice

MARGIN = 0.97  # drafting has to win by 3 %: costs are not known better, and drafting in vain is the worse mistake
PROBE_BLOCKS = 2  # of a probe: the second is queued before the first is observed
PROBE_SHARE = 0.015  # of the time, spent on finding out whether an idle draft model has become useful
READ_SHARE = 0.008  # of the time, spent on what the drafter has to read before a probe
PROBE_DOUBT = 0.5  # what earlier evidence weighs from then on: it is old, and a probe is short
TYPICAL_ANSWER = 128.0  # tokens, before any answer was seen


class DraftPolicy(Protocol):
    """Decides the proposer and the length of each draft."""

    def start(self, prompt: Sequence[int], max_tokens: float, unread: int) -> None:
        """Begin a new answer.

        Args:
            prompt: its token ids.
            max_tokens: the most tokens that the answer may have.
            unread: tokens of the prompt that the model drafter would have to read before it drafts.
        """

    def choose(self, missing: float) -> Choice:
        """Return the next block of an answer that may have ``missing`` more tokens. Changes nothing."""

    def expected_tokens(self, choice: Choice) -> float:
        """Return the tokens that a block is expected to yield."""

    def observe(self, choice: Choice, tokens: Sequence[int], accepted: int, unread: int) -> None:
        """Learn from a block.

        Args:
            choice: what the block was.
            tokens: what it committed.
            accepted: how many drafted tokens were accepted.
            unread: tokens that the model drafter would have to read by now, 0 while it drafts.
        """


class Fixed:
    """The same choice for every block."""

    def __init__(self, choice: Choice):
        self.choice = choice
        self.acceptance = Acceptance()

    def start(self, prompt: Sequence[int], max_tokens: float, unread: int) -> None:
        pass

    def choose(self, missing: float) -> Choice:
        return self.choice

    def expected_tokens(self, choice: Choice) -> float:
        return self.acceptance.expected()[min(choice.length, LONGEST)]

    def observe(self, choice: Choice, tokens: Sequence[int], accepted: int, unread: int) -> None:
        self.acceptance.observe(choice.length, accepted)


class Automatic:
    """Chooses from ``MENU`` by measured cost and estimated acceptance; keeps what it learned across answers.

    Changing the choice costs something once: a new length is traced, a drafter reads what it missed. This is the
    ski-rental problem, and the rule is its classic answer: change when staying has lost, by these estimates, as much
    as the change costs. Then never more than twice the unavoidable is lost.

    While the model does not draft, nothing is learned of it. So a small share of the time is saved up for probes,
    unless even a drafter that is always right would lose. How prompt lookup would do is known without trying it.

    Args:
        costs: what blocks cost on this device.
        proposers: the names of the drafters to choose from, besides drafting nothing.
        ngram: of prompt lookup.
    """

    def __init__(self, costs: BlockCosts, proposers: Sequence[str], ngram: int = 3):
        self.table = costs
        self.costs = costs  # at the present length of the text
        self.acceptance = Acceptance()
        self.replay = LookupReplay(ngram) if LOOKUP in proposers else None
        self.yields: dict[str, Yield] = {MODEL: self.acceptance} if MODEL in proposers else {}
        if self.replay:
            self.yields[LOOKUP] = self.replay
        self.choice = PLAIN
        self.length = 0  # of the text, in tokens
        self.regret = 0.0  # seconds lost by not having changed yet
        self.savings = 0.0  # seconds that may be spent on a probe
        self.probing = False
        self.answered, self.missing = 0, 0.0  # tokens of this answer, and the most that may follow
        self.typical_answer = TYPICAL_ANSWER

    def start(self, prompt: Sequence[int], max_tokens: float, unread: int) -> None:
        if self.answered:
            self.typical_answer += (self.answered - self.typical_answer) / 2
        self.answered, self.missing, self.probing, self.length = 0, max_tokens, False, 0
        self.grow(len(prompt))
        if self.replay:
            self.replay.start(prompt)
        tokens, rates = min(max_tokens, self.typical_answer), self.rates()
        self.change(min(rates, key=lambda choice: tokens / rates[choice] + self.reading(choice, unread)))

    def choose(self, missing: float) -> Choice:
        if self.choice.length < missing:
            return self.choice
        # The answer ends before a whole block. A shorter draft may do; each token that it leaves costs a plain block.
        shorter = [Choice(self.choice.proposer, n) for n in MENU[1:] if n <= self.choice.length]
        plain = self.costs.block(PLAIN)
        return min(
            [PLAIN, *shorter],
            key=lambda one: self.costs.block(one) + max(0.0, missing - self.expected_tokens(one)) * plain,
        )

    def expected_tokens(self, choice: Choice) -> float:
        return self.yields[choice.proposer].expected()[choice.length] if choice.length else 1.0

    def observe(self, choice: Choice, tokens: Sequence[int], accepted: int, unread: int) -> None:
        self.answered += len(tokens)
        self.missing -= len(tokens)
        self.grow(len(tokens))
        if self.replay:
            self.replay.extend(tokens)
        if choice.proposer == MODEL:
            self.acceptance.observe(choice.length, accepted)
        rates = self.rates()
        best = max(rates, key=lambda one: rates[one])
        if self.probing:
            if choice.proposer == MODEL:  # the probe, not a block that was in flight before it
                self.probing = False
                self.change(best)
            return
        spent = self.costs.block(choice)
        self.regret += spent * (1 - rates[self.choice] / rates[best])
        if best != self.choice and self.regret >= self.price(best, rates, unread):
            self.change(best)
        elif MODEL in self.yields and self.choice.proposer != MODEL:
            self.savings += PROBE_SHARE * spent + min(len(tokens) * self.costs.draft_read, READ_SHARE * spent)
            self.probe_if_affordable(rates, unread)

    def rates(self) -> dict[Choice, float]:
        """Return the tokens per second of each choice, with ``MARGIN`` against drafting."""
        found = {PLAIN: 1 / self.costs.block(PLAIN)}
        for name, estimate in self.yields.items():
            expected = estimate.expected()
            for choice in (Choice(name, length) for length in MENU[1:]):
                found[choice] = MARGIN * expected[choice.length] / self.costs.block(choice)
        return found

    def grow(self, tokens: int) -> None:
        """Account for a text that is longer by ``tokens``: its blocks cost more."""
        self.length += tokens
        if tokens == self.length or capacity_for(self.length) != capacity_for(self.length - tokens):
            self.costs = self.table.at_length(self.length)

    def change(self, choice: Choice) -> None:
        self.choice, self.regret = choice, 0.0

    def price(self, choice: Choice, rates: dict[Choice, float], unread: int) -> float:
        """Return the seconds that a change costs once. To leave the model costs the probe that would bring it back."""
        leaving = self.choice.proposer == MODEL != choice.proposer
        once = self.vain_seconds(probe_of(rates)) if leaving else self.reading(choice, unread)
        return once + (self.costs.trace if choice.length else 0.0)

    def reading(self, choice: Choice, unread: int) -> float:
        """Return the seconds that the model takes to read what it missed, if it is to draft."""
        return unread * self.costs.draft_read if choice.proposer == MODEL else 0.0

    def probe_if_affordable(self, rates: dict[Choice, float], unread: int) -> None:
        probe = probe_of(rates)
        hopeless = max((n + 1) / self.costs.block(Choice(MODEL, n)) for n in MENU[1:]) <= rates[self.choice]
        if hopeless or self.missing < PROBE_BLOCKS * (probe.length + 1):
            return
        if self.savings >= PROBE_BLOCKS * self.vain_seconds(probe) + self.reading(probe, unread):
            self.savings, self.probing = 0.0, True
            self.acceptance.fade(PROBE_DOUBT)
            self.change(probe)

    def vain_seconds(self, probe: Choice) -> float:
        """Return the seconds that a block takes longer than plain decoding, lost if none of its draft is accepted."""
        return max(0.0, self.costs.block(probe) - self.costs.block(PLAIN))


def probe_of(rates: dict[Choice, float]) -> Choice:
    """Return the fastest block that the model drafts for."""
    return max((choice for choice in rates if choice.proposer == MODEL), key=lambda choice: rates[choice])
