"""A stage's folder: the record of its inputs, its metrics, and the processes that share it.

``stage.json`` holds the inputs of the stage, its result, and whether it is complete. ``metrics.jsonl`` has one line of
JSON for each logged step. Under ``mlx.launch`` several processes use one folder. The first process decides and writes.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mlxspec.errors import InvalidRequestError, TrainingError
from mlxspec.files import explain_write_errors, locked, parse_json, read_json, write_atomically, write_json
from mlxspec.models import sharding
from mlxspec.models.sharding import Value, agree, is_first, launched_processes

Metrics = dict[str, float]

# Names of checkpoints and best drafters, as glob patterns. A copy that a user made has another name.
CHECKPOINTS, BEST_DRAFTERS = (f"{name}-{'[0-9]' * 8}" for name in ("step", "best"))
RESULTS = ("drafter", "tokens", CHECKPOINTS, BEST_DRAFTERS, "metrics.jsonl")  # what a stage writes or deletes


@contextmanager
def locked_for_all(folder: Path) -> Iterator[None]:
    """Lock a folder as ``locked`` does. Under ``mlx.launch`` the first process holds the lock for all processes."""
    with ExitStack() as stack:
        refusal = None
        if is_first_process():
            try:
                stack.enter_context(locked(folder))
            except InvalidRequestError as error:
                refusal = error
        if broadcast(refusal is not None):
            raise refusal or InvalidRequestError(f"{folder} is in use by another process; use another folder")
        yield


def start_stage(folder: Path, inputs: dict[str, Any], changeable: Sequence[str] = ()) -> bool:
    """Create the record of a stage, or compare an existing record with the inputs of this run.

    Args:
        folder: The stage's folder.
        inputs: Everything that the stage's result depends on, as JSON. Fingerprints come last, since a setting says
            more to the user.
        changeable: Inputs that may change while the stage is unfinished. ``steps`` may always grow, which makes a
            finished stage unfinished. While it is unfinished, ``steps`` may also shrink, down to the last checkpoint.

    Returns:
        Whether the stage still has to be run or resumed.

    Raises:
        TrainingError: The folder was created with other inputs. The message names the first difference. Or the folder
            holds results and has no record.
        DisagreementError: Another process of ``mlx.launch`` has other inputs.
    """
    as_stored = json.loads(json.dumps(inputs))
    if (group := launched_processes()) is not None:
        # Each process has trained the drafter itself. Another kind of chip may have rounded differently.
        agree(group, {name: value for name, value in as_stored.items() if name != "drafter"})
    return broadcast(is_first_process() and _start_stage(folder, as_stored, changeable))


def _start_stage(folder: Path, inputs: dict[str, Any], changeable: Sequence[str]) -> bool:
    check_record(folder)
    record = folder / "stage.json"
    # While a folder holds no results, its record may be replaced. The inputs in it may have been rejected.
    if not record.exists() or not has_results(folder):
        write_json(record, {"complete": False, "inputs": inputs})
        return True
    try:
        stored = read_json(record)
        before, finished = stored["inputs"], stored["complete"]
        names = list({**inputs, **before})
        if finished not in (True, False) or (finished and not isinstance(stored["result"], dict)):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(f"{record} cannot be read; delete {folder} and repeat the command") from None
    longer = is_longer(before, inputs)
    finished = finished and not longer
    reached = max((int(path.name[-8:]) for path in folder.glob(CHECKPOINTS)), default=0)
    for name in names:
        if name == "steps" and not finished and type(steps := inputs.get(name)) is int:
            if steps < reached:
                raise TrainingError(
                    f"{folder} has a checkpoint of step {reached}, but this run has steps = {steps}; use at least "
                    f"{reached}, or another folder"
                )
            continue
        if before.get(name) != inputs.get(name) and (finished or name not in changeable):
            raise TrainingError(
                f"{folder} was created with {name} = {before.get(name)}, but this run has {name} = {inputs.get(name)}; "
                "use another folder or delete this one"
            )
    if not finished and before != inputs:
        write_json(record, {"complete": False, "inputs": inputs})
    return not finished


def check_record(folder: Path) -> None:
    """Raise TrainingError if a folder holds results that no stage has recorded, such as a drafter from elsewhere."""
    found = next((path for name in RESULTS for path in folder.glob(name)), None)
    if found and not (folder / "stage.json").exists():
        raise TrainingError(
            f"{found} was not made by this stage, since {folder} has no stage.json; use another folder or move it"
        )


def is_longer(before: dict[str, Any], inputs: dict[str, Any]) -> bool:
    """Return whether a run has more training steps than the recorded one."""
    steps = before.get("steps")
    return isinstance(steps, int) and inputs.get("steps", 0) > steps


def complete_stage(folder: Path, result: Metrics | None = None) -> None:
    """Record that a stage is complete, with the scores of its drafter."""
    if is_first_process():
        record = read_json(folder / "stage.json")
        write_json(folder / "stage.json", {**record, "complete": True, "result": result or {}})
    barrier()


def is_complete(folder: Path) -> bool:
    """Return whether a stage is complete, whatever its inputs are."""
    try:
        return bool(read_json(folder / "stage.json")["complete"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def has_results(folder: Path) -> bool:
    """Return whether a stage has produced anything that a resumed run would use."""
    return is_complete(folder) or any(folder.glob(CHECKPOINTS)) or (folder / "tokens" / "index.json").exists()


def log_metrics(folder: Path, step: int, metrics: Metrics) -> None:
    """Append a line to ``metrics.jsonl``.

    Args:
        folder: The stage's folder.
        step: Number of steps taken.
        metrics: The metrics by name.

    Raises:
        WriteError: The file cannot be written.
    """
    path = folder / "metrics.jsonl"
    with explain_write_errors(path), path.open("a") as file:
        file.write(json.dumps({"step": step, **metrics}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl``, except those that are damaged or still being written."""
    lines = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with suppress(ValueError):
            entry = parse_json(line) if line.endswith("\n") else None
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                lines.append(entry)
    return lines


def truncate_metrics(folder: Path, step: int) -> None:
    """Delete the lines after a step from ``metrics.jsonl``, since a resumed run logs these steps again."""
    path = folder / "metrics.jsonl"
    if path.exists():
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step))


def is_first_process() -> bool:
    """Return whether this process decides and writes. Without ``mlx.launch`` this is always true."""
    return is_first(launched_processes())


def broadcast(value: Value) -> Value:
    """Return the first process's ``value`` in all processes. No process returns before all have called it."""
    return sharding.broadcast(value, launched_processes())


def barrier() -> None:
    """Wait until all processes have called this function."""
    broadcast(None)
