"""Two processes that divide the target train what one process trains."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxspec
from mlxspec import InvalidRequestError, TrainingError
from mlxspec.training.recipe import Recipe
from mlxspec.training.recording import Recording
from mlxspec.training.run_folder import read_metrics
from mlxspec.training.shards import TokenShards
from mlxspec.training.step_memory import target_pass_bytes
from mlxspec.training.target import Target
from mlxspec.training.teachers import OnlineTeacher, TeacherStore
from mlxspec.training.trainer import TrainingSettings
from mlxspec.training.warm_start import WarmStart, warm_start
from tests.conftest import random_llama
from tests.models.test_sharding import ROOT, kill, launched, two_processes

TRAIN = [sys.executable, "-c", "from mlxspec.cli import main; main()", "train"]
COMMAND = [*TRAIN, "run"]
LENGTH, TOP_K = 16, 8
RECIPE = f"""
target = "TARGET"
divide_target = true

[drafter]
layers = [0, -1]
vocabulary_size = 128
share_embedding = true

[distill]
prompts = ["stories.jsonl"]
temperatures = [0]
max_tokens = 8
group = 6

[[finetune]]
loss = "kld"
teacher_top_k = {TOP_K}
steps = 3
batch = 4
length = {LENGTH}
log_every = 1
checkpoint_every = 1

[[finetune]]
loss = "tvd"
steps = 2
batch = 4
length = {LENGTH}
log_every = 1
evaluate_every = 2

[evaluation]
count = 1
max_tokens = 6
"""


@pytest.fixture
def recipe(tmp_path, stories_folder) -> Path:
    lines = [{"text": f"Once upon a time there was a {name}."} for name in ("dog", "cat", "girl", "boy", "bird", "hat")]
    (tmp_path / "stories.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "small.toml").write_text(RECIPE.replace("TARGET", str(stories_folder)))
    return tmp_path / "small.toml"


# ----------------------------------------------------------------------- one process


def test_a_recipe_that_divides_the_target_says_so_and_other_values_are_one_line(recipe):
    assert Recipe.read(recipe).divide_target
    recipe.write_text(recipe.read_text().replace("divide_target = true", "divide_target = 2"))
    with pytest.raises(TrainingError, match="divide_target is 2; use a value of type bool"):
        Recipe.read(recipe)


def test_a_width_that_needs_the_whole_target_is_refused(stories_folder):
    target = Target(str(stories_folder), group=mx.distributed.init())
    with pytest.raises(InvalidRequestError, match="need the activations of the whole target; leave them out, or make"):
        warm_start(target, WarmStart((0,), intermediate_size=32), None)


def test_a_divided_target_runs_the_rows_of_all_processes_with_its_share_of_the_widths():
    config, settings = {"hidden_size": 64, "intermediate_size": 1024, "num_attention_heads": 1}, TrainingSettings()
    whole = target_pass_bytes(config, 100, settings)
    hidden = 100 * settings.dtype.size * 2 * 64
    assert target_pass_bytes(config, 100, settings, 2) == 2 * (hidden + (whole - hidden) / 2)


def test_each_process_keeps_the_rows_that_are_its_own():
    """With a group of one, these are all rows."""
    target, rows = random_llama(), mx.random.randint(0, 8, (3, 10))
    one, other = (OnlineTeacher(target, True, (0, 1), group) for group in (None, mx.distributed.init()))
    for mine, expected in zip(*(teacher.states(rows, rows // 4, ()) for teacher in (other, one)), strict=True):
        assert mx.array_equal(mine, expected)


# ----------------------------------------------------------------------- two processes


def stored(folder: Path) -> dict[tuple, dict[int, float]]:
    """The probabilities in a run's cached teacher, by its name, the row and the position."""
    (teacher,) = (folder / "answers" / "tokens").glob("teacher-*")
    rows = (teacher / "ids").stat().st_size // (2 * TOP_K * LENGTH)
    store, found = TeacherStore(teacher, rows, LENGTH, TOP_K, np.uint16), {}
    for row in filter(store.has, range(rows)):
        for position, (ids, logprobs) in enumerate(zip(*store.read(row), strict=True)):
            found[teacher.name, row, position] = dict(zip(ids.tolist(), np.exp(logprobs).tolist(), strict=True))
    return found


