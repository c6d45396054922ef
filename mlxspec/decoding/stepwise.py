"""Whether more is worth drafting, decided as the draft goes on from how sure the drafter is of it.

A drafter is right about some words and guesses at others, and its own probabilities tell which. So the length of a
draft follows the text: more is drafted and verified as long as what it will probably yield is worth more than the time
it costs, at the speed reached so far.

Whether a token is verified is decided from its distribution and from the tokens before it, never from which token was
drawn from that distribution: only so does the emitted text stay distributed as the target's own. (Dropping a token
because it turned out to be an unlikely one would favour the likely ones.)
"""

from bisect import bisect
from collections.abc import Sequence
from itertools import pairwise

from mlxspec.decoding.choice import LENGTHS, PRIOR_RATE, PRIOR_WEIGHT, BlockCosts, expected_tokens

TYPICAL = 2  # a draft of middling length
LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)  # between classes of confidence
MEMORY = 0.99  # what a block's evidence is worth a block later: of what confidence means
SHORT_MEMORY = 0.98  # and of how fast this is on the text at hand


class Confidence:
    """How often a drafted token was accepted, given those before it were, by the drafter's confidence in it.

    Nothing is learnt of a token that is not verified. So what is not known is hoped for: half way from the confidence
    to certainty, and again when the evidence is old.
    """

    def __init__(self):
        edges = (0.0, *LEVELS, 1.0)
        self.expected = [(1 + (low + high) / 2) / 2 for low, high in pairwise(edges)]
        self.tried = [0.0] * len(self.expected)
        self.passed = [0.0] * len(self.expected)

    def rate(self, confidence: float) -> float:
        level = bisect(LEVELS, confidence)
        passed = self.passed[level] + PRIOR_WEIGHT * self.expected[level]
        return passed / (self.tried[level] + PRIOR_WEIGHT)

    @property
    def mean(self) -> float:
        """Of a token whose confidence is not known yet."""
        return (sum(self.passed) + PRIOR_WEIGHT * PRIOR_RATE) / (sum(self.tried) + PRIOR_WEIGHT)

    def observe(self, confidences: Sequence[float], accepted: int) -> None:
        """A draft: of its tokens, the first that was rejected is the last that tells something."""
        self.fade(MEMORY)
        for position, confidence in enumerate(confidences[: accepted + 1]):
            level = bisect(LEVELS, confidence)
            self.tried[level] += 1
            self.passed[level] += position < accepted

    def fade(self, factor: float) -> None:
        """Count what was seen so far for less."""
        self.tried = [count * factor for count in self.tried]
        self.passed = [count * factor for count in self.passed]


class Draft:
    """One draft under way. Draft as many tokens as are ``wanted``, ``take`` their confidences; and so on."""

    def __init__(self, costs: BlockCosts, confidence: Confidence, speed: float, most: int, opening: int = 1):
        self.costs, self.confidence, self.speed, self.opening = costs, confidence, speed, opening
        self.lengths = [length for length in LENGTHS if length <= most]
        self.confidences: list[float] = []  # of the tokens that are to be verified
        self.steps = self.reads = 0  # passes of the drafter, and how often the host looked
        self.ended = False
        self.chance = 1.0  # that all so far are accepted

    @property
    def length(self) -> int:
        return len(self.confidences)

    @property
    def wanted(self) -> int:
        """How many tokens to draft now; 0: no more. Some always are: they are what tells how things stand.

        The first token beyond a length tells whether to go on to the next one. Then nothing is left to decide up to
        there, and the host need not look in between.
        """
        if self.ended or self.length == self.lengths[-1]:
            return 0
        if not self.steps:
            return min(self.opening, self.lengths[-1])
        if self.length in self.lengths:
            return int(self._worth(self.confidence.mean, drafted=False))
        return next(length for length in self.lengths if length > self.length) - self.length

    def take(self, confidences: Sequence[float]) -> int:
        """They were drafted; how many of them are to be verified. If not all, the draft has ended."""
        self.steps += len(confidences)
        self.reads += 1
        for number, confidence in enumerate(confidences):
            rate = self.confidence.rate(confidence)
            if self.length == self.lengths[-1] or (self.length in self.lengths and not self._worth(rate, drafted=True)):
                self.ended = True
                return number
            self.confidences.append(confidence)
            self.chance *= rate
        return len(confidences)

    def work(self, opening: int) -> tuple[int, int]:
        """The steps and reads of a draft of this length, had it opened with so many tokens."""
        steps, reads = opening, 1
        for before, after in pairwise(LENGTHS):
            if opening <= before < self.length:
                steps, reads = after, reads + 1 + (after - before > 1)
        if opening <= self.length < self.lengths[-1] and self._worth(self.confidence.mean, drafted=False):
            return self.length + 1, reads + 1  # one more, that told to end
        return steps, reads

    def _worth(self, rate: float, drafted: bool) -> bool:
        """Whether to go on to some longer length, if the next token is accepted at ``rate``; it may be ``drafted``.

        Not only to the next length: where the first row more is dear and the others are cheap, only many pay.
        """
        return any(self._gain(length, rate, drafted) > 0 for length in self.lengths if length > self.length)

    def _gain(self, length: int, rate: float, drafted: bool) -> float:
        """Tokens that going on to ``length`` yields more than the time for it is worth.

        That opening the draft may have made more of them already does not count: what pays only for that reason would
        make long openings look right for ever.
        """
        more = length - self.length
        tokens = self.chance * rate * expected_tokens([self.confidence.mean] * more, more - 1)
        rows = max(0.0, self.costs.verify[length] - self.costs.verify[self.length])
        return tokens - self.speed * (rows + self.costs.steps(more - drafted, (not drafted) + (more > 1)))


