"""``mlxspec bench`` and ``mlxspec report``: what a pair is worth on this machine, as a table, JSON and a page."""

import os
import sys
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

import mlxspec
from mlxspec.cli.generate import INTERRUPTED
from mlxspec.cli.options import DraftLength, drafter_name, target_name
from mlxspec.decoding.block import CompiledBlocks
from mlxspec.decoding.calibration import measure_and_keep
from mlxspec.decoding.verification import RULES
from mlxspec.errors import InvalidRequestError
from mlxspec.evaluation.benchmark import (
    BenchmarkSettings,
    Record,
    compared,
    new_record,
    run_benchmark,
    samplings,
    summaries,
)
from mlxspec.evaluation.engines import PEER_DRAFT_LENGTH
from mlxspec.evaluation.report import (
    ENGINE_HEADINGS,
    HEADINGS,
    cells,
    engine_cells,
    headline,
    read_record,
    write_report,
)
from mlxspec.evaluation.speedup import calibrated, profile
from mlxspec.evaluation.tasks import TASK_NAMES, Task, read_tasks
from mlxspec.models.pair import ModelPair

PROFILED = 4  # tokens drafted by the block whose time is taken apart


@click.command()
@click.option("--target", help="Folder, hub id or short name of the model.  [default: the embedded demo model]")
@click.option("--drafter", help="As for generate.  [default: the demo's own]")
@click.option("--quantize", help="As for generate.")
@click.option("--tasks", default="stories", show_default=True,
              help=f"Separated by commas: {', '.join(TASK_NAMES)}, or .jsonl files (Spec-Bench's too).")  # fmt: skip
@click.option("--temperature", "temperatures", type=float, multiple=True,
              help="May be given several times.  [default: the task's, or 0 and 1]")  # fmt: skip
@click.option("--prompts", default=4, show_default=True, help="Prompts of each task.")
@click.option("--max-tokens", default=128, show_default=True, help="Longest answer.")
@click.option("--rounds", default=5, show_default=True, help="After one that is not counted.")
@click.option("--draft-length", type=DraftLength(), default="auto", show_default=True)
@click.option("--peer-draft-length", default=PEER_DRAFT_LENGTH, show_default=True, help="What mlx-lm drafts.")
@click.option("--verification", type=click.Choice(list(RULES)), default="block", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="bench.json", show_default=True)
@click.option("--calibrate", is_flag=True, help="Measure what blocks cost anew, and the speed at each draft length.")
@click.option("--compare", type=(click.Path(path_type=Path), click.Path(path_type=Path)), metavar="A.json B.json",
              help="Measure nothing: B's figures over A's.")  # fmt: skip
def bench(target, drafter, quantize, tasks, prompts, out, calibrate, compare, **settings):
    """Measure a pair against mlx-lm, plain and speculative, on this machine."""
    if compare:
        print_comparison(*map(read_record, compare))
        return
    settings = BenchmarkSettings(**settings)
    if prompts < 1:
        raise InvalidRequestError(f"prompts is {prompts}; use 1 or more")
    check_writable(out)
    pair = mlxspec.load(target, drafter, quantize=quantize)
    if calibrate and pair.drafter is None:
        raise InvalidRequestError("--calibrate needs a drafter; name one with --drafter")
    room = (pair.context_length or float("inf")) - settings.max_tokens
    chosen = read_tasks([name for name in tasks.split(",") if name], pair.tokenizer, prompts, room)
    record = new_record(pair, settings, {"target": target_name(target), "drafter": drafter_name(target, drafter)})
    try:
        if pair.drafter is not None:
            measure_blocks(pair, chosen, settings, calibrate, record)
        with tqdm(disable=None, leave=False, unit="round") as bar:

            def progress(what: str, done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.set_description(what)

            run_benchmark(pair, chosen, settings, record, out, progress)
    except KeyboardInterrupt:
        finished = any(result["rounds"] for result in record["results"])
        where = f"the finished rounds are in {out}" if finished else "no round was finished"
        click.echo(f"interrupted; {where}", err=True)
        print_results(record)
        sys.exit(INTERRUPTED)
    print_results(record)
    click.echo(f"\n{out}; a page of it: mlxspec report {out}", err=True)


def check_writable(out: Path) -> None:
    """Before anything is measured that could then not be kept."""
    if not out.parent.is_dir():
        raise InvalidRequestError(f"there is no folder {out.parent} for {out.name}; make it or choose another")
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise InvalidRequestError(f"{out} cannot be written; name a file in a folder of yours with --out")


def measure_blocks(
    pair: ModelPair, tasks: list[Task], settings: BenchmarkSettings, calibrate: bool, record: Record
) -> None:
    """The profile of a block and, if asked for, the table of costs, into the record."""
    sampling, verification = samplings(tasks[0], settings)[0], settings.verification
    record["profile"] = profile(pair, sampling, PROFILED, verification)
    if calibrate:
        with tqdm(disable=None, leave=False, unit="run", desc="draft lengths") as bar:

            def progress(done: int, total: int) -> None:
                bar.total, bar.n = total, done
                bar.refresh()

            prompts, rounds, longest = tasks[0].prompts, settings.rounds, settings.max_tokens
            record["calibration"] = calibrated(pair, prompts, sampling, rounds, longest, verification, progress)
        for other in {s for task in tasks for s in samplings(task, settings)} - {sampling}:
            measure_and_keep(CompiledBlocks(pair, other, verification))
        print_calibration(record["calibration"])


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for the page and its pictures.  [default: FILE-report]"
)
def report(file: Path, out: Path | None) -> None:
    """Make a page of what bench wrote into FILE: index.html, which needs nothing beside it, and the pictures as PNG."""
    record = read_record(file)
    click.echo(write_report(record, out or file.with_name(f"{file.stem}-report")))


