"""Answers of the target to several prompts at once.

mlx-lm's BatchGenerator returns the log-probabilities of each sequence as an array of its own. With hundreds of
sequences, these arrays take more time than the model. Here a step evaluates the tokens of the batch and nothing else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, make_prompt_cache

from mlxspec.models.attention import attention_windows

PREFILL_POSITIONS = 2**14  # positions of all prompts in one pass
LIVING_SHARE = 0.9  # ended answers leave the batch once fewer rows than this are unfinished

Sampler = Callable[[mx.array], mx.array]  # logits [B, V] -> tokens [B]


def sample_answers(
    target: nn.Module, prompts: Sequence[list[int]], ends: set[int], sampler: Sampler, max_tokens: int
) -> list[list[int]]:
    """Sample one answer to each prompt.

    Args:
        target: The target model.
        prompts: Token ids of each prompt.
        ends: Tokens that end an answer. An answer includes the token that ended it.
        sampler: Draws the next tokens from logits.
        max_tokens: Maximum length of an answer, in tokens.

    Returns:
        The token ids of each answer.
    """
    step = BatchSteps(target, prompts)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # the prompt of each row of the batch
    unfinished = set(rows)
    tokens = sampler(step(None))
    for count in range(1, max_tokens + 1):
        following = sampler(step(tokens)) if count < max_tokens else tokens
        mx.async_eval(following)  # the device computes the next tokens while these are read
        for row, token in zip(rows, np.array(tokens).tolist(), strict=True):
            if row in unfinished:
                answers[row].append(token)
                if token in ends:
                    unfinished.remove(row)
        if not unfinished:
            break
        if len(unfinished) < LIVING_SHARE * len(rows):
            kept = [place for place, row in enumerate(rows) if row in unfinished]
            rows = [rows[place] for place in kept]
            following = following[mx.array(kept)]
            step.keep(kept)
        tokens = following
    return answers


class BatchSteps:
    """Computes the logits of the next token for a batch of prompts, one token after the other.

    Args:
        target: The target model.
        prompts: Token ids of each prompt. Shorter ones are padded on the left, and the caches mask the padding.
    """

    def __init__(self, target: nn.Module, prompts: Sequence[list[int]]):
        self.target = target
        longest = max(map(len, prompts))
        self.cache = batch_cache(target, [longest - len(prompt) for prompt in prompts])
        self.prompts = mx.array([[0] * (longest - len(prompt)) + prompt for prompt in prompts])

    def __call__(self, tokens: mx.array | None) -> mx.array:
        """Return the logits [B, V] that follow the tokens [B], or the prompts if tokens is None."""
        if tokens is None:
            width = max(1, PREFILL_POSITIONS // len(self.prompts))
            rest = self.prompts[:, :-1]
            for start in range(0, rest.shape[1], width):
                self.target(rest[:, start : start + width], cache=self.cache)
                mx.eval([layer.keys for layer in self.cache], [layer.values for layer in self.cache])
            tokens = self.prompts[:, -1]
        return self.target(tokens[:, None], cache=self.cache)[:, -1]

    def keep(self, rows: list[int]) -> None:
        """Keep only these rows of the batch."""
        for layer in self.cache:
            layer.filter(mx.array(rows))


def batch_cache(target: nn.Module, padding: list[int]) -> list[Any]:
    """Return a KV cache for each layer of the target.

    Args:
        target: The target model.
        padding: Number of padded positions at the start of each row.
    """
    if len(padding) == 1:
        return make_prompt_cache(target)
    return [
        BatchKVCache(padding) if window is None else BatchRotatingKVCache(window, padding)
        for window in attention_windows(target)
    ]
