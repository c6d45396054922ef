"""A recipe from end to end: three stages, resumed, skipped, refused."""

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import mlxspec
from mlxspec import Drafter, DrafterConfig, InvalidRequestError
from mlxspec.models.loading import DEMO
from mlxspec.settings import key_of
from mlxspec.training import estimate
from mlxspec.training.prompts import read_prompts, split_prompts
from mlxspec.training.recipe import TABLES, Recipe
from mlxspec.training.responses import AnswerSettings, answer_counts, prompt_groups
from mlxspec.training.shards import Index, ShardWriter, TokenShards
from mlxspec.training.target import Target
from mlxspec.training.trainer import Trainer

RECIPE = f"""
target = "{DEMO / "target"}"

[drafter]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
tie_word_embeddings = true

[pretrain]
data = ["stories.jsonl"]
steps = 6
batch = 4
length = 32
checkpoint_every = 2

[distill]
prompts = ["stories.jsonl"]
temperatures = [0, 1]
max_tokens = 12
group = 8

[[finetune]]
loss = "kld"
steps = 4
batch = 4
length = 16
checkpoint_every = 2

[[finetune]]
steps = 4
batch = 4
length = 16
evaluate_every = 2
checkpoint_every = 2
log_every = 1

[evaluation]
count = 2
max_tokens = 8
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    folder = tmp_path / "a folder"
    folder.mkdir()
    names = ["dog", "cat", "girl", "boy", "bird"]
    lines = [
        {"text": f"Once upon a time there was a {name} with {count} hats."} for name in names for count in range(6)
    ]
    (folder / "stories.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "small.toml").write_text(RECIPE)
    return folder / "small.toml"


def result_weights(recipe: Path) -> dict[str, np.ndarray]:
    return dict(mx.load(str(recipe.with_suffix("") / "finetune-2" / "drafter" / "model.safetensors")))


def same_weights(one, other) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]).item() for name in one)


@pytest.mark.parametrize("table", TABLES)
def test_no_two_settings_of_a_table_have_the_same_name(table):
    """The command line has one option for each field, and a recipe one key."""
    settings = [field for cls in TABLES[table] for field in fields(cls)]
    for names in ([field.name for field in settings], [key_of(field) for field in settings]):
        assert len(names) == len(set(names))


def test_three_stages_make_a_drafter_that_serves_and_a_second_run_skips_them(recipe, mlxspec_command, tmp_path):
    first = mlxspec_command("train", "run", str(recipe))
    assert first.status == 0
    stages = [line.split(":")[0] for line in first.err.splitlines()]
    assert stages == ["answers", "start", "text", "pretrain", "finetune-1", "finetune-2"]
    drafter = recipe.with_suffix("") / "finetune-2" / "drafter"
    assert first.out.startswith(f"{drafter}, block efficiency ")
    load_model(drafter)  # mlx-lm reads it as it is
    assert json.loads((drafter / "training.json").read_text())["inputs"]["name"] == "tvd++"
    target = str(DEMO / "target")
    served = mlxspec_command("generate", "A dog", "--target", target, "--drafter", str(drafter), "--max-tokens", "4")
    assert served.status == 0
    second = mlxspec_command("train", "run", str(recipe))
    assert (second.out, second.err) == (first.out, "")


def test_a_dry_run_tells_what_each_stage_costs_and_makes_nothing(recipe, mlxspec_command):
    outcome = mlxspec_command("train", "run", str(recipe), "--dry-run")
    assert outcome.status == 0
    assert not recipe.with_suffix("").exists()
    lines = {line.split()[0]: line for line in outcome.out.splitlines()}
    assert " ".join(lines) == "target drafter folder answers text pretrain finetune-1 finetune-2 total"
    assert "vocabulary of 2048" in lines["target"]
    assert "6 steps of 128 positions" in lines["pretrain"]
    assert re.search(r"768 tokens, 0\.\d GB of memory, about \d+ s", lines["pretrain"])
    assert "56 answers in 8 groups" in lines["answers"]  # of 30 prompts, 2 are held out
    assert re.search(r"total +about \d+ s", lines["total"])


def test_a_dry_run_counts_what_is_there_exactly_and_says_what_is_done(recipe, mlxspec_command):
    recipe.write_text(recipe.read_text().split("[distill]")[0])
    guessed = mlxspec_command("train", "run", str(recipe), "--dry-run").out
    mlxspec_command("train", "run", str(recipe))
    planned = mlxspec_command("train", "run", str(recipe), "--dry-run").out
    tokens = TokenShards(recipe.with_suffix("") / "text" / "tokens").index.tokens
    assert f": {tokens:,} tokens, done" in planned
    assert f": {tokens:,} tokens, about" in guessed  # all of so small a corpus was tried
    assert planned.splitlines()[-1] == "total      about 0 s"


def dry_run(mlxspec_command, recipe: Path) -> dict[str, str]:
    """The lines of a dry run by their first word."""
    return {
        line.split()[0]: line for line in mlxspec_command("train", "run", str(recipe), "--dry-run").out.splitlines()
    }


def interrupt_after(monkeypatch, method: str, calls: int) -> None:
    """Let the ``calls``-th call of a method of the trainer or the writer of shards end as Ctrl-C would end it."""
    cls = Trainer if hasattr(Trainer, method) else ShardWriter
    original, made = getattr(cls, method), []

    def interrupted(*args, **given):
        original(*args, **given)
        made.append(args)
        if len(made) == calls:
            raise KeyboardInterrupt

    monkeypatch.setattr(cls, method, interrupted)


def test_a_dry_run_counts_only_the_steps_that_are_left(recipe, mlxspec_command, monkeypatch):
    monkeypatch.setattr(estimate, "step_seconds", lambda *_: 100.0)
    recipe.write_text(recipe.read_text().split("[distill]")[0])
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    recipe.write_text(recipe.read_text().replace("steps = 6", "steps = 9"))  # longer than the finished run
    assert re.search(
        r"9 steps .*: 1,152 tokens \(768 done\), .* about 5 min 0 s", dry_run(mlxspec_command, recipe)["pretrain"]
    )
    interrupt_after(monkeypatch, "_save", 1)
    assert mlxspec_command("train", "run", str(recipe)).status == 130  # after step 8
    lines = dry_run(mlxspec_command, recipe)
    assert re.search(r": 1,152 tokens \(1,024 done\), .* about 1 min 40 s", lines["pretrain"])
    assert lines["total"] == "total      about 1 min 40 s"
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    for checkpoint in recipe.with_suffix("").glob("pretrain/step-*"):  # a finished stage does not need them
        shutil.rmtree(checkpoint)
    assert re.search(r": 1,152 tokens, .* done$", dry_run(mlxspec_command, recipe)["pretrain"])


def test_a_dry_run_counts_only_the_answers_that_are_left(recipe, mlxspec_command, monkeypatch):
    interrupt_after(monkeypatch, "commit", 6)
    assert mlxspec_command("train", "run", str(recipe)).status == 130
    index = Index.read(recipe.with_suffix("") / "answers" / "tokens")
    prompts = read_prompts([recipe.parent / "stories.jsonl"], Target(str(DEMO / "target")).tokenizer, None)[0][:28]
    most = index.tokens + sum(len(prompt) + 12 for prompt in prompts[24:]) * 2  # two of eight groups are left
    assert f": {most:,} tokens ({index.tokens:,} done)" in dry_run(mlxspec_command, recipe)["answers"]


@pytest.mark.parametrize(
    ("tables", "made"),
    [
        (["distill"], "answers"),
        pytest.param(["pretrain", "distill"], "pretrain/drafter", marks=pytest.mark.slow),
        pytest.param(["distill", "finetune"], "finetune/drafter", marks=pytest.mark.slow),
        pytest.param(["pretrain"], "pretrain/drafter", marks=pytest.mark.slow),
        pytest.param(["pretrain", "distill", "finetune"], "finetune/drafter", marks=pytest.mark.slow),
        pytest.param(["distill", "finetune", "finetune"], "finetune-2/drafter", marks=pytest.mark.slow),
    ],
)
def test_every_sensible_choice_of_stages_ends_with_what_it_made(recipe, mlxspec_command, tables, made):
    head, *parts = re.split(r"(?=^\[\[?(?:pretrain|distill|finetune|evaluation)\]\]?$)", recipe.read_text(), flags=re.M)
    of = {re.match(r"\[+(\w+)", part)[1]: part for part in parts}
    recipe.write_text(head + "".join(of[table] for table in tables) + of["evaluation"])
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 0, outcome.err
    assert outcome.out.startswith(str(recipe.with_suffix("") / made))
    planned = mlxspec_command("train", "run", str(recipe), "--dry-run")
    assert planned.status == 0
    assert planned.out.splitlines()[-1] == "total      about 0 s"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ('loss = "kld"', "teacher_top_k = 4\ntemperatures = [0.5, 1]", "teacher_top_k 4, which stores one temperature"),
        ('prompts = ["stories.jsonl"]', 'prompts = ["nothing.jsonl"]', "no such file, folder or pattern"),
        ("max_tokens = 12", "max_tokens = 4000", "use a smaller max_tokens"),
        ('prompts = ["stories.jsonl"]', "", "without prompts, set samples to the number of texts"),
        ("length = 16", "length = 16\nbatch = 6\naccumulate = 4", "accumulate is 4; use a divisor of batch, 6"),
        ("count = 2", "count = 2\ndraft_length = 65", "draft length is 65; use 0 (no drafting) to 64"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_what_a_later_stage_refuses_is_refused_before_the_first(recipe, mlxspec_command, old, new, complaint, options):
    text = recipe.read_text().replace(
        "batch = 4\nlength = 16", "length = 16" if "batch" in new else "batch = 4\nlength = 16"
    )
    recipe.write_text(text.replace(old, new, 1))
    outcome = mlxspec_command("train", "run", str(recipe), *options)
    assert outcome.status == 2
    assert complaint in outcome.err
    assert not recipe.with_suffix("").exists()


def test_a_recipe_without_a_stage_is_refused(recipe, mlxspec_command):
    recipe.write_text(recipe.read_text().split("[pretrain]")[0])
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert "small.toml has no stage; add a [pretrain], [distill] or [[finetune]] table" in outcome.err


def test_empty_data_are_refused_by_a_dry_run_too(recipe, mlxspec_command):
    (recipe.parent / "stories.jsonl").write_text("")
    recipe.write_text(recipe.read_text().split("[distill]")[0])
    for options in ([], ["--dry-run"]):
        outcome = mlxspec_command("train", "run", str(recipe), *options)
        assert outcome.status == 2
        assert "contain no text; use files with text" in outcome.err


def test_a_finished_run_is_lengthened_and_says_from_where(recipe, mlxspec_command):
    recipe.write_text(recipe.read_text().split("[distill]")[0])
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    recipe.write_text(recipe.read_text().replace("steps = 6", "steps = 9"))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 0, outcome.err
    assert (
        "pretrain: 9 steps of 128 positions, ce, continued after step 6 with the learning rate of a run of 9"
        in outcome.err
    )
    assert mlxspec_command("train", "run", str(recipe)).err == ""


def test_a_finished_stage_that_was_lengthened_by_mistake_is_finished_again_with_the_old_number_of_steps(
    recipe, mlxspec_command, monkeypatch
):
    short = recipe.read_text().split("[distill]")[0]
    recipe.write_text(short)
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    drafter = recipe.with_suffix("") / "pretrain" / "drafter" / "model.safetensors"
    before = mx.load(str(drafter))
    recipe.write_text(short.replace("steps = 6", "steps = 60"))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", interrupted)
        assert mlxspec_command("train", "run", str(recipe)).status == 130
    recipe.write_text(short)
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 0, outcome.err
    assert same_weights(before, mx.load(str(drafter)))
    assert mlxspec_command("train", "run", str(recipe)).err == ""


def interrupted(*_):
    raise KeyboardInterrupt


def test_an_interrupted_pretraining_is_resumed_with_and_without_an_evaluation_and_with_another_target(
    recipe, mlxspec_command, monkeypatch, tmp_path
):
    """Only the evaluation runs the target. A score that another target gave is measured again."""
    other = shutil.copytree(DEMO / "target", tmp_path / "other")
    weights = mx.load(str(other / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    mx.save_safetensors(str(other / "model.safetensors"), weights, metadata={"format": "pt"})
    out, prompt = recipe.parent / "out", recipe.parent / "prompt.jsonl"
    prompt.write_text('{"text": "A dog"}')
    shape = ("--hidden-size=16", "--intermediate-size=32", "--num-hidden-layers=1", "--num-attention-heads=2")
    small = ("--data", str(recipe.parent / "stories.jsonl"), "--out", str(out), "--batch=2", "--length=16")
    common = ("train", "pretrain", *shape, *small, "--steps=8", "--checkpoint-every=2", "--log-every=1")
    original = Trainer._save

    def save_and_stop(self, done):
        original(self, done)
        raise KeyboardInterrupt

    def scored() -> list[int]:
        lines = map(json.loads, (out / "pretrain" / "metrics.jsonl").read_text().splitlines())
        return [line["step"] for line in lines if "block_efficiency" in line]

    monkeypatch.setattr(Trainer, "_save", save_and_stop)
    for target, every, expected in ((DEMO / "target", 0, []), (DEMO / "target", 3, [2, 3]), (other, 5, [2, 3, 4, 5])):
        prompts = ("--prompts", str(prompt)) if every else ()
        options = ("--target", str(target), f"--evaluate-every={every}", *prompts)
        outcome = mlxspec_command(*common, *options)
        assert outcome.status == 130, outcome.err
        assert scored() == expected
    monkeypatch.setattr(Trainer, "_save", original)
    outcome = mlxspec_command(*common, "--target", str(DEMO / "target"))
    assert outcome.status == 0, outcome.err


def test_a_stage_is_not_lengthened_under_the_results_of_a_later_one(recipe, mlxspec_command):
    short = recipe.read_text()
    folder = recipe.with_suffix("")
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    record = folder / "pretrain" / "stage.json"
    for complete in (True, False):  # False: lengthened by an earlier version, and interrupted
        record.write_text(json.dumps({**json.loads(record.read_text()), "complete": complete}))
        recipe.write_text(short.replace("steps = 6", "steps = 9"))
        before = record.read_text()
        for options in ([], ["--dry-run"]):
            outcome = mlxspec_command("train", "run", str(recipe), *options)
            assert outcome.status == 2
            assert outcome.err == (
                f"error: {folder / 'finetune-1'} was trained from the drafter of {folder / 'pretrain'} with steps = 6, "
                "but this recipe has steps = 9; use 6 again, or delete the folders of all later stages\n"
            )
        assert record.read_text() == before
        recipe.write_text(short)
        outcome = mlxspec_command("train", "run", str(recipe))
        assert outcome.status == 0, outcome.err
        assert "finetune" not in outcome.err
    for name in ("finetune-1", "finetune-2"):
        shutil.rmtree(folder / name)
    recipe.write_text(short.replace("steps = 6", "steps = 9"))
    assert mlxspec_command("train", "run", str(recipe)).status == 0


def test_the_help_of_run_shows_every_key_of_a_recipe_with_its_default(mlxspec_command):
    shown = mlxspec_command("train", "run", "--help").out
    parts = re.findall(r"^ *\[+(\w+)\]+( with \w+)?.*?:\n(.*?)(?=^ *\[|\Z)", shown, flags=re.M | re.S)
    tables = {name + layers: text for name, layers, text in parts}
    assert tables.keys() == TABLES.keys()
    for name, classes in TABLES.items():
        for field in (field for cls in classes for field in fields(cls)):
            assert re.search(rf"^ +{key_of(field)}( = .+)?$", tables[name], flags=re.M), (name, field.name)
    assert "evaluate_every = 0" in tables["finetune"]
    assert "temperatures = [0.0, 1.0]" in tables["evaluation"]
    assert max(map(len, shown.splitlines())) <= 100


def test_the_prompts_of_spec_bench_are_answered(mlxspec_command, tmp_path):
    lines = [{"question_id": n, "category": "writing", "turns": [f"Once upon {n}", "More"]} for n in range(3)]
    (tmp_path / "bench.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--max-tokens=4", "--temperatures=0", "--out", str(tmp_path / "answers")]
    outcome = mlxspec_command("train", "distill", "--target", str(DEMO / "target"), "--prompts",
                              str(tmp_path / "bench.jsonl"), *options)  # fmt: skip
    assert outcome.status == 0, outcome.err
    tokenizer = Target(str(DEMO / "target")).tokenizer
    documents = TokenShards(tmp_path / "answers" / "tokens").documents()
    prompts = [tokenizer.decode(document.ids[document.mask == 0].tolist()) for document in documents]
    assert [prompt.removeprefix(tokenizer.bos_token or "") for prompt in prompts] == [
        f"Once upon {n}" for n in range(3)
    ]


@pytest.mark.parametrize("command", [("pretrain", "--data", "x"), ("finetune", "--drafter", "x", "--answers", "x")])
def test_prompts_for_an_evaluation_that_never_takes_place_are_one_line(mlxspec_command, tmp_path, command):
    outcome = mlxspec_command("train", *command, "--target", "x", "--prompts", "x", "--out", str(tmp_path / "out"))
    assert outcome.err == "error: --prompts needs --evaluate-every, such as --evaluate-every 500; add it\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompts", "nothing.jsonl", "--evaluate-every=2"), "nothing.jsonl: no such file, folder or pattern"),
        (("--drafter", "nothing"), "no such folder: nothing"),
        (("--hidden-size=30", "--num-attention-heads=4"), "hidden_size"),
        (("--batch=5", "--accumulate=2"), "use a divisor of batch"),
        (("--batch=1000000000",), "a step needs about"),
        (("--drafter", "narrow"), "the drafter has a vocabulary of 64"),
    ],
)
def test_pretrain_refuses_what_it_can_before_it_reads_the_corpus(recipe, mlxspec_command, tmp_path, options, message):
    """A line of the corpus is bad, which is what a command that reads it says."""
    Drafter(DrafterConfig(64, 16, 32, 1, 2)).save(tmp_path / "narrow")
    (tmp_path / "a.jsonl").write_text("{")
    options = [str(tmp_path / "narrow") if option == "narrow" else option for option in options]
    common = ("--target", str(DEMO / "target"), "--data", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out"))
    assert "1 of 1 lines are bad" in mlxspec_command("train", "pretrain", *common).err
    shutil.rmtree(tmp_path / "out")
    outcome = mlxspec_command("train", "pretrain", *common, *options)
    assert outcome.status == 2
    assert message in outcome.err
    assert "lines are bad" not in outcome.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pretrain_by_two_processes_refuses_a_batch_that_they_cannot_share_before_it_reads_the_corpus(recipe, tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    pretrain = [*command(recipe)[:1], "train", "pretrain", "--target", str(DEMO / "target"), "--batch=3", "--data",
                str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "out")]  # fmt: skip
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--"]
    outcome = subprocess.run([*launch, *pretrain], capture_output=True, text=True, timeout=100)
    assert "batch is 3; use a multiple of 2" in outcome.stderr
    assert "lines are bad" not in outcome.stderr


def test_a_run_leaves_a_picture_of_its_stages(recipe, mlxspec_command):
    recipe.write_text(recipe.read_text().split("[distill]")[0])
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    assert (recipe.with_suffix("") / "curves.png").stat().st_size > 5000


def test_a_matplotlib_that_fails_leaves_the_path_of_the_drafter(recipe, tmp_path):
    recipe.write_text(recipe.read_text().split("[distill]")[0])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "matplotlib.py").write_text("raise ImportError('built for another NumPy')")
    paths = [str(tmp_path / "broken"), str(Path(mlxspec.__file__).parent.parent)]
    outcome = subprocess.run(
        command(recipe), capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    assert "built for another NumPy" in outcome.stderr
    assert outcome.stdout == f"{recipe.with_suffix('') / 'pretrain' / 'drafter'}\n"


@pytest.mark.parametrize("room", [1000, 20_000])
def test_a_disk_that_is_full_ends_in_one_line_and_the_run_goes_on_when_there_is_room(recipe, room):
    """A limit on the size of files stands for it: writing fails in the shards, or in a checkpoint."""
    recipe.write_text(recipe.read_text().split("[distill]")[0])

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    full = subprocess.run(command(recipe), capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 2
    assert re.search(r"^error: cannot write .* \(.*\); free some space and repeat the command", full.stderr, re.M)
    assert "Traceback" not in full.stderr
    subprocess.run(command(recipe), check=True, capture_output=True)


def test_changed_settings_are_refused_with_what_changed(recipe, mlxspec_command):
    short = recipe.read_text().split("[distill]")[0]
    recipe.write_text(short)
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    recipe.write_text(short.replace("steps = 6", "steps = 5"))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert "pretrain was created with steps = 6, but this run has steps = 5; use another folder" in outcome.err
    assert (recipe.with_suffix("") / "pretrain" / "drafter" / "model.safetensors").exists()


def test_the_single_commands_make_what_the_recipe_makes(recipe, mlxspec_command):
    out, data = recipe.parent, str(recipe.parent / "stories.jsonl")
    common = ["--target", str(DEMO / "target"), "--batch=4"]
    shape = ["--hidden-size=16", "--intermediate-size=32", "--num-hidden-layers=1", "--num-attention-heads=2"]
    text = ["--data", data, "--steps=6", "--length=32", "--out", str(out)]
    pretrained = mlxspec_command("train", "pretrain", *common, *shape, "--tie-word-embeddings", *text)
    prompts = ["--prompts", data, "--temperatures=0", "--temperatures=1", "--max-tokens=12", "--group=8"]
    answered = mlxspec_command("train", "distill", *common[:2], *prompts, "--validate", "--out", str(out / "answers"))
    sources = ["--answers", str(out / "answers"), "--text", str(out / "text"), "--loss=kld"]
    start = ["--drafter", str(out / "pretrain" / "drafter"), "--steps=4", "--length=16"]
    tuned = mlxspec_command("train", "finetune", *common, *start, *sources, "--out", str(out / "tuned"))
    assert [outcome.status for outcome in (pretrained, answered, tuned)] == [0, 0, 0]
    assert re.match(r"60 answers, \d+ tokens, \d+ duplicates, 0 empty, \d+ truncated", answered.out)
    assert tuned.out == f"{out / 'tuned' / 'drafter'}\n"
    run = mlxspec_command("train", "run", str(recipe))
    assert run.status == 0
    by_hand = mx.load(str(out / "pretrain" / "drafter" / "model.safetensors"))
    by_recipe = mx.load(str(recipe.with_suffix("") / "pretrain" / "drafter" / "model.safetensors"))
    assert same_weights(by_hand, by_recipe)


@pytest.mark.parametrize("mix", ["0", "0.25"])
def test_finetune_trains_on_what_the_recipe_trains_on_with_any_share_of_text(recipe, mlxspec_command, mix):
    head, *parts = re.split(r"(?=^\[\[finetune\]\]$)", recipe.read_text(), flags=re.M)
    recipe.write_text(head + parts[0].replace("[[finetune]]", f'[[finetune]]\nmix = {mix}\nrobust = "groups"'))
    (recipe.parent / "prompts.jsonl").write_text('{"prompt": "A dog", "task": "dogs"}\n{"prompt": "A cat"}\n' * 6)
    recipe.write_text(recipe.read_text().replace('prompts = ["stories.jsonl"]', 'prompts = ["prompts.jsonl"]'))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 0, outcome.err
    made, out = recipe.with_suffix(""), recipe.parent / "out"
    sources = ("--answers", str(made / "answers"), "--text", str(made / "text"), f"--mix={mix}")
    start = ("--target", str(DEMO / "target"), "--drafter", str(made / "pretrain" / "drafter"))
    small = ("--robust=groups", "--loss=kld", "--steps=4", "--batch=4", "--length=16")
    outcome = mlxspec_command("train", "finetune", *start, *sources, *small, "--out", str(out))
    assert outcome.status == 0, outcome.err
    single, whole = (json.loads((folder / "stage.json").read_text()) for folder in (out, made / "finetune"))
    assert single == whole
    weights = [mx.load(str(folder / "drafter" / "model.safetensors")) for folder in (out, made / "finetune")]
    assert same_weights(*weights)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("steps = 6", "stesp = 6", 'small.toml: pretrain: there is no key "stesp"; the nearest is "steps"'),
        ("[distill]", "[destill]", 'small.toml: there is no key "destill"; the nearest is "distill"'),
        ("steps = 6", 'steps = "6"', "pretrain: steps is '6'; use a value of type int"),
        ("steps = 6", "steps = 0", "pretrain: steps is 0; use 1 or more"),
        ('loss = "kld"', 'loss = "kdl"', "finetune: loss: name is 'kdl'; use one of ce, kld"),
        ('data = ["stories.jsonl"]', "", "pretrain has no data"),
        ("target =", "target ", "is not valid TOML"),
        ('data = ["stories.jsonl"]', 'data = ["nothing.jsonl"]', "nothing.jsonl: no such file, folder or pattern"),
        ("max_tokens = 12", "max_tokens = 4000", "context of 1024 tokens has no room for a prompt and 4000 tokens"),
        ("log_every = 1", "log_every = 1\nmix = 1.5", "finetune: mix is 1.5; use a number in [0, 1)"),
        (
            "count = 2",
            "count = 2\ntemperatures = []",
            "evaluation: temperatures are (); use 0, or numbers from 0.0001 to 10",
        ),
        (
            "count = 2",
            "count = 40",
            "there are 30 prompts and the evaluation holds out 40; add prompts, or set a smaller count",
        ),
        ("group = 8", "group = 8\nseed = -1", "distill: seed is -1; use a number in [0, 2**32)"),
        ('prompts = ["stories.jsonl"]', "", "without prompts, set samples to the number of texts"),
        ('loss = "kld"', "teacher_top_k = 4\ntemperatures = [0.5, 1]", "teacher_top_k 4, which stores one temperature"),
        ('loss = "kld"', 'statistics = "batch"\naccumulate = 2', "the batch is computed in 2 parts"),
        (
            "batch = 4\nlength = 32",
            "batch = 5\nlength = 32\naccumulate = 2",
            "accumulate is 2; use a divisor of batch, 5",
        ),
    ],
)
def test_a_wrong_recipe_ends_in_one_line(recipe, mlxspec_command, old, new, complaint):
    assert old in recipe.read_text()
    recipe.write_text(recipe.read_text().replace(old, new, 1))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert complaint in outcome.err
    assert outcome.err.count("error: ") == 1
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("stage", ["answers/tokens", "start/drafter", "text/tokens", "pretrain/drafter",
                                   "finetune-2/drafter"])  # fmt: skip
def test_a_recipe_does_not_write_over_what_it_has_not_made(recipe, mlxspec_command, stage):
    existing = recipe.with_suffix("") / stage
    shutil.copytree(DEMO / "drafter", existing)
    for options in ([], ["--dry-run"]):
        outcome = mlxspec_command("train", "run", str(recipe), *options)
        assert outcome.status == 2
        assert outcome.err == (
            f"error: {existing} was not made by this stage, since {existing.parent} has no stage.json; use another "
            "folder or move it\n"
        )
    assert not list(recipe.with_suffix("").rglob("stage.json"))


def test_single_commands_do_not_write_over_what_they_have_not_made(mlxspec_command, tmp_path):
    target = ("--target", str(DEMO / "target"))
    answers = ("--samples", "2", "--temperatures", "1", "--max-tokens", "8", "--out", str(tmp_path / "answers"))
    assert mlxspec_command("train", "distill", *target, *answers).status == 0
    (tmp_path / "a.txt").write_text("A dog.")
    small = ("--steps", "1", "--batch", "1", "--length", "16")
    commands = {
        "finetune": ("--drafter", "drafter", "--answers", str(tmp_path / "answers"), *small),
        "init": ("--layers", "0"),
        "pretrain": ("--data", str(tmp_path / "a.txt"), "--drafter", "drafter", *small),
        "distill": answers[:-2],
    }
    made = {"finetune": "drafter", "init": "drafter", "pretrain": "pretrain/drafter", "distill": "tokens"}
    for command, options in commands.items():
        out = tmp_path / command
        existing = shutil.copytree(DEMO / "drafter", out / made[command])
        before = {path: path.read_bytes() for path in existing.iterdir()}
        options = [str(existing) if option == "drafter" else option for option in options]
        outcome = mlxspec_command("train", command, *target, *options, "--out", str(out))
        assert outcome.status == 2, command
        assert f"{existing} was not made by this stage, since " in outcome.err
        assert {path: path.read_bytes() for path in existing.iterdir()} == before


def test_a_recipe_that_is_nested_too_deeply_is_one_line(mlxspec_command, tmp_path):
    (tmp_path / "deep.toml").write_text("target = " + "[" * 9000)
    outcome = mlxspec_command("train", "run", str(tmp_path / "deep.toml"))
    assert outcome.status == 2
    assert outcome.err.startswith(f"error: {tmp_path / 'deep.toml'} is not valid TOML: ")


def test_a_record_that_is_nested_too_deeply_is_one_line(recipe, mlxspec_command):
    recipe.write_text(recipe.read_text().split("[distill]")[0])
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    record = recipe.with_suffix("") / "pretrain" / "stage.json"
    record.write_text("[" * 9000)
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert f"{record} cannot be read; delete " in outcome.err


def test_what_was_refused_can_be_put_right_in_the_same_folder(recipe, mlxspec_command):
    good = recipe.read_text()
    recipe.write_text(good.replace("max_tokens = 12", "max_tokens = 4000"))
    assert "use a smaller max_tokens" in mlxspec_command("train", "run", str(recipe)).err
    recipe.write_text(good)
    assert mlxspec_command("train", "run", str(recipe)).status == 0


def test_a_run_is_the_same_under_any_path_that_names_it(recipe, mlxspec_command, monkeypatch):
    recipe.write_text(recipe.read_text().split("[distill]")[0])
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    monkeypatch.chdir(recipe.parent)
    again = mlxspec_command("train", "run", recipe.name)
    assert (again.status, again.err) == (0, "")


def test_other_evaluation_settings_are_not_passed_over(recipe, mlxspec_command):
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    recipe.write_text(recipe.read_text().replace("max_tokens = 8", "max_tokens = 9"))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert "finetune-2 was created with evaluation = " in outcome.err


def test_prompts_that_are_held_out_are_not_trained_on():
    prompts = [[n % 5] for n in range(12)]  # [0] … [4], again and again
    training, held_out = split_prompts(prompts, 2, max_tokens=10, context=None)
    assert held_out == [[0], [1]]
    assert {prompt[0] for prompt in training} == {2, 3, 4}
    assert split_prompts(prompts, 0, 10, None) == (prompts, [])
    assert split_prompts([[1], [2] * 20], 0, max_tokens=10, context=20)[0] == [[1]]


def test_a_drafter_with_other_tokens_than_the_target_is_refused(recipe, mlxspec_command, tmp_path):
    answers = str(recipe.parent / "answers")
    target = ["--target", str(DEMO / "target")]
    mlxspec_command("train", "distill", *target, "--prompts", str(recipe.parent / "stories.jsonl"), "--max-tokens=4",
                    "--temperatures=1", "--out", answers)  # fmt: skip
    small = tmp_path / "small"
    Drafter(DrafterConfig(64, 16, 32, 1, 2)).save(small)
    options = ["--drafter", str(small), "--answers", answers, "--out", str(tmp_path / "out")]
    outcome = mlxspec_command("train", "finetune", *target, *options)
    assert outcome.status == 2
    assert "the drafter has a vocabulary of 64" in outcome.err
    renamed = json.loads((DEMO / "drafter" / "tokenizer.json").read_text())
    vocabulary = renamed["model"]["vocab"]
    vocabulary["!"], vocabulary["a"] = vocabulary["a"], vocabulary["!"]
    Drafter(DrafterConfig(2048, 16, 32, 1, 2)).save(small)
    (small / "tokenizer.json").write_text(json.dumps(renamed))
    shutil.copy(DEMO / "drafter" / "tokenizer_config.json", small)
    outcome = mlxspec_command("train", "finetune", *target, *options)
    assert outcome.status == 2
    assert "token" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_recipe_that_is_not_there_is_named(mlxspec_command, tmp_path):
    outcome = mlxspec_command("train", "run", str(tmp_path / "none.toml"))
    assert outcome.status == 2
    assert "none.toml cannot be read" in outcome.err


def test_text_that_was_changed_since_is_refused(recipe, mlxspec_command):
    recipe.write_text(recipe.read_text().split("[distill]")[0])
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    with (recipe.parent / "stories.jsonl").open("a") as file:
        file.write('\n{"text": "One more."}\n')
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert "text was created with content = " in outcome.err


def test_shards_of_another_tokenizer_are_refused(recipe, mlxspec_command):
    recipe.write_text(recipe.read_text().split("[distill]")[0])
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    index = recipe.with_suffix("") / "text" / "tokens" / "index.json"
    index.write_text(index.read_text().replace(Target(str(DEMO / "target")).tokenizer_fingerprint, "another"))
    shutil.rmtree(recipe.with_suffix("") / "pretrain")
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert "tokens was made with another tokenizer (vocabulary of 2048)" in outcome.err


def test_paths_are_relative_to_the_recipe_and_numbers_are_converted(recipe):
    read = Recipe.read(recipe)
    assert read.pretrain[0].data == (str(recipe.parent / "stories.jsonl"),)
    assert read.distill[1].temperatures == (0.0, 1.0)
    assert [stage.loss.name for stage in read.finetune] == ["kld", "tvd++"]


def test_every_prompt_is_answered_at_every_temperature_as_often_as_asked():
    work = prompt_groups([[n] for n in range(10)], AnswerSettings(temperatures=(0.0, 1.0), samples=2, group=4))
    assert [group.number for group in work] == list(range(9))
    for temperature, times in ((0.0, 1), (1.0, 2)):  # at 0, a second answer would be the first
        answered = [prompt for group in work if group.temperature == temperature for prompt in group.prompts]
        assert sorted(answered) == sorted([[n] for n in range(10)] * times)


def test_answer_settings_out_of_range_are_refused():
    for given in ({"top_p": 0.0}, {"samples": 0}, {"temperatures": (-1.0,)}):
        with pytest.raises(InvalidRequestError, match=next(iter(given))):
            AnswerSettings(**given)


def command(recipe: Path) -> list[str]:
    return [str(Path(sys.executable).with_name("mlxspec")), "train", "run", str(recipe)]


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_and_corrupt_nothing(recipe):
    began = time.perf_counter()
    subprocess.run(command(recipe), check=True, capture_output=True)
    seconds, whole = time.perf_counter() - began, result_weights(recipe)
    whole = {name: mx.array(weight) for name, weight in whole.items()}
    answers = [doc.ids.tolist() for doc in TokenShards(recipe.with_suffix("") / "answers" / "tokens").documents()]
    moments, kills, stages = random.Random(0), 0, set()
    while kills < 20:
        shutil.rmtree(recipe.with_suffix(""))
        while True:
            process = subprocess.Popen(command(recipe), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            try:
                _, errors = process.communicate(timeout=moments.uniform(0.2, 0.7) * seconds if kills < 20 else 120)
                assert process.returncode == 0, errors
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                stages |= {path.parent.name for path in recipe.with_suffix("").glob("*/stage.json")}
        assert same_weights(result_weights(recipe), whole)
        shards = TokenShards(recipe.with_suffix("") / "answers" / "tokens", verify=True)
        assert [doc.ids.tolist() for doc in shards.documents()] == answers
    assert {"text", "pretrain", "answers", "finetune-1"} <= stages


@pytest.mark.slow
def test_two_processes_train_what_one_does(recipe):
    subprocess.run(command(recipe), check=True, capture_output=True)
    one = {name: np.array(weight) for name, weight in result_weights(recipe).items()}
    shards = TokenShards(recipe.with_suffix("") / "answers" / "tokens")
    answers = [doc.ids.tolist() for doc in shards.documents()]
    shutil.rmtree(recipe.with_suffix(""))
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--"]
    outcome = subprocess.run([*launch, *command(recipe)], capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stderr
    for name, weight in result_weights(recipe).items():
        np.testing.assert_allclose(np.array(weight), one[name], atol=1e-5)
    shards = TokenShards(recipe.with_suffix("") / "answers" / "tokens", verify=True)
    assert [doc.ids.tolist() for doc in shards.documents()] == answers
    counts = answer_counts(shards)
    assert counts["answers"] == len(answers)
