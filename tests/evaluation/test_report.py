"""A record becomes one page and its pictures."""

import json

import pytest

from mlxspec import InvalidRequestError
from mlxspec.evaluation.benchmark import summaries
from mlxspec.evaluation.engines import PLAIN
from mlxspec.evaluation.profile import PARTS
from mlxspec.evaluation.report import draw_block, headline, pictures, read_record, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_report_is_one_page_that_needs_nothing_beside_it(record, tmp_path):
    page = write_report(record, tmp_path / "report")
    content = page.read_text()
    assert content.count("data:image/png;base64,") == 4
    assert 'src="http' not in content
    assert "<script" not in content
    assert "a &lt;target&gt;" in content
    assert {file.name for file in page.parent.iterdir()} == {
        "index.html", "tasks.png", "acceptance.png", "draft-length.png", "block.png",
    }  # fmt: skip
    assert all((page.parent / f"{name}.png").read_bytes() == image for name, image in pictures(record).items())
    assert all(image.startswith(PNG) for image in pictures(record).values())


def test_a_report_without_calibration_has_only_the_pictures_it_can(record):
    assert set(pictures({**record, "calibration": None, "profile": None}).keys()) == {"tasks", "acceptance"}


def test_the_headline_names_task_and_temperature_of_the_lowest_block_efficiency(record):
    rows = summaries(record)
    lowest = min(rows, key=lambda row: row["block_efficiency"])
    wanted = f"block efficiency is {lowest['block_efficiency']:.2f} on the worst task, stories at temperature "
    assert headline(rows).endswith(f"{wanted}{lowest['temperature']:g}.")
    mean = sum(row["block_efficiency"] for row in rows) / len(rows)
    assert f"; mean block efficiency is {mean:.2f}; " in headline(rows)


@pytest.mark.parametrize(("ratios", "words"), [((1.2, 2), "is faster than"), ((0.5, 0.9), "is slower than"),
                                               ((0.9, 2), "is not always faster than")])  # fmt: skip
def test_the_headline_says_whether_it_is_faster(record, ratios, words):
    rows = [{**row, "ratio": {PLAIN: {"median": ratio}}} for row, ratio in zip(summaries(record), ratios, strict=True)]
    assert words in headline(rows)


class Axis:
    """Remembers the bars."""

    def __init__(self):
        self.bars = []

    def barh(self, y, width, left, label, **style):
        self.bars.append((left, width, label))

    def __getattr__(self, name):
        return lambda *args, **options: None


def test_the_bars_of_a_block_add_up_to_it_even_where_noise_makes_a_remainder_negative():
    parts = dict(zip(PARTS, (0.004, 0.010, 0.003, -0.001), strict=True))
    axis = Axis()
    draw_block(axis, {**parts, "block": 0.016, "draft_length": 4})
    left, width, label = axis.bars[-1]
    assert left + width == pytest.approx(16)  # milliseconds
    assert label == "host: -1.00 ms (-6.2%)"


def test_pictures_without_matplotlib_say_what_to_install(record, monkeypatch):
    monkeypatch.setattr("mlxspec.evaluation.report.can_draw", lambda: False)
    with pytest.raises(InvalidRequestError, match=r"pip install 'mlxspec\[plots\]'"):
        pictures(record)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", "[" * 9000, '{"format": 2, "results": [{}]}', '{"format": 9, "results": []}']
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InvalidRequestError, match=r"x.json was not written by this version's `mlxspec bench`"):
        read_record(tmp_path / "x.json")


def test_a_record_of_an_earlier_format_is_refused(record, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({**record, "format": 1}))
    with pytest.raises(InvalidRequestError, match="not written by this version's"):
        read_record(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps(record))
    assert summaries(read_record(tmp_path / "x.json")) == summaries(record)


def test_a_record_without_a_finished_round_makes_no_report(record, tmp_path):
    empty = {**record, "results": [{**record["results"][0], "rounds": []}]}
    (tmp_path / "x.json").write_text(json.dumps(empty))
    with pytest.raises(InvalidRequestError, match="interrupted before its first round"):
        write_report(read_record(tmp_path / "x.json"), tmp_path / "out")
