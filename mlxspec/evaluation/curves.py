"""A picture of a training run, from the metrics.jsonl that each of its stages leaves. Needs matplotlib."""

import importlib.util
from pathlib import Path
from typing import Any

from mlxspec.errors import InvalidRequestError
from mlxspec.training.run_folder import read_metrics

WINDOW = 20  # lines of metrics that the thick line is the mean of
EFFICIENCY = "block_efficiency"


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw_curves(folder: str | Path, out: str | Path | None = None) -> Path:
    """Loss, acceptance rate and block efficiency against steps, a column for each stage; PNG, PDF or SVG by its suffix.

    ``folder`` is a stage's or that of a whole run; ``out`` is ``folder/curves.png`` if not given. Raises
    InvalidRequestError if there is nothing to draw, nothing to draw with, or no such format.
    """
    if not can_draw():
        raise InvalidRequestError("pictures need matplotlib; install it with: pip install 'mlxspec[plots]'")
    folder = Path(folder)
    runs = {path.parent.name: read_metrics(path) for path in metrics_files(folder)}
    runs = {name: lines for name, lines in runs.items() if lines}
    if not runs:
        raise InvalidRequestError(f"{folder} has no metrics.jsonl in it; give the folder of a training run")
    # Not pyplot: it would choose a window system, and keep every figure.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6, 4.5 * len(runs)), 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(runs), squeeze=False, sharex="col")
    for (name, lines), (above, below) in zip(runs.items(), axes.T, strict=True):
        above.set_title(name)
        draw_smoothed(above, lines, "loss", "loss")
        below.set_xlabel("step")
        draw_worth(below, lines)
    out = Path(out) if out else folder / "curves.png"
    try:
        figure.savefig(out, dpi=120)
    except ValueError as error:
        raise InvalidRequestError(f"{out} cannot be drawn: {error}") from None
    return out


def metrics_files(folder: Path) -> list[Path]:
    """In the order in which the stages were run."""
    own = folder / "metrics.jsonl"
    found = [own] if own.exists() else folder.glob("*/metrics.jsonl")
    return sorted(found, key=lambda path: (path.parent.name != "pretrain", len(path.parent.name), path.parent.name))


def draw_smoothed(axis: Any, lines: list[dict[str, Any]], name: str, label: str, color: str = "C0") -> None:
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


def draw_worth(axis: Any, lines: list[dict[str, Any]]) -> None:
    """Acceptance rate on the left, block efficiency on the right; the gradient's norm where neither was measured."""
    if not points(lines, "acceptance_rate")[0]:
        draw_smoothed(axis, lines, "gradient_norm", "gradient norm", "C2")
        return
    draw_smoothed(axis, lines, "acceptance_rate", "acceptance rate α", "C1")
    names = sorted({name for line in lines for name in line if name.startswith(f"{EFFICIENCY}_at_")})
    if names:
        right = axis.twinx()
        for name, marker in zip(names, "os^vD*", strict=False):
            label = f"T = {name.removeprefix(f'{EFFICIENCY}_at_')}"
            right.plot(*points(lines, name), marker=marker, color="C3", linewidth=1, label=label)
        right.set_ylabel("block efficiency, as served")
        right.legend(loc="lower right")


def points(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]
