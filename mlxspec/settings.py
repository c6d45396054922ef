"""Settings as dataclass fields that carry their default and the help text of the command line."""

from dataclasses import field
from typing import Any


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Return a dataclass field with a help text.

    Args:
        default: The default value.
        help: The help text.
        metadata: More for the command line, such as ``choices`` or ``key``, the name of the option.
    """
    return field(default=default, metadata={"help": help, **metadata})


def key_of(field: Any) -> str:
    """Return the name of a dataclass field in recipes and on the command line."""
    return field.metadata.get("key", field.name)
