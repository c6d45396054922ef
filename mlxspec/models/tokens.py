"""Encode prompts and conversations, and compare tokenizers.

A user's text never becomes a control token: "</s>" or "<|im_start|>" in a prompt is encoded letter by letter. Only a
``raw`` prompt, where the caller supplies the complete template, may spell control tokens.
"""

import re
from typing import Any

from mlxspec.errors import InvalidRequestError, TokenizerMismatchError, in_one_line

Message = dict[str, str]  # role and content
Span = tuple[int, int]  # start and end in a string
MARK = "\ue000"  # a private-use character, which templates leave unchanged

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


def check_same_tokens(target: Any, drafter: Any) -> None:
    """Raise TokenizerMismatchError, with the first difference, unless both tokenizers map ids to the same tokens.

    Ids that only one tokenizer has are padding of its vocabulary and are ignored.
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
    """Encode one prompt, through the chat template if the tokenizer has one, else as plain text after BOS.

    Args:
        tokenizer: mlx-lm's tokenizer.
        prompt: The text.
        system: System prompt, for the chat template.
        raw: Skip the template, and encode control tokens that the prompt spells as control tokens.

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
            + ("--raw turns it off; leave one out" if raw else "this tokenizer has none; put the text into the prompt")
        )
    check_unicode(prompt)
    starts_with_bos = raw and tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return list(
        tokenizer.encode(prompt, add_special_tokens=not starts_with_bos, split_special_tokens=not raw, verbose=False)
    )


def encode_conversation(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Encode a conversation up to the start of the next answer, through the tokenizer's chat template.

    Raises:
        InvalidRequestError: A message is not Unicode, or the template rejects the conversation.
    """
    rendered, spans = rendered_with_spans(tokenizer, messages)
    if spans is not None:
        return encode_rendered(tokenizer, rendered, spans)
    if any(name in message["content"] for name in control_tokens(tokenizer) for message in messages):
        raise InvalidRequestError(
            "a message spells a control token of this model, and its chat template rewrites messages, so the text "
            "cannot be distinguished from a control token; remove it from the message"
        )
    return encode_rendered(tokenizer, rendered, [])


def render(tokenizer: Any, messages: list[Message]) -> str:
    """Return the conversation as the chat template formats it, up to the start of the next answer."""
    for message in messages:
        check_unicode(message["content"])
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template may raise anything to reject a conversation
        raise InvalidRequestError(
            f"the model's chat template rejects this conversation: {in_one_line(error)}; change the messages"
        ) from None


def encode_rendered(tokenizer: Any, rendered: str, user_spans: list[Span]) -> list[int]:
    """Encode the output of a chat template.

    Args:
        tokenizer: mlx-lm's tokenizer.
        rendered: The output.
        user_spans: The parts of it that users wrote, in which nothing becomes a control token.

    Returns:
        The token ids.
    """
    control = control_tokens(tokenizer)
    if not any(name in rendered[low:high] for name in control for low, high in user_spans):
        return list(tokenizer.encode(rendered, add_special_tokens=False, verbose=False))
    names = re.compile("|".join(re.escape(name) for name in sorted(control, key=len, reverse=True)))
    tokens: list[int] = []
    start = 0

    def add_text(end: int) -> None:
        if text := rendered[start:end]:
            tokens.extend(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))

    for match in names.finditer(rendered):
        if not any(low < match.end() and match.start() < high for low, high in user_spans):
            add_text(match.start())
            tokens.append(control[match[0]])
            start = match.end()
    add_text(len(rendered))
    return tokens


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Return the ids of the special tokens by their text."""
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def rendered_with_spans(tokenizer: Any, messages: list[Message]) -> tuple[str, list[Span] | None]:
    """Return the conversation as the chat template formats it, and the span of each message in it.

    The spans are found by rendering the template once more with a mark in place of each message. They are None if the
    template changes messages by more than stripping white space.
    """
    rendered = render(tokenizer, messages)
    frame = render(tokenizer, [{**message, "content": MARK} for message in messages]).split(MARK)
    position, spans = len(frame[0]), []
    texts = [message["content"] for message in messages]
    for text, behind in zip(texts, frame[1:], strict=False):
        shown = next((one for one in (text, text.strip()) if rendered.startswith(one + behind, position)), None)
        if shown is None:
            return rendered, None
        spans.append((position, position + len(shown)))
        position += len(shown) + len(behind)
    return rendered, spans if position == len(rendered) and len(spans) == len(messages) else None


def check_unicode(text: str) -> None:
    """Raise InvalidRequestError if the text contains surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("the prompt is not valid UTF-8; convert it first") from None


def end_token(tokenizer: Any) -> int | None:
    """Return the token that ends an answer: the tokenizer's EOS, or the smallest id if it names several others."""
    named = getattr(tokenizer, "eos_token_id", None)
    return named if named in tokenizer.eos_token_ids else min(tokenizer.eos_token_ids, default=None)
