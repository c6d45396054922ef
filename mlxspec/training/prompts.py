"""Prompts for the target, from text and chat files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlxspec.errors import InvalidRequestError, TrainingError
from mlxspec.models.tokens import Message, encode_conversation, encode_prompt
from mlxspec.training.corpus import BadLines, corpus_files, read_documents


class Prompt(list[int]):
    """The token ids of a prompt, with its task."""

    def __init__(self, ids: Iterable[int], task: str | None = None):
        super().__init__(ids)
        self.task = task


def read_prompts(
    sources: Iterable[str | Path], tokenizer: Any, system: str | None, words: int = 0
) -> tuple[list[Prompt], BadLines]:
    """Read prompts from files. The prompt of a conversation is everything before its last answer.

    Answers and completions are not used, since the target generates its own.

    Args:
        sources: Files, folders or patterns.
        tokenizer: mlx-lm's tokenizer.
        system: System prompt for prompts that have none.
        words: Number of words to use from the start of each text. 0 for all.

    Returns:
        The prompts, and the lines that were skipped.

    Raises:
        TrainingError: There are no prompts, or too many lines are malformed.
    """
    bad, prompts = BadLines(), []
    for document in read_documents(corpus_files(sources), bad, prompts=True):
        try:
            content = prompt_of(document.content, system)
            if isinstance(content, str):
                text = " ".join(content.split()[:words]) if words else content
                ids = encode_prompt(tokenizer, text, system)
            else:
                ids = encode_conversation(tokenizer, content)
            prompts.append(Prompt(ids, document.task))
        except InvalidRequestError as error:
            bad.skip(document.where, str(error))
    if not bad.read:
        raise TrainingError(
            f"{', '.join(map(str, sources))} contain no prompts; use files with prompts, or no files to sample from BOS"
        )
    bad.check()
    return prompts, bad


def split_prompts(
    prompts: list[Prompt], held_out: int, max_tokens: int, context: int | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Split prompts into a training part and a held-out part.

    Neither part has prompts that leave no room for an answer. The training part has no prompt that equals a held-out
    one.

    Args:
        prompts: The prompts.
        held_out: Number of prompts to hold out, from the end of the list.
        max_tokens: Maximum length of an answer, in tokens.
        context: The target's context in tokens, or None for no limit.

    Returns:
        The prompts to train on, and the held-out prompts.

    Raises:
        TrainingError: There are no prompts to train on.
    """
    fitting = [prompt for prompt in prompts if context is None or len(prompt) + max_tokens <= context]
    if not fitting:
        raise TrainingError(
            f"the target's context of {context} tokens has no room for a prompt and {max_tokens} tokens; use a "
            "smaller max_tokens"
        )
    unseen = fitting[len(fitting) - min(held_out, len(fitting)) :]
    excluded = {tuple(prompt) for prompt in unseen}
    training = [prompt for prompt in fitting if tuple(prompt) not in excluded]
    if not training:
        raise TrainingError(
            f"there are {len(fitting)} prompts and the evaluation holds out {held_out}; add prompts, or set a smaller "
            "count or other prompts under [evaluation] in the recipe"
        )
    return training, unseen


def prompt_of(content: str | list[Message], system: str | None = None) -> str | list[Message]:
    """Return the prompt in a document: a text, or a conversation without its last answer.

    A conversation of one user message is returned as a text. The two are equivalent.

    Args:
        content: Content of a document.
        system: System prompt for a conversation that has none.

    Raises:
        InvalidRequestError: The conversation has no message before its answer.
    """
    if isinstance(content, str):
        return content
    messages = content[:-1] if content[-1]["role"] == "assistant" else content
    if not messages:
        raise InvalidRequestError("the conversation contains no user message")
    if [message["role"] for message in messages] == ["user"]:
        return messages[0]["content"]
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return messages
