"""Choice of the proposer and the draft length of the next block, for the most tokens per second.

A policy uses only blocks that the host has already read. It never sees the draft whose length it decides, so no
decision can change the distribution of the text.
"""

import math
from collections.abc import Sequence
from typing import Protocol

from mlxspec.decoding.acceptance import LONGEST, MENU, Acceptance, LookupReplay, Yield
from mlxspec.decoding.cache import capacity_for
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import LOOKUP, MODEL, PLAIN, Choice

MARGIN = 0.97  # drafting must be 3 % faster than plain decoding, because costs are only known to about 3 %
PROBE_BLOCKS = 2  # blocks of a probe: the second is queued before the first is observed
PROBE_SHARE = 0.015  # share of the time for finding out whether an idle draft model has become useful
READ_SHARE = 0.008  # share of the time for what the draft model has to read before a probe
PROBE_DOUBT = 0.5  # weight of earlier evidence once a probe starts, so that a short probe can outvote it
TYPICAL_ANSWER = 128.0  # tokens of an answer, before any was seen


class DraftPolicy(Protocol):
    """Decides the proposer and the length of each draft."""

    def start(self, prompt: Sequence[int], max_tokens: float, unread: int) -> None:
        """Begin a new answer.

        Args:
            prompt: Token ids of the prompt.
            max_tokens: Limit of the answer, which may be infinite.
            unread: Tokens of the prompt that the draft model would have to read before it drafts.
        """

    def choose(self, missing: float) -> Choice:
        """Return the next block. May be called more than once for a block, so it must not change anything.

        Args:
            missing: Tokens that the answer may still have.
        """

    def expected_tokens(self, choice: Choice) -> float:
        """Return the expected tokens of a block. No block is queued after one that will probably end the answer."""

    def observe(self, choice: Choice, tokens: Sequence[int], accepted: int, unread: int) -> None:
        """Learn from a block. The next one may be queued already.

        Args:
            choice: The choice of that block.
            tokens: The tokens that it committed.
            accepted: Number of drafted tokens that were accepted.
            unread: Tokens that the draft model would have to read by now. 0 while it drafts.
        """


class Fixed:
    """The same choice for every block."""

    def __init__(self, choice: Choice):
        self.choice = choice
        self.acceptance = Acceptance()

    def start(self, prompt: Sequence[int], max_tokens: float, unread: int) -> None:
        """Begin a new answer. Nothing depends on it."""

    def choose(self, missing: float) -> Choice:
        """Return the fixed choice."""
        return self.choice

    def expected_tokens(self, choice: Choice) -> float:
        """Return the expected tokens of a block, from the acceptance of earlier blocks."""
        return self.acceptance.expected()[min(choice.length, LONGEST)]

    def observe(self, choice: Choice, tokens: Sequence[int], accepted: int, unread: int) -> None:
        """Add a block to the acceptance."""
        self.acceptance.observe(choice.length, accepted)


