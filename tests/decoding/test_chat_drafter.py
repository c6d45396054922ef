"""The drafters of a real chat model, a draft model and a head, as tests/data keeps them in 4 bits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxspec import blas
from tests.conftest import SHARED, shared
from tests.test_blas import needs_openblas

ROOT = Path(__file__).parent.parent.parent
# Folder -> block efficiency at temperature 0 that it must exceed on ten prompts, which is less than it had.
DRAFTERS = {"smollm2-drafter": 1.5, "smollm2-head": 1.3}


@pytest.mark.parametrize("name", DRAFTERS)
def test_a_stored_drafter_takes_at_most_8_mb(name):
    assert sum(file.stat().st_size for file in (ROOT / "tests" / "data" / name).iterdir()) <= 8e6


@needs_openblas
@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), DRAFTERS.items())
def test_a_stored_drafter_has_its_block_efficiency_on_held_out_prompts_of_dolly(tmp_path, name, least):
    """Ten of the hundred prompts and short answers, since a pass of the target takes 20 to 100 ms."""
    target, drafter = shared("models/SmolLM2-135M-Instruct-4bit"), ROOT / "tests" / "data" / name
    scripts = ROOT / "scripts"
    subprocess.run(
        [sys.executable, scripts / "one_night_prompts.py", SHARED, tmp_path], check=True, stdout=subprocess.DEVNULL
    )
    words = [
        target,
        drafter,
        tmp_path / "dolly-test.jsonl",
        "--count",
        "10",
        "--max-tokens",
        "48",
        "--temperature",
        "0",
    ]
    result = subprocess.run(
        [sys.executable, scripts / "measure_block_efficiency.py", *map(str, words)],
        env={**os.environ, blas.SWITCH: ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout)["block_efficiency_at_0"] > least
