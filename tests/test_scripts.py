"""The maintainer's scripts, as processes, on a small scale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlx_lm.utils import load_model

from tests.conftest import shared

SCRIPTS = Path(__file__).parent.parent / "scripts"


def run_script(name: str, *arguments) -> str:
    result = subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_speed_comparison_measures_all_four(tmp_path, stories_folder, temperature):
    options = ["--pad-layers", 2, "--pad-width", 256, "--tokens", 20, "--rounds", 1, "--draft-length", 3]
    out = run_script(
        "compare_speed.py", "--target", stories_folder, *options, "--temperature", temperature, "--json", tmp_path / "x"
    )
    assert "padded with 2 layers that change no text" in out
    assert temperature or "all four give the same text" in out
    record = json.loads((tmp_path / "x").read_text())
    assert set(record["rates"]) == {
        "mlx-lm plain", "mlx-lm speculative", "mlxspec", "mlxspec, nothing drafted"
    }  # fmt: skip
    assert all(rate > 0 for rates in record["rates"].values() for rate in rates)


@pytest.mark.slow
def test_the_demo_pair_can_be_made_anew(tmp_path, stories_folder):
    work, out = tmp_path / "work", tmp_path / "out"
    stories = shared("text/tinystories_500.jsonl")
    small = ["--sample-tokens", 40_000, "--target-steps", 2, "--drafter-steps", 2, "--batch", 1]
    run_script(
        "build_demo_pair.py", "--teacher", stories_folder, "--stories", stories, "--work", work, "--out", out, *small
    )
    for name in ("target", "drafter"):
        load_model(out / name)
    assert sum(path.stat().st_size for path in out.rglob("*")) <= 4_000_000
