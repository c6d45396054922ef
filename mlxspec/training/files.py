"""Files that are whole or not there, and what is said where they cannot be written."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlxspec.errors import TrainingError, in_one_line


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Aside and renamed: a reader finds the old or the new content, whatever happens meanwhile."""
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


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
