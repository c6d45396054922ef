"""``stage.json``: what went into a stage, and whether it is complete."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlxspec.errors import TrainingError
from mlxspec.files import write_json
from mlxspec.training.processes import as_the_first_says, is_first, wait_for_all

Metrics = dict[str, float]  # of a step, by name


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that is being written, or was when the power went, is left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with suppress(json.JSONDecodeError):
            if line.endswith("\n"):
                lines.append(json.loads(line))
    return lines


def begin(folder: Path, inputs: dict[str, Any], changeable: Sequence[str] = ()) -> bool:
    """Whether the stage in ``folder`` is still to be run, or to be gone on with.

    An unfinished stage may go on with other values of what is ``changeable``. Raises TrainingError, with the first
    thing that differs, if the folder holds what was made of other inputs.
    """
    return bool(as_the_first_says(begun(folder, json.loads(json.dumps(inputs)), changeable) if is_first() else 0))


def begun(folder: Path, inputs: dict[str, Any], changeable: Sequence[str]) -> bool:
    record = folder / "stage.json"
    # Where nothing has been made yet, what was asked for first, and refused perhaps, binds nobody.
    if not record.exists() or not has_progress(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, {"complete": False, "inputs": inputs})
        return True
    try:
        found = json.loads(record.read_text())
        before, finished = found["inputs"], found["complete"]
    except (OSError, ValueError, KeyError, TypeError):
        raise TrainingError(f"{record} cannot be read; delete {folder} to make it again") from None
    for name in sorted({*before, *inputs}):
        if before.get(name) != inputs.get(name) and (finished or name not in changeable):
            raise TrainingError(
                f"{folder} was begun with {name} {before.get(name)}, and now it is {inputs.get(name)}; choose another "
                "folder, or delete this one to make it again"
            )
    if not finished and before != inputs:
        write_json(record, {"complete": False, "inputs": inputs})
    return not finished


def has_progress(folder: Path) -> bool:
    return is_complete(folder) or any(folder.glob("step-*")) or (folder / "tokens" / "index.json").exists()


def is_complete(folder: Path) -> bool:
    """Whether a stage has been run to its end, whatever its inputs were."""
    try:
        return json.loads((folder / "stage.json").read_text())["complete"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def complete(folder: Path, result: dict[str, float] | None = None) -> None:
    if is_first():
        record = json.loads((folder / "stage.json").read_text())
        write_json(folder / "stage.json", {**record, "complete": True, "result": result or {}})
    wait_for_all()