class Automatic:
    """Chooses from ``MENU`` by measured cost and estimated acceptance. Keeps what it learned across answers.

    Switching has a cost that is paid once: a new length is traced, an idle draft model reads what it missed. When to
    switch is the ski-rental problem, and the rule is its classic answer: switch when staying has lost, by the
    estimates, as much as the switch costs.

    While the draft model is idle, the policy learns nothing about it. So it saves a small share of the time for probes,
    unless even full acceptance would be slower. How prompt lookup would do is known without using it.

    Args:
        costs: Costs of blocks on this device.
        proposers: Names of the proposers to choose from, besides none.
        ngram: Longest suffix that prompt lookup searches for, in tokens.
        reach: Context of the draft model, in tokens. It does not draft in a longer text.
    """

    def __init__(self, costs: BlockCosts, proposers: Sequence[str], ngram: int = 3, reach: float = math.inf):
        self.table = costs
        self.costs = costs  # at the present length of the text
        self.reach = reach
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
        """Begin a new answer with the choice that is fastest for an answer of typical length."""
        if self.answered:
            self.typical_answer += (self.answered - self.typical_answer) / 2
        self.answered, self.missing, self.probing, self.length = 0, max_tokens, False, 0
        self.grow(len(prompt))
        if self.replay:
            self.replay.start(prompt)
        tokens, rates = min(max_tokens, self.typical_answer), self.rates()
        self.switch(min(rates, key=lambda choice: tokens / rates[choice] + self.reading(choice, unread)))

    def choose(self, missing: float) -> Choice:
        """Return the present choice, or a shorter draft if the answer ends sooner."""
        if self.choice.length < missing:
            return self.choice
        # The answer ends before a whole block. A shorter draft may be faster; each remaining token costs a plain block.
        shorter = [Choice(self.choice.proposer, n) for n in MENU[1:] if n <= self.choice.length]
        plain = self.costs.block(PLAIN)
        return min(
            [PLAIN, *shorter],
            key=lambda one: self.costs.block(one) + max(0.0, missing - self.expected_tokens(one)) * plain,
        )

    def expected_tokens(self, choice: Choice) -> float:
        """Return the expected tokens of a block, from the estimate of its proposer."""
        return self.yields[choice.proposer].expected()[choice.length] if choice.length else 1.0

    def observe(self, choice: Choice, tokens: Sequence[int], accepted: int, unread: int) -> None:
        """Update the estimates with a block, and switch to another choice if staying has cost enough."""
        self.answered += len(tokens)
        self.missing -= len(tokens)
        self.grow(len(tokens))
        if self.replay:
            self.replay.extend(tokens)
        if choice.proposer == MODEL:
            if self.probing:
                self.acceptance.fade(PROBE_DOUBT)
            self.acceptance.observe(choice.length, accepted)
        rates = self.rates()
        best = max(rates, key=lambda one: rates[one])
        if self.choice not in rates:  # the text has outgrown the draft model
            self.probing = False
            self.switch(best)
            return
        if self.probing:
            if choice.proposer == MODEL:  # the probe, not a block that was in flight before it
                self.probing = False
                self.switch(best)
            return
        spent = self.costs.block(choice)
        self.regret += spent * (1 - rates[self.choice] / rates[best])
        if best != self.choice and self.regret >= self.price(best, rates, unread):
            self.switch(best)
        elif self.can_draft(MODEL) and self.choice.proposer != MODEL:
            self.savings += PROBE_SHARE * spent + min(self.costs.reading(len(tokens), self.length), READ_SHARE * spent)
            self.probe_if_affordable(rates, unread)

    def rates(self) -> dict[Choice, float]:
        """Return the tokens per second of each choice, with ``MARGIN`` against drafting."""
        found = {PLAIN: 1 / self.costs.block(PLAIN)}
        for name, estimate in self.yields.items():
            if not self.can_draft(name):
                continue
            expected = estimate.expected()
            for choice in (Choice(name, length) for length in MENU[1:]):
                found[choice] = MARGIN * expected[choice.length] / self.costs.block(choice)
        return found

    def can_draft(self, name: str) -> bool:
        """Return whether a proposer is there, and can draft after the present text."""
        return name in self.yields and (name != MODEL or self.length + LONGEST <= self.reach)

    def grow(self, tokens: int) -> None:
        """Account for ``tokens`` more tokens of text: blocks cost more."""
        self.length += tokens
        if tokens == self.length or capacity_for(self.length) != capacity_for(self.length - tokens):
            self.costs = self.table.at_length(self.length)

    def switch(self, choice: Choice) -> None:
        """Make a choice the present one."""
        self.choice, self.regret = choice, 0.0

    def price(self, choice: Choice, rates: dict[Choice, float], unread: int) -> float:
        """Return the seconds that a switch costs once. Leaving the draft model is priced as the block to come back."""
        leaving = self.choice.proposer == MODEL != choice.proposer
        once = self.vain_seconds(probe_of(rates)) if leaving else self.reading(choice, unread)
        return once + (self.costs.trace if choice.length else 0.0)

    def reading(self, choice: Choice, unread: int) -> float:
        """Return the seconds that the draft model takes to read what it missed, if it is to draft."""
        return self.costs.reading(unread, self.length) if choice.proposer == MODEL else 0.0

    def probe_if_affordable(self, rates: dict[Choice, float], unread: int) -> None:
        """Start a probe of the idle draft model, if the savings cover its cost and it could be faster.

        Args:
            rates: Tokens per second of each choice.
            unread: Tokens that the draft model would have to read.
        """
        probe = probe_of(rates)
        hopeless = max((n + 1) / self.costs.block(Choice(MODEL, n)) for n in MENU[1:]) <= rates[self.choice]
        if hopeless or self.missing < PROBE_BLOCKS * (probe.length + 1):
            return
        if self.savings >= PROBE_BLOCKS * self.vain_seconds(probe) + self.reading(probe, unread):
            self.savings, self.probing = 0.0, True
            self.switch(probe)

    def vain_seconds(self, probe: Choice) -> float:
        """Return the seconds that a block takes longer than plain decoding, lost if none of its draft is accepted."""
        return max(0.0, self.costs.block(probe) - self.costs.block(PLAIN))


def probe_of(rates: dict[Choice, float]) -> Choice:
    """Return the fastest block with the draft model."""
    return max((choice for choice in rates if choice.proposer == MODEL), key=lambda choice: rates[choice])
