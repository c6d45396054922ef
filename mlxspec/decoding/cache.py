"""A KV cache whose length is an array, so that a block of decoding needs no host to rewind it.

mlx-lm's models ask a layer's cache for three things: ``offset``, ``update_and_fetch`` and ``make_mask``. These answer
with arrays over a buffer of fixed capacity; what lies behind the length is masked out and overwritten later.
A sliding window is a mask too: the buffer keeps every position, hence rewinding is always possible.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlxspec.errors import UnsupportedModelError
from mlxspec.models.attention import attention_windows, model_type

Buffers = list[tuple[mx.array, mx.array]]  # a layer each: keys, values, [1, H, capacity, D]

# Attention over a buffer costs its capacity, not its length, and every new capacity is traced and compiled anew.
CAPACITY_STEP = 256

PREFILL_STEP = 512  # tokens in one forward pass over a prompt


class KVCache:
    """One layer's view of its buffers during one forward pass over the positions from ``length`` on.

    ``buffers`` is None only while the shapes of a model's keys and values are being found out. ``end`` is where the
    pass ends, if the host knows: then attention covers no more than that.
    """

    def __init__(
        self,
        buffers: tuple[mx.array, mx.array] | None,
        length: mx.array,
        window: int | None,
        end: int | None = None,
    ):
        self.keys: mx.array | None
        self.values: mx.array | None
        self.keys, self.values = buffers or (None, None)
        self.offset = length
        self.capacity = CAPACITY_STEP if buffers is None else buffers[0].shape[2]
        self.window = window
        self.end = end

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [1, H, L, D] behind the valid positions; returns the buffers, up to the end if that is known."""
        if self.keys is None or self.values is None:
            self.keys = mx.zeros((*keys.shape[:2], self.capacity, keys.shape[-1]), keys.dtype)
            self.values = mx.zeros((*values.shape[:2], self.capacity, values.shape[-1]), values.dtype)
        start = self.offset.reshape(1)
        self.keys = mx.slice_update(self.keys, keys, start, axes=(2,))
        self.values = mx.slice_update(self.values, values, start, axes=(2,))
        self.offset = self.offset + keys.shape[2]
        if self.end is None:
            return self.keys, self.values
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    @property
    def buffers(self) -> tuple[mx.array, mx.array]:
        """The keys and values after the pass."""
        assert self.keys is not None and self.values is not None, "every layer of a model uses its cache"
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str:
        """Row i sees the valid positions and the new ones up to its own, within the window: bool [N, positions].

        "causal" says that where the last row's own position is the last one, in a form that kernels are made for.
        """
        window = window_size or self.window
        if self.end is not None and window is None and not return_array:
            return "causal"
        query = (self.offset + mx.arange(N))[:, None]
        key = mx.arange(self.end or self.capacity)[None]
        mask = key <= query
        return mask if window is None else mask & (key > query - window)


def capacity_for(length: int) -> int:
    return max(1, -(-length // CAPACITY_STEP)) * CAPACITY_STEP


def with_room(buffers: Buffers, length: int, exactly: bool = False) -> Buffers:
    """The same positions in buffers with room for ``length``.

    ``exactly`` also gives back what a longer text left behind, so that a short one does not pay for it.
    """
    capacity, present = capacity_for(length), buffers[0][0].shape[2]

    def resized(buffer: mx.array) -> mx.array:
        if capacity < present:
            return mx.contiguous(buffer[:, :, :capacity])
        more = mx.zeros((*buffer.shape[:2], capacity - present, buffer.shape[3]), buffer.dtype)
        return mx.concatenate([buffer, more], axis=2)

    if capacity == present or (capacity < present and not exactly):
        return buffers
    return [(resized(keys), resized(values)) for keys, values in buffers]


class CachedModel:
    """A model together with the shapes of its caches; every forward pass goes through here.

    Raises UnsupportedModelError for a model that cannot run on caches whose length is an array.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.windows = attention_windows(model)
        try:
            # Traced and never evaluated: costs no forward pass, and fails just where the compiled block would.
            logits, buffers = mx.compile(lambda token, length: self(token, None, length))(mx.array([0]), mx.array(0))
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise UnsupportedModelError(
                f"{model_type(model)} cannot run on a cache whose length is an array, which a rewind without the host "
                f"needs: {reason}"
            ) from error
        self.vocab_size = logits.shape[-1]
        self.shapes = [[(buffer.shape, buffer.dtype) for buffer in layer] for layer in buffers]

    def empty(self, length: int) -> Buffers:
        """Buffers with room for ``length`` positions, none of them filled."""

        def zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
            return mx.zeros((*shape[:2], capacity_for(length), shape[3]), dtype)

        return [(zeros(*keys), zeros(*values)) for keys, values in self.shapes]

    def __call__(
        self, tokens: mx.array, buffers: Buffers | None, length: mx.array, end: int | None = None
    ) -> tuple[mx.array, Buffers]:
        """tokens [L] behind ``length`` positions -> logits [L, V], buffers. Nothing is evaluated.

        ``end`` is length + L, where the host knows it.
        """
        layers: Sequence[tuple[mx.array, mx.array] | None] = buffers or [None] * len(self.windows)
        caches = [KVCache(layer, length, window, end) for layer, window in zip(layers, self.windows, strict=True)]
        logits = self.model(tokens[None], cache=caches)[0]
        return logits, [cache.buffers for cache in caches]

    def prefill(self, tokens: mx.array, kept: list[Buffers], length: int, advanced: Callable[[int], None]) -> Buffers:
        """Run a model over a text, in chunks.

        Args:
            tokens: [L] int32.
            kept: buffers that hold the ``length`` positions before them, or nothing. They are taken out of the list:
                what the caller still held would be copied instead of written in place.
            length: positions before ``tokens``.
            advanced: is called with the number of tokens of each chunk.
        """
        buffers = with_room(kept.pop(), length, exactly=True) if kept else self.empty(length)
        for start in range(0, tokens.size, PREFILL_STEP):
            chunk = tokens[start : start + PREFILL_STEP]
            buffers = with_room(buffers, length + chunk.size)
            _, buffers = self(chunk, buffers, mx.array(length), length + chunk.size)
            mx.eval(buffers)
            length += chunk.size
            advanced(chunk.size)
        return buffers
