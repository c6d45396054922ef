"""From token ids to text as it comes: whole characters only, and never a part of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from mlxspec.errors import InvalidRequestError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # how an incomplete character decodes
LONGEST_CHARACTER = 4  # bytes in UTF-8, and so the most tokens that one character may take
LONGEST_WAIT = 16  # tokens without text, after which the window moves on


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
    """The text of an answer, token by token, until an EOS or a stop string ends it.

    Special tokens are not shown, but a stop string may be one or contain one.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: set[int], stops: Sequence[str]):
        self._text = StreamingText(tokenizer)
        self._stops = StopStrings(stops)
        self._eos_token_ids = eos_token_ids
        self._special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._rest = ""
        self.ended = False

    def add(self, token: int) -> str:
        """The text that has become certain; nothing once the answer has ended, what is left comes from ``finish``."""
        if token in self._eos_token_ids:
            self.ended = True
            return ""
        if token in self._special:
            shown = self._stops.add(self._special[token], hidden=True)
        else:
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
    about leading spaces see the same context in both. A character is held back until it is complete, but for no longer
    than the longest character takes: bytes that are no characters are shown as replacement characters. (They may come
    out as others than in one piece: some tokenizers judge a run of bytes as a whole.)
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text
        self._new = 0  # tokens since text was last shown
        self._incomplete = 0  # tokens since a character began

    def add(self, token: int) -> str:
        self._window.append(token)
        self._new += 1
        text = self._decode()
        whole = text.rstrip(REPLACEMENT)
        grows = len(whole) > self._shown
        self._incomplete = 0 if whole == text else 1 if grows else self._incomplete + 1
        if self._incomplete == LONGEST_CHARACTER:  # it would be complete by now
            whole, self._incomplete = text, 0
        if len(whole) <= self._shown and self._new < LONGEST_WAIT:
            return ""
        piece = whole[self._shown :]
        self._window, self._new = self._window[-self._new :], 0
        self._shown = len(self._decode()) - (len(text) - len(whole))
        return piece

    def finish(self) -> str:
        """What is still held back, half a character shown as a replacement character."""
        return self._decode()[self._shown :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True) if self._window else ""


class StopStrings:
    """Cuts a stream of text before the first stop string, holding back what could become one."""

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str):
            stops = [stops]
        if not all(stops):
            raise InvalidRequestError("a stop string is empty; give at least one character")
        self._stops = list(stops)
        self._held = ""
        self._visible: list[bool] = []  # of each character held
        self.found = False

    def add(self, text: str, hidden: bool = False) -> str:
        """The text that is safe to show now. Hidden text is not shown; a stop string may contain it or skip it."""
        self._held += text
        self._visible += [not hidden] * len(text)
        ends: list[tuple[int, int]] = []  # last character and first, of each stop string that is there
        safe = len(self._held)
        for places in self._readings():
            reading = "".join(self._held[place] for place in places)
            for stop in self._stops:
                if (at := reading.find(stop)) >= 0:
                    ends.append((places[at + len(stop) - 1], places[at]))
                elif size := overlap(reading, stop):
                    safe = min(safe, places[len(reading) - size])
        if not ends:
            return self._release(safe)
        # The stop string that is complete first counts, so that it does not matter how the text was cut up.
        self.found = True
        return self._release(min(ends)[1], drop=True)

    def _readings(self) -> list[list[int]]:
        """The places of what is held, with hidden text and without."""
        everything = list(range(len(self._held)))
        return [everything] if all(self._visible) else [everything, list(compress(everything, self._visible))]

    def finish(self) -> str:
        """What was held back and did not become a stop string."""
        return self._release(len(self._held))

    def _release(self, count: int, drop: bool = False) -> str:
        """Return the first characters held, without hidden ones. Keep the rest, or drop it."""
        shown = "".join(compress(self._held[:count], self._visible))
        count = len(self._held) if drop else count
        self._held, self._visible = self._held[count:], self._visible[count:]
        return shown


def overlap(text: str, stop: str) -> int:
    """The length of the longest beginning of ``stop`` that ``text`` ends with."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
