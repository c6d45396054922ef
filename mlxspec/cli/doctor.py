"""``mlxspec doctor``: check mlxspec on this machine, and write what was measured to a file that can be shared."""

import sys
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

import mlxspec
from mlxspec.cli.bench import check_writable, print_table
from mlxspec.cli.generate import INTERRUPTED
from mlxspec.cli.options import DRAFTER, QUANTIZE, TARGET, advance, announce_compiling, check_pair, say_drafter
from mlxspec.decoding.kernels import chip_of, has_tf32
from mlxspec.errors import InvalidRequestError
from mlxspec.evaluation.doctor import DEFAULT_ROUNDS, Record, checks, new_record
from mlxspec.files import write_json

FAILED = 1  # exit status if a check failed


@click.command()
@TARGET
@DRAFTER
@QUANTIZE
@click.option("--rounds", type=click.IntRange(1), default=DEFAULT_ROUNDS, show_default=True,
              help="Measured rounds. Each figure is the median over the rounds.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default="doctor.json", show_default=True,
              help="JSON file for the results.")  # fmt: skip
def doctor(target, drafter, quantize, rounds, out):
    """Check mlxspec on this machine, and measure what decides the speed.

    This compares greedy text of the demo pair with mlx-lm's, and measures passes over 1 to 17 rows, attention and
    the draft length that mlxspec chooses. The file has no user name, host name or path.
    """
    check_pair(target, drafter, quantize)
    if drafter == "none":
        raise InvalidRequestError("doctor needs a drafter; leave out --drafter none")
    check_writable(out)
    announce_compiling()
    pair = mlxspec.load(target, drafter, quantize=quantize)
    if target and drafter is None:
        say_drafter(pair)
    record = new_record(pair, target, rounds)
    print_machine(record)
    click.echo()
    click.echo("measuring, which takes a few minutes", err=True)
    finished = []
    try:
        with tqdm(disable=None, leave=False, unit="run") as bar:

            def progress(what: str, done: int, total: int) -> None:
                bar.set_description(what, refresh=False)
                advance(bar, done, total)

            for name, found in checks(pair, record, progress):
                bar.clear()
                print_failure(name, found) if "failed" in found else PRINTERS[name](found, record)
                click.echo()
                finished.append(name)
                write_json(out, record)
    except KeyboardInterrupt:
        where = f"the finished checks are in {out}" if finished else "no check was finished"
        click.echo(f"interrupted; {where}", err=True)
        sys.exit(INTERRUPTED)
    click.echo(f"written to {out}", err=True)
    if any("failed" in record[name] for name in finished) or not is_exact(record["identity"]):
        sys.exit(FAILED)


def is_exact(identity: Record) -> bool:
    """Return whether all texts in float32 were the same."""
    return "failed" not in identity and identity["float32"]["same"] == identity["float32"]["answers"]


def print_failure(name: str, found: Record) -> None:
    """Print the error that stopped a check."""
    click.echo(f"FAILED: {name}: {found['failed']}")


def print_machine(record: Record) -> None:
    """Print versions, chip and memory."""
    machine: dict[str, Any] = record["machine"]
    system = f"macOS {machine['macos']}" if machine["macos"] else machine["system"]
    back_end = f"CPU, {machine['blas']}" if machine["blas"] else f"GPU {machine['architecture']}"
    wired = machine["wired_limit_bytes"]
    limit = f", of which {wired / 1e9:.1f} GB can be wired" if wired else ""
    click.echo(f"mlxspec {machine['mlxspec']}, mlx {machine['mlx']}, mlx-lm {machine['mlx_lm']}, "
               f"Python {machine['python']}, {system}")  # fmt: skip
    click.echo(f"{machine['chip']} ({back_end}), {machine['memory_bytes'] / 1e9:.1f} GB of memory{limit}")


def print_identity(found: Record, record: Record) -> None:
    """Print in how many answers the greedy text was the same."""
    click.echo("Greedy text of the demo pair, with drafts and with mlx-lm alone")
    for dtype, result in found.items():
        line = f"  {dtype:8}  the same in {result['same']} of {result['answers']} answers"
        if result["first_difference"] is not None:
            line += f"; the first difference comes after {result['first_difference']} tokens"
            line += ", which near-ties can cause" if dtype != "float32" else ": PLEASE REPORT THIS"
            if dtype == "float32" and has_tf32(chip_of(record["machine"]["architecture"])):
                line += " if MLX_ENABLE_TF32=0 does not change it"
        click.echo(line)


def print_kernels(found: Record, record: Record) -> None:
    """Print on which kernels a pass of the target runs."""
    if not found:
        click.echo("There is no Metal GPU, so no kernels to name.")
        return
    click.echo("Kernels of the target by rows, as MLX chooses them")
    for name, by_rows in found.items():
        spans: list[list[str]] = []
        for count, kernel in by_rows.items():
            if not spans or spans[-1][0] != kernel["name"]:
                spans.append([kernel["name"], count, count])
            spans[-1][2] = count
        listed = ", ".join(f"{kernel} {first if first == last else f'{first}-{last}'}" for kernel, first, last in spans)
        click.echo(f"  {name:10}{listed or '-'}")


def print_rows(found: Record, record: Record) -> None:
    """Print what a pass over several rows takes."""
    for number, one in enumerate(found.values()):
        if number:
            click.echo()
        click.echo(f"Passes over 1 to 17 rows: {one['name']}")
        first = one["seconds"]["1"]
        print_table(("rows", "ms", "/ one row"), [[count, f"{1000 * seconds:.3g}", f"{seconds / first:.2f}"]
                                                  for count, seconds in one["seconds"].items()])  # fmt: skip


def print_attention(found: Record, record: Record) -> None:
    """Print what attention takes."""
    for number, (name, one) in enumerate(found.items()):
        if number:
            click.echo()
        heads = one["heads"]
        click.echo(f"Attention in one layer, in ms by positions and rows: {name}")
        click.echo(f"{heads['heads']} query heads, {heads['kv_heads']} KV heads of size {heads['head_dim']}")
        table = [[positions, *(f"{1000 * seconds:.3g}" for seconds in by_rows.values())]
                 for positions, by_rows in one["seconds"].items()]  # fmt: skip
        print_table(("positions", *next(iter(one["seconds"].values()))), table)


def print_policy(found: Record, record: Record) -> None:
    """Print what the policy chose, and the speed."""
    count = found["draft_length"]
    choice = f"drafts {count} token{'s' * (count > 1)} by {found['drafter']}" if count else "drafts nothing"
    measured = found["measured"]
    click.echo(f"At temperature 0 with target {record['target']['name']}, mlxspec {choice}.")
    click.echo(f"Speed relative to plain decoding: predicted {found['predicted']:.2f}, measured "
               f"{measured['median']:.2f} ({measured['least']:.2f}-{measured['most']:.2f}).")  # fmt: skip


PRINTERS = {
    "identity": print_identity,
    "kernels": print_kernels,
    "rows": print_rows,
    "attention": print_attention,
    "policy": print_policy,
}
