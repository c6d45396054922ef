"""A KV cache whose length is an array, so that a block can be rewound without the host.

mlx-lm's models use three members of a layer's cache: ``offset``, ``update_and_fetch`` and ``make_mask``. Here they work
on arrays over a buffer of fixed capacity. Entries beyond the length are masked out and overwritten later. A sliding
window is a mask too. The buffer keeps every position, so it can always be rewound.
"""

import traceback
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlxspec.errors import UnsupportedModelError, in_one_line
from mlxspec.models.attention import attention_windows, model_type
from mlxspec.models.parts import run_with_states

# For each layer its keys and values, [1, H, capacity, D]. Then, if they are kept: the most likely tokens after each
# position and their log-probabilities, [1, 1, capacity, k]. Last, if they are kept, the hidden states alone,
# [1, 1, capacity, F].
Buffers = list[tuple[mx.array, ...]]

# Attention in a decoding block costs the capacity, not the length, and every new capacity is traced again.
CAPACITY_STEP = 256

LEAST_LOGPROB = -1e4  # instead of −∞

PREFILL_STEP = 512  # tokens in one forward pass over a prompt


class KVCache:
    """One layer's view of its buffers during one forward pass.

    Args:
        buffers: Keys and values, [1, H, capacity, D]. None only while the shapes of a model's caches are determined.
        length: Number of positions before the pass, scalar int32.
        window: Size of the sliding window, None for full attention.
        end: Number of positions after the pass, if the host knows it. Attention then covers only these.
    """

    def __init__(
        self,
        buffers: tuple[mx.array, ...] | None,
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
        """Write new keys and values [1, H, L, D] after the valid positions.

        A value that is not finite is stored as 0, and its key as NaN. A mask hides a key from a row, but not a value,
        because 0 · NaN is NaN. Such a value would spoil even the rows before it. Rows that attend to the NaN key still
        become NaN.

        Returns:
            The keys and values [1, H, capacity, D], or [1, H, end, D] if ``end`` is known.
        """
        spoiled = values * 0  # 0, or NaN
        keys = keys + (spoiled if keys.shape == values.shape else spoiled.sum(axis=-1, keepdims=True))
        values = mx.where(spoiled == 0, values, 0)
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
        """The keys and values [1, H, capacity, D] after the pass.

        Raises:
            UnsupportedModelError: The layer did not use its cache.
        """
        if self.keys is None or self.values is None:
            raise UnsupportedModelError("a layer does not use its cache")
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str:
        """Return the attention mask of the pass.

        Row i attends to the valid positions and to the new ones up to its own, within the window.

        Args:
            N: Number of rows of the pass.
            return_array: Return an array even where "causal" would do.
            window_size: Size of the sliding window in positions. None for the layer's own window.

        Returns:
            A mask [N, positions] bool, or "causal" if ``end`` is known and there is no window. MLX has fast kernels for
            "causal".
        """
        window = window_size or self.window
        if self.end is not None and window is None and not return_array:
            return "causal"
        query = (self.offset + mx.arange(N))[:, None]
        key = mx.arange(self.end or self.capacity)[None]
        mask = key <= query
        return mask if window is None else mask & (key > query - window)


def capacity_for(length: int) -> int:
    """Round ``length`` positions up to the capacity of a buffer, a positive multiple of ``CAPACITY_STEP``."""
    return max(1, -(-length // CAPACITY_STEP)) * CAPACITY_STEP


def with_room(buffers: Buffers, length: int, exactly: bool = False) -> Buffers:
    """Resize buffers so that they hold ``length`` positions. The positions already stored are kept.

    Args:
        buffers: The buffers of a model.
        length: Number of positions.
        exactly: Also shrink buffers that a longer text has enlarged, so that attention over a short text costs less.

    Returns:
        The resized buffers, or ``buffers`` if nothing changes.
    """
    capacity, present = capacity_for(length), buffers[0][0].shape[2]

    def resized(buffer: mx.array) -> mx.array:
        if capacity < present:
            return mx.contiguous(buffer[:, :, :capacity])
        more = mx.zeros((*buffer.shape[:2], capacity - present, buffer.shape[3]), buffer.dtype)
        return mx.concatenate([buffer, more], axis=2)

    if capacity == present or (capacity < present and not exactly):
        return buffers
    return [tuple(resized(buffer) for buffer in layer) for layer in buffers]


class CachedModel:
    """A model and the shapes of its caches. Every forward pass in decoding uses this class.

    Args:
        model: A model with the interface of mlx-lm's models.
        read_layers: Numbers of the layers whose inputs are kept as hidden states, () for the last hidden states. None
            to keep no hidden states.
        top_k: Number of the most likely tokens to keep at each position that ``prefill`` does not run. 0 to keep none.

    Raises:
        UnsupportedModelError: The model cannot run on caches whose length is an array.
    """

    def __init__(self, model: nn.Module, read_layers: Sequence[int] | None = None, top_k: int = 0):
        self.model = model
        self.read_layers = read_layers
        self.top_k = top_k
        self.windows = attention_windows(model)
        self.layers = len(self.windows)
        try:
            # Traced and never evaluated. It costs no forward pass and fails where the compiled block would.
            logits, buffers = mx.compile(lambda token, length: self(token, None, length))(mx.array([0]), mx.array(0))
        except Exception as error:  # a model's code may raise anything
            if raised_in_mlxspec(error) and not isinstance(error, UnsupportedModelError):
                raise
            raise UnsupportedModelError(
                f"{model_type(model)} cannot run on a cache whose length is an array, which a rewind without the host "
                f"needs: {in_one_line(error)}; use another model"
            ) from error
        self.vocab_size = logits.shape[-1]
        self.shapes = [[(buffer.shape, buffer.dtype) for buffer in layer] for layer in buffers]

    def empty(self, length: int) -> Buffers:
        """Return empty buffers with room for ``length`` positions."""

        return [
            tuple(mx.zeros((*shape[:2], capacity_for(length), shape[3]), dtype) for shape, dtype in layer)
            for layer in self.shapes
        ]

    def __call__(
        self, tokens: mx.array, buffers: Buffers | None, length: mx.array, end: int | None = None
    ) -> tuple[mx.array, Buffers]:
        """Run the model over tokens. Nothing is evaluated.

        Args:
            tokens: Token ids [L].
            buffers: The buffers, None to determine their shapes.
            length: Number of positions before ``tokens``, scalar int32.
            end: length + L, if the host knows it.

        Returns:
            Logits [L, V] and the buffers after the pass.
        """
        layers: Sequence[tuple[mx.array, ...] | None] = buffers[: self.layers] if buffers else [None] * self.layers
        caches = [KVCache(layer, length, window, end) for layer, window in zip(layers, self.windows, strict=True)]

        def run() -> mx.array:
            return self.model(tokens[None], cache=caches)

        if self.read_layers is None:
            logits, states = run(), None
        else:
            logits, states = run_with_states(self.model, self.read_layers, run)
        following: Buffers = [cache.buffers for cache in caches]
        if self.top_k and buffers and end is not None:
            following.append(buffers[self.layers])  # a prefill, which needs no logits
        elif self.top_k:
            place = buffers[self.layers] if buffers else None
            following.append(written(place, most_likely(logits[0], self.top_k), length))
        if states is not None:
            following.append(written(buffers[-1] if buffers else None, (states[0],), length))
        return logits[0], following

    def prefill(self, tokens: mx.array, kept: list[Buffers], length: int, advanced: Callable[[int], None]) -> Buffers:
        """Run the model over a text, in chunks of ``PREFILL_STEP`` tokens.

        Args:
            tokens: Token ids [L] int32.
            kept: A list with buffers that hold the ``length`` positions before ``tokens``, or an empty list. The
                buffers are removed from the list. If the caller still held them, MLX would copy them instead of writing
                in place.
            length: Number of positions before ``tokens``.
            advanced: Called after each chunk with its number of tokens.

        Returns:
            The buffers after the text.
        """
        whole = length + tokens.size
        buffers = with_room(kept.pop(), whole, exactly=True) if kept else self.empty(whole)
        for start in range(0, tokens.size, PREFILL_STEP):
            chunk = tokens[start : start + PREFILL_STEP]
            _, buffers = self(chunk, buffers, mx.array(length), length + chunk.size)
            mx.eval(buffers)
            length += chunk.size
            advanced(chunk.size)
        return buffers


def written(
    buffers: tuple[mx.array, ...] | None, values: tuple[mx.array, ...], length: mx.array
) -> tuple[mx.array, ...]:
    """Write values after the valid positions of buffers.

    Args:
        buffers: The buffers, each [1, 1, capacity, D]. None for empty ones.
        values: The values, each [L, D].
        length: Number of valid positions, scalar int32.
    """
    buffers = buffers or tuple(mx.zeros((1, 1, CAPACITY_STEP, part.shape[-1]), part.dtype) for part in values)
    start = length.reshape(1)
    pairs = zip(buffers, values, strict=True)
    return tuple(mx.slice_update(buffer, part[None, None], start, axes=(2,)) for buffer, part in pairs)


def most_likely(logits: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return the k most likely tokens [L, k] int32, in no order, and their log-probabilities, for logits [L, V].

    There are V − 1 of them if k is larger. A token that the target excludes has ``LEAST_LOGPROB``.
    """
    k, logits = min(k, logits.shape[-1] - 1), logits.astype(mx.float32)
    tokens = mx.argpartition(-logits, k - 1, axis=-1)[:, :k]
    logprobs = mx.take_along_axis(logits, tokens, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    return tokens.astype(mx.int32), mx.maximum(logprobs, LEAST_LOGPROB)


def raised_in_mlxspec(error: Exception) -> bool:
    """Return whether mlxspec's own code raised the error. Then it is a bug, not an unsupported model."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("mlxspec.")
