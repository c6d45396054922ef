"""The pictures of a benchmark, from its record. Needs matplotlib."""

import io
from collections.abc import Callable
from typing import Any

from mlxspec.errors import InvalidRequestError
from mlxspec.evaluation.benchmark import OURS, PEER, PLAIN, Record, summaries
from mlxspec.evaluation.curves import can_draw

COLOURS = {PLAIN: "#9aa5b1", PEER: "#e0a458", OURS: "#2f6f9f"}
PARTS = {
    "drafting": ("drafter", "#e0a458"),
    "verification": ("target", "#2f6f9f"),
    "acceptance": ("drawing and verifying", "#7fb069"),
    "host": ("host", "#c8553d"),
}


def pictures(record: Record) -> dict[str, bytes]:
    """PNGs by name, of whatever the record has. Raises InvalidRequestError without matplotlib."""
    if not can_draw():
        raise InvalidRequestError("pictures need matplotlib; install it with: pip install 'mlxspec[plots]'")
    rows = summaries(record)
    wanted: dict[str, tuple[bool, Callable[[Any], None], tuple[float, float]]] = {
        "tasks": (bool(rows), lambda axis: draw_tasks(axis, rows), (8, 1.5 + 0.75 * len(rows))),
        "acceptance": (
            any(row["acceptance_by_position"] for row in rows),
            lambda axis: draw_acceptance(axis, rows),
            (8, 4),
        ),
        "draft-length": (
            bool(record.get("calibration")),
            lambda axis: draw_lengths(axis, record["calibration"]),
            (8, 4),
        ),
        "block": (bool(record.get("profile")), lambda axis: draw_block(axis, record["profile"]), (8, 2.2)),
    }
    return {name: png(draw, size) for name, (there, draw, size) in wanted.items() if there}


def png(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    # Not pyplot: it would choose a window system, and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    draw(axis)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def label(row: Record) -> str:
    return f"{row['task']}, T = {row['temperature']:g}"


def draw_tasks(axis: Any, rows: list[Record]) -> None:
    """Tokens per second of every engine, a group of bars for each task and temperature."""
    names = [name for name in (PLAIN, PEER, OURS) if name in rows[0]["tokens_per_second"]]
    height = 0.8 / len(names)
    for place, name in enumerate(names):
        values = [row["tokens_per_second"][name] for row in rows]
        bars = axis.barh([i + (place - (len(names) - 1) / 2) * height for i in range(len(rows))], values, 0.92 * height,
                         label=name, color=COLOURS[name])  # fmt: skip
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), [label(row) for row in rows])
    axis.invert_yaxis()
    axis.margins(x=0.1)
    axis.set_xlabel("tokens/s of whole answers (median)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), frameon=False)


def draw_acceptance(axis: Any, rows: list[Record]) -> None:
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
    """Speed-up over drafting nothing, as measured and as predicted; of "auto" as measured, if the record has it."""
    lengths = calibration["lengths"]
    x = [entry["draft_length"] for entry in lengths]
    axis.axhline(1, color="black", linewidth=0.8)
    axis.plot(x, [entry["measured"] for entry in lengths], marker="o", color=COLOURS[OURS], label="measured")
    axis.plot(x, [entry["predicted"] for entry in lengths], linestyle="--", marker="s", markerfacecolor="none",
              color=COLOURS[PEER], label="predicted from cost and acceptance")  # fmt: skip
    if auto := calibration.get("auto"):
        axis.axhline(auto["measured"], color=COLOURS[OURS], linestyle=":", label="draft length auto, measured")
    axis.set_xticks(x)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens drafted a block, γ")
    axis.set_ylabel("speed-up over γ = 0")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)


def draw_block(axis: Any, profile: Record) -> None:
    """One bar: where the milliseconds of a block go."""
    start, total = 0.0, sum(profile[name] for name in PARTS)
    for name, (words, colour) in PARTS.items():
        milliseconds = 1000 * profile[name]
        share = profile[name] / total if total else 0.0
        axis.barh([0], milliseconds, left=start, color=colour, label=f"{words}: {milliseconds:.2f} ms ({share:.1%})")
        start += milliseconds
    axis.set_yticks([])
    axis.set_xlabel(f"milliseconds of a block that drafts {profile['draft_length']} tokens")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
