"""A conversation of several turns in which only what is new is prefilled."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlxspec.decoding.decoder import Progress, SpeculativeDecoder
from mlxspec.decoding.text import Segment
from mlxspec.errors import InvalidRequestError
from mlxspec.models.tokens import EncodedText, Message, encode_formatted


@dataclass
class Conversation:
    """Turns of a user and a chat model; the decoder's caches are kept between them.

    Every turn, the whole conversation goes through the chat template and the tokenizer. The tokens of an answer are
    kept as they were decoded, since their text could be encoded as other tokens, and the caches would have to be filled
    again from there. What follows the answer is taken from the encoded conversation. Where the template formats an
    earlier part otherwise than before, the encoded conversation replaces all of it.
    """

    decoder: SpeculativeDecoder
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)  # the conversation so far, as the model saw and said it
    _prompt: list[int] = field(default_factory=list)  # the conversation up to the last answer, as the template has it

    def __post_init__(self):
        tokenizer = self.decoder.pair.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            raise InvalidRequestError("this model has no chat template, so it cannot chat; use a chat model")

    def say(self, text: str, max_tokens: int = -1, progress: Progress = lambda done, total: None) -> Iterator[Segment]:
        """Answer ``text``. If the caller stops listening, what was said until then is the answer.

        Raises InvalidRequestError, and leaves the conversation as it was, if the context has no room for it.
        """
        if not text.strip():
            raise InvalidRequestError("the message is empty; say something")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, tokens = self._encoded(messages)
        segments = self.decoder.stream(tokens, max_tokens, progress=progress)
        self.messages, self._prompt, self._tokens = messages, prompt, tokens
        return self._listen(segments)

    def reset(self, system: str | None = None) -> None:
        """Start anew, with another system prompt if one is given."""
        self.system = system if system is not None else self.system
        self.messages, self._prompt, self._tokens = [], [], []

    def _listen(self, segments: Iterator[Segment]) -> Iterator[Segment]:
        answer = {"role": "assistant", "content": ""}
        self.messages = [*self.messages, answer]
        self._tokens = list(self._tokens)
        for segment in segments:
            answer["content"] += segment.text
            self._tokens += segment.tokens
            yield segment

    def _encoded(self, messages: list[Message]) -> tuple[list[int], list[int]]:
        """Return the encoded conversation, and the same with the answers as they were decoded."""
        tokenizer, system = self.decoder.pair.tokenizer, []
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        whole = encode_formatted(tokenizer, [*system, *messages])
        if self._tokens and whole.ids[: len(self._prompt)] == self._prompt:
            rest = tokens_after_answer(tokenizer, whole, self._tokens[-1])
            if rest is not None:
                return whole.ids, [*self._tokens, *rest]
        return whole.ids, whole.ids


def tokens_after_answer(tokenizer: Any, whole: EncodedText, last_token: int) -> list[int] | None:
    """Return the tokens of a conversation behind its last answer, less an EOS that was decoded already.

    None if it cannot be said where the answer ends, since a token stands for its end and for what follows.
    """
    if whole.spans is None:
        return None
    (_, end), (following, _) = whole.spans[-2:]
    places = enumerate(whole.offsets)
    if last_token in tokenizer.eos_token_ids:
        eos = (i for i, place in places if whole.ids[i] == last_token and place[1] > end and place[0] < following)
        at = next(eos, None)
        return None if at is None else whole.ids[at + 1 :]
    at = next(i for i, place in places if place[0] >= end)
    # Some tokenizers leave white space out of a token's place.
    joined = at > 0 and (whole.offsets[at - 1][1] > end or whole.text[end - 1].isspace())
    return None if joined else whole.ids[at:]
