"""Text to token ids, and whether two tokenizers mean the same by them.

What a user writes is text: a prompt that contains "</s>" or "<|im_start|>" gets the tokens of those letters, never the
control token. Only ``raw`` prompts, which are a whole template of the caller's own, may spell control tokens.
"""

import re
from typing import Any

from mlxspec.errors import InvalidRequestError, TokenizerMismatchError, in_one_line

Message = dict[str, str]  # role and content
Span = tuple[int, int]  # start and end in a string
MARK = "\ue000"  # a private-use character, which no template and no change of case alters

# Meta's template, for Llama 2 Chat repositories that come without one.
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
    """Raise TokenizerMismatchError, naming the first difference, unless both map ids to the same tokens.

    Ids that only one of them has are padding of its vocabulary and do no harm.
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
    """Token ids of one prompt: a conversation of one message if the tokenizer has a chat template, else text with BOS.

    ``raw`` goes without the template, and control tokens that the text spells are control tokens.
    Raises InvalidRequestError for an empty prompt, text that is not Unicode, or a system prompt with no place to go.
    """
    if not prompt:
        raise InvalidRequestError("the prompt is empty; give some text")
    if not raw and tokenizer.has_chat_template:
        messages = [{"role": "system", "content": system}] if system is not None else []
        return encode_conversation(tokenizer, [*messages, {"role": "user", "content": prompt}])
    if system is not None:
        raise InvalidRequestError(
            "a system prompt needs a chat template, and "
            + ("--raw turns it off" if raw else "this tokenizer has none; put the text into the prompt")
        )
    check_unicode(prompt)
    starts_with_bos = raw and tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    return list(
        tokenizer.encode(prompt, add_special_tokens=not starts_with_bos, split_special_tokens=not raw, verbose=False)
    )


def encode_conversation(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation up to where the answer begins, through the tokenizer's chat template.

    Raises InvalidRequestError for text that is not Unicode or a conversation that the template refuses.
    """
    rendered, spans = rendered_with_spans(tokenizer, messages)
    if spans is not None:
        return encode_rendered(tokenizer, rendered, spans)
    if any(name in message["content"] for name in control_tokens(tokenizer) for message in messages):
        raise InvalidRequestError(
            "the conversation spells a control token of this model, and its chat template rewrites messages, so that "
            "the two cannot be told apart; take the control token out"
        )
    return encode_rendered(tokenizer, rendered, [])


def render(tokenizer: Any, messages: list[Message]) -> str:
    """The conversation as the chat template writes it, up to where the answer begins."""
    for message in messages:
        check_unicode(message["content"])
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates are code of the model's, and refuse by raising what they like
        raise InvalidRequestError(
            f"the model's chat template refuses this conversation: {in_one_line(error)}"
        ) from None


def encode_rendered(tokenizer: Any, rendered: str, theirs: list[Span]) -> list[int]:
    """Token ids of what a template made; control tokens count except in the spans of it that users wrote."""
    control = control_tokens(tokenizer)
    if not any(name in rendered[low:high] for name in control for low, high in theirs):
        return list(tokenizer.encode(rendered, add_special_tokens=False, verbose=False))
    names = re.compile("|".join(re.escape(name) for name in sorted(control, key=len, reverse=True)))
    tokens, start = [], 0

    def add_text(end: int) -> None:
        if text := rendered[start:end]:
            tokens.extend(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False))

    for match in names.finditer(rendered):
        if not any(low < match.end() and match.start() < high for low, high in theirs):
            add_text(match.start())
            tokens.append(control[match[0]])
            start = match.end()
    add_text(len(rendered))
    return tokens


def control_tokens(tokenizer: Any) -> dict[str, int]:
    return {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def rendered_with_spans(tokenizer: Any, messages: list[Message]) -> tuple[str, list[Span] | None]:
    """The conversation as the chat template writes it, up to where the answer begins, and where the messages are in it.

    The messages are found by rendering marks in their place; None where the template does more to them than strip.
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
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("the prompt is not valid UTF-8; convert it first") from None


def end_token(tokenizer: Any) -> int | None:
    """The token that ends an answer: of several, the one that the tokenizer names."""
    named = getattr(tokenizer, "eos_token_id", None)
    return named if named in tokenizer.eos_token_ids else min(tokenizer.eos_token_ids, default=None)
