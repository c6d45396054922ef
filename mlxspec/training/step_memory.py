"""The memory that answers and a training step need. That of a step is a sum over the large arrays:

- weights with their gradients and Adam's moments, old and new,
- the activations that each layer keeps for the backward pass,
- the chunks of the loss,
- the target with the activations of one layer.

tests/training/test_step_memory.py compares the sum with what MLX reports. What does not fit is refused, since the
operating system would swap or kill the process.
"""

import math
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache

from mlxspec.errors import TrainingError
from mlxspec.models.drafter import Drafter, DrafterConfig
from mlxspec.models.eagle import Eagle
from mlxspec.models.memory import cache_bytes_per_token, device_limit, gigabytes
from mlxspec.training.chunked_loss import CHUNK_ARRAYS, chunk_rows
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import AnyDrafter
from mlxspec.training.responses import AnswerSettings, Group
from mlxspec.training.retention import NO_RETENTION, Retention
from mlxspec.training.target import Target
from mlxspec.training.trainer import TrainingSettings

HIDDEN_ARRAYS, INTERMEDIATE_ARRAYS = 10, 4  # arrays of a layer's two widths that its backward pass needs


def training_bytes(
    config: DrafterConfig,
    settings: TrainingSettings,
    processes: int = 1,
    target_bytes: int = 0,
    target_config: dict[str, Any] | None = None,
    divided: bool = False,
) -> int:
    """Return the peak memory of a step in one process, in bytes.

    Args:
        config: The drafter's shape.
        settings: The settings of the stage.
        processes: Number of processes that share a batch.
        target_bytes: Bytes of the target's weights in this process. 0 for a stage without the target.
        target_config: The target's config. None for a stage without the target.
        divided: Whether the target is divided over the processes.

    Returns:
        The number of bytes.
    """
    number = settings.dtype.size
    positions = settings.batch * settings.length // (settings.accumulate * processes)
    weights = config.num_parameters * (2 * (4 + 8) + 4 + (number if number < 4 else 0))
    layer = positions * number * (
        HIDDEN_ARRAYS * config.hidden_size
        + INTERMEDIATE_ARRAYS * config.intermediate_size
        + attention_scores(config.num_attention_heads, settings.length)
    )  # fmt: skip
    inputs = positions * number * config.hidden_size * config.num_hidden_layers
    layers = inputs + layer if settings.recompute else layer * config.num_hidden_layers
    chunks = 4 * CHUNK_ARRAYS * min(chunk_rows(config.output_size), positions) * config.output_size
    target_pass = target_pass_bytes(target_config or {}, positions, settings, processes if divided else 1)
    return weights + layers + chunks + target_bytes + target_pass


def target_pass_bytes(config: dict[str, Any], positions: int, settings: TrainingSettings, processes: int = 1) -> int:
    """Return the memory of the target's activations in bytes. Only one layer's are held at a time.

    Args:
        config: The target's config.
        positions: Number of positions of each process in the pass.
        settings: The settings of the stage, for the type and the length of a row.
        processes: Number of processes that divide the target and run it on the positions of all of them.

    Returns:
        The number of bytes, or 0 if the config lacks the sizes.
    """
    hidden = config.get("hidden_size") or config.get("dim") or 0
    heads = config.get("num_attention_heads") or config.get("n_heads") or 0
    inner = max(3 * config.get("intermediate_size", 0), attention_scores(heads, settings.length)) // processes
    return positions * processes * settings.dtype.size * (2 * hidden + max(inner, 4 * hidden))


def attention_scores(heads: int, length: int) -> int:
    """Return the number of attention scores stored for each position.

    Only the CPU back end stores them, since its attention is not fused.
    """
    return 2 * heads * length if mx.default_device().type == mx.cpu else 0


def step_bytes(
    drafter: AnyDrafter,
    target: Target,
    loss: Loss,
    settings: TrainingSettings,
    draft_steps: int = 1,
    retention: Retention = NO_RETENTION,
) -> int:
    """Return the peak memory of a step in this process, in bytes.

    Args:
        drafter: A drafter of the right shape.
        target: The target.
        loss: The loss. It decides whether the target runs.
        settings: The settings of the stage.
        draft_steps: Draft steps that an EAGLE head is trained on.
        retention: Settings against forgetting.

    Returns:
        The number of bytes.
    """
    processes = mx.distributed.init().size()
    config = drafter.config if isinstance(drafter, Drafter) else unrolled(drafter, draft_steps)
    kept = retention.extra_bytes(config.num_parameters)
    if not loss.needs_target:
        return kept + training_bytes(config, settings, processes)
    divided = target.group is not None
    return kept + training_bytes(config, settings, processes, target.weight_bytes, target.config, divided)


def unrolled(head: Eagle, draft_steps: int) -> DrafterConfig:
    """Return the shape of a drafter whose training takes about as much memory: a layer for each draft step."""
    args = head.args
    return DrafterConfig(
        args.vocab_size,
        args.hidden_size,
        args.intermediate_size,
        draft_steps,
        args.num_attention_heads,
        args.num_key_value_heads,
        draft_vocab_size=head.draft_vocab_size,
        shared_embedding=True,
    )


def check_fits(
    needed: int, what: str = "a step", advice: str = "a larger accumulate, recompute = true, or a smaller batch"
) -> None:
    """Raise TrainingError if something needs more bytes than the device has.

    Args:
        needed: The number of bytes.
        what: What needs them, for the message.
        advice: What to use instead, for the message.
    """
    if needed > device_limit():
        raise TrainingError(
            f"{what} needs about {gigabytes(needed)} and this device has {gigabytes(device_limit())}; use {advice}"
        )


def check_answers_fit(target: Target, groups: list[Group], settings: AnswerSettings, together: bool) -> int:
    """Return the most bytes of the target and of its KV caches for the largest group, in this process.

    Caches of sliding windows and answers that end early take less.

    Args:
        target: The target.
        groups: The groups to answer.
        settings: How to sample.
        together: Whether the prompts of a group are answered in one batch.

    Raises:
        TrainingError: The device has less memory.
    """
    positions = 0
    for group in groups:
        longest = max(map(len, group.prompts)) + settings.max_tokens - 1  # the last token is not run
        capacity = math.ceil(longest / BatchKVCache.step) * BatchKVCache.step
        positions = max(positions, capacity * (len(group.prompts) if together else 1))
    processes = target.group.size() if target.group is not None else 1
    needed = target.weight_bytes + cache_bytes_per_token(target.config, None) * positions // processes
    check_fits(needed, "a group of answers", "a smaller group or max_tokens")
    return needed
