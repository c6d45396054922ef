"""A killed run that is resumed with other settings keeps and reports a drafter of the evaluation that it has now."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxspec import Drafter, DrafterConfig
from mlxspec.errors import TrainingError
from mlxspec.training import run_folder
from mlxspec.training.batches import Batches
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import objective
from mlxspec.training.run_folder import complete_stage, start_stage
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.trainer import Trainer, TrainingSettings

V = 32
ROOT = Path(__file__).parent.parent.parent


def new_drafter() -> Drafter:
    mx.random.seed(0)
    return Drafter(DrafterConfig(V, 16, 32, 1, 2))


def distance(drafter: Drafter) -> float:
    """How far training has moved the weights."""
    pairs = zip(tree_flatten(drafter.parameters()), tree_flatten(new_drafter().parameters()), strict=True)
    return sum(float(mx.abs(one - other).sum()) for (_, one), (_, other) in pairs)


# Functions of the weights. By the first and second, the earliest drafter is best, by the third the last one.
EVALUATIONS = {
    "large": lambda drafter: 1000 / distance(drafter),
    "small": lambda drafter: 1 / distance(drafter),
    "rising": lambda drafter: distance(drafter) / 1e6,
    None: None,
}


def run(folder: Path, evaluation: str | None, every: int = 2, last: int = 0, steps: int = 8, rate: float = 1e-3):
    """Train in ``folder``. The process kills itself, as ``kill -9`` does, once step ``last`` is reported."""
    if not (folder / "tokens" / "index.json").exists():
        with ShardWriter(folder / "tokens", V, "tokens") as writer:
            for _ in range(8):
                writer.add(range(V), [1] * V)
            writer.finish()
    settings = TrainingSettings(
        steps, 4, 16, checkpoint_every=2, log_every=1, evaluate_every=every if evaluation else 0, learning_rate=rate
    )
    figure = EVALUATIONS[evaluation]
    scorer = (lambda drafter: {"block_efficiency": figure(drafter)}) if figure else None
    drafter = new_drafter()

    def report(step, metrics):
        if step == last and "loss" in metrics:
            signal.raise_signal(signal.SIGKILL)

    batches = Batches([TokenShards(folder / "tokens")], [1.0], 16, 4, 0)
    inputs = {"prompts": evaluation, "temperatures": (0.0,)}
    trainer = Trainer(drafter, objective(Loss("ce")), batches, settings, folder, scorer, None, report, inputs)
    return drafter, trainer.run()


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders of runs that were killed after step 5, with and without an evaluation."""
    folders = {}
    for evaluation in ("large", None):
        folders[evaluation] = tmp_path_factory.mktemp("killed run")
        code = (
            f"from tests.training.test_resuming import *; run(Path({str(folders[evaluation])!r}), {evaluation!r}, 2, 5)"
        )
        process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert [path.name for path in sorted(folders[evaluation].glob("step-*"))] == ["step-00000002", "step-00000004"]
    return folders


def weights(drafter: Drafter) -> dict[str, np.ndarray]:
    return {name: np.array(weight) for name, weight in tree_flatten(drafter.parameters())}


@pytest.mark.parametrize("before", ["large", None])
@pytest.mark.parametrize(
    ("after", "every"),
    [("large", 2), ("large", 3), ("small", 2), ("small", 5), ("rising", 2), ("rising", 3), (None, 0)],
)
def test_the_drafter_that_is_kept_has_the_figure_that_is_reported(killed, tmp_path, before, after, every):
    folder = shutil.copytree(killed[before], tmp_path / "a run")
    kept, result = run(folder, after, every)
    last, _ = run(tmp_path / "whole", None)
    if after is None:
        assert result == {}
        assert all(np.array_equal(weights(kept)[name], weight) for name, weight in weights(last).items())
        return
    assert result["block_efficiency"] == pytest.approx(EVALUATIONS[after](kept), rel=1e-6)
    assert result["block_efficiency"] >= EVALUATIONS[after](last) * (1 - 1e-6)
    # The drafters that it can know: all of the same evaluation, or those from the checkpoint on.
    best = 2 if before == after else {"rising": 8}.get(after, 4)
    assert result["step"] == best


def test_a_best_drafter_that_a_discarded_part_of_the_run_wrote_is_not_taken_for_the_one_of_the_checkpoint(tmp_path):
    """Killed after step 4 was found to be the best and before its checkpoint; then step 4 is trained otherwise."""
    run(tmp_path, "large", steps=4)
    shutil.rmtree(tmp_path / "step-00000004")
    drafter, result = run(tmp_path, "large", steps=4, rate=0.1)
    assert result["step"] == 2
    assert result["block_efficiency"] == pytest.approx(EVALUATIONS["large"](drafter), rel=1e-6)


def test_a_longer_run_continues_after_the_last_checkpoint_with_the_rates_of_the_longer_run(tmp_path):
    run(tmp_path, None, steps=4)
    run(tmp_path, None, steps=8)
    lines = run_folder.read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    settings = TrainingSettings(steps=8)
    assert [line["learning_rate"] for line in lines[4:]] == [settings.rate(step) for step in range(4, 8)]


def test_a_finished_stage_accepts_more_steps_and_nothing_else(tmp_path):
    inputs = {"steps": 4, "batch": 2}
    assert start_stage(tmp_path, inputs)
    complete_stage(tmp_path)
    assert not start_stage(tmp_path, inputs)
    for other in ({"steps": 3}, {"batch": 3}, {"steps": 8, "batch": 3}):
        with pytest.raises(ValueError, match="was created with"):
            start_stage(tmp_path, {**inputs, **other})
    assert not start_stage(tmp_path, inputs)
    assert start_stage(tmp_path, {**inputs, "steps": 8})


def test_an_unfinished_stage_accepts_as_few_steps_as_its_last_checkpoint_has(tmp_path):
    assert start_stage(tmp_path, {"steps": 8, "batch": 2})
    for step in (2, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
    assert start_stage(tmp_path, {"steps": 80, "batch": 2})
    assert start_stage(tmp_path, {"steps": 4, "batch": 2})
    with pytest.raises(TrainingError, match="has a checkpoint of step 4, but this run has steps = 3; use at least 4"):
        start_stage(tmp_path, {"steps": 3, "batch": 2})
    with pytest.raises(TrainingError, match="was created with batch = 2"):
        start_stage(tmp_path, {"steps": 4, "batch": 3})
    with pytest.raises(TrainingError, match="was created with steps = 4, but this run has steps = None"):
        start_stage(tmp_path, {"batch": 2})
