"""Files that are whole or not there, and what is said where they cannot be written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlxspec.errors import TrainingError, in_one_line

Metrics = dict[str, float]  # of a step, by name


def write_whole(path: Path, content: str) -> None:
    """Aside and renamed: a reader finds the old or the new content, whatever happens meanwhile."""
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=1))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; one that is being written, or was when the power went, is left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        with suppress(json.JSONDecodeError):
            if line.endswith("\n"):
                lines.append(json.loads(line))
    return lines


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Raises TrainingError, naming ``what``, where a disk is full or a folder not writable."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError where it cannot write
        reason = error.strerror if isinstance(error, OSError) and error.strerror else in_one_line(error)
        raise TrainingError(
            f"{what} cannot be written ({reason}); make room and run the command again, it goes on where it was"
        ) from error
