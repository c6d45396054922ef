"""One measured record of the demo pair, for all tests of what is made from a record."""

import pytest

import mlxspec
from mlxspec import Sampling
from mlxspec.evaluation.benchmark import BenchmarkSettings, new_record, run_benchmark
from mlxspec.evaluation.profile import calibrated, profile
from mlxspec.evaluation.tasks import read_tasks


@pytest.fixture(scope="package")
def names():
    return {"target": "a <target>", "drafter": "demo"}


@pytest.fixture(scope="package")
def demo():
    return mlxspec.load(quantize="none")


@pytest.fixture(scope="package")
def record(demo, names, tmp_path_factory):
    tasks = read_tasks(["stories"], demo.tokenizer, 2)
    settings = BenchmarkSettings(rounds=2, max_tokens=24, draft_length=3)
    made = new_record(demo, settings, names)
    made["profile"] = profile(demo, Sampling(), 3, rounds=2)
    made["calibration"] = calibrated(demo, tasks[0].prompts, Sampling(), 1, 16)
    run_benchmark(demo, tasks, settings, made, tmp_path_factory.mktemp("bench") / "b.json")
    return made
