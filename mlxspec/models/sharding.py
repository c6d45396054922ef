"""A target that is divided over the processes of ``mlx.launch``, and what these processes tell each other.

The target is tensor-parallel: each process holds a part of every matrix that mlx-lm's ``shard`` divides, and the
processes add up their results twice in each layer. All else is whole in every process: the drafter, the embedding, the
output head, and the drawing of tokens. So the processes draw the same tokens without telling each other, as long as
they have the same files, request and random key, and make the same choices. What depends on one process, such as a
measured time, is the first process's for all.
"""

import json
from importlib.metadata import version
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlxspec.errors import DisagreementError, ProcessError, UnsupportedModelError, in_one_line, is_out_of_memory
from mlxspec.models.attention import model_type

Group = mx.distributed.Group
Value = TypeVar("Value")
# How messages start when a collective operation fails. On a GPU, the wait for another process may time out.
BACK_ENDS = ("[ring]", "[jaccl]", "[mpi]", "NCCL", "[METAL]")


def launched_processes() -> Group | None:
    """Return the processes of ``mlx.launch``, or None if this is the only one. Raises ProcessError if they fail."""
    try:
        group = mx.distributed.init()
    except (RuntimeError, ValueError) as error:
        raise ProcessError(
            f"the processes of mlx.launch cannot be connected ({in_one_line(error)}); check its hosts and its back end"
        ) from None
    return group if group.size() > 1 else None


def is_first(group: Group | None) -> bool:
    """Return whether this process prints and writes."""
    return group is None or group.rank() == 0


def gathered(value: Any, group: Group) -> list[Any]:
    """Return the values of all processes, each as JSON stores it. No process returns before all have called this.

    Raises:
        ProcessError: Another process has stopped.
    """
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    try:
        sizes = summed(np.array([content.size], np.int32), group)[:, 0]
        rows = summed(np.pad(content, (0, sizes.max() - content.size)), group)
    except RuntimeError as error:
        raise lost(error) from None
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def summed(row: np.ndarray, group: Group) -> np.ndarray:
    """Return the rows of all processes. On the ring back end, ``all_gather`` may wait for ever for a killed process."""
    rows = np.zeros((group.size(), row.size), row.dtype)
    rows[group.rank()] = row
    table = mx.distributed.all_sum(mx.array(rows), group=group, stream=mx.cpu)
    mx.eval(table)
    return np.array(table)


def broadcast(value: Value, group: Group | None) -> Value:
    """Return the first process's value in all processes. Without a group, that is ``value`` itself."""
    return value if group is None else gathered(value if is_first(group) else None, group)[0]


def lost(error: RuntimeError) -> Exception:
    """Return the error to raise for a RuntimeError of MLX: it may be one of a collective operation, or any other."""
    if is_out_of_memory(error) or not str(error).startswith(BACK_ENDS):
        return error
    return ProcessError(
        f"another process of mlx.launch has stopped or cannot be reached ({in_one_line(error)}); see its own message, "
        "and start all processes again"
    )


def agree(group: Group, described: dict[str, Any], error: Exception | None = None) -> None:
    """Compare what the processes have loaded.

    Args:
        group: The processes.
        described: What must be the same in all of them, by name, as JSON.
        error: Why this process could not load it.

    Raises:
        DisagreementError: A process has an error, or something else than the first process. All processes raise it.
        ProcessError: Another process has stopped.
    """
    answers = gathered([described, error and in_one_line(error)], group)
    complaints = [complaint for _, complaint in answers]
    for number, complaint in enumerate(complaints):
        if complaint:
            where = "" if all(complaints) else f"in process {number} of mlx.launch: "
            raise DisagreementError(where + complaint)
    first = answers[0][0]
    for number, (other, _) in enumerate(answers):
        for name in {**first, **other}:
            if other.get(name) != first.get(name):
                raise DisagreementError(
                    f"process {number} of mlx.launch has another {name} than the first one ({other.get(name)} instead "
                    f"of {first.get(name)}); all of them must have the same"
                )


def machine() -> dict[str, str]:
    """Return what decides how results are rounded. Processes that round differently may draw different tokens."""
    info = mx.device_info()
    chip = str(info.get("architecture") or info.get("device_name"))
    return {"MLX": version("mlx"), "mlx-lm": version("mlx-lm"), "chip": chip}


def shard(model: Any, group: Group) -> None:
    """Divide a model over the processes, in place. Nothing is evaluated.

    Raises:
        UnsupportedModelError: mlx-lm cannot divide this model, or its sizes are no multiples of the processes.
    """
    size, name = group.size(), model_type(model)
    if not hasattr(model, "shard"):
        raise UnsupportedModelError(f"mlx-lm cannot divide a {name} model over several processes; use one machine")
    args = getattr(model, "args", None)
    heads = [getattr(args, kind, None) for kind in ("num_attention_heads", "num_key_value_heads")]
    if uneven := [count for count in heads if count and count % size]:
        raise UnsupportedModelError(
            f"the target's {uneven[0]} attention heads cannot be divided over {size} processes; use another number"
        )
    try:
        model.shard(group)
    except ValueError as error:
        raise UnsupportedModelError(
            f"the target's weights cannot be divided over {size} processes ({in_one_line(error)}); use another number "
            "or another quantization"
        ) from error
