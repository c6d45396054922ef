"""Reports of a benchmark: one self-contained HTML page, and its pictures as PNG files. Pictures need matplotlib."""

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxspec.errors import InvalidRequestError
from mlxspec.evaluation.benchmark import FORMAT, Record, summaries, throttled, worst
from mlxspec.evaluation.curves import can_draw, new_figure
from mlxspec.evaluation.engines import OURS, PEER, PLAIN
from mlxspec.evaluation.profile import PARTS
from mlxspec.evaluation.rounds import Spread
from mlxspec.files import read_json, write_atomically

CAPTIONS = {
    "tasks": "Tokens per second by task, prefill included. Medians over interleaved rounds in one process.",
    "acceptance": "How often a drafted token is accepted, by its position in the block.",
    "draft-length": "Speed-up by draft length: measured, and predicted by the cost model.",
    "block": "The time of a block by its parts. The draft and the target's pass are timed alone; the other two parts "
    "are what remains. A remainder that noise made negative is hatched.",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #dde3ea; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
figure { margin: 1.5rem 0 } img { max-width: 100%; height: auto } figcaption { color: #55636f; font-size: .9rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem } dt { color: #55636f } dd { margin: 0 }
"""
COLORS = {PLAIN: "#9aa5b1", PEER: "#e0a458", OURS: "#2f6f9f"}
PART_NAMES = {"drafting": "draft", "verification": "target pass", "acceptance": "acceptance", "host": "host"}
PART_COLORS = {"drafting": "#e0a458", "verification": "#2f6f9f", "acceptance": "#7fb069", "host": "#c8553d"}


def read_record(file: Path) -> Record:
    """Read a record that ``mlxspec bench`` wrote. Raises InvalidRequestError for any other file."""
    try:
        record = read_json(file)
        summaries(record)
        described(record)
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}")
    except OSError as error:
        raise InvalidRequestError(
            f"{file} cannot be read: {error.strerror}; give a file that `mlxspec bench` wrote"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError, IndexError):
        raise InvalidRequestError(f"{file} was not written by this version's `mlxspec bench`; run it again") from None
    return record


def write_report(record: Record, folder: Path) -> Path:
    """Write ``index.html`` and the PNG files into ``folder``, and return the path of the page.

    Raises:
        InvalidRequestError: No round was finished, or matplotlib is not installed.
    """
    if not summaries(record):
        raise InvalidRequestError("the benchmark was interrupted before its first round was finished; run it again")
    drawn = pictures(record)
    for name, content in drawn.items():
        write_atomically(folder / f"{name}.png", content)
    page = folder / "index.html"
    write_atomically(page, page_of(record, drawn))
    return page


# ----------------------------------------------------------------------- page


def page_of(record: Record, drawn: dict[str, bytes]) -> str:
    """Return the HTML page of a record. ``drawn`` holds its pictures as PNG by name."""
    pair, rows = record["pair"], summaries(record)
    title = f"{pair['target']} with drafter {pair['drafter']}"
    figures = "".join(
        f'<figure><img alt="{text(CAPTIONS[name])}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        f"<figcaption>{text(CAPTIONS[name])}</figcaption></figure>"
        for name, content in drawn.items()
    )
    unfinished = "" if record["complete"] else "<p><strong>Interrupted: only finished rounds are shown.</strong></p>"
    slow = f"<p><strong>{text(line)}</strong></p>" if (line := throttled(record)) else ""
    lowest = "Lowest τ: {task} at temperature {temperature:g}.".format(**worst(rows))
    engines = [line for row in rows for line in engine_cells(row)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{text(title)}</title><style>{STYLE}</style></head><body>
<h1>{text(title)}</h1>
<p>{text(headline(rows))}</p>{unfinished}{slow}
<h2>By task</h2><div class="wide">{table(HEADINGS, [cells(row) for row in rows])}</div>
<p>Ratios compare the tokens per second of whole answers within a round: the median, and in brackets the least and the
most over the rounds. τ is block efficiency, the tokens per target pass. γ is the mean draft length. MBSU is the
speed-up on a machine where a step costs what it reads, with the drafter's cost by parameters and by bytes. "Same text"
says whether all engines gave the same text at temperature 0. {text(lowest)}</p>
<h2>By engine</h2><div class="wide">{table(ENGINE_HEADINGS, engines)}</div>
<p>Tokens per second of whole answers, of the prompt, and after the first token or block. Power and energy are
shown where they can be read.</p>
<h2>Pictures</h2>{figures}
<h2>Measured on</h2><dl>{"".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in described(record))}</dl>
</body></html>
"""


HEADINGS = (
    "task",
    "T",
    "τ",
    "accepted",
    "γ",
    "/ mlx-lm plain",
    "/ mlx-lm speculative",
    "tokens/s",
    "MBSU",
    "same text",
)


def cells(row: Record) -> list[str]:
    """Return a row of the table by task, for the terminal and the page."""
    mbsu = f"{row['mbsu_parameters']:.2f} / {row['mbsu_step_bytes']:.2f}"
    same = {True: "yes", False: "no", None: "-"}[row["same_text"]]
    return [
        row["task"],
        f"{row['temperature']:g}",
        f"{row['block_efficiency']:.2f}",
        f"{row['acceptance_rate']:.2f}",
        f"{row['draft_length']:.1f}",
        *(str(Spread(**row["ratio"][name])) if name in row["ratio"] else "-" for name in (PLAIN, PEER)),
        f"{row['tokens_per_second'][OURS]:.1f}",
        mbsu,
        same,
    ]


ENGINE_HEADINGS = ("task", "T", "engine", "tokens/s", "prefill", "decode", "peak memory", "W", "J/token")


def engine_cells(row: Record) -> list[list[str]]:
    """Return the rows of the table by engine that belong to one row of the table by task."""

    def known(figure: str, name: str) -> str:
        value = row[figure][name]
        return "-" if value is None else f"{value:.3g}"

    return [
        [
            row["task"],
            f"{row['temperature']:g}",
            name,
            f"{row['tokens_per_second'][name]:.1f}",
            f"{row['prefill_tokens_per_second'][name]:.0f}",
            f"{row['decode_tokens_per_second'][name]:.1f}",
            f"{row['peak_memory_bytes'][name] / 1e6:.0f} MB",
            known("watts", name),
            known("joules_per_token", name),
        ]
        for name in row["tokens_per_second"]
    ]


def headline(rows: list[Record]) -> str:
    """Return a sentence that states whether mlxspec is faster than plain decoding, and the block efficiency.

    The mean block efficiency is that over the rows, each of a task and a temperature.
    """
    ratios = [row["ratio"][PLAIN]["median"] for row in rows]
    lowest, mean = worst(rows), sum(row["block_efficiency"] for row in rows) / len(rows)
    verdict = "faster than" if min(ratios) > 1 else "slower than" if max(ratios) < 1 else "not always faster than"
    span = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(ratios), max(ratios))))
    return (
        f"mlxspec is {verdict} mlx-lm's plain decoding here: {span} times its tokens per second; mean block "
        f"efficiency is {mean:.2f}; block efficiency is {lowest['block_efficiency']:.2f} on the worst task, "
        f"{lowest['task']} at temperature {lowest['temperature']:g}."
    )


