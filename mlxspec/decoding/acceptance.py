"""How many tokens a block of a given draft length will yield: estimated from the blocks and the text so far."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, count, pairwise
from operator import mul
from typing import Protocol

MENU = (0, 1, 2, 3, 4, 6, 8, 12, 16)  # the draft lengths that ``Automatic`` chooses from
LONGEST = MENU[-1]

PRIOR_RATE, PRIOR_WEIGHT = 0.75, 2.0  # of a drafter that has drafted nothing yet: as if 2 tokens had been tried
POSITION_WEIGHT = 2.0  # of the average over all positions in the estimate of one, as if so many tokens had been tried
BLOCK_MEMORY = 0.98  # the weight of a block's evidence one block later: the last 50 blocks count
TOKEN_MEMORY = 0.98  # the same per token of text, for prompt lookup: copied passages come and go


class Yield(Protocol):
    """An estimate of what a proposer's blocks yield."""

    def expected(self) -> dict[int, float]:
        """Return the expected tokens per block, for each draft length of ``MENU`` at least."""


class Acceptance:
    """A running estimate of how often each draft position is accepted, given that those before it were.

    Old blocks fade. A position that was hardly tried borrows from the average over all positions, and that average
    borrows from a prior.
    """

    def __init__(self, rate: float = PRIOR_RATE, weight: float = PRIOR_WEIGHT, memory: float = BLOCK_MEMORY):
        self.rate, self.weight, self.memory = rate, weight, memory
        self.tried = [0.0] * LONGEST
        self.accepted = [0.0] * LONGEST

    def observe(self, drafted: int, accepted: int) -> None:
        """Add one block that drafted ``drafted`` tokens and accepted the first ``accepted`` of them."""
        self.fade(self.memory)
        for position in range(min(accepted + 1, drafted, LONGEST)):
            self.tried[position] += 1
            self.accepted[position] += position < accepted

    def fade(self, factor: float) -> None:
        """Count everything that was seen so far ``factor`` times."""
        self.tried = [factor * n for n in self.tried]
        self.accepted = [factor * n for n in self.accepted]

    def rates(self) -> list[float]:
        """Return the acceptance rate of each draft position."""
        average = (sum(self.accepted) + self.rate * self.weight) / (sum(self.tried) + self.weight)
        return [
            (accepted + average * POSITION_WEIGHT) / (tried + POSITION_WEIGHT)
            for accepted, tried in zip(self.accepted, self.tried, strict=True)
        ]

    def expected(self) -> dict[int, float]:
        """Return the expected tokens per block for each draft length up to ``LONGEST``."""
        return dict(enumerate(expected_tokens(self.rates())))


class LookupReplay:
    """What prompt lookup would have yielded on the text so far, at every draft length of ``MENU``.

    Prompt lookup proposes from the text alone. So the host can replay it block by block, without any device time and
    whether or not it was used. A drafted token is accepted with the probability that the target gives it, which is
    also how often the text continues with it: the text itself tells the acceptance.

    The replays at different lengths are independent. A long draft that fails starts its next block just behind the
    failure, where a match is rarest; rates by position that were taken there would make short drafts look useless.

    Args:
        ngram: the longest suffix that the lookup searches for, in tokens.
    """

    def __init__(self, ngram: int):
        self.ngram = ngram
        self.replays = [Replay(length) for length in MENU[1:]]
        self.start([])

    def start(self, prompt: Sequence[int]) -> None:
        """Begin a new text. The estimates of the last one are kept."""
        self.text: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}  # n-gram -> where it last ended, the end of the text excepted
        for replay in self.replays:
            replay.draft = None
        for token in prompt:
            self._append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        for token in tokens:
            ended = [replay for replay in self.replays if replay.ends_with(token)]
            self._append(token)
            for replay in ended:
                replay.draft = self._continuation() if len(self.text) > 1 else None

    def expected(self) -> dict[int, float]:
        """Return the expected tokens per block for each draft length of ``MENU``."""
        return {0: 1.0} | {replay.length: replay.tokens / replay.blocks for replay in self.replays}

    def _append(self, token: int) -> None:
        end = len(self.text) - 1  # of the text so far, which is no longer its last token
        for n in range(1, min(self.ngram, len(self.text)) + 1):
            self.ends[tuple(self.text[-n:])] = end
        self.text.append(token)

    def _continuation(self) -> Iterator[int]:
        """Yield what ``LookupProposer`` would propose at the end of the text, without end."""
        last = len(self.text) - 1
        matches = (self.ends.get(tuple(self.text[-n:])) for n in range(min(self.ngram, last), 0, -1))
        match = next((end for end in matches if end is not None), last - 1)
        return (self.text[match + 1 + i % (last - match)] for i in count())


class Replay:
    """Prompt lookup at one draft length: its running count of blocks and of the tokens they yielded."""

    def __init__(self, length: int):
        self.length = length
        self.draft: Iterator[int] | None = None
        self.right = 0  # tokens of the present draft that the text confirmed
        self.blocks, self.tokens = 1.0, 1.3  # a block that yielded little, as a prior

    def ends_with(self, token: int) -> bool:
        """Add one token of text. Return whether the present block ends with it."""
        self.blocks *= TOKEN_MEMORY
        self.tokens *= TOKEN_MEMORY
        if self.draft is None:
            return True
        if self.right < self.length and next(self.draft) == token:
            self.right += 1
            return False
        self.blocks += 1
        self.tokens += self.right + 1
        self.right = 0
        return True


def expected_tokens(rates: Sequence[float]) -> list[float]:
    """Return the expected tokens per block for draft lengths 0, 1, …, len(rates): 1 + Σ_i Π_{j≤i} rate_j.

    Args:
        rates: of each draft position, the chance that it is accepted if those before it were.
    """
    return list(accumulate(accumulate(rates, mul), initial=1.0))


def expected_blocks(rates: Sequence[float], length: int, tokens: int) -> float:
    """Return how many blocks of ``length`` drafted tokens an answer of ``tokens`` tokens takes; its end cuts the last.

    Args:
        rates: as for ``expected_tokens``.
        length: draft length.
        tokens: length of the answer.
    """
    reached = [1.0, *accumulate(rates[:length], mul), 0.0]  # the chance of at least 0, 1, … accepted tokens
    exactly = [more - less for more, less in pairwise(reached)]
    blocks = [0.0]
    for missing in range(1, tokens + 1):
        blocks.append(1 + sum(chance * blocks[max(0, missing - n)] for n, chance in enumerate(exactly, start=1)))
    return blocks[tokens]
