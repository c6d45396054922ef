"""``mlxspec bench`` and ``mlxspec report``: measure a pair on this machine; a table, JSON and a page with pictures."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from tqdm import tqdm

import mlxspec
from mlxspec import SpeculativeDecoder
from mlxspec.cli.generate import INTERRUPTED
from mlxspec.cli.launched import one_speaker
from mlxspec.cli.options import (
    CONTEXT,
    DRAFT_LENGTH,
    DRAFTER,
    QUANTIZE,
    QUANTIZE_DRAFTER,
    TARGET,
    VERIFICATION,
    advance,
    calibrate,
    check_pair,
    say_drafter,
    target_name,
)
from mlxspec.errors import InvalidRequestError
from mlxspec.evaluation.benchmark import (
    BenchmarkSettings,
    Record,
    compared,
    new_record,
    run_benchmark,
    samplings,
    summaries,
    throttled,
)
from mlxspec.evaluation.energy import needs_root
from mlxspec.evaluation.profile import PARTS, calibrated, profile
from mlxspec.evaluation.report import (
    ENGINE_HEADINGS,
    HEADINGS,
    PART_NAMES,
    cells,
    engine_cells,
    headline,
    read_record,
    write_report,
)
from mlxspec.evaluation.rounds import PAUSE, default_pause
from mlxspec.evaluation.tasks import TASK_NAMES, Task, read_tasks
from mlxspec.models.pair import ModelPair
from mlxspec.models.sharding import broadcast, is_first, launched_processes

LEGEND = (
    "τ: block efficiency, the tokens per pass of the target. γ: mean draft length. MBSU: the memory-bound speed-up, "
    "τ / (cγ + 1). c is the drafter's parameters, or its bytes, divided by the target's. Ratios: tokens/s of mlxspec "
    "divided by those of mlx-lm in the same round."
)
PROFILED = 4  # draft length of the block whose parts are timed


@click.command()
@TARGET
@DRAFTER
@QUANTIZE
@QUANTIZE_DRAFTER
@CONTEXT
@click.option("--tasks", multiple=True, default=["stories"], show_default=True,
              help=f"Tasks, separated by commas: {', '.join(TASK_NAMES)}, or .jsonl files with prompts. Can be given "
                   "several times.")  # fmt: skip
@click.option("--temperature", "--temp", "temperatures", type=float, multiple=True,
              help="Sampling temperature. Can be given several times.  "
                   "[default: the task's own, or 0 and 1]")  # fmt: skip
@click.option("--prompts", default=4, show_default=True, help="Prompts per task.")
@click.option(
    "--max-tokens",
    default=BenchmarkSettings.max_tokens,
    show_default=True,
    help="Maximum length of an answer, in tokens.",
)
@click.option("--rounds", default=BenchmarkSettings.rounds, show_default=True,
              help="Measured rounds. A warm-up round comes first.")  # fmt: skip
@click.option("--pause", type=float, default=default_pause, show_default=f"{PAUSE:g} on a GPU, 0 on the CPU",
              help="Seconds to pause before each answer, so that the machine cools down.")  # fmt: skip
@DRAFT_LENGTH
@click.option("--peer-draft-length", default=BenchmarkSettings.peer_draft_length, show_default=True,
              help="Tokens that mlx-lm drafts for each pass of the target.")  # fmt: skip
@VERIFICATION
@click.option("--out", type=click.Path(path_type=Path), default="bench.json", show_default=True,
              help="JSON file for the results.")  # fmt: skip
@click.option("--calibrate", "calibration", is_flag=True,
              help="First measure how long passes take, predict the speed at each draft length "
                   "from that, and compare it with the measured speed.")  # fmt: skip
@click.option("--compare", type=(click.Path(path_type=Path), click.Path(path_type=Path)), metavar="A.json B.json",
              help="Compare two result files: print the figures of B relative to A.")  # fmt: skip
@one_speaker
def bench(target, drafter, quantize, quantize_drafter, context, tasks, prompts, out, calibration, compare, **given):
    """Compare the speed of mlxspec with that of plain and of speculative mlx-lm, for a target and its drafter.

    Started by mlx.launch, the processes divide the target, and the first one prints.
    """
    if compare:
        if others := [name for name in measuring_options() if name != "compare"]:
            raise InvalidRequestError(f"--{others[0].replace('_', '-')} has no effect with --compare; leave one out")
        print_comparison(*map(read_record, compare))
        return
    settings = BenchmarkSettings(**given)
    if prompts < 1:
        raise InvalidRequestError(f"prompts is {prompts}; use 1 or more")
    check_pair(target, drafter, quantize)
    if calibration and drafter == "none":
        raise InvalidRequestError("--calibrate needs a drafter; leave out --drafter none")
    group = launched_processes()
    if is_first(group):
        check_writable(out)
    if needs_root():
        click.echo("power and energy are not measured: powermetrics needs root; to measure them, use sudo", err=True)
    pair = mlxspec.load(
        target,
        drafter,
        quantize=quantize,
        context_length=context,
        quantize_drafter=quantize_drafter,
        group=group,
    )
    if target and drafter is None:
        say_drafter(pair)
    contexts = [pair.context_length, pair.drafter_context_length]  # mlx-lm asks a drafter beyond its own
    room = min((context for context in contexts if context), default=float("inf")) - settings.max_tokens
    names = [name for part in tasks for name in part.split(",") if name]
    found = [asdict(task) for task in read_tasks(names, pair.tokenizer, prompts, room)] if is_first(group) else []
    chosen = [Task(**task) for task in broadcast(found, group)]
    record = new_record(pair, settings, {"target": target_name(target), "drafter": pair.drafter_name})
    try:
        measure_blocks(pair, chosen, settings, calibration, record)
        with tqdm(disable=None, leave=False, unit="answer") as bar:

            def progress(what: str, done: int, total: int) -> None:
                bar.set_description(what, refresh=False)
                advance(bar, done, total)

            run_benchmark(pair, chosen, settings, record, out if is_first(group) else None, progress)
    except KeyboardInterrupt:
        finished = any(result["rounds"] for result in record["results"])
        where = f"the finished rounds are in {out}" if finished else "no round was finished"
        click.echo(f"interrupted; {where}", err=True)
        print_results(record)
        sys.exit(INTERRUPTED)
    print_results(record)
    click.echo(f"\nwritten to {out}; to make a page of it: mlxspec report {out}", err=True)


def measuring_options() -> list[str]:
    """Return the names of the options that were given on the command line."""
    ctx = click.get_current_context()
    return [name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]


def check_writable(out: Path) -> None:
    """Raise InvalidRequestError before anything is measured that could not be kept."""
    if not out.parent.is_dir():
        raise InvalidRequestError(f"there is no folder {out.parent} for {out.name}; make it or choose another")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise InvalidRequestError(f"{out} cannot be written; give a file in a writable folder with --out")


def measure_blocks(
    pair: ModelPair, tasks: list[Task], settings: BenchmarkSettings, calibration: bool, record: Record
) -> None:
    """Measure the block costs that "auto" needs, and add the profile and, if wanted, the calibration to a record.

    Args:
        pair: target and drafters.
        tasks: their samplings decide which costs are needed; the prompts of the first are used.
        settings: how to measure.
        calibration: measure known costs again, and the speed at each draft length.
        record: is added to.
    """
    first, *others = dict.fromkeys(sampling for task in tasks for sampling in samplings(task, settings))
    length = "auto" if calibration else settings.draft_length
    for sampling in others if calibration else [first, *others]:  # ``calibrated`` measures the costs of the first
        calibrate(SpeculativeDecoder(pair, sampling, length, settings.verification), again=calibration)
    if pair.drafter is not None:
        record["profile"] = profile(pair, first, PROFILED, settings.verification)
    if calibration:
        with tqdm(disable=None, leave=False, unit="run", desc="draft lengths") as bar:
            record["calibration"] = calibrated(
                pair,
                tasks[0].prompts,
                first,
                settings.rounds,
                settings.max_tokens,
                settings.verification,
                lambda done, total: advance(bar, done, total),
            )
        print_calibration(record["calibration"])


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the page and its pictures.  [default: FILE-report]"
)
def report(file: Path, out: Path | None) -> None:
    """Make an HTML page with pictures from FILE, the results of bench. The pictures are also saved as PNG files."""
    record = read_record(file)
    click.echo(write_report(record, out or file.with_name(f"{file.stem}-report")))


def print_results(record: Record) -> None:
    """Print the tables and the conclusion of a benchmark."""
    if rows := summaries(record):
        print_table(HEADINGS, [cells(row) for row in rows])
        click.echo()
        print_table(ENGINE_HEADINGS, [line for row in rows for line in engine_cells(row)])
        click.echo(f"\n{LEGEND}\n\n{headline(rows)}")
        print_block(record.get("profile"))
        if warning := throttled(record):
            click.echo(warning, err=True)


def print_block(found: Record | None) -> None:
    """Print how long each part of a block takes."""
    if found:
        parts = ", ".join(f"{PART_NAMES[part]} {1000 * found[part]:.2f}" for part in PARTS)
        click.echo(
            f"A block that drafts {found['draft_length']} tokens takes {1000 * found['block']:.2f} ms: {parts}. "
            "Acceptance and host are what the others leave."
        )


def print_calibration(found: Record) -> None:
    """Print the predicted and the measured speed at each draft length."""
    one, costs = found["lengths"][0]["verify"], found["costs"]
    rows = [
        [
            str(entry["draft_length"]),
            str(entry["draft_length"] + 1),
            f"{1000 * entry['verify']:.2f} ms",
            f"{entry['verify'] / one:.2f}",
            f"{entry['predicted']:.2f}",
            f"{entry['measured']:.2f}",
        ]
        for entry in found["lengths"]
    ]
    rows.append(["auto", "", "", "", "", f"{found['auto']['measured']:.2f}"])
    print_table(("γ", "rows", "verify", "/ one row", "predicted", "measured"), rows)
    if costs["draft_step"]:
        click.echo(
            f"A draft costs {1000 * costs['draft_once']:.2f} ms and {1000 * costs['draft_step']:.2f} ms per token."
        )
    click.echo("Speed-ups are over γ = 0.")
    best = max(found["lengths"], key=lambda entry: entry["measured"])
    if best["draft_length"] == 0:
        click.echo("Plain decoding wins: with this drafter, no draft length is faster than drafting nothing.\n")
    else:
        click.echo(f"Drafting {best['draft_length']} wins: {best['measured']:.2f} times the speed of plain decoding.\n")


def print_comparison(before: Record, after: Record) -> None:
    """Print the figures of one benchmark relative to those of an earlier one."""
    rows = compared(before, after)
    if not rows:
        raise InvalidRequestError(
            "the two files have no task and temperature in common; compare runs of the same tasks"
        )
    headings = ("task", "T", "τ", "tokens/s", "over mlx-lm plain")
    figures = ("block_efficiency", "tokens_per_second", "over_plain")
    print_table(headings, [[row["task"], f"{row['temperature']:g}", *(f"{row[name]:.2f}" for name in figures)]
                           for row in rows])  # fmt: skip
    click.echo("second file relative to the first; above 1 the second is better")


def print_table(headings: tuple[str, ...], rows: list[list[Any]]) -> None:
    """Print a table with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        first, *others = (cell.ljust(width) if i == 0 else cell.rjust(width)
                          for i, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        click.echo("  ".join([first, *others]).rstrip())
