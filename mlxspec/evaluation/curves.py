"""Curves of a training run, drawn from the metrics.jsonl of each stage. Drawing needs matplotlib."""

import importlib.util
import math
from itertools import cycle
from pathlib import Path
from typing import Any

from mlxspec.errors import InvalidRequestError, WriteError
from mlxspec.files import write_atomically
from mlxspec.training.run_folder import read_metrics

WINDOW = 20  # lines of metrics that the thick line averages
EFFICIENCY = "block_efficiency"


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(size: tuple[float, float]) -> Any:
    """Return an empty figure of a size in inches.

    It is made without ``pyplot``, which would choose a window system and keep every figure in memory.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curves(folder: str | Path, out: str | Path | None = None) -> Path:
    """Draw loss, acceptance rate and block efficiency by step, with one column for each stage.

    Args:
        folder: Folder of a stage or of a whole run.
        out: A PNG, PDF or SVG file. None for ``folder/curves.png``.

    Returns:
        The file.

    Raises:
        InvalidRequestError: There are no metrics, matplotlib is not installed, or the format is unknown.
    """
    if not can_draw():
        raise InvalidRequestError("pictures need matplotlib; install it with: pip install 'mlxspec[plots]'")
    folder = Path(folder)
    runs = {path.parent.name: read_metrics(path) for path in metrics_files(folder)}
    runs = {name: lines for name, lines in runs.items() if lines}
    if not runs:
        raise InvalidRequestError(f"{folder} contains no metrics.jsonl; give the folder of a training run")
    figure = new_figure((max(6, 4.5 * len(runs)), 6))
    axes = figure.subplots(2, len(runs), squeeze=False, sharex="col")
    for (name, lines), (above, below) in zip(runs.items(), axes.T, strict=True):
        above.set_title(name)
        draw_smoothed(above, lines, "loss", "loss")
        below.set_xlabel("step")
        draw_quality(below, lines)
    out = Path(out) if out else folder / "curves.png"
    try:
        write_atomically(out, lambda path: figure.savefig(path, dpi=120, format=out.suffix[1:] or "png"))
    except WriteError:
        raise
    except ValueError as error:
        raise InvalidRequestError(f"{out} cannot be drawn: {error}") from None
    return out


def metrics_files(folder: Path) -> list[Path]:
    """Return the metrics file of each stage, in the order in which the stages ran."""
    own = folder / "metrics.jsonl"
    found = [own] if own.exists() else folder.glob("*/metrics.jsonl")
    return sorted(found, key=lambda path: (path.parent.name != "pretrain", len(path.parent.name), path.parent.name))


def draw_smoothed(axis: Any, lines: list[dict[str, Any]], name: str, label: str, color: str = "C0") -> None:
    """Draw a metric as a thin line and its running mean as a thick line.

    Args:
        axis: The axes to draw on.
        lines: The lines of a metrics file.
        name: The metric.
        label: Label of the vertical axis.
        color: Color of both lines.
    """
    steps, values = points(lines, name)
    window = min(WINDOW, max(1, len(values) // 5))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    smooth = [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(window, i + 1) for i in range(len(values))]
    axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smooth, color=color, linewidth=1.6)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def draw_quality(axis: Any, lines: list[dict[str, Any]]) -> None:
    """Draw the acceptance rate (left axis) and block efficiency (right axis).

    A stage without acceptance rates gets the gradient norm instead.
    """
    if not points(lines, "acceptance_rate")[0]:
        draw_smoothed(axis, lines, "gradient_norm", "gradient norm", "C2")
        return
    draw_smoothed(axis, lines, "acceptance_rate", "acceptance rate α", "C1")
    drawn = [axis.get_lines()[-1]]
    drawn[0].set_label("acceptance rate α")
    names = sorted({name for line in lines for name in line if name.startswith(f"{EFFICIENCY}_at_")})
    if names:
        right = axis.twinx()
        for name, marker in zip(names, cycle("os^vD*")):
            label = f"block efficiency, T = {name.removeprefix(f'{EFFICIENCY}_at_')}"
            drawn += right.plot(*points(lines, name), marker=marker, color="C3", linewidth=1, label=label)
        right.set_ylabel("block efficiency, as served")
    # Below the axes, where the legend hides no line.
    axis.legend(handles=drawn, loc="upper center", bbox_to_anchor=(0.5, -0.2), frameon=False, fontsize="small")


def is_number(value: Any) -> bool:
    """Return whether a value can be drawn. A damaged metrics file may contain anything."""
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e30


def points(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a metric was logged, and the values of the metric."""
    found = [(line["step"], line[name]) for line in lines if is_number(line.get(name))]
    return [step for step, _ in found], [value for _, value in found]
