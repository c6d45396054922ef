"""Verbs that ``mlx.launch`` may start in several processes."""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from mlxspec.errors import DisagreementError, MlxspecError
from mlxspec.models.sharding import broadcast, is_first, launched_processes, lost

GRACE = 2.0  # seconds for the first process to print an error that all have; mlx.launch ends all when one has ended


def one_speaker(command: Callable[..., None]) -> Callable[..., None]:
    """Let only the first process of ``mlx.launch`` print what a command prints.

    The other processes print an error only if they still run after a while: ``mlx.launch`` ends them when the first
    one has printed the same error. If a process stops, each of the others ends with one line.
    """

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        group = launched_processes()
        try:
            with contextlib.nullcontext() if is_first(group) else silence():
                command(*args, **options)
                broadcast(None, group)  # nothing ends before all are done
        except (click.Abort, click.exceptions.Exit):  # RuntimeErrors too
            raise
        except (RuntimeError, MlxspecError) as error:
            if not is_first(group):
                time.sleep(GRACE)
                if isinstance(error, DisagreementError):  # all processes have it
                    sys.exit(2)
            if group is not None and isinstance(error, RuntimeError):
                raise lost(error) from None
            raise

    return run


@contextlib.contextmanager
def silence():
    """Discard what is printed."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
