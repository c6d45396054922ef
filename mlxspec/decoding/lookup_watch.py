"""What prompt lookup would have been worth on the text so far, without running it."""

from collections.abc import Iterator, Sequence
from itertools import count

from mlxspec.decoding.choice import LONGEST_CHOICE, Acceptance

SHORT_MEMORY = 0.95  # what a draft's evidence is worth a draft later: copied passages come and go


class LookupWatch:
    """How prompt lookup would have fared on the text, had it drafted all of it; costs no device time.

    A replay of ``LookupProposer`` block after block: the continuation of the longest suffix of at most ``ngram`` tokens
    where it last occurred. Whether a drafted token is accepted has the probability that the target gives it, which is
    also how often the text goes on with it; so the text itself tells the acceptance.
    """

    def __init__(self, ngram: int):
        self.ngram = ngram
        self.acceptance = Acceptance(rate=0.3, memory=SHORT_MEMORY)
        self.begin([])

    def begin(self, prompt: Sequence[int]) -> None:
        """A new text. What was learnt of the last one is kept."""
        self.text: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}  # n-gram -> where it last ended, the text's end excepted
        self.draft: Iterator[int] | None = None  # what the draft under way says next
        self.right = 0  # of its tokens, so far
        for token in prompt:
            self._append(token)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            ended = self._judge(token)
            self._append(token)
            if ended and len(self.text) > 1:
                self.draft, self.right = self._drafted(), 0

    def _judge(self, token: int) -> bool:
        """Whether the draft under way ends with ``token``: the first that it has wrong, or the one behind all of it."""
        if self.draft is None:
            return True
        if self.right < LONGEST_CHOICE and next(self.draft) == token:
            self.right += 1
            return False
        self.acceptance.observe(LONGEST_CHOICE, self.right)
        return True

    def _append(self, token: int) -> None:
        end = len(self.text) - 1  # of the text so far, which is no longer its last token
        for n in range(1, min(self.ngram, len(self.text)) + 1):
            self.ends[tuple(self.text[-n:])] = end
        self.text.append(token)

    def _drafted(self) -> Iterator[int]:
        """What followed the match, round and round if the text ends there; the text grows meanwhile."""
        last = len(self.text) - 1
        found = (self.ends.get(tuple(self.text[-n:])) for n in range(min(self.ngram, last), 0, -1))
        match = next((end for end in found if end is not None), last - 1)
        return (self.text[match + 1 + i % (last - match)] for i in count())