def numbers(folder: Path) -> list[float]:
    """The losses and block efficiencies of a run's finetuning stages."""
    lines = [line for stage in ("finetune-1", "finetune-2") for line in read_metrics(folder / stage / "metrics.jsonl")]
    return [line[name] for line in lines for name in ("loss", "acceptance_rate", "block_efficiency") if name in line]


@pytest.mark.slow
def test_two_processes_that_divide_the_target_train_what_one_does(recipe, mlxspec_command):
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    folder, alone = recipe.with_suffix(""), recipe.with_name("alone")
    shutil.move(folder, alone)
    outcome = launched(*COMMAND, str(recipe))
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith(f"{folder / 'finetune-2' / 'drafter'}, block efficiency")
    assert len(outcome.stdout.splitlines()) == 1
    answers = [
        [document.ids.tolist() for document in TokenShards(run / "answers" / "tokens", verify=True).documents()]
        for run in (folder, alone)
    ]
    assert answers[0] == answers[1]
    assert stored(folder).keys() == stored(alone).keys()
    for place, probs in stored(folder).items():
        # A token whose probability is that of the last one may be left out instead.
        expected, least = stored(alone)[place], min(stored(alone)[place].values())
        for token in probs.keys() | expected.keys():
            assert probs.get(token, least) == pytest.approx(expected.get(token, least), rel=4e-3, abs=1e-6)
    assert numbers(folder) == pytest.approx(numbers(alone), rel=1e-3)
    for stage in ("finetune-1", "finetune-2"):
        weights, others = (dict(mx.load(str(run / stage / "drafter" / "model.safetensors"))) for run in (folder, alone))
        assert weights.keys() == others.keys()
        for name, weight in weights.items():
            np.testing.assert_allclose(np.array(weight), np.array(others[name]), atol=1e-4)
    # The records do not depend on the division, so that either can continue what the other has started.
    shutil.move(folder, recipe.with_name("divided"))
    shutil.copytree(recipe.with_name("divided"), folder)
    assert mlxspec_command("train", "run", str(recipe)).err == ""


@pytest.mark.slow
@pytest.mark.parametrize("divided", [True, False])
def test_another_recipe_in_one_process_is_one_line(recipe, divided):
    text = recipe.read_text().replace("divide_target = true", f"divide_target = {str(divided).lower()}")
    recipe.write_text(text)
    other = recipe.with_name("other.toml")
    other.write_text(text.replace("max_tokens = 8", "max_tokens = 9"))
    shell = f'R={recipe}; [ "$MLX_RANK" = 1 ] && R={other}; exec "$@" $R --out {recipe.with_suffix("")}'
    outcome = launched("sh", "-c", shell, "sh", *COMMAND)
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    name = "distill.1.max_tokens" if divided else "max_tokens"
    assert errors == [
        f"error: process 1 of mlx.launch has another {name} than the first one (9 instead of 8); all of them must have "
        "the same"
    ]


@pytest.mark.slow
def test_a_killed_process_ends_the_other_with_one_line_and_the_run_is_resumed(recipe, mlxspec_command):
    recipe.write_text(recipe.read_text().replace("steps = 3", "steps = 200"))
    stage = recipe.with_suffix("") / "finetune-1"
    with two_processes([*COMMAND, str(recipe)], recipe.parent) as processes:
        while not any(stage.glob("step-*")):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.1)
        _, errors = kill(processes, 1)
    assert errors[-1].startswith("error: another process of mlx.launch has stopped or cannot be reached")
    assert len([line for line in errors if line.startswith("error")]) == 1
    resumed = mlxspec_command("train", "run", str(recipe))
    assert resumed.status == 0
    assert "continued after step" in resumed.err


def weights_of(drafter: Path) -> dict[str, np.ndarray]:
    weights: dict = mx.load(str(drafter / "model.safetensors"))  # type: ignore[assignment]
    return {name: np.array(weight) for name, weight in weights.items()}