class Stepwise:
    """Such drafts, and what was learnt of them."""

    def __init__(self, costs: BlockCosts):
        self.costs = costs
        self.confidence = Confidence()
        # Before anything was seen: as fast as with the best fixed length of an average drafter.
        tokens = {length: expected_tokens([PRIOR_RATE] * length, length) for length in LENGTHS}
        length = max(LENGTHS[1:], key=lambda n: tokens[n] / costs.stepwise(n, n, 1))
        self.blocks, self.tokens, self.spent = 1.0, tokens[length], costs.stepwise(length, length, 1)
        # Seconds that the drafts so far would have taken, had each opened with so many tokens at once.
        self.openings = dict.fromkeys(LENGTHS[1:], 0.0)

    def adopt(self, costs: BlockCosts) -> None:
        """As the text grows, everything takes longer; so would what was seen so far have."""
        self.spent *= costs.stepwise(TYPICAL, TYPICAL, 1) / self.costs.stepwise(TYPICAL, TYPICAL, 1)
        self.costs = costs

    @property
    def fastest(self) -> float:
        """Tokens per second with a drafter that is always right."""
        return max((length + 1) / self.costs.stepwise(length, length, 1) for length in LENGTHS)

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.spent

    @property
    def seconds(self) -> float:
        """Of a block, lately."""
        return self.spent / self.blocks

    def draft(self, most: int) -> Draft:
        """A new one, of at most so many tokens."""
        return Draft(self.costs, self.confidence, max(1 / self.costs.verify[0], self.rate), most, self.opening)

    @property
    def opening(self) -> int:
        """How many tokens to draft before the host looks."""
        return min(self.openings, key=self.openings.get)

    def observe(self, draft: Draft, accepted: int) -> float:
        """What became of it. -> seconds of the block"""
        seconds = self.costs.stepwise(draft.length, draft.steps, draft.reads)
        for opening, spent in self.openings.items():
            self.openings[opening] = SHORT_MEMORY * spent + self.costs.steps(*draft.work(opening))
        self.confidence.observe(draft.confidences, accepted)
        self.blocks = SHORT_MEMORY * self.blocks + 1
        self.tokens = SHORT_MEMORY * self.tokens + accepted + 1
        self.spent = SHORT_MEMORY * self.spent + seconds
        return seconds

    def doubt(self, blocks: int) -> None:
        """Before so many blocks that are to tell whether all this still holds: they are to count for half of it."""
        self.confidence.fade(0.25)
        self.openings = dict.fromkeys(self.openings, 0.0)
        factor = min(1.0, blocks / self.blocks)
        self.blocks, self.tokens, self.spent = (factor * total for total in (self.blocks, self.tokens, self.spent))
