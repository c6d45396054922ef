"""Encode prompts and conversations, and compare tokenizers.

Text is encoded as in transformers. The chat template formats a conversation as a whole, and the result is encoded as a
whole. There is one difference: a user's text never becomes a control token. "</s>" or "<|im_start|>" in a prompt is
encoded letter by letter. Only a ``raw`` prompt, for which the caller writes the template, may spell control tokens.
"""

import json
import secrets
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from tokenizers import Encoding, Tokenizer

from mlxspec.errors import InvalidRequestError, TokenizerMismatchError, in_one_line

Message = dict[str, str]  # role and content
Span = tuple[int, int]  # start and end in a string
MARK = "\ue000"  # a private-use character, which templates leave unchanged
LETTER, SYMBOL = "ꔀ", "⁂"  # no normalizer changes these, no control token contains them

# Meta's template, for Llama 2 Chat repositories that have none.
LLAMA2_TEMPLATE = (
    "{% for message in messages if message['role'] != 'system' %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' }}"
    "{% if loop.first and messages[0]['role'] == 'system' %}"
    "{{ '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' }}"
    "{% endif %}"
    "{{ message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class EncodedText:
    """Token ids and their positions in the text.

    Attributes:
        text: The text, for a conversation the output of the chat template.
        ids: The token ids.
        offsets: The span of text of each token.
        spans: The span of text of each message. None if the chat template rewrites messages.
    """

    text: str
    ids: list[int]
    offsets: list[Span]
    spans: list[Span] | None


class ControlToken(NamedTuple):
    """A control token and its position in a text.

    Attributes:
        start: Index of its first character.
        end: Index after its last character.
        name: Text of the token.
    """

    start: int
    end: int
    name: str


def check_same_tokens(target: Any, drafter: Any) -> None:
    """Check that both tokenizers map ids to the same tokens.

    Ids that only one tokenizer has are padding of its vocabulary and are ignored.

    Raises:
        TokenizerMismatchError: They differ. The message names the first difference.
    """
    target_tokens, drafter_tokens = (
        {token_id: token for token, token_id in tokenizer.get_vocab().items()} for tokenizer in (target, drafter)
    )
    for token_id in sorted(target_tokens.keys() & drafter_tokens.keys()):
        if target_tokens[token_id] != drafter_tokens[token_id]:
            raise TokenizerMismatchError(
                f"target and drafter have different tokenizers: id {token_id} is {target_tokens[token_id]!r} in the "
                f"target and {drafter_tokens[token_id]!r} in the drafter; use a drafter made for this target"
            )


def encode_prompt(tokenizer: Any, prompt: str, system: str | None = None, raw: bool = False) -> list[int]:
    """Encode one prompt, with the chat template if the tokenizer has one, else as plain text.

    Args:
        tokenizer: mlx-lm's tokenizer.
        prompt: The text.
        system: System prompt, for the chat template.
        raw: Skip the chat template, and let the prompt spell control tokens.

    Returns:
        The token ids.

    Raises:
        InvalidRequestError: The prompt is empty or not Unicode, or there is no template for the system prompt.
    """
    if not prompt:
        raise InvalidRequestError("the prompt is empty; give some text")
    if not raw and tokenizer.has_chat_template:
        messages = [{"role": "system", "content": system}] if system is not None else []
        return encode_conversation(tokenizer, [*messages, {"role": "user", "content": prompt}])
    if system is not None:
        raise InvalidRequestError(
            "a system prompt needs a chat template, and "
            + ("a raw prompt skips it; use one of them" if raw else "this tokenizer has none; put it into the prompt")
        )
    check_unicode(prompt)
    if not raw:
        return encode_texts(tokenizer, [prompt])[0]
    starts_with_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return encode(tokenizer, [prompt], add_special_tokens=not starts_with_bos)[0].ids


def encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Encode plain texts with the tokenizer's default BOS and EOS. A text that spells a control token stays text."""
    control = control_tokens(tokenizer)
    return [
        without_names(tokenizer, frozenset(control.items())).tokenizer.encode(text).ids
        if control_places(tokenizer, text, encoding, control)
        else encoding.ids
        for text, encoding in zip(texts, encode(tokenizer, texts, add_special_tokens=True), strict=True)
    ]


def encode_conversation(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Encode a conversation as ``encode_formatted`` does. Return the ids up to the start of the next answer."""
    return encode_formatted(tokenizer, messages).ids


def encode_formatted(tokenizer: Any, messages: list[Message], answered: bool = False) -> EncodedText:
    """Encode a conversation with the tokenizer's chat template.

    If no message spells a control token, the ids are those of transformers' ``apply_chat_template``. If one does, only
    the ids of that spelling differ.

    Args:
        tokenizer: mlx-lm's tokenizer.
        messages: The conversation.
        answered: Whether the text ends with the last message, an answer. By default it ends where the next answer
            starts.

    Returns:
        The ids and their positions in the formatted text.

    Raises:
        InvalidRequestError: A message is not Unicode, a role spells a control token, the template rejects the
            conversation, or the template rewrites a message that spells a control token.
    """
    text = render(tokenizer, messages, answered)
    frame = render(tokenizer, [{**message, "content": MARK} for message in messages], answered)
    spans = message_spans(text, frame, messages)
    control = control_tokens(tokenizer, frame)
    if any(name in message["role"] for message in messages for name in control):
        raise InvalidRequestError("the role of a message spells a control token of this model; rename the role")
    encoding, around = encode(tokenizer, [text, frame])
    found = control_places(tokenizer, text, encoding, control)
    if spans is not None:
        own = [place for place in found if not any(place.start < end and start < place.end for start, end in spans)]
        if len(own) < len(found):
            # A spelled control token can change how its neighbors are read. So look again with the messages blanked.
            blank = blanked(text, spans)
            own += control_places(tokenizer, blank, encode(tokenizer, [blank])[0], control)
            return EncodedText(text, *encode_with_own(tokenizer, text, own, control), spans)
    elif [place.name for place in found] != [
        place.name for place in control_places(tokenizer, frame, around, control)
    ] or any(name in message["content"] for message in messages for name in control):
        raise InvalidRequestError(
            "a message spells a control token of this model, and its chat template rewrites messages, so the text "
            "cannot be distinguished from a control token; remove it from the message"
        )
    return EncodedText(text, encoding.ids, encoding.offsets, spans)


def render(tokenizer: Any, messages: list[Message], answered: bool = False) -> str:
    """Format a conversation with the chat template.

    Args:
        tokenizer: mlx-lm's tokenizer.
        messages: The conversation.
        answered: Whether the text ends with the last message. By default it ends where the next answer starts.

    Returns:
        The formatted text.

    Raises:
        InvalidRequestError: A message is not Unicode, or the template rejects the conversation.
    """
    for message in messages:
        check_unicode(message["content"])
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=not answered, tokenize=False)
    except Exception as error:  # a template may raise anything to reject a conversation
        raise InvalidRequestError(
            f"the model's chat template rejects this conversation: {in_one_line(error)}; change the messages"
        ) from None


def encode(tokenizer: Any, texts: list[str], add_special_tokens: bool = False) -> list[Encoding]:
    """Encode texts as transformers does, so that a text may spell control tokens. The texts are encoded in parallel.

    Args:
        tokenizer: mlx-lm's tokenizer.
        texts: The texts.
        add_special_tokens: Whether to add the tokenizer's default BOS and EOS.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = False
    return backend.encode_batch(texts, add_special_tokens=add_special_tokens)


def control_tokens(tokenizer: Any, frame: str | None = None) -> dict[str, int]:
    """Return the ids of the control tokens by their text.

    Control tokens are the special tokens, and the other added tokens that the chat template writes. White space is not
    included, because some tokenizers have added tokens for line breaks.

    Args:
        tokenizer: mlx-lm's tokenizer.
        frame: The text that the template writes around the messages of a conversation. None for a short conversation.
    """
    frame = template_frame(tokenizer) if frame is None else frame
    written = {*encode(tokenizer, [frame])[0].ids}
    source = str(tokenizer.chat_template or "")
    return {
        str(token): i
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or ((i in written or str(token) in source) and str(token).replace("▁", " ").strip())
    }


def template_frame(tokenizer: Any) -> str:
    """Return the text that the chat template writes around the messages of a short conversation.

    It is empty if there is no template.
    """
    roles = ["system", "user", "assistant", "user"] if tokenizer.has_chat_template else []
    for first in range(len(roles)):
        try:
            return render(tokenizer, [{"role": role, "content": MARK} for role in roles[first:]])
        except InvalidRequestError:
            continue
    return ""


def control_places(tokenizer: Any, text: str, encoding: Encoding, control: dict[str, int]) -> list[ControlToken]:
    """Find the control tokens that a text spells.

    A BOS that the tokenizer added is not spelled by the text. An unknown character becomes the unknown token, but does
    not spell it.

    Args:
        tokenizer: mlx-lm's tokenizer.
        text: The text.
        encoding: The encoding of the text.
        control: The ids of the control tokens by their text.

    Returns:
        The control tokens and their positions in the text.
    """
    names = {token: name for name, token in control.items()}
    found = []
    for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token in names:
            # A token may include the space around it, and its spelling may differ before normalization.
            name, part = names[token], text[start:end]
            spelled = name if name in part else "" if token == tokenizer.unk_token_id else part.strip()
            if spelled:
                start += part.index(spelled)
                found.append(ControlToken(start, start + len(spelled), name))
    return found


def blanked(text: str, spans: list[Span]) -> str:
    """Replace the characters of messages by placeholders. White space stays.

    Letters and digits become ``LETTER``, other characters become ``SYMBOL``.
    """
    chars = list(text)
    for start, end in spans:
        chars[start:end] = [
            char if char.isspace() else LETTER if char.isalnum() or char == "_" else SYMBOL for char in text[start:end]
        ]
    return "".join(chars)


@dataclass(frozen=True)
class WithoutNames:
    """A tokenizer whose control tokens have secret names, so that no text can spell one.

    Attributes:
        tokenizer: The tokenizer. It has the same ids, and the same rules about the characters around added tokens.
        secret: The secret name of each control token, by its usual name.
    """

    tokenizer: Tokenizer
    secret: dict[str, str]


@lru_cache(maxsize=4)
def without_names(tokenizer: Any, control: frozenset[tuple[str, int]]) -> WithoutNames:
    """Rename the control tokens in a copy of the tokenizer. This takes about a second for a large vocabulary.

    The names are removed from the vocabulary and the merges too, because a model may form a control token from its
    letters. A secret name begins and ends with the same characters as the usual one. They decide whether a neighboring
    token is a word of its own.
    """
    key = secrets.token_hex(16)
    secret = {name: f"{name[0]}{key}{token:08x}{name[-1]}" for name, token in control}
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["content"] = secret.get(token["content"], token["content"])
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {secret.get(name, name): token for name, token in model["vocab"].items()}
    else:
        model["vocab"] = [[secret.get(name, name), score] for name, score in model["vocab"]]
    if model.get("unk_token") in secret:
        model["unk_token"] = secret[model["unk_token"]]
    if "merges" in model:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & secret.keys()]
    renamed = Tokenizer.from_str(json.dumps(content))
    renamed.no_truncation()
    renamed.no_padding()
    return WithoutNames(renamed, secret)


def encode_with_own(
    tokenizer: Any, text: str, own: list[ControlToken], control: dict[str, int]
) -> tuple[list[int], list[Span]]:
    """Encode a text so that only the template's own control tokens become control tokens.

    Args:
        tokenizer: mlx-lm's tokenizer.
        text: The text.
        own: Places that may be the template's own control tokens. The tokenizer's rules decide. For example, a token
            that must stand alone as a word is not a control token next to a letter.
        control: The ids of all control tokens by their text.

    Returns:
        The ids and their positions in the text.
    """
    renamed = without_names(tokenizer, frozenset(control.items()))
    secret_control = {renamed.secret[name]: token for name, token in control.items()}
    own = sorted({*own})
    own = [place for i, place in enumerate(own) if i == 0 or place.start >= own[i - 1].end]
    while True:
        changed, done = "", 0
        origin: list[int] = []  # index in ``text`` of each character of ``changed``
        starts: dict[int, ControlToken] = {}
        for place in own:
            changed += text[done : place.start]
            starts[len(changed)] = place
            changed += (secret := renamed.secret[place.name])
            origin += [*range(done, place.start), place.start, *[place.end] * (len(secret) - 1)]
            done = place.end
        changed += text[done:]
        origin += range(done, len(text) + 1)
        encoding = renamed.tokenizer.encode(changed, add_special_tokens=False)
        found = control_places(tokenizer, changed, encoding, secret_control)
        taken = [starts[place.start] for place in found if place.start in starts]
        if len(taken) == len(own):
            return encoding.ids, [(origin[start], origin[end]) for start, end in encoding.offsets]
        own = taken


def message_spans(text: str, frame: str, messages: list[Message]) -> list[Span] | None:
    """Find each message in a formatted conversation.

    A template may strip the white space around a message and, as those of reasoning models do, leave out its beginning.

    Args:
        text: The conversation as the chat template formats it.
        frame: The same conversation with ``MARK`` in place of each message.
        messages: The conversation.

    Returns:
        The span of each message, or None if the template changes messages in any other way.
    """
    before, *behinds = frame.split(MARK)
    if len(behinds) != len(messages) or not text.startswith(before):
        return None
    spans, position = [], len(before)
    for message, behind in zip(messages, behinds, strict=True):
        length = shown_length(text, position, message["content"], behind)
        if length is None:
            return None
        spans.append((position, position + length))
        position += length + len(behind)
    return spans if position == len(text) else None


def shown_length(text: str, position: int, content: str, behind: str) -> int | None:
    """Measure a message at a position of a formatted conversation.

    Args:
        text: The formatted conversation.
        position: Index where the message would start.
        content: The message.
        behind: The text that the template writes after the message.

    Returns:
        Number of characters of the message, or None if it is not there.
    """
    for shown in (content, content.strip()):
        if text.startswith(shown + behind, position):
            return len(shown)
    for shown in (content, content.strip()):
        end = position + len(shown)
        while (end := text.rfind(behind, position, end + len(behind) - 1)) >= 0:
            # Compare the last characters first, because most candidates differ there.
            if shown.endswith(text[max(position, end - 20) : end]) and shown.endswith(text[position:end]):
                return end - position
    return None


def check_unicode(text: str) -> None:
    """Check that a text is valid Unicode. Raises InvalidRequestError if it contains surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("the prompt is not valid UTF-8; convert it first") from None


def end_token(tokenizer: Any) -> int | None:
    """Return the id of the token that ends a text, or None if there is none.

    It is the tokenizer's EOS. If the tokenizer names several others instead, it is the smallest of their ids.
    """
    named = getattr(tokenizer, "eos_token_id", None)
    return named if named in tokenizer.eos_token_ids else min(tokenizer.eos_token_ids, default=None)
