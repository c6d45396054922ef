"""``mlxspec export`` and ``mlxspec push``: write a drafter for other tools, and upload it to the hub."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import click

from mlxspec.models.export import CardFacts, check_repository_name, export, files_to_push, push

FACTS = {
    "license": "License identifier, such as apache-2.0.",
    "base": "The target that the drafter was made for.",
    "data": "The training data.",
    "loss": "The training loss.",
    "block_efficiency": "The measured block efficiency, with draft length and temperature.",
}


def fact_options(command: Callable) -> Callable:
    """Add an option for each field of ``CardFacts``."""
    for field in reversed(fields(CardFacts)):
        name = f"--{field.name.replace('_', '-')}"
        command = click.option(name, help=f"For the model card. {FACTS[field.name]}")(command)
    return command


@click.command(name="export")
@click.argument("drafter")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--quantize", help="Quantize to 4 bits, 8 bits, mxfp4 or nvfp4. Only MLX can load the result.")
@click.option("--target", help="The target, for a drafter that uses its embedding.")
@fact_options
def export_command(drafter: str, out: Path, quantize: str | None, target: str | None, **facts: str | None) -> None:
    """Write DRAFTER to the new folder OUT, in a layout for mlx-lm, transformers and llama.cpp's converter."""
    print_files(export(drafter, out, quantize, CardFacts(**facts), target), out)


@click.command(name="push")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--private", is_flag=True, help="Make a new repository private. By default everyone can read it.")
@click.option("--dry-run", is_flag=True, help="List the files without uploading them.")
def push_command(folder: Path, repository: str, private: bool, dry_run: bool) -> None:
    """Upload FOLDER, written by `mlxspec export`, to REPOSITORY (owner/name) on the hub."""
    if dry_run:
        check_repository_name(repository)
        print_files(files_to_push(folder), folder)
        click.echo(f"dry run: nothing was sent to {repository}", err=True)
    else:
        click.echo(push(folder, repository, private))


def print_files(files: list[Path], folder: Path) -> None:
    """Print the size and name of each file."""
    for file in files:
        click.echo(f"{file.stat().st_size:>14,} bytes  {file.relative_to(folder)}")
