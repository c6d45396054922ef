"""Settings are dataclass fields that carry their default and the words the command line explains them with."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with help; further metadata is for who makes options of it, such as ``choices``."""
    return field(default=default, metadata={"help": help, **metadata})
