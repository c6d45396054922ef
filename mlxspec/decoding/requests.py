"""What a decoder may be asked for: the ranges of its options, and how long an answer may be."""

import math
from collections.abc import Sequence

from mlxspec.decoding.verification import RULES
from mlxspec.errors import InvalidRequestError

DEFAULT_DRAFT_LENGTH, DEFAULT_MAX_TOKENS = "auto", 256
LONGEST_DRAFT = 64  # a block is unrolled when it is compiled


def check_options(draft_length: int | str, verification: str) -> None:
    """Raise InvalidRequestError for options that a decoder cannot have."""
    if verification not in RULES:
        raise InvalidRequestError(f"verification is {verification!r}; use one of {', '.join(RULES)}")
    if draft_length != "auto" and (type(draft_length) is not int or not 0 <= draft_length <= LONGEST_DRAFT):
        raise InvalidRequestError(
            f'draft length is {draft_length!r}; use 0 (no drafting) to {LONGEST_DRAFT}, or "auto"'
        )


def answer_budget(prompt: Sequence[int], max_tokens: int, context: int | None, vocab_size: float = math.inf) -> float:
    """Return how many tokens may be emitted. Raise InvalidRequestError for a prompt that cannot be answered."""
    if not prompt:
        raise InvalidRequestError("the prompt is empty; give at least one token")
    if max_tokens < -1:
        raise InvalidRequestError(f"max_tokens is {max_tokens}; use 0 or more, or -1 for as many as fit")
    outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise InvalidRequestError(
            f"token id {outside} in the prompt is outside the target's vocabulary of {vocab_size}"
        )
    room = float("inf") if context is None else context - len(prompt)
    if context is not None and room <= 0:
        raise InvalidRequestError(
            f"the prompt has {len(prompt)} tokens and the target's context holds {context}; shorten it to at "
            f"most {context - 1}"
        )
    return min(room, max_tokens if max_tokens >= 0 else float("inf"))
