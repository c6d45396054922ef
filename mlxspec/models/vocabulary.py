"""A smaller output vocabulary for a drafter: the tokens that the target emits most often.

Verification stays exact, since q is a distribution like any other. A token outside the vocabulary cannot be drafted.
The target's probability of such tokens bounds what a smaller vocabulary costs in acceptance.

Source: VocabTrim, arXiv 2506.22694.
"""

from collections.abc import Iterable

import mlx.core as mx
import numpy as np

from mlxspec.errors import InvalidRequestError


def most_frequent(counts: np.ndarray, size: int, control: Iterable[int] = ()) -> np.ndarray:
    """Return the tokens of a smaller vocabulary.

    Args:
        counts: How often the target emitted each token, [V].
        size: Number of tokens K.
        control: Tokens to include in any case, such as those that end an answer.

    Returns:
        Token ids [K] in increasing order.

    Raises:
        InvalidRequestError: The size is out of range.
    """
    forced = sorted(set(control))
    if not max(len(forced), 1) <= size <= len(counts):
        raise InvalidRequestError(
            f"vocabulary_size is {size}; use {max(len(forced), 1)} to {len(counts)}, the size of the target's "
            "vocabulary"
        )
    order = counts.astype(np.int64)
    order[forced] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-order, kind="stable")[:size])


def places(tokens: mx.array, columns: mx.array, vocab_size: int) -> tuple[mx.array, mx.array]:
    """Find tokens in a smaller vocabulary.

    Args:
        tokens: Token ids [N].
        columns: The token ids [K] of the smaller vocabulary.
        vocab_size: Size of the full vocabulary.

    Returns:
        The column of each token [N], and whether the smaller vocabulary has the token [N]. The column of a missing
        token is 0.
    """
    numbers = mx.arange(1, columns.shape[0] + 1)
    table = mx.put_along_axis(mx.zeros(vocab_size, numbers.dtype), columns, numbers, axis=0)
    found = table[tokens]
    return mx.maximum(found - 1, 0), found > 0


def over_all_tokens(logits: mx.array, tokens: mx.array, vocab_size: int) -> mx.array:
    """Return the logits [..., V] of all tokens: −∞ for those that the smaller vocabulary lacks.

    Args:
        logits: Logits of the smaller vocabulary [..., K].
        tokens: Its token ids [K].
        vocab_size: Size V of the full vocabulary.
    """
    every = mx.full((*logits.shape[:-1], vocab_size), -mx.inf, logits.dtype)
    return mx.put_along_axis(every, mx.broadcast_to(tokens, logits.shape), logits, axis=-1)


def checked_map(d2t: mx.array, vocab_size: int) -> mx.array:
    """Return the map from rows of the output head to tokens, int32. Raises ValueError if it is damaged."""
    if d2t.ndim != 1 or d2t.size == 0:
        raise ValueError(f"d2t has the shape {d2t.shape}, and should have one number for each row of the output head")
    if not mx.issubdtype(d2t.dtype, mx.integer):
        raise ValueError(f"d2t has the type {d2t.dtype} instead of integers")
    offsets = np.array(d2t).astype(np.int64)
    tokens = np.sort(offsets + np.arange(len(offsets)))
    if tokens[0] < 0 or tokens[-1] >= vocab_size:
        wrong = tokens[0] if tokens[0] < 0 else tokens[-1]
        raise ValueError(f"d2t names token {wrong}, and the vocabulary has {vocab_size} tokens")
    if (tokens[1:] == tokens[:-1]).any():
        raise ValueError("d2t names a token twice")
    return mx.array(offsets.astype(np.int32))