def described(record: Record) -> list[tuple[str, str]]:
    """Return the models, settings, machine and versions as (name, value) pairs."""
    pair, machine, settings = record["pair"], record["machine"], record["settings"]
    return [
        ("target", f"{pair['target']}, {pair['target_parameters']:,} parameters"),
        ("drafter", f"{pair['drafter']}, {pair['drafter_parameters']:,} parameters"),
        ("draft length", f"{settings['draft_length']}; mlx-lm's {settings['peer_draft_length']}"),
        ("answers", f"at most {settings['max_tokens']} tokens, {settings['rounds']} rounds after a warm-up"),
        ("machine", f"{machine['chip']}, {machine['cores']} cores, {machine['device']}, {machine['system']}"
                    + (f", {machine['blas']}" if machine.get("blas") else "")),
        ("versions", f"mlxspec {machine['mlxspec']} ({machine['revision'] or 'no checkout'}), MLX {machine['mlx']}, "
                     f"mlx-lm {machine['mlx_lm']}, Python {machine['python']}"),
    ]  # fmt: skip


def table(headings: tuple[str, ...], rows: list[list[str]]) -> str:
    """Return an HTML table. All cells are escaped."""
    head = "".join(f"<th>{text(name)}</th>" for name in headings)
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def text(value: Any) -> str:
    """Return a value as escaped HTML text."""
    return html.escape(str(value))


