"""One process or several, started by ``mlx.launch``: the first one decides and writes, the others follow."""

import mlx.core as mx

from mlxspec.errors import TrainingError


def is_first() -> bool:
    return mx.distributed.init().rank() == 0


def as_the_first_says(number: int) -> int:
    """``number`` of the first process, on all of them; nobody goes on before all have asked."""
    group = mx.distributed.init()
    if group.size() == 1:
        return number
    said = mx.array(int(number) if group.rank() == 0 else 0, mx.int32)
    try:
        return int(mx.distributed.all_sum(said, group=group).item())
    except RuntimeError:  # the connection is lost
        raise TrainingError("another process has stopped, and says why; start all of them again") from None


def wait_for_all() -> None:
    as_the_first_says(0)
