"""Attention masks that keep the documents of a packed row apart.

A row holds several documents, one after the other. The mask is causal within each document and hides all other
documents. Rotary embedding depends only on the distance between two positions. A document in the middle of a row
therefore gets the same logits as at the start of a row.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxspec.models.attention import attention_windows, position_table
from mlxspec.models.pair import limit_of

TRIAL_TOKENS = 12  # length of each document in a trial
ROUNDING = 0.25  # largest difference due to rounding, as a fraction of the difference without the mask


class DocumentMask:
    """Replaces a layer's cache in one pass over rows, to supply the attention mask.

    mlx-lm's models ask their cache for the mask. This one caches nothing.

    Args:
        documents: Number of the document at each position [B, L].
        window: Size of the layer's sliding window in positions. None for full attention.
    """

    offset = 0

    def __init__(self, documents: mx.array, window: int | None):
        self.documents, self.window = documents, window

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values unchanged, since nothing is cached."""
        return keys, values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return the attention mask.

        Args:
            N: Number of positions L.
            return_array: Part of mlx-lm's protocol. The mask is always an array.
            window_size: Size of the sliding window in positions. None for that of the layer.

        Returns:
            bool [B, 1, L, L], True where attention is allowed.
        """
        place, window = mx.arange(N), window_size or self.window
        mask = (self.documents[:, None, :, None] == self.documents[:, None, None, :]) & (place[:, None] >= place)
        return mask if window is None else mask & (place[:, None] < place + window)


def document_masks(windows: list[int | None], documents: mx.array) -> list[Any]:
    """Return one mask for each layer, to be passed to a model as its caches.

    Args:
        windows: Size of the sliding window of each layer, as ``attention_windows`` returns them.
        documents: Number of the document at each position [B, L].
    """
    return [DocumentMask(documents, window) for window in windows]


def keeps_documents_apart(model: nn.Module) -> bool:
    """Return whether each document of a row gets the same probabilities as when it is alone in the row.

    This fails for models that have a table of positions or make their masks themselves. A trial with two documents
    decides. It measures how far the probabilities differ from those of one document alone, with and without the mask,
    and compares the two differences. A fixed limit would not work, since rounding in 16 bits may change a probability
    by several percent.
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
    except Exception:  # a model's code may raise any exception for a mask in place of a cache
        return False
