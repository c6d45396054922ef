"""Text to token ids, and whether two tokenizers mean the same by them."""

from typing import Any

from mlxspec.errors import InvalidRequestError, TokenizerMismatchError


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
    """Token ids of a prompt: through the chat template if the tokenizer has one, as plain text with BOS if ``raw``.

    Raises InvalidRequestError for an empty prompt, text that is not Unicode, or a system prompt with no place to go.
    """
    if not prompt:
        raise InvalidRequestError("the prompt is empty; give some text")
    try:
        (prompt + (system or "")).encode()
    except UnicodeEncodeError:
        raise InvalidRequestError("the prompt is not valid UTF-8; convert it first") from None
    if raw or not tokenizer.has_chat_template:
        if system is not None:
            raise InvalidRequestError(
                "a system prompt needs a chat template, and "
                + ("--raw turns it off" if raw else "this tokenizer has none; put the text into the prompt")
            )
        starts_with_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return list(tokenizer.encode(prompt, add_special_tokens=not starts_with_bos))
    messages = [{"role": "system", "content": system}] if system is not None else []
    try:
        return list(
            tokenizer.apply_chat_template([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)
        )
    except Exception as error:  # templates are code of the model's, and refuse by raising what they like
        raise InvalidRequestError(f"the model's chat template refuses this conversation: {error}") from None
