"""Keeps the documents of a packed row apart: each attends to itself only, as if it were alone in the row.

A row holds several documents, one after the other. The mask is causal within each document and blocks of different
documents do not see each other. Rotary embedding depends on the distance of two positions only, so a document in the
middle of a row gets the logits that it would get at its start.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxspec.models.attention import attention_windows
from mlxspec.models.pair import limit_of

CLOSE = 0.01  # largest difference of probabilities that counts as rounding, in 16 bits


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

    Not so for models with a table of positions, or that make their masks themselves. A trial decides.
    """
    try:
        windows = attention_windows(model)
        length = min(24, limit_of(model, None) or 24)
        one, other = mx.arange(1, length // 2), mx.arange(2, length // 2)
        documents = mx.array([[0] * one.size + [1] * other.size])
        together = model(mx.concatenate([one, other])[None], cache=document_masks(windows, documents))
        alone = mx.concatenate([model(one[None]), model(other[None])], axis=1)
        difference = mx.softmax(together.astype(mx.float32), axis=-1) - mx.softmax(alone.astype(mx.float32), axis=-1)
        return bool((mx.abs(difference).max() < CLOSE).item())
    except Exception:  # a model's code may raise anything about what it takes for its cache
        return False
