"""A run's picture is drawn from what its stages have written so far."""

import json

import pytest

from mlxspec import InvalidRequestError
from mlxspec.evaluation import curves
from mlxspec.evaluation.curves import draw_curves, draw_quality, draw_smoothed, metrics_files, new_figure, read_metrics

PNG = b"\x89PNG"


@pytest.fixture
def run(tmp_path):
    for name in ("finetune-1", "pretrain", "finetune-2"):
        lines = [{"step": step, "loss": 1 / step, "gradient_norm": 1.0} for step in range(1, 40)]
        if name != "pretrain":
            lines = [{**line, "acceptance_rate": 0.5} for line in lines]
            lines += [{"step": 39, "block_efficiency": 2.0, "block_efficiency_at_0": 2.1, "block_efficiency_at_1": 1.9}]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_stages_are_in_the_order_in_which_they_were_run(run):
    assert [path.parent.name for path in metrics_files(run)] == ["pretrain", "finetune-1", "finetune-2"]
    assert [path.parent.name for path in metrics_files(run / "pretrain")] == ["pretrain"]


def test_a_picture_is_drawn_while_a_line_is_being_written(run):
    with (run / "finetune-2" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    assert len(read_metrics(run / "finetune-2" / "metrics.jsonl")) == 40
    assert draw_curves(run) == run / "curves.png"
    assert (run / "curves.png").read_bytes().startswith(PNG)


def test_the_legend_names_every_line_of_quality_and_covers_none(run):
    figure = new_figure((6, 6))
    axes = figure.subplots(2, 1)
    draw_quality(axes[1], read_metrics(run / "finetune-1" / "metrics.jsonl"))
    figure.canvas.draw()
    legend = axes[1].get_legend()
    named = ["acceptance rate α", "block efficiency, T = 0", "block efficiency, T = 1"]
    assert [text.get_text() for text in legend.get_texts()] == named
    box = legend.get_window_extent()
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)
    assert not any(box.overlaps(label.get_window_extent()) for label in axes[1].get_xticklabels())


def test_metrics_that_are_damaged_are_left_out_of_the_picture(run):
    file = run / "pretrain" / "metrics.jsonl"
    bad = [
        "[1]",
        '{"loss": 1}',
        '{"step": "x", "loss": 1}',
        '{"step": 50, "loss": "x"}',
        '{"step": 51, "loss": NaN}',
        "{",
    ]
    file.write_text(file.read_text() + "\n".join([*bad, "[" * 100_000]) + "\n")
    assert draw_curves(run) == run / "curves.png"


class Axis:
    """Remembers what is plotted."""

    def __init__(self):
        self.lines = []

    def plot(self, steps, values, **_):
        self.lines.append((steps, values))

    def set_ylabel(self, label): ...
    def grid(self, alpha): ...


def test_the_thick_line_is_the_mean_of_the_last_values():
    axis = Axis()
    draw_smoothed(axis, [{"step": step, "loss": float(step % 2)} for step in range(100)], "loss", "loss")
    thin, thick = axis.lines
    assert thin[1][:4] == [0, 1, 0, 1]
    assert thick[1][30:] == pytest.approx([0.5] * 70)


def test_nothing_to_draw_and_no_such_format_are_one_line(run, tmp_path, mlxspec_command):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidRequestError, match=r"contains no metrics\.jsonl"):
        draw_curves(tmp_path / "empty")
    outcome = mlxspec_command("train", "plot", str(run), "--out", str(run / "x.doc"))
    assert outcome.status == 2
    assert "x.doc cannot be drawn" in outcome.err
    drawn = mlxspec_command("train", "plot", str(run), "--out", str(run / "a picture.svg"))
    assert drawn.out == f"{run / 'a picture.svg'}\n"


def test_without_matplotlib_the_command_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(curves, "can_draw", lambda: False)
    with pytest.raises(InvalidRequestError, match=r"pip install 'mlxspec\[plots\]'"):
        draw_curves(run)
