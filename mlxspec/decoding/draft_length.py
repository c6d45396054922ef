"""How many tokens to draft next, and who drafts them: whatever yields the most tokens per second.

That is measured cost times measured acceptance (``choice.py``), "draft nothing" included; a model that drafts does so
step by step, for as long as it seems sure enough (``stepwise.py``).

Every choice is arithmetic on what was committed earlier, so the emitted text stays distributed as the target's own,
and with the same costs and the same past the choice is the same.
"""

from collections.abc import Sequence
from typing import Protocol

from mlxspec.decoding.block import CompiledBlocks
from mlxspec.decoding.cache import CAPACITY_STEP, capacity_for
from mlxspec.decoding.calibration import known_costs
from mlxspec.decoding.choice import (
    LENGTHS,
    LOOKUP,
    MODEL,
    PLAIN,
    STEPWISE,
    Acceptance,
    BlockCosts,
    Choice,
    chance_of,
    expected_tokens,
)
from mlxspec.decoding.lookup_watch import LookupWatch
from mlxspec.decoding.stepwise import Draft, Stepwise

CAUTION = 0.97  # costs are not known better than that, and drafting in vain is the worse mistake
PROBE_BLOCKS = 4
PROBE_SHARE = 0.02  # of the time, spent on finding out whether drafting would pay by now
TYPICAL_ANSWER = 128  # tokens, before any was seen


class Chooser(Protocol):
    """What the decoder asks."""

    choice: Choice  # of the next block

    def begin(self, prompt: Sequence[int], max_tokens: float, behind: int) -> None:
        """A new answer; the model drafter has not seen the last ``behind`` tokens of its prompt."""

    def draft(self, most: int) -> Draft:
        """The next draft, if the choice is STEPWISE: of at most so many tokens."""

    def opening(self) -> int:
        """How many tokens of the next draft to make before it is known whether there will be one."""

    def observe(
        self, choice: Choice, tokens: Sequence[int], accepted: int, behind: int, draft: Draft | None = None
    ) -> None:
        """A block: what it was, what it committed, the draft if it was made stepwise; ``behind`` as above, by now."""

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

    def observe(self, choice, tokens, accepted, behind, draft=None):
        self.acceptance.observe(choice.length, accepted)

    def chance_of(self, choice, tokens):
        return chance_of(self.acceptance.rates, choice.length, tokens)


