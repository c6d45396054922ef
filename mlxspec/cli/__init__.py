"""The ``mlxspec`` command: one module per verb, and the one place where errors become a line and an exit status."""

import io
import sys

import click

from mlxspec import MlxspecError, __version__
from mlxspec.cli.bench import bench, report
from mlxspec.cli.chat import chat
from mlxspec.cli.generate import generate
from mlxspec.cli.models import models
from mlxspec.cli.share import export_command, push_command
from mlxspec.cli.train import train


@click.group()
@click.version_option(__version__)
def cli() -> None:
    """Lossless speculative decoding on MLX, and training of drafters."""


cli.add_command(bench)
cli.add_command(chat)
cli.add_command(generate)
cli.add_command(models)
cli.add_command(export_command)
cli.add_command(push_command)
cli.add_command(report)
cli.add_command(train)


def main() -> None:
    """Run the command. Exit status: 0; 2 for an error that the user can fix, one line; 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal's encoding lacks
    try:
        sys.exit(cli(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
    except click.ClickException as error:
        fail(error.format_message())
    except MlxspecError as error:
        fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except OSError as error:  # a full disk, an unwritable folder
        fail(f"{error.filename or 'output'}: {error.strerror or error}; free some space or choose another folder")


def fail(message: str) -> None:
    click.secho(f"error: {message}", fg="red", err=True)
    sys.exit(2)
