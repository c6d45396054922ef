"""What a block may be, what it costs and what it yields.

A block of γ drafted tokens costs ``v(γ+1) + o + γ·d`` seconds, which ``calibration.py`` measured, and yields
``1 + Σ_i Π_{j≤i} a_j`` tokens, where a_j is how often draft position j was accepted if those before it were.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import NamedTuple

LENGTHS = (0, 1, 2, 4, 8, 16)  # of "auto": every other one would have to be traced, for a gain of a percent or two
LONGEST_CHOICE = LENGTHS[-1]
MODEL, LOOKUP, NOBODY = "model", "lookup", "none"

PRIOR_RATE, PRIOR_WEIGHT = 0.8, 2.0  # of a drafter that nothing is known of
MEMORY = 0.98  # what a block's evidence is worth a block later: about the last 50 count


class Choice(NamedTuple):
    """Who drafts the next block, and how many tokens."""

    proposer: str
    length: int


PLAIN = Choice(NOBODY, 0)
STEPWISE = Choice(MODEL, -1)  # as many as turn out to be worth it: ``stepwise.py``


@dataclass(frozen=True)
class BlockCosts:
    """Seconds on this device, by the names of the proposers where it depends on them.

    ``verify[m-1]`` is a block over m rows but for the drafting (m = 1 … 17; 10 … 16, which no block of "auto" has, are
    interpolated), ``once`` that anything is drafted at all, ``draft`` each drafted token, ``catch_up`` each token of a
    text that a drafter has not seen yet, ``trace`` the first block of a length that is new. When the model drafts
    stepwise, ``step_once`` is that it does at all, and ``read`` each time that the host looks at what was drafted.
    All that is behind a short text; a position more adds ``longer`` (to a pass over one row, to each row more, to a
    token that the model drafts).
    """

    verify: tuple[float, ...]
    once: dict[str, float] = field(default_factory=dict)
    draft: dict[str, float] = field(default_factory=dict)
    catch_up: dict[str, float] = field(default_factory=dict)
    trace: float = 0.0
    step_once: float = 0.0
    read: float = 0.0
    longer: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def behind(self, more: int) -> "BlockCosts":
        """The costs behind a text that is so many positions longer."""
        one, row, step = (more * seconds for seconds in self.longer)
        verify = tuple(seconds + one + drafted * row for drafted, seconds in enumerate(self.verify))
        draft = {name: seconds + step * (name == MODEL) for name, seconds in self.draft.items()}
        return replace(self, verify=verify, draft=draft, longer=(0.0, 0.0, 0.0))

    def block(self, choice: Choice) -> float:
        """Seconds of a block whose length is fixed."""
        if not choice.length:
            return self.verify[0]
        drafting = self.once.get(choice.proposer, 0.0) + choice.length * self.draft.get(choice.proposer, 0.0)
        return self.verify[choice.length] + drafting

    def stepwise(self, length: int, steps: int, reads: int) -> float:
        """Seconds of a block that verifies ``length`` tokens after so many passes of the drafter, read so often."""
        return self.verify[length] + self.step_once + self.steps(steps, reads)

    def steps(self, steps: int, reads: int) -> float:
        """Seconds of so many passes of the drafter, at which the host looks so often."""
        return steps * self.draft[MODEL] + reads * self.read


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


def expected_blocks(rates: Sequence[float], length: int, tokens: int) -> float:
    """How many such blocks an answer of so many tokens takes; the last may be cut off."""
    reached = [1.0, *accumulate(rates[:length], mul), 0.0]  # at least so many accepted
    exactly = [more - less for more, less in pairwise(reached)]
    blocks = [0.0]
    for missing in range(1, tokens + 1):
        after = sum(chance * blocks[max(0, missing - n)] for n, chance in enumerate(exactly, start=1))
        blocks.append(1 + after)
    return blocks[tokens]


def chance_of(rates: Sequence[float], length: int, tokens: float) -> float:
    """The probability that a block of ``length`` drafted tokens yields at least ``tokens``."""
    if tokens > length + 1:
        return 0.0
    return prod(rates[: max(0, int(tokens) - 1)])
