"""The drafter that was trained for a real chat model, as tests/data keeps it: 4 bits, 6.7 MB, without an embedding."""

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
DRAFTER = ROOT / "tests" / "data" / "smollm2-drafter"


def test_the_stored_drafter_takes_at_most_8_mb():
    assert sum(file.stat().st_size for file in DRAFTER.iterdir()) <= 8e6


@needs_openblas
@pytest.mark.slow
def test_the_stored_drafter_has_its_block_efficiency_on_held_out_prompts_of_dolly(tmp_path):
    """Ten of the hundred prompts and short answers, since a pass of the target takes 20 to 100 ms."""
    target = shared("models/SmolLM2-135M-Instruct-4bit")
    scripts = ROOT / "scripts"
    subprocess.run(
        [sys.executable, scripts / "one_night_prompts.py", SHARED, tmp_path], check=True, stdout=subprocess.DEVNULL
    )
    words = [
        target,
        DRAFTER,
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
    assert json.loads(result.stdout)["block_efficiency_at_0"] > 1.5  # 1.63 when it was stored
