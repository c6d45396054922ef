"""The verbs of the ``mlxspec`` command, and the one place where errors become a line and an exit status.

A verb's module is imported when the verb is used, since most of them import MLX.
"""

import importlib
import io
import os
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from mlxspec import __version__
from mlxspec.blas import check_switch
from mlxspec.cli import leave_at_once
from mlxspec.errors import MlxspecError, advice_for, in_one_line, is_out_of_memory

# Verb -> where its command is defined, and its line in the list of commands. tests/cli/test_main.py compares the lines.
VERBS = {
    "bench": ("mlxspec.cli.bench:bench", "Compare the speed of mlxspec with that of mlx-lm."),
    "cache": ("mlxspec.cli.cache:cache", "List or delete what mlxspec keeps on disk."),
    "chat": ("mlxspec.cli.chat:chat", "Talk to a chat model."),
    "doctor": ("mlxspec.cli.doctor:doctor", "Check mlxspec on this machine."),
    "export": ("mlxspec.cli.share:export_command", "Write a drafter for other tools."),
    "generate": ("mlxspec.cli.generate:generate", "Answer a prompt."),
    "models": ("mlxspec.cli.models:models", "List the short names of targets and drafters."),
    "push": ("mlxspec.cli.share:push_command", "Upload an exported drafter to the hub."),
    "report": ("mlxspec.cli.bench:report", "Make an HTML page from the results of bench."),
    "train": ("mlxspec.cli.train:train", "Train a drafter for a target."),
}


class Verbs(click.Group):
    """A group that imports a command when it is used, and lists all of them without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return the command of a verb, None for an unknown one."""
        if name not in VERBS:
            return None
        module, command = VERBS[name][0].split(":")
        found = getattr(importlib.import_module(module), command)
        if signal.getsignal(signal.SIGINT) is leave_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on, a verb may want to keep something
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


def versions() -> str:
    """Return the versions of mlxspec, MLX and mlx-lm, which are not imported for it."""
    found = {"mlxspec": __version__}
    for name in ("mlx", "mlx-lm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return ", ".join(f"{name} {number}" for name, number in found.items())


@click.group(cls=Verbs)
@click.version_option(message=versions())
def cli() -> None:
    """Lossless speculative decoding on MLX, and training of drafters."""


def run() -> None:
    """Run the command. Exit status: 0; 2 for an error that the user can fix, one line; 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal's encoding lacks
    try:
        check_switch()
        color: dict[str, Any] = {"color": False} if no_color() else {}
        sys.exit(cli(standalone_mode=False, **color))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
    except click.ClickException as error:
        fail(error.format_message())
    except MlxspecError as error:
        fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:  # a full disk, an unwritable folder
        fail(f"{error.filename or 'the output'}: {error.strerror or error}; {advice_for(error)}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail(f"out of memory ({in_one_line(error)}); close other programs, or use a smaller model, prompt or batch")


def no_color() -> bool:
    """Return whether the user has asked for no colors (no-color.org), or has a terminal without them."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


def fail(message: str) -> None:
    """Print an error and exit."""
    click.secho(f"error: {message}", fg="red", err=True, color=False if no_color() else None)
    sys.exit(2)
