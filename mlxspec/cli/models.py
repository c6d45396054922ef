"""``mlxspec models``: list the short names."""

import click

from mlxspec.models.catalog import KNOWN_MODELS


@click.command()
def models() -> None:
    """List the short names of targets and drafters. Any hub id or folder works too."""
    for role, title in (("target", "targets"), ("drafter", "drafters"), ("head", "EAGLE heads, each for one target")):
        click.echo(title)
        for model in KNOWN_MODELS.values():
            if model.role == role:
                click.echo(f"  {model.name:16s} {model.hub_id:36s} {model.gigabytes:5.1f} GB  {model.license}")
    click.echo(
        "Sizes are the memory of the weights on a GPU, without the KV cache. Accept a model's license before using it."
    )