def print_results(record: Record) -> None:
    if record and (rows := summaries(record)):
        print_table(HEADINGS, [cells(row) for row in rows])
        click.echo()
        print_table(ENGINE_HEADINGS, [line for row in rows for line in engine_cells(row)])
        click.echo(f"\n{headline(rows)}")
        print_block(record.get("profile"))


def print_block(found: Record | None) -> None:
    if found:
        click.echo(
            f"A block that drafts {found['draft_length']}: {1000 * found['block']:.2f} ms; drafter "
            f"{1000 * found['drafting']:.2f}, target {1000 * found['verification']:.2f}, drawing and verifying "
            f"{1000 * found['acceptance']:.2f}, host {1000 * found['host']:.2f}."
        )


def print_calibration(found: Record) -> None:
    verify, once, draft = (found["costs"][name] for name in ("verify", "once", "draft"))
    rows = [
        [
            str(entry["draft_length"]),
            str(entry["draft_length"] + 1),
            f"{1000 * verify[entry['draft_length']]:.2f} ms",
            f"{verify[entry['draft_length']] / verify[0]:.2f}",
            f"{entry['predicted']:.2f}",
            f"{entry['measured']:.2f}",
        ]
        for entry in found["lengths"]
    ]
    if auto := found.get("auto"):  # a file of an earlier version has none
        rows.append(["auto", "", "", "", "", f"{auto['measured']:.2f}"])
    print_table(("γ", "rows", "verifying them", "/ one row", "predicted", "measured"), rows)
    click.echo(
        f"a drafted token costs {1000 * draft:.2f} ms, drafting at all {1000 * once:.2f} ms more; speed-ups are over "
        "γ = 0"
    )
    best = max(found["lengths"], key=lambda entry: entry["measured"])
    if best["draft_length"] == 0:
        click.echo("Plain decoding wins: with this drafter, no draft length is faster than drafting nothing.\n")
    else:
        click.echo(f"Drafting {best['draft_length']} wins: {best['measured']:.2f} times the speed of plain decoding.\n")


def print_comparison(before: Record, after: Record) -> None:
    rows = compared(before, after)
    if not rows:
        raise InvalidRequestError(
            "the two files have no task and temperature in common; compare runs of the same tasks"
        )
    headings = ("task", "T", "τ", "tokens/s", "over mlx-lm plain")
    figures = ("block_efficiency", "tokens_per_second", "over_plain")
    print_table(headings, [[row["task"], f"{row['temperature']:g}", *(f"{row[name]:.2f}" for name in figures)]
                           for row in rows])  # fmt: skip
    click.echo("second file over first; above 1 the second is better")


def print_table(headings: tuple[str, ...], rows: list[list[Any]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        first, *others = (cell.ljust(width) if i == 0 else cell.rjust(width)
                          for i, (cell, width) in enumerate(zip(row, widths, strict=True)))  # fmt: skip
        click.echo("  ".join([first, *others]).rstrip())
