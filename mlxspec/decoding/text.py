"""Streaming detokenization. It emits only complete characters, and never a part of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from mlxspec.errors import InvalidRequestError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # the decoding of an incomplete character
LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, so the most tokens that it can take
LONGEST_WAIT = 16  # tokens without text, after which the window moves on


@dataclass(frozen=True)
class Segment:
    """A piece of an answer whose text can no longer change.

    Attributes:
        text: The text, which may be empty.
        tokens: Ids of the tokens consumed since the previous segment.
        drafted: Whether the proposer drafted the last of the tokens.
        finish_reason: In the last segment, "stop" (EOS or a stop string) or "length" (max_tokens or the context).
    """

    text: str
    tokens: list[int] = field(default_factory=list)
    drafted: bool = False
    finish_reason: str | None = None


class AnswerText:
    """Decodes the tokens of an answer to text until an EOS or a stop string ends it.

    Special tokens are not shown, but a stop string may be one or contain one.

    Args:
        tokenizer: mlx-lm's tokenizer.
        eos_token_ids: Tokens that end the answer.
        stops: Stop strings.
    """

    def __init__(self, tokenizer: Any, eos_token_ids: set[int], stops: Sequence[str]):
        self._text = StreamingText(tokenizer)
        self._stops = StopStrings(stops)
        self._eos_token_ids = eos_token_ids
        self._special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._rest = ""
        self.ended = False

    def add(self, token: int) -> str:
        """Add a token. Return the text that can no longer change, or "" once the answer has ended."""
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
        """Return the rest of the text, up to the stop string if there is one. Call it once, after the last token."""
        if self._stops.found:
            return self._rest
        return self._stops.add(self._text.finish()) + self._stops.finish()


class StreamingText:
    """Decodes one token at a time. The pieces add up to the decoding of all tokens at once.

    A piece is the text that the newest tokens add to the decoding of a short window. The window keeps a few tokens
    before them, so that the tokenizer's rules about leading spaces see the same context. An incomplete character is
    held back for at most ``LONGEST_CHARACTER`` tokens. Invalid bytes are shown as replacement characters. Their number
    can differ from that of a decoding at once, because some tokenizers decode a run of bytes as a whole.

    Args:
        tokenizer: mlx-lm's tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0  # characters of the window's text that were returned
        self._new = 0  # tokens since text was last shown
        self._incomplete = 0  # tokens since a character began

    def add(self, token: int) -> str:
        """Add a token. Return the complete characters that it adds, which may be none."""
        self._window.append(token)
        self._new += 1
        text = self._decode()
        whole = text.rstrip(REPLACEMENT)
        grows = len(whole) > self._shown
        self._incomplete = 0 if whole == text else 1 if grows else self._incomplete + 1
        if self._incomplete == LONGEST_CHARACTER:  # a valid character would be complete by now
            whole, self._incomplete = text, 0
        if len(whole) <= self._shown and self._new < LONGEST_WAIT:
            return ""
        piece = whole[self._shown :]
        self._window, self._new = self._window[-self._new :], 0
        self._shown = len(self._decode()) - (len(text) - len(whole))
        return piece

    def finish(self) -> str:
        """Return the text that is still held back. An incomplete character becomes a replacement character."""
        return self._decode()[self._shown :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True) if self._window else ""


class StopStrings:
    """Cuts a stream of text before the first stop string. Text that may become a stop string is held back.

    Args:
        stops: Stop strings, or a single one.

    Raises:
        InvalidRequestError: A stop string is empty.
    """

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
        """Add text. Return the text that no stop string can remove anymore.

        Args:
            text: The new text.
            hidden: Whether to leave the text out of the result. A stop string may contain hidden text or ignore it.
        """
        self._held += text
        self._visible += [not hidden] * len(text)
        ends: list[tuple[int, int]] = []  # last and first index of each stop string found
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
        # Use the stop string that is complete first, so that the result does not depend on how the text was split.
        self.found = True
        return self._release(min(ends)[1], drop=True)

    def _readings(self) -> list[list[int]]:
        """Return the indices of the held characters, with hidden text and, if there is any, without it."""
        everything = list(range(len(self._held)))
        return [everything] if all(self._visible) else [everything, list(compress(everything, self._visible))]

    def finish(self) -> str:
        """Return the text that was held back and did not become a stop string."""
        return self._release(len(self._held))

    def _release(self, count: int, drop: bool = False) -> str:
        """Remove and return the first ``count`` held characters, without hidden ones. ``drop`` discards the others."""
        shown = "".join(compress(self._held[:count], self._visible))
        count = len(self._held) if drop else count
        self._held, self._visible = self._held[count:], self._visible[count:]
        return shown


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest proper prefix of ``stop`` that ``text`` ends with, 0 for none."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
