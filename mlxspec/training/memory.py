"""What a training step needs of memory, before it is tried: the answer of an operating system is to swap, or to kill.

Counted is what is large: weights with their gradients and Adam's moments, the old and the new ones; what each layer
keeps for the backward pass; the chunks of the loss; the target with one of its layers' activations. ``test_memory``
holds the sum against what MLX then says.
"""

from typing import Any

import mlx.core as mx

from mlxspec.errors import TrainingError
from mlxspec.models.drafter import DrafterConfig
from mlxspec.models.memory import device_limit, gigabytes
from mlxspec.training.chunked import CHUNK_ELEMENTS
from mlxspec.training.training_settings import TrainingSettings

CHUNKS_UNDER_WAY = 2  # the next one is begun before the last one's memory is free
CHUNK_ARRAYS = 12  # arrays of a chunk's size that its loss and gradient take, of 4 bytes an element
HIDDEN_KEPT, INTERMEDIATE_KEPT = 10, 4  # arrays of the layer's two widths that its backward pass looks at


def training_bytes(
    config: DrafterConfig,
    settings: TrainingSettings,
    processes: int = 1,
    target_bytes: int = 0,
    target_config: dict[str, Any] | None = None,
) -> int:
    """Bytes at the peak of a step of one process; ``target_bytes`` are those of the target's weights."""
    number = settings.dtype.size
    positions = settings.batch * settings.length // (settings.accumulate * processes)
    weights = config.num_parameters * (2 * (4 + 8) + 4 + (number if number < 4 else 0))
    layer = positions * number * (
        HIDDEN_KEPT * config.hidden_size
        + INTERMEDIATE_KEPT * config.intermediate_size
        + attention_scores(config.num_attention_heads, settings.length)
    )  # fmt: skip
    inputs = positions * number * config.hidden_size * config.num_hidden_layers
    layers = inputs + layer if settings.recompute else layer * config.num_hidden_layers
    chunks = 4 * CHUNK_ARRAYS * min(CHUNKS_UNDER_WAY * CHUNK_ELEMENTS, positions * config.vocab_size)
    return weights + layers + chunks + target_bytes + target_pass_bytes(target_config or {}, positions, settings)


def target_pass_bytes(config: dict[str, Any], positions: int, settings: TrainingSettings) -> int:
    """Activations of the target: it keeps nothing, so those of one layer; 0 for a config that does not say."""
    hidden = config.get("hidden_size") or config.get("dim") or 0
    heads = config.get("num_attention_heads") or config.get("n_heads") or 0
    widest = max(3 * config.get("intermediate_size", 0), attention_scores(heads, settings.length), 4 * hidden)
    return positions * settings.dtype.size * (2 * hidden + widest)


def attention_scores(heads: int, length: int) -> int:
    """Numbers a position of scores that are kept whole: on the CPU back end, which has no fused attention."""
    return 2 * heads * length if mx.default_device().type == mx.cpu else 0


def check_fits(needed: int) -> None:
    """Raises TrainingError if a step needs more than the device has."""
    if needed > device_limit():
        raise TrainingError(
            f"a step needs about {gigabytes(needed)} and this device has {gigabytes(device_limit())}; use a larger "
            "accumulate, recompute = true, or a smaller batch"
        )
