"""Text to token ids, and whether two tokenizers mean the same by them.

What a user writes is text: a prompt that contains "</s>" or "<|im_start|>" gets the tokens of those letters, never the
control token. Only ``raw`` prompts, which are a whole template of the caller's own, may spell control tokens.
"""

import re
from typing import Any

from mlxspec.errors import InvalidRequestError, TokenizerMismatchError

Message = dict[str, str]  # role and content

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
    return list(tokenizer.encode(prompt, add_special_tokens=not starts_with_bos, split_special_tokens=not raw))


def encode_conversation(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation up to where the answer begins, through the tokenizer's chat template.

    Raises InvalidRequestError for text that is not Unicode or a conversation that the template refuses.
    """
    return encode_rendered(tokenizer, render(tokenizer, messages), [message["content"] for message in messages])


def render(tokenizer: Any, messages: list[Message]) -> str:
    """The conversation as the chat template writes it, up to where the answer begins."""
    for message in messages:
        check_unicode(message["content"])
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates are code of the model's, and refuse by raising what they like
        raise InvalidRequestError(f"the model's chat template refuses this conversation: {error}") from None


def encode_rendered(tokenizer: Any, rendered: str, texts: list[str]) -> list[int]:
    """Token ids of a rendered template; control tokens count where the template wrote them and not inside ``texts``."""
    control = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not any(name in text for name in control for text in texts):
        return list(tokenizer.encode(rendered, add_special_tokens=False))
    names = re.compile("|".join(re.escape(name) for name in sorted(control, key=len, reverse=True)))
    theirs = spans(rendered, [text.strip() for text in texts])
    tokens, start = [], 0

    def add_text(end: int) -> None:
        text = rendered[start:end]
        tokens.extend(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else [])

    for match in names.finditer(rendered):
        if not any(low <= match.start() < high for low, high in theirs):
            add_text(match.start())
            tokens.append(control[match[0]])
            start = match.end()
    add_text(len(rendered))
    return tokens


def spans(rendered: str, texts: list[str]) -> list[tuple[int, int]]:
    """Where the texts stand in what the template made of them, in order."""
    found, position = [], 0
    for text in texts:
        start = rendered.find(text, position)
        if start < 0:
            raise InvalidRequestError(
                "the conversation spells a control token of this model, and its chat template rewrites messages, so "
                "that the two cannot be told apart; take the control token out"
            )
        position = start + len(text)
        found.append((start, position))
    return found


def check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("the prompt is not valid UTF-8; convert it first") from None