def errors_of(*command: str) -> list[str]:
    """The lines of errors of two processes. The second one runs in the folder OTHER."""
    shell = 'cd "$FIRST"; [ "$MLX_RANK" = 1 ] && cd "$OTHER"; exec "$@"'
    first, other, *command = command
    outcome = launched("sh", "-c", shell, "sh", *command, FIRST=first, OTHER=other, PYTHONPATH=str(ROOT))
    return [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
def test_two_processes_estimate_a_recipe_once_and_compare_its_prompts(recipe):
    outcome = launched(*COMMAND, "--dry-run", str(recipe))
    assert outcome.returncode == 0, outcome.stderr
    names = [line.split()[0] for line in outcome.stdout.splitlines()]
    assert names == ["target", "drafter", "folder", "answers", "finetune-1", "finetune-2", "total"]
    other = recipe.with_name("other")
    other.mkdir()
    shutil.copy(recipe, other)
    (other / "stories.jsonl").write_text((recipe.with_name("stories.jsonl")).read_text().replace("girl", "king"))
    (error,) = errors_of(str(recipe.parent), str(other), *COMMAND, "--dry-run", recipe.name)
    assert error.startswith("error: process 1 of mlx.launch has another set of prompts than the first one (")


@pytest.mark.slow
def test_two_processes_that_divide_the_target_start_pretrain_and_adapt_as_one_does(
    recipe, stories_folder, mlxspec_command
):
    folder, target = recipe.parent, ("--target", str(stories_folder))
    (folder / "text.txt").write_text("Once upon a time there was a dog. It saw a cat, and they were friends.\n\n" * 40)
    (folder / "one.jsonl").write_text((folder / "stories.jsonl").read_text().splitlines()[0])
    decoder = mlxspec.SpeculativeDecoder(mlxspec.load(stories_folder, "none"), mlxspec.Sampling(1.0), keep_top_k=8)
    recording = Recording(folder / "recorded", decoder.pair.target)
    for seed in range(11):
        list(decoder.stream("Once upon a time", max_tokens=30, seed=seed))
        recording.add(*decoder.kept_probs())
    general = str(folder / "general")
    drawn = ("--samples", "8", "--temperatures", "1", "--max-tokens", "30", "--group", "8", "--out", general)
    assert mlxspec_command("train", "distill", *target, *drawn).status == 0
    steps = ("--steps", "4", "--batch", "2", "--length", "32")

    def commands(out: Path) -> list[tuple[str, ...]]:
        start = ("--drafter", str(out / "start" / "drafter"))
        return [
            ("init", *target, "--layers", "0", "--vocabulary-size", "128", "--answers", general, "--out",
             str(out / "start")),
            ("pretrain", *target, *start, "--data", str(folder / "text.txt"), "--prompts",
             str(folder / "one.jsonl"), "--evaluate-every", "4", *steps, "--out", str(out / "text")),
            ("adapt", *target, *start, "--recorded", str(folder / "recorded"), "--general", general, *steps,
             "--tolerance", "0.9", "--out", str(out / "adapted")),
        ]  # fmt: skip

    found = {}
    for out, options in ((folder / "alone", ()), (folder / "two", ("--divide-target",))):
        printed = []
        for command in commands(out):
            if options:
                outcome = launched(*TRAIN, *command, *options)
                assert outcome.returncode == 0, outcome.stderr
                printed += outcome.stdout.splitlines()
            else:
                one = mlxspec_command("train", *command)
                assert one.status == 0, one.err
                printed += one.out.splitlines()
        drafters = [weights_of(path) for path in (out / "start" / "drafter", out / "text" / "pretrain" / "drafter")]
        found[out.name] = printed, drafters
    (alone, expected), (two, drafters) = found.values()
    assert len(two) == len(alone)
    for line, other in zip(two, alone, strict=True):
        assert re.sub(r"[\d.]+", "#", line.replace("/two/", "/alone/")) == re.sub(r"[\d.]+", "#", other)
    rates = [[float(rate) for rate in re.findall(r"0\.\d{4}", "\n".join(lines))] for lines in (two, alone)]
    assert rates[0] == pytest.approx(rates[1], abs=2e-3)
    assert len(rates[0]) == 4
    for weights, others in zip(drafters, expected, strict=True):
        assert weights.keys() == others.keys()
        for name, weight in weights.items():
            np.testing.assert_allclose(weight, others[name], atol=1e-4)

    other = folder / "other"
    shutil.copytree(folder / "recorded", other / "recorded")
    next((other / "recorded").glob("*.npz")).unlink()
    start = str(folder / "alone" / "start" / "drafter")
    errors = errors_of(
        str(folder), str(other), *TRAIN, "adapt", *target, "--drafter", start, "--recorded", "recorded", "--general",
        general, *steps, "--out", str(folder / "out"), "--divide-target",
    )  # fmt: skip
    assert len(errors) == 1, errors
    assert errors[0].startswith("error: process 1 of mlx.launch has another recorded answers than the first one (")
