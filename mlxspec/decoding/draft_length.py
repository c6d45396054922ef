"""How many tokens to draft next, and who drafts them: measured cost times measured acceptance.

A block of γ drafted tokens costs ``v(γ+1) + o + γ·d`` seconds, which ``calibration.py`` measured, and yields
``1 + Σ_i Π_{j≤i} a_j`` tokens, where a_j is how often draft position j was accepted if those before it were. The choice
is what maximises tokens per second, "draft nothing" included.

Everything here is arithmetic on what was committed earlier, so the emitted text stays distributed as the target's own,
and with the same costs and the same past the choice is the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, Protocol

LONGEST_CHOICE = 8  # of "auto": beyond 9 rows the cheap kernels end everywhere
MODEL, LOOKUP, NOBODY = "model", "lookup", "none"

PRIOR_RATE, PRIOR_WEIGHT = 0.8, 2.0  # of a drafter that nothing is known of
MEMORY = 0.98  # what a block's evidence is worth a block later: about the last 50 count
CAUTION = 0.97  # costs are not known better than that, and drafting in vain is the worse mistake
PROBE_BLOCKS = 4
PROBE_SHARE = 0.02  # of the time, spent on finding out whether drafting would pay by now
TYPICAL_ANSWER = 128  # tokens, before any was seen


class Choice(NamedTuple):
    """Who drafts the next block, and how many tokens."""

    proposer: str
    length: int


PLAIN = Choice(NOBODY, 0)


@dataclass(frozen=True)
class BlockCosts:
    """Seconds on this device, by the names of the proposers where it depends on them.

    ``verify[m-1]`` is a block over m rows (m = 1 … 9) but for the drafting, ``once`` that anything is drafted at all,
    ``draft`` each drafted token, ``catch_up`` each token of a text that a drafter has not seen yet, ``trace`` the first
    block of a length that is new.
    """

    verify: tuple[float, ...]
    once: dict[str, float] = field(default_factory=dict)
    draft: dict[str, float] = field(default_factory=dict)
    catch_up: dict[str, float] = field(default_factory=dict)
    trace: float = 0.0

    def block(self, choice: Choice) -> float:
        """Seconds of a block."""
        if not choice.length:
            return self.verify[0]
        drafting = self.once.get(choice.proposer, 0.0) + choice.length * self.draft.get(choice.proposer, 0.0)
        return self.verify[choice.length] + drafting


class Acceptance:
    """How often each draft position is accepted, given that those before it were: a running estimate with a prior."""

    def __init__(self, rate: float = PRIOR_RATE, weight: float = PRIOR_WEIGHT, memory: float = MEMORY):
        self.prior = (rate, weight)
        self.memory = memory
        self.tried = [0.0] * LONGEST_CHOICE
        self.passed = [0.0] * LONGEST_CHOICE

    def observe(self, drafted: int, accepted: int) -> None:
        """One more block, of which the first LONGEST_CHOICE positions count."""
        self.fade(self.memory)
        for position in range(min(accepted + 1, drafted, LONGEST_CHOICE)):
            self.tried[position] += 1
            self.passed[position] += position < accepted

    def fade(self, factor: float) -> None:
        """Count what was seen so far for less."""
        self.tried = [count * factor for count in self.tried]
        self.passed = [count * factor for count in self.passed]

    @property
    def rates(self) -> list[float]:
        """By position; one that was hardly tried borrows from all of them together."""
        rate, weight = self.prior
        together = (sum(self.passed) + rate * weight) / (sum(self.tried) + weight)
        return [
            (passed + together * weight) / (tried + weight)
            for passed, tried in zip(self.passed, self.tried, strict=True)
        ]


def expected_tokens(rates: Sequence[float], length: int) -> float:
    """Block efficiency of ``length`` drafted tokens that are accepted at ``rates``: 1 … length + 1."""
    expected, all_so_far = 1.0, 1.0
    for rate in rates[:length]:
        all_so_far *= rate
        expected += all_so_far
    return expected


def chance_of(rates: Sequence[float], length: int, tokens: float) -> float:
    """The probability that a block of ``length`` drafted tokens yields at least ``tokens``."""
    if tokens > length + 1:
        return 0.0
    return prod(rates[: max(0, int(tokens) - 1)])


class Chooser(Protocol):
    """What the decoder asks."""

    choice: Choice  # of the next block

    def begin(self, prompt: Sequence[int], max_tokens: float, behind: int) -> None:
        """A new answer; the model drafter has not seen the last ``behind`` tokens of its prompt."""

    def observe(self, choice: Choice, tokens: Sequence[int], accepted: int, behind: int) -> None:
        """A block: what it was, what it committed; ``behind`` as above, by now."""

    def chance_of(self, choice: Choice, tokens: float) -> float:
        """The probability that a block yields at least so many."""


class Watch(Protocol):
    """Who knows how prompt lookup would have fared on the text: ``lookup_watch.py``."""

    acceptance: Acceptance

    def begin(self, prompt: Sequence[int]) -> None:
        """A new text."""

    def extend(self, tokens: Sequence[int]) -> None:
        """It goes on."""


class Fixed:
    """The same for every block."""

    def __init__(self, choice: Choice):
        self.choice = choice
        self.acceptance = Acceptance()

    def begin(self, prompt, max_tokens, behind):
        pass

    def observe(self, choice, tokens, accepted, behind):
        self.acceptance.observe(choice.length, accepted)

    def chance_of(self, choice, tokens):
        return chance_of(self.acceptance.rates, choice.length, tokens)


class Automatic:
    """What yields the most tokens per second by what was measured and seen so far, kept across prompts.

    A change costs time once (a new length is traced, a drafter reads what it missed). So it is made when what the
    present choice has lost so far, by these estimates, amounts to that: then no more than twice the unavoidable is ever
    lost. While nothing is drafted nothing is learnt of a model drafter; it is tried as often as PROBE_SHARE of the time
    allows, but not where even a drafter that is always right would lose. How prompt lookup would have fared is known
    without trying it. What a drafter is worth has to be found out once: a first, short answer pays for that.
    """

    def __init__(self, costs: BlockCosts, proposers: Sequence[str], watch: Watch | None = None):
        self.costs = costs
        self.acceptance = {name: Acceptance() for name in proposers}
        self.watch = watch
        if watch:
            self.acceptance[LOOKUP] = watch.acceptance
        self.choices = [PLAIN, *(Choice(name, n) for name in proposers for n in range(1, LONGEST_CHOICE + 1))]
        self.traced: set[Choice] = set()
        self.choice = PLAIN
        self.lost = 0.0  # seconds, by not having changed yet
        self.saved_up = 0.0  # seconds that may be spent on a probe
        self.probing = 0  # blocks left
        self.typical, self.answered = float(TYPICAL_ANSWER), None

    def begin(self, prompt, max_tokens, behind):
        if self.answered:
            self.typical += (self.answered - self.typical) / 2
        self.answered, self.probing = 0, 0
        if self.watch:
            self.watch.begin(prompt)
        # A length that is new has to be worth its tracing first, as within an answer; but for the very first.
        known, length = self.traced - {PLAIN} or self.choices, min(max_tokens, self.typical)
        best = max([*known, PLAIN], key=self.rate)
        gained = length * (1 / self.rate(PLAIN) - 1 / self.rate(best))
        # To draft for a long prompt and a short answer may not be worth the drafter's reading of the prompt.
        chosen = best if gained > self.catching_up(best, behind) else PLAIN
        if chosen != self.choice:
            self.change(chosen)
        self.traced.add(chosen)

    def observe(self, choice, tokens, accepted, behind):
        self.answered += len(tokens)
        if choice.proposer == MODEL:
            self.acceptance[MODEL].observe(choice.length, accepted)
        if self.watch:
            self.watch.extend(tokens)
        spent = self.costs.block(choice)
        if self.probing:
            self.probing -= choice.proposer == MODEL
            if not self.probing:
                self.change(max(self.traced, key=self.rate))
            return
        best = self.best()
        self.lost += spent * max(0.0, 1 - self.rate(self.choice) / self.rate(best))
        if best != self.choice and self.lost >= self.price(best, behind):
            self.change(best)
        elif self.choice.proposer != MODEL and MODEL in self.acceptance:
            self.saved_up += PROBE_SHARE * spent
            self.probe_if_affordable(behind)

    def chance_of(self, choice, tokens):
        return chance_of(self.rates(choice), choice.length, tokens)

    def rates(self, choice: Choice) -> list[float]:
        return self.acceptance[choice.proposer].rates if choice.length else []

    def rate(self, choice: Choice) -> float:
        """Tokens per second, as estimated; cautiously, where something is drafted."""
        rate = expected_tokens(self.rates(choice), choice.length) / self.costs.block(choice)
        return CAUTION * rate if choice.length else rate

    def best(self) -> Choice:
        return max(self.choices, key=self.rate)

    def change(self, choice: Choice) -> None:
        self.choice, self.lost = choice, 0.0
        self.traced.add(choice)

    def price(self, choice: Choice, behind: int) -> float:
        """Seconds that a change costs once; to leave a model drafter costs the probe that would bring it back."""
        trace = 0.0 if choice in self.traced else self.costs.trace
        if self.choice.proposer == choice.proposer:
            return trace
        back = PROBE_BLOCKS * self.extra(self.choice) if self.choice.proposer == MODEL else 0.0
        return trace + self.catching_up(choice, behind) + back

    def extra(self, choice: Choice) -> float:
        """Seconds that a block costs more than one that drafts nothing."""
        return max(0.0, self.costs.block(choice) - self.costs.block(PLAIN))

    def catching_up(self, choice: Choice, behind: int) -> float:
        return behind * self.costs.catch_up.get(choice.proposer, 0.0) if choice.proposer == MODEL else 0.0

    def probe_if_affordable(self, behind: int) -> None:
        drafting = [Choice(MODEL, length) for length in range(1, LONGEST_CHOICE + 1)]
        if max(self.rate_if(choice, 1.0) for choice in drafting) <= self.rate(self.choice):
            return
        known = [choice for choice in drafting if choice in self.traced] or drafting
        probe = max(known, key=lambda choice: self.rate_if(choice, PRIOR_RATE))
        if self.saved_up >= self.price(probe, behind) + PROBE_BLOCKS * self.extra(probe):
            self.saved_up, self.probing = 0.0, PROBE_BLOCKS
            self.acceptance[MODEL].fade(0.25)
            self.change(probe)

    def rate_if(self, choice: Choice, rate: float) -> float:
        """Tokens per second if every draft position were accepted at ``rate``."""
        return expected_tokens([rate] * LONGEST_CHOICE, choice.length) / self.costs.block(choice)
