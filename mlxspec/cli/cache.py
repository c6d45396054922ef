"""``mlxspec cache``: what mlxspec keeps on disk between runs."""

import shutil
import time
from pathlib import Path

import click

from mlxspec import InvalidRequestError
from mlxspec.models.quantizing import cache_folder, copies

COSTS = "costs"  # the name that stands for all files with costs of blocks


@click.command()
@click.option(
    "--delete", multiple=True, metavar="NAME", help="Delete this entry, or `all`. Can be given several times."
)
def cache(delete):
    """List or delete what mlxspec keeps on disk.

    These are quantized copies of targets, and measurements of how long passes take on this machine. mlxspec makes both
    again when it needs them. Downloaded models belong to the hub's own cache: see `hf cache`.
    """
    entries = {path.name: path for path in copies()}
    if (cache_folder() / COSTS).is_dir():
        entries[COSTS] = cache_folder() / COSTS
    if unknown := next((name for name in delete if name != "all" and name not in entries), None):
        raise InvalidRequestError(f"there is no entry {unknown}; `mlxspec cache` lists them")
    for name in entries if "all" in delete else dict.fromkeys(delete):
        shutil.rmtree(entries[name])
        click.echo(f"deleted {entries[name]}")
    if not delete:
        click.echo(cache_folder())
        for name, path in entries.items():
            click.echo(f"  {size_of(path) / 1e6:>9,.1f} MB  used {last_use(path)}  {name}")
        if not entries:
            click.echo("  nothing is kept")


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def last_use(folder: Path) -> str:
    """Return the day on which a file of the folder was last read or written, as far as the disk records it."""
    times = [max(path.stat().st_atime, path.stat().st_mtime) for path in folder.rglob("*")]
    return time.strftime("%Y-%m-%d", time.localtime(max(times, default=folder.stat().st_mtime)))
