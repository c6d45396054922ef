"""From token ids to text as it comes: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxspec.errors import InvalidRequestError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # how an incomplete character decodes


@dataclass(frozen=True)
class Segment:
    """Text that has become certain, and the token ids consumed for it since the last segment.

    ``drafted`` tells whether the last of them was proposed by the drafter. The last segment of a stream has a
    ``finish_reason``: "stop" (EOS or a stop string) or "length" (max_tokens or the context).
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    drafted: bool = False
    finish_reason: str | None = None


class AnswerText:
    """The text of an answer, token by token, until an EOS or a stop string ends it."""

    def __init__(self, tokenizer: Any, eos_token_ids: set[int], stops: Sequence[str]):
        self._text = StreamingText(tokenizer)
        self._stops = StopStrings(stops)
        self._eos_token_ids = eos_token_ids
        self._rest = ""
        self.ended = False

    def add(self, token: int) -> str:
        """The text that has become certain; nothing once the answer has ended, what is left comes from ``finish``."""
        if token in self._eos_token_ids:
            self.ended = True
            return ""
        shown = self._stops.add(self._text.add(token))
        if not self._stops.found:
            return shown
        self.ended, self._rest = True, shown
        return ""

    def finish(self) -> str:
        """The end of the text, with what was held back if nothing came of it."""
        if self._stops.found:
            return self._rest
        return self._stops.add(self._text.finish()) + self._stops.finish()


class StreamingText:
    """Decodes one token at a time; the pieces add up to what the tokenizer makes of all tokens at once.

    A piece is what the newest tokens add to the decoding of a short window before them, so that a tokenizer's rules
    about leading spaces see the same context in both. Pieces that end inside a character are held back. (Bytes that
    are no characters at all may come out as other replacement characters than in one piece: some tokenizers judge a
    run of bytes as a whole.)
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0  # tokens of the window whose text is out

    def add(self, token: int) -> str:
        self._window.append(token)
        text, before = self._decode(self._window), self._decode(self._window[: self._shown])
        if len(text) <= len(before) or text.endswith(REPLACEMENT):
            return ""
        self._window, self._shown = self._window[self._shown :], len(self._window) - self._shown
        return text[len(before) :]

    def finish(self) -> str:
        """What is still held back, half a character shown as a replacement character."""
        return self._decode(self._window)[len(self._decode(self._window[: self._shown])) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""


class StopStrings:
    """Cuts a stream of text before the first stop string, holding back what could become one."""

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str):
            stops = [stops]
        if not all(stops):
            raise InvalidRequestError("a stop string is empty; give at least one character")
        self._stops = list(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """The text that is safe to show now."""
        self._held += text
        # The stop string that is complete first counts, so that it does not matter how the text was cut up.
        ends = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            safe = min(ends)[1]
            self._held = self._held[:safe]
        else:
            safe = len(self._held) - max((overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        held, self._held = self._held, ""
        return held


def overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of ``stop`` that ``text`` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