class Automatic:
    """What yields the most tokens per second by what was measured and seen so far, kept across prompts.

    A change costs time once (a new length is traced, a drafter reads what it missed). So it is made when what the
    present choice has lost so far, by these estimates, amounts to that: then no more than twice the unavoidable is ever
    lost (of the few lengths that are traced for stepwise drafts one is counted). While nothing is drafted nothing is
    learnt of a model drafter; it is tried as often as PROBE_SHARE of the time allows, but not where even a drafter that
    is always right would lose. How prompt lookup would have fared is known without trying it. What a drafter is worth
    has to be found out once: a first, short answer pays for that.
    """

    def __init__(self, costs: BlockCosts, proposers: Sequence[str], watch: Watch | None = None):
        self.short_costs = self.costs = costs
        self.length = 0  # of the text
        self.stepwise = Stepwise(costs) if MODEL in proposers else None
        self.watch = watch
        self.choices = [PLAIN]
        if self.stepwise:
            self.choices.append(STEPWISE)
        if watch:
            self.choices += [Choice(LOOKUP, length) for length in LENGTHS[1:]]
        self.traced: set[Choice] = set()
        self.choice = PLAIN
        self.lost = 0.0  # seconds, by not having changed yet
        self.saved_up = 0.0  # seconds that may be spent on a probe
        self.probing = 0  # blocks left
        self.typical, self.answered, self.budget = float(TYPICAL_ANSWER), None, 0.0

    def begin(self, prompt, max_tokens, behind):
        if self.answered:
            self.typical += (self.answered - self.typical) / 2
        self.answered, self.probing, self.length, self.budget = 0, 0, 0, max_tokens
        self.grow(len(prompt))
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

    def draft(self, most):
        return self.stepwise.draft(most)

    def opening(self):
        return 0 if self.probing == 1 else self.stepwise.opening

    def observe(self, choice, tokens, accepted, behind, draft=None):
        self.answered += len(tokens)
        self.grow(len(tokens))
        if self.watch:
            self.watch.extend(tokens)
        spent = self.stepwise.observe(draft, accepted) if draft else self.costs.block(choice)
        if self.probing:
            self.probing -= choice.proposer == MODEL
            if not self.probing:
                self.change(max(self.traced, key=self.rate))
            return
        best = max(self.choices, key=self.rate)
        self.lost += spent * max(0.0, 1 - self.rate(self.choice) / self.rate(best))
        if best != self.choice and self.lost >= self.price(best, behind):
            self.change(best)
        elif self.choice.proposer != MODEL and self.stepwise:
            self.saved_up += PROBE_SHARE * spent
            self.probe_if_affordable(behind)

    def grow(self, tokens: int) -> None:
        """The text is so many tokens longer, and attention over it takes longer when its buffers have grown."""
        before, self.length = capacity_for(self.length), self.length + tokens
        if (capacity := capacity_for(self.length)) != before or self.length == tokens:
            self.costs = self.short_costs.behind(capacity - CAPACITY_STEP)
            if self.stepwise:
                self.stepwise.adopt(self.costs)

    def chance_of(self, choice, tokens):
        rates = self.watch.acceptance.rates if choice.proposer == LOOKUP else []
        return chance_of(rates, choice.length, tokens)

    def rate(self, choice: Choice) -> float:
        """Tokens per second, as estimated; cautiously, where something is drafted."""
        if choice == STEPWISE:
            return CAUTION * self.stepwise.rate
        if choice.length:
            return CAUTION * expected_tokens(self.watch.acceptance.rates, choice.length) / self.costs.block(choice)
        return 1 / self.costs.block(choice)

    def change(self, choice: Choice) -> None:
        self.choice, self.lost = choice, 0.0
        self.traced.add(choice)

    def price(self, choice: Choice, behind: int) -> float:
        """Seconds that a change costs once; to leave a model drafter costs the probe that would bring it back."""
        trace = 0.0 if choice in self.traced else self.costs.trace
        if self.choice.proposer == choice.proposer:
            return trace
        back = self.probe_seconds if self.choice.proposer == MODEL else 0.0
        return trace + self.catching_up(choice, behind) + back

    @property
    def probe_seconds(self) -> float:
        """What trying the model costs more than drafting nothing, if it is in vain."""
        return PROBE_BLOCKS * max(0.0, self.stepwise.seconds - self.costs.block(PLAIN))

    def catching_up(self, choice: Choice, behind: int) -> float:
        return behind * self.costs.catch_up.get(choice.proposer, 0.0) if choice.proposer == MODEL else 0.0

    def probe_if_affordable(self, behind: int) -> None:
        if self.stepwise.fastest <= self.rate(self.choice) or self.budget - self.answered < PROBE_BLOCKS:
            return
        if self.saved_up >= self.price(STEPWISE, behind) + self.probe_seconds:
            self.saved_up, self.probing = 0.0, PROBE_BLOCKS
            self.stepwise.doubt(PROBE_BLOCKS)
            self.change(STEPWISE)


def chooser_for(compiled: CompiledBlocks, draft_length: int | str) -> Chooser:
    """For the blocks of a pair; what "auto" has to know of their costs is measured here if nobody knows it."""
    names = compiled.drafters
    if draft_length != "auto" or not names:
        return Fixed(Choice(names[0], draft_length) if names else PLAIN)
    watch = LookupWatch(compiled.proposers[LOOKUP].lookup.ngram) if LOOKUP in names else None
    return Automatic(known_costs(compiled), names, watch)
