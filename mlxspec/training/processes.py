"""One process or several, started by ``mlx.launch``: the first one decides and writes, the others follow."""

import mlx.core as mx


def is_first() -> bool:
    return mx.distributed.init().rank() == 0


def as_the_first_says(number: int) -> int:
    """``number`` of the first process, on all of them; nobody goes on before all have asked."""
    group = mx.distributed.init()
    if group.size() == 1:
        return number
    return int(mx.distributed.all_sum(mx.array(int(number) if group.rank() == 0 else 0, mx.int32), group=group).item())


def wait_for_all() -> None:
    as_the_first_says(0)
