"""A conversation of several turns in which only what is new is prefilled."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlxspec.decoding.decoder import Progress, SpeculativeDecoder
from mlxspec.decoding.text import Segment
from mlxspec.errors import InvalidRequestError
from mlxspec.models.tokens import Message, encode_conversation, encode_rendered, rendered_with_spans


@dataclass
class Conversation:
    """Turns of a user and a chat model; the decoder's caches are kept between them.

    The tokens of an answer are kept as they were decoded. Encoding their text anew could give other tokens, and the
    caches would have to be filled again from there.
    """

    decoder: SpeculativeDecoder
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)  # the conversation so far, as the model saw and said it

    def __post_init__(self):
        tokenizer = self.decoder.pair.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            raise InvalidRequestError("this model has no chat template, so it cannot chat; use `mlxspec generate`")

    def say(self, text: str, max_tokens: int = -1, progress: Progress = lambda done, total: None) -> Iterator[Segment]:
        """Answer ``text``. If the caller stops listening, what was said until then is the answer.

        Raises InvalidRequestError, and leaves the conversation as it was, if the context has no room for it.
        """
        if not text.strip():
            raise InvalidRequestError("the message is empty; say something")
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self._encoded(messages)
        segments = self.decoder.stream(tokens, max_tokens, progress=progress)
        self.messages, self._tokens = messages, tokens
        return self._listen(segments)

    def reset(self, system: str | None = None) -> None:
        """Start anew, with another system prompt if one is given."""
        self.system = system if system is not None else self.system
        self.messages, self._tokens = [], []

    def _listen(self, segments: Iterator[Segment]) -> Iterator[Segment]:
        answer = {"role": "assistant", "content": ""}
        self.messages = [*self.messages, answer]
        self._tokens = list(self._tokens)
        for segment in segments:
            answer["content"] += segment.text
            self._tokens += segment.tokens
            yield segment

    def _encoded(self, messages: list[Message]) -> list[int]:
        """Token ids of the conversation: what the caches hold, and behind it what the template makes of the rest."""
        tokenizer, system = self.decoder.pair.tokenizer, []
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        if self._tokens:
            rest = tokens_after_answer(tokenizer, [*system, *messages], self._tokens[-1])
            if rest is not None:
                return [*self._tokens, *rest]
        return encode_conversation(tokenizer, [*system, *messages])


def tokens_after_answer(tokenizer: Any, messages: list[Message], last_token: int) -> list[int] | None:
    """What the template writes behind the last answer, less an EOS that was decoded already.

    None if the template rewrites messages, so that it cannot be said where the answer ends.
    """
    rendered, spans = rendered_with_spans(tokenizer, messages)
    if spans is None:
        return None
    (_, start), (low, high) = spans[-2:]
    if last_token in tokenizer.eos_token_ids:
        eos = tokenizer.convert_ids_to_tokens(last_token)
        at = rendered.find(eos, start, low)
        if at < 0:
            return None
        start = at + len(eos)
    return encode_rendered(tokenizer, rendered[start:], [(low - start, high - start)])
