"""Estimates of the tokens that a block of a given draft length yields, from the earlier blocks and the text."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, count, pairwise
from operator import mul
from typing import Protocol

MENU = (0, 1, 2, 3, 4, 6, 8, 12, 16)  # the draft lengths that ``Automatic`` chooses from
LONGEST = MENU[-1]

PRIOR_RATE, PRIOR_WEIGHT = 0.8, 2.0  # for a drafter without evidence; the weight is a pseudo-count in tokens
POSITION_WEIGHT = 2.0  # pseudo-count of the overall rate in each position's rate
BLOCK_MEMORY = 0.98  # decay of the evidence per block: about the last 50 blocks count
TOKEN_MEMORY = 0.98  # decay per token of text, for prompt lookup: copied passages start and end abruptly


class Yield(Protocol):
    """A running estimate of the tokens that a proposer's blocks yield."""

    def expected(self) -> dict[int, float]:
        """Return the expected tokens per block, for each draft length of ``MENU`` at least."""


class Acceptance:
    """A running estimate of how often each draft position is accepted, given that the earlier ones were.

    Evidence decays with each block. The rate of a position is shrunk toward the overall rate, and the overall rate
    toward a prior.

    Args:
        rate: Acceptance rate of the prior.
        weight: Pseudo-count of the prior, in tokens.
        memory: Decay of the evidence per block.
    """

    def __init__(self, rate: float = PRIOR_RATE, weight: float = PRIOR_WEIGHT, memory: float = BLOCK_MEMORY):
        self.rate, self.weight, self.memory = rate, weight, memory
        self.tried = [0.0] * LONGEST
        self.accepted = [0.0] * LONGEST

    def observe(self, drafted: int, accepted: int) -> None:
        """Add one block that drafted ``drafted`` tokens, of which the first ``accepted`` were accepted."""
        self.fade(self.memory)
        for position in range(min(accepted + 1, drafted, LONGEST)):
            self.tried[position] += 1
            self.accepted[position] += position < accepted

    def fade(self, factor: float) -> None:
        """Multiply the weight of all evidence by ``factor``, from 0 to 1."""
        self.tried = [factor * n for n in self.tried]
        self.accepted = [factor * n for n in self.accepted]

    def rates(self) -> list[float]:
        """Return the acceptance rate of each draft position, given that the earlier ones were accepted."""
        average = (sum(self.accepted) + self.rate * self.weight) / (sum(self.tried) + self.weight)
        return [
            (accepted + average * POSITION_WEIGHT) / (tried + POSITION_WEIGHT)
            for accepted, tried in zip(self.accepted, self.tried, strict=True)
        ]

    def expected(self) -> dict[int, float]:
        """Return the expected tokens per block, for each draft length up to ``LONGEST``."""
        return dict(enumerate(expected_tokens(self.rates())))


class LookupReplay:
    """An estimate of what prompt lookup would have yielded on the answers so far, at each draft length of ``MENU``.

    Prompt lookup proposes from the text alone. So the host can replay it block by block without using the device, even
    while another proposer drafts. The target accepts a lookup token x with probability p(x), and emits x with the same
    probability. So the share of lookup tokens that the text confirms estimates the acceptance rate. Only the answer is
    replayed. The prompt is only searched.

    The replays at different lengths are independent. After a rejected long draft, the next block starts right after a
    mismatch, where matches are rare. Rates by position from such blocks would underestimate short drafts.

    Args:
        ngram: Longest suffix that the lookup searches for, in tokens.
    """

    def __init__(self, ngram: int):
        self.ngram = ngram
        self.replays = [Replay(length) for length in MENU[1:]]
        self.start([])

    def start(self, prompt: Sequence[int]) -> None:
        """Start a new text with the tokens of its prompt. The estimates from earlier texts are kept."""
        self.text: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}  # n-gram -> index of its last token, latest occurrence
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
        """Return the expected tokens per block, for each draft length of ``MENU``."""
        return {0: 1.0} | {replay.length: replay.tokens / replay.blocks for replay in self.replays}

    def _append(self, token: int) -> None:
        # Recorded before the token is appended, so that the suffix of the text does not match itself.
        end = len(self.text) - 1
        for n in range(1, min(self.ngram, len(self.text)) + 1):
            self.ends[tuple(self.text[-n:])] = end
        self.text.append(token)

    def _continuation(self) -> Iterator[int]:
        """Yield what ``LookupProposer`` would propose at the end of the text, without limit."""
        last = len(self.text) - 1
        matches = (self.ends.get(tuple(self.text[-n:])) for n in range(min(self.ngram, last), 0, -1))
        match = next((end for end in matches if end is not None), last - 1)
        return (self.text[match + 1 + i % (last - match)] for i in count())


class Replay:
    """A replay of prompt lookup at one draft length. It counts the blocks and the tokens that they yielded.

    Args:
        length: Draft length γ, at least 1.
    """

    def __init__(self, length: int):
        self.length = length
        self.draft: Iterator[int] | None = None
        self.right = 0  # leading tokens of the current draft that the text confirmed
        self.blocks, self.tokens = 1.0, 1.3  # the prior: one block that yielded 1.3 tokens

    def ends_with(self, token: int) -> bool:
        """Add one token of the text. Return whether the current block ends with it."""
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
        rates: Probability that each draft position is accepted, given that the earlier ones were.
    """
    return list(accumulate(accumulate(rates, mul), initial=1.0))


def expected_blocks(rates: Sequence[float], length: int, tokens: int) -> float:
    """Compute the expected number of blocks for an answer. The end of the answer cuts the last block.

    Args:
        rates: Probability that each draft position is accepted, given that the earlier ones were.
        length: Draft length γ.
        tokens: Length of the answer, in tokens.

    Returns:
        The expected number of blocks, 0 for an empty answer.
    """
    reached = [1.0, *accumulate(rates[:length], mul), 0.0]  # probability of at least 0, 1, … accepted tokens
    exactly = [more - less for more, less in pairwise(reached)]
    blocks = [0.0]
    for missing in range(1, tokens + 1):
        blocks.append(1 + sum(chance * blocks[max(0, missing - n)] for n, chance in enumerate(exactly, start=1)))
    return blocks[tokens]
