"""A conversation of several turns. Each turn prefills only the tokens that are new."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mlxspec.decoding.decoder import Progress, SpeculativeDecoder
from mlxspec.decoding.text import Segment
from mlxspec.errors import InvalidRequestError
from mlxspec.models.tokens import EncodedText, Message, encode_formatted


@dataclass
class Conversation:
    """The turns of a user and a chat model. The decoder keeps its caches between turns.

    Each turn formats and encodes the whole conversation. The text of an answer may encode to other tokens than those
    that were decoded, and the caches would have to be recomputed from there. So the decoded tokens of the answers are
    kept, and only the tokens after the last answer come from the encoded conversation. If the template now formats an
    earlier part differently, the encoded conversation replaces all kept tokens.

    Args:
        decoder: The decoder. Its pair needs a tokenizer with a chat template.
        system: System prompt, or None.
        messages: The messages so far, without the system prompt.

    Raises:
        InvalidRequestError: The model has no chat template.
    """

    decoder: SpeculativeDecoder
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    _tokens: list[int] = field(default_factory=list)  # the conversation so far, with the answers as they were decoded
    _prompt: list[int] = field(default_factory=list)  # the encoded conversation, up to the last answer

    def __post_init__(self):
        tokenizer = self.decoder.pair.tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            raise InvalidRequestError("this model has no chat template, so it cannot chat; use a chat model")

    def say(self, text: str, max_tokens: int = -1, progress: Progress = lambda done, total: None) -> Iterator[Segment]:
        """Send a message and stream the answer. If the caller stops reading early, the part read so far is the answer.

        Args:
            text: The user's message.
            max_tokens: Limit of the answer, in tokens. −1 continues until an EOS or a full context.
            progress: Called with the number of prompt tokens read and of all prompt tokens.

        Returns:
            An iterator over the segments of the answer.

        Raises:
            InvalidRequestError: The message is empty, the chat template rejects it, or the context has no room for it.
                The conversation is unchanged.
        """
        if not text.strip():
            raise InvalidRequestError("the message is empty; say something")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, tokens = self._encoded(messages)
        context = self.decoder.pair.context_length
        if self.messages and context and len(tokens) >= context:
            raise InvalidRequestError(
                f"the conversation would have {len(tokens)} tokens and the target's context holds {context}; send a "
                "shorter message, or start a new conversation (/reset in mlxspec chat)"
            )
        segments = self.decoder.stream(tokens, max_tokens, progress=progress)
        answer: Message = {"role": "assistant", "content": ""}
        self.messages, self._prompt, self._tokens = [*messages, answer], prompt, list(tokens)
        return listened(segments, answer, self._tokens)

    def reset(self, system: str | None = None) -> None:
        """Delete all messages. ``system`` replaces the system prompt unless it is None."""
        self.system = system if system is not None else self.system
        self.messages, self._prompt, self._tokens = [], [], []

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


def listened(segments: Iterator[Segment], answer: Message, tokens: list[int]) -> Iterator[Segment]:
    """Yield the segments of an answer, and add each to the message and to the tokens."""
    for segment in segments:
        answer["content"] += segment.text
        tokens += segment.tokens
        yield segment


def tokens_after_answer(tokenizer: Any, whole: EncodedText, last_token: int) -> list[int] | None:
    """Find the tokens of a conversation that follow its last answer. An EOS that was already decoded is left out.

    Args:
        tokenizer: mlx-lm's tokenizer.
        whole: The encoded conversation.
        last_token: Id of the last token that was decoded.

    Returns:
        The token ids. None if the end of the answer is unknown, because one token covers it and the text that follows.
    """
    if whole.spans is None:
        return None
    (_, end), (following, _) = whole.spans[-2:]
    places = enumerate(whole.offsets)
    if last_token in tokenizer.eos_token_ids:
        eos = (i for i, place in places if whole.ids[i] == last_token and place[1] > end and place[0] < following)
        at = next(eos, None)
        return None if at is None else whole.ids[at + 1 :]
    at = next((i for i, place in places if place[0] >= end), None)
    # Some tokenizers leave white space out of a token's offsets.
    joined = at is None or (at > 0 and (whole.offsets[at - 1][1] > end or whole.text[end - 1].isspace()))
    return None if joined else whole.ids[at:]
