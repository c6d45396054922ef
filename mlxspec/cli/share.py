"""``mlxspec export`` and ``mlxspec push``: a drafter in the form that other tools load, and on the hub."""

from dataclasses import fields
from pathlib import Path

import click

from mlxspec.models.sharing import CardFacts, export, files_to_push, push

FACTS = {
    "licence": "Identifier of the licence, such as apache-2.0.",
    "base": "The target that it drafts for.",
    "data": "What it was trained on.",
    "loss": "What it was trained with.",
    "block_efficiency": "As measured, with the setting.",
}


def fact_options(command):
    for field in reversed(fields(CardFacts)):
        command = click.option(f"--{field.name.replace('_', '-')}", help=f"For the model card. {FACTS[field.name]}")(
            command
        )
    return command


@click.command(name="export")
@click.argument("drafter")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--quantize", help="4, 8, mxfp4 or nvfp4; the result is then for MLX only.")
@fact_options
def export_command(drafter, out, quantize, **facts):
    """Write DRAFTER to the new folder OUT, in the layout that mlx-lm, transformers and llama.cpp's converter load."""
    print_files(export(drafter, out, quantize, CardFacts(**facts)), out)


@click.command(name="push")
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository")
@click.option("--private", is_flag=True)
@click.option("--dry-run", is_flag=True, help="Show what would be sent.")
def push_command(folder, repository, private, dry_run):
    """Upload FOLDER, which `mlxspec export` wrote, to the hub's REPOSITORY (owner/name)."""
    if dry_run:
        print_files(files_to_push(folder), folder)
        click.echo(f"would go to {repository}; nothing was sent", err=True)
    else:
        click.echo(push(folder, repository, private))


def print_files(files: list[Path], folder: Path) -> None:
    for file in files:
        click.echo(f"{file.stat().st_size:>14,} bytes  {file.relative_to(folder)}")