# ----------------------------------------------------------------------- pictures


def pictures(record: Record) -> dict[str, bytes]:
    """Return the pictures that a record has data for, as PNG by name. Raises InvalidRequestError without matplotlib."""
    if not can_draw():
        raise InvalidRequestError("pictures need matplotlib; install it with: pip install 'mlxspec[plots]'")
    rows, found = summaries(record), {}
    if rows:
        found["tasks"] = png(lambda axis: draw_tasks(axis, rows), (8, 1.5 + 0.75 * len(rows)))
    if any(row["acceptance_by_position"] for row in rows):
        found["acceptance"] = png(lambda axis: draw_acceptance(axis, rows), (8, 4))
    if calibration := record.get("calibration"):
        found["draft-length"] = png(lambda axis: draw_lengths(axis, calibration), (8, 4))
    if profile := record.get("profile"):
        found["block"] = png(lambda axis: draw_block(axis, profile), (8, 2.2))
    return found


def png(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """Return a picture as PNG. ``draw`` draws on its axes, and ``size`` is its width and height in inches."""
    figure = new_figure(size)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    draw(axis)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def label(row: Record) -> str:
    """Return the label of a row: its task and temperature."""
    return f"{row['task']}, T = {row['temperature']:g}"


def draw_tasks(axis: Any, rows: list[Record]) -> None:
    """Draw the tokens per second of every engine, with one group of bars for each task and temperature."""
    names = [name for name in (PLAIN, PEER, OURS) if name in rows[0]["tokens_per_second"]]
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        values = [row["tokens_per_second"][name] for row in rows]
        bars = axis.barh([i + (place - (len(names) - 1) / 2) * height for i in range(len(rows))], values, 0.92 * height,
                         label=name, color=COLORS[name])  # fmt: skip
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), [label(row) for row in rows])
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel("tokens/s of whole answers (median)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), frameon=False)


def draw_acceptance(axis: Any, rows: list[Record]) -> None:
    """Draw the acceptance rate by draft position, with one line for each task and temperature."""
    longest = max(len(row["acceptance_by_position"]) for row in rows)
    for row, marker in zip(rows, "os^vD*PX" * (1 + len(rows) // 8), strict=False):
        if shares := row["acceptance_by_position"]:
            axis.plot(range(1, len(shares) + 1), shares, marker=marker, label=label(row))
    axis.set_ylim(0, 1.02)
    axis.set_xticks(range(1, longest + 1))
    axis.set_xlabel("draft position")
    axis.set_ylabel("accepted, of those drafted")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def draw_lengths(axis: Any, calibration: Record) -> None:
    """Draw the speed-up over plain decoding by draft length, measured and predicted, and the speed-up of "auto"."""
    lengths = calibration["lengths"]
    x = [entry["draft_length"] for entry in lengths]
    axis.axhline(1, color="black", linewidth=0.8)
    axis.plot(x, [entry["measured"] for entry in lengths], marker="o", color=COLORS[OURS], label="measured")
    axis.plot(x, [entry["predicted"] for entry in lengths], linestyle="--", marker="s", markerfacecolor="none",
              color=COLORS[PEER], label="predicted from cost and acceptance")  # fmt: skip
    axis.axhline(
        calibration["auto"]["measured"], color=COLORS[OURS], linestyle=":", label="draft length auto, measured"
    )
    axis.set_xticks(x)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens drafted per block, γ")
    axis.set_ylabel("speed-up over γ = 0")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def draw_block(axis: Any, profile: Record) -> None:
    """Draw one bar whose parts add up to the block. A negative remainder, which noise can cause, is hatched."""
    start = 0.0
    for part in PARTS:
        milliseconds, share = 1000 * profile[part], profile[part] / profile["block"]
        words = f"{PART_NAMES[part]}: {milliseconds:.2f} ms ({share:.1%})"
        color = PART_COLORS[part]
        style = {"color": color} if milliseconds >= 0 else {"color": "none", "edgecolor": color, "hatch": "////"}
        axis.barh([0], milliseconds, left=start, label=words, **style)
        start += milliseconds
    axis.axvline(1000 * profile["block"], color="black", linewidth=1)
    axis.set_yticks([])
    axis.set_xlabel(f"milliseconds of a block that drafts {profile['draft_length']} tokens")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
