"""``mlxspec bench`` and ``mlxspec report`` as a user runs them."""

import json
import re
import signal
import sys
import time

import pytest

from mlxspec.cli.bench import print_block
from mlxspec.decoding.acceptance import MENU
from mlxspec.evaluation.profile import PARTS
from mlxspec.evaluation.report import PART_NAMES

SHORT = ["--prompts", "1", "--max-tokens", "12", "--rounds", "1", "--temperature", "0"]


def test_bench_prints_a_table_and_writes_json_that_report_makes_a_page_of(mlxspec_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = mlxspec_command("bench", *SHORT, "--draft-length", "3")
    assert outcome.status == 0
    heading, row = outcome.out.splitlines()[:2]
    assert heading.split()[:3] == ["task", "T", "τ"]
    assert row.split()[:2] == ["stories", "0"]
    assert "times its tokens per second" in outcome.out
    assert "on the worst task, stories at temperature 0." in outcome.out
    assert "to make a page of it: mlxspec report bench.json" in outcome.err
    page = mlxspec_command("report", "bench.json")
    assert page.out.strip() == "bench-report/index.html"
    assert "<h2>By task</h2>" in (tmp_path / "bench-report" / "index.html").read_text()
    compared = mlxspec_command("bench", "--compare", "bench.json", "bench.json")
    assert compared.out.splitlines()[1].split() == ["stories", "0", "1.00", "1.00", "1.00"]


@pytest.mark.slow
def test_calibrate_prints_what_rows_cost_and_says_which_length_wins(mlxspec_command, tmp_path):
    outcome = mlxspec_command("bench", *SHORT, "--calibrate", "--out", str(tmp_path / "b.json"))
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(MENU) + 2]] == [*map(str, MENU), "auto"]
    assert re.search(r"^A draft costs [\d.]+ ms and [\d.]+ ms per token\.$", outcome.out, re.MULTILINE)
    assert " wins: " in outcome.out
    assert len(json.loads((tmp_path / "b.json").read_text())["calibration"]["lengths"]) == len(MENU)


def test_the_parts_of_a_block_that_are_printed_add_up_to_it(capsys):
    parts = dict(zip(PARTS, (0.004, 0.010, 0.003, -0.001), strict=True))
    print_block({**parts, "block": 0.016, "draft_length": 4})
    line = capsys.readouterr().out
    assert line.startswith("A block that drafts 4 tokens takes 16.00 ms: ")
    assert [float(re.search(rf"{PART_NAMES[part]} (-?\d+\.\d+)", line)[1]) for part in PARTS] == [4, 10, 3, -1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "sotries"], "there is no task and no file named sotries"),
        (["--prompts", "0"], "prompts is 0"),
        (["--rounds", "0"], "rounds is 0"),
        (["--temperature", "-1"], "temperature is -1"),
        (["--draft-length", "99"], "draft length is 99"),
        (["--out", "."], ". cannot be written"),
        (["--drafter", "none", "--calibrate"], "--calibrate needs a drafter"),
        (["--compare", "a.json", "b.json"], "a.json cannot be read"),
        (["--out", "no/such/folder/b.json"], "there is no folder no/such/folder"),
        (["--tasks", ","], "name at least one task"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(mlxspec_command, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    outcome = mlxspec_command("bench", *arguments)
    assert outcome.status == 2
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_ctrl_c_before_the_first_round_shows_no_older_results(mlxspec_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mlxspec_command("bench", *SHORT).status == 0
    older = (tmp_path / "bench.json").read_bytes()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["mlxspec.cli.bench"], "profile", interrupted)
    outcome = mlxspec_command("bench", *SHORT)
    assert (outcome.status, outcome.out) == (130, "")
    assert outcome.err.splitlines()[-1] == "interrupted; no round was finished"  # a busy machine still measures before
    assert (tmp_path / "bench.json").read_bytes() == older


@pytest.mark.slow
def test_ctrl_c_keeps_the_finished_rounds(mlxspec_process, tmp_path):
    out = tmp_path / "b.json"
    process = mlxspec_process("bench", "--rounds", "500", "--prompts", "1", "--max-tokens", "8", "--out", str(out))
    deadline = time.monotonic() + 120
    while not out.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in told
    assert f"the finished rounds are in {out}" in told
    assert printed.splitlines()[1].split()[:2] == ["stories", "0"]
    record = json.loads(out.read_text())
    assert not record["complete"]
    assert len(record["results"][0]["rounds"]) >= 1
