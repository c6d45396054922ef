"""``mlxspec models``: the short names and what stands behind them."""

import click

from mlxspec.models.names import KNOWN_MODELS


@click.command()
def models() -> None:
    """List the short names for targets and drafters. Any hub id or folder works too."""
    for role in ("target", "drafter"):
        click.echo(f"{role}s")
        for model in KNOWN_MODELS.values():
            if model.role == role:
                click.echo(f"  {model.name:16s} {model.hub_id:36s} {model.gigabytes:5.1f} GB  {model.licence}")
    click.echo(
        "The weights' memory is that on a GPU; the KV cache comes on top. Accept a licence before you use a model."
    )
