"""Keeps the documents of a packed row apart: each attends to itself only, as if it were alone in the row.

A row holds several documents, one after the other. The mask is causal within each document and blocks of different
documents do not see each other. Rotary embedding depends on the distance of two positions only, so a document in the
middle of a row gets the logits that it would get at its start.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxspec.models.attention import attention_windows, position_table
from mlxspec.models.pair import limit_of

TRIAL_TOKENS = 12  # of each document in a trial
ROUNDING = 0.25  # what counts as rounding, as a fraction of the difference that the other document makes


class DocumentMask:
    """Stands in for a layer's cache in one pass over rows, to hand the model an attention mask.

    mlx-lm's models ask their cache for the mask. Nothing is cached.

    Args:
        documents: Number of the document at each position [B, L].
        window: Size of the layer's sliding window, None for full attention.
    """

    offset = 0

    def __init__(self, documents: mx.array, window: int | None):
        self.documents, self.window = documents, window

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values of the row itself."""
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return the attention mask: bool [B, 1, L, L]."""
        place, window = mx.arange(N), window_size or self.window
        mask = (self.documents[:, None, :, None] == self.documents[:, None, None, :]) & (place[:, None] >= place)
        return mask if window is None else mask & (place[:, None] < place + window)


def document_masks(windows: list[int | None], documents: mx.array) -> list[Any]:
    """Return what a model takes as its caches.

    Args:
        windows: Size of the sliding window of each layer, as ``attention_windows`` returns them.
        documents: Number of the document at each position [B, L].
    """
    return [DocumentMask(documents, window) for window in windows]


def keeps_documents_apart(model: nn.Module) -> bool:
    """Return whether a model gives documents in one row the probabilities that it gives them alone.

    Not so for models with a table of positions, or that make their masks themselves. A trial decides. It compares two
    differences from the document alone, with and without the mask, because rounding in 16 bits may change a
    probability by several percent.
    """
    try:
        if position_table(model):
            return False
        windows = attention_windows(model)
        count = min(TRIAL_TOKENS, (limit_of(model, None) or 2 * TRIAL_TOKENS) // 2)
        size = model(mx.array([[0]])).shape[-1]
        # Many tokenizers have control tokens and bytes at the start, and unused tokens at the end.
        ids = mx.array(np.random.default_rng(0).integers(size // 2, size - size // 10, (2, count)))
        documents = mx.repeat(mx.arange(2), count)[None]
        alone = mx.softmax(model(ids[1:]).astype(mx.float32), axis=-1)

        def difference(cache: list[Any] | None) -> mx.array:
            p = mx.softmax(model(ids.reshape(1, -1), cache=cache).astype(mx.float32), axis=-1)
            return mx.abs(p[:, count:] - alone).sum(-1).mean()

        return bool((difference(document_masks(windows, documents)) <= ROUNDING * difference(None)).item())
    except Exception:  # a model's code may raise anything about what it takes for its cache
        return False
