"""Warm starts in recipes: layers of the target or of another drafter, with a smaller vocabulary or width."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import pytest

from mlxspec import Drafter
from mlxspec.files import read_json
from mlxspec.models.loading import DEMO
from mlxspec.training.recipe import Recipe, included_recipes
from mlxspec.training.target import Target
from mlxspec.training.warm_start import WarmStart, warm_start
from tests.models.test_old_layout import write_old_layout

RECIPE = f"""
target = "{DEMO / "target"}"

[drafter]
layers = [0, -1]
vocabulary_size = 200
share_embedding = true

[distill]
samples = 6
temperatures = [1.0]
max_tokens = 40
group = 3

[[finetune]]
loss = "kld"
steps = 4
batch = 2
length = 32
teacher_top_k = 16
checkpoint_every = 1

[[finetune]]
loss = "tvd++"
steps = 4
batch = 2
length = 32
fake_quantize = 4
checkpoint_every = 1
"""


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "a folder").mkdir()
    path = tmp_path / "a folder" / "small.toml"
    path.write_text(RECIPE)
    return path


def last_drafter(recipe):
    return recipe.with_suffix("") / "finetune-2" / "drafter"


def test_a_recipe_copies_layers_and_chooses_the_vocabulary_from_the_answers(recipe, mlxspec_command):
    dry = mlxspec_command("train", "run", str(recipe), "--dry-run")
    assert dry.status == 0, dry.err
    assert "tokens/s" in dry.out
    assert not recipe.with_suffix("").exists()
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 0, outcome.err
    assert "% of the answers' tokens are in its vocabulary" in outcome.err
    config = json.loads((last_drafter(recipe) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["draft_vocab_size"], config["shared_embedding"]) == (2, 200, True)
    again = mlxspec_command("train", "run", str(recipe))
    assert again.status == 0
    assert again.out == outcome.out
    served = mlxspec_command(
        "generate", "--target", str(DEMO / "target"), "--drafter", str(last_drafter(recipe)), "--quantize-drafter", "4",
        "--draft-length", "2", "--max-tokens", "20", "A dog",
    )  # fmt: skip
    assert served.status == 0, served.err


WARM = ("layers = [0, -1]", "vocabulary_size = 200", "share_embedding = true")
RANDOM = ("hidden_size = 16", "intermediate_size = 32", "num_hidden_layers = 1", "num_attention_heads = 2")
STARTS = {
    "shared": WARM,
    "narrow": ("layers = [0, -1]", "hidden_size = 192", "intermediate_size = 320"),
    "random": RANDOM,
}


def with_drafter(*keys):
    """The recipe with other keys in [drafter], and one finetuning stage."""
    parts = re.split(r"(?=^\[)", RECIPE, flags=re.M)
    return "".join([parts[0], "[drafter]\n", "\n".join(keys), "\n\n", parts[2], parts[3]])


@pytest.mark.parametrize("start", STARTS)
def test_the_start_is_made_once_and_a_run_from_before_it_was_a_stage_goes_on(
    recipe, mlxspec_command, monkeypatch, start
):
    recipe.write_text(with_drafter(*STARTS[start]))
    first = mlxspec_command("train", "run", str(recipe))
    assert first.status == 0, first.err
    assert [line.split(":")[0] for line in first.err.splitlines()] == ["answers", "start", "finetune"]
    folder = recipe.with_suffix("") / "start"
    assert read_json(folder / "stage.json")["result"].keys() == ({"coverage"} if start == "shared" else set())
    assert read_json(folder / "drafter" / "training.json")["inputs"] == read_json(folder / "stage.json")["inputs"]

    shutil.rmtree(folder)
    again = mlxspec_command("train", "run", str(recipe))
    assert (again.status, again.out) == (0, first.out)
    assert [line.split(":")[0] for line in again.err.splitlines()] == ["start"]

    monkeypatch.setattr("mlxspec.training.stages.warm_start", lambda *_: pytest.fail("made again"))
    complete = mlxspec_command("train", "run", str(recipe))
    assert (complete.status, complete.out, complete.err) == (0, first.out, "")


@pytest.mark.parametrize(
    ("keys", "old", "new", "change"),
    [
        (WARM, "[0, -1]", "[0]", "layers = [0, -1], but this run has layers = [0]"),
        (WARM, "200", "100", "vocabulary_size = 200, but this run has vocabulary_size = 100"),
        (WARM, "vocabulary_size = 200", "", "vocabulary_size = 200, but this run has vocabulary_size = None"),
        (WARM, "true", f'true\nfrom = "{DEMO / "target"}"', "from = None, but this run has from = "),
        (RANDOM, "hidden_size = 16", "hidden_size = 32", "hidden_size = 16, but this run has hidden_size = 32"),
    ],
)
def test_a_changed_key_of_the_drafter_is_named_with_its_old_and_new_value(
    recipe, mlxspec_command, keys, old, new, change
):
    text = with_drafter(*keys)
    recipe.write_text(text)
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    recipe.write_text(text.replace(old, new, 1))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert f"start was created with {change}" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_layers_of_another_drafter_can_be_copied_and_its_vocabulary_stays(recipe, mlxspec_command, tmp_path):
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    first = last_drafter(recipe)
    target = Target(str(DEMO / "target"))
    drafter, coverage = warm_start(target, WarmStart((1,), source=str(first)), None)
    whole = Drafter.load(first, embedding=target.embedding)
    assert coverage is None
    assert mx.array_equal(drafter.output_tokens, whole.output_tokens)
    assert mx.array_equal(drafter.layers[0].mlp.up_proj.weight, whole.layers[1].mlp.up_proj.weight)
    assert mx.array_equal(drafter.model.embed_tokens.weight, whole.model.embed_tokens.weight)
    refused = mlxspec_command(
        "train", "init", "--target", str(DEMO / "target"), "--from", str(first), "--layers", "0", "--vocabulary-size",
        "100", "--answers", str(recipe.with_suffix("") / "answers"), "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert refused.status == 2
    assert "has a smaller vocabulary already; leave out vocabulary_size" in refused.err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layers = [0, -1]", "layers = [0, 99]", "layers are [0, 99]; use numbers from"),
        ("layers = [0, -1]", "layers = []", "there are no layers to copy"),
        ("layers = [0, -1]", "layer = [0, -1]", 'there is no key "layer"; the nearest is "layers"'),
        ("layers = [0, -1]", "", "there are no layers to copy"),
        ("vocabulary_size = 200", "vocabulary_size = 5000", "vocabulary_size is 5000; use"),
        ("vocabulary_size = 200", "vocabulary_size = 0", "vocabulary_size is 0; use 1 or more, or leave it out"),
        ("share_embedding = true", "hidden_size = 0", "hidden_size is 0; use 1 or more"),
        ("vocabulary_size = 200", 'vocabulary_size = 200\nfrom = "nowhere"', "nowhere"),
        ("vocabulary_size = 200", "hidden_size = 100", "leave out share_embedding or hidden_size"),
        ("fake_quantize = 4", "fake_quantize = 5", "fake_quantize is '5'; use one of 4, 8"),
        ("teacher_top_k = 16", "teacher_top_k = 4000", "teacher_top_k is 4000; use 2 to 2047"),
    ],
)
def test_a_wrong_start_is_one_line_before_anything_runs(recipe, mlxspec_command, old, new, message):
    recipe.write_text(RECIPE.replace(old, new))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not (recipe.with_suffix("") / "answers" / "tokens").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("layres = [0, -1]", 'drafter: there is no key "layres"; the nearest is "layers"'),
        ("vocab_size = 200", 'drafter: there is no key "vocab_size"; the nearest is "vocabulary_size"'),
        ("layers = [0]\nvocab_size = 200", 'drafter: there is no key "vocab_size"; the nearest is "vocabulary_size"'),
        ("num_hiden_layers = 2", 'drafter: there is no key "num_hiden_layers"; the nearest is "num_hidden_layers"'),
        (
            "layers = [0]\nnum_attention_heads = 4",
            'drafter: "num_attention_heads" is for random weights and "layers" for copied layers; remove one of them',
        ),
    ],
)
def test_a_misspelt_key_of_the_drafter_is_shown_with_the_nearest_key_of_both_forms(
    recipe, mlxspec_command, keys, message
):
    recipe.write_text(f"{RECIPE.split('layers')[0]}{keys}\n[distill]{RECIPE.split('[distill]')[1]}")
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert message in outcome.err
    assert len(outcome.err.splitlines()) == 1


def test_a_start_that_needs_answers_needs_a_stage_that_makes_them(recipe, mlxspec_command):
    recipe.write_text(RECIPE.split("[distill]")[0] + '[pretrain]\ndata = ["small.toml"]\n')
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert "needs the target's answers; add a [distill] table" in outcome.err


def test_every_included_recipe_is_listed_printed_and_valid(mlxspec_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    listed = mlxspec_command("train", "recipes").out
    assert len(included_recipes()) >= 4
    for name, path in included_recipes().items():
        assert f"{name}\n  " in listed
        text = mlxspec_command("train", "recipes", name).out
        assert text == path.read_text()
        recipe = Recipe.read(name)
        assert recipe.distill
        assert recipe.distill[0].prompts == ("prompts.jsonl",)  # of the current folder
        assert recipe.finetune
        copy = tmp_path / "copy.toml"
        copy.write_text(text)
        assert Recipe.read(copy).finetune == recipe.finetune
    unknown = mlxspec_command("train", "recipes", "nothing")
    assert unknown.status == 2
    assert "use one of llama2-7b-chat-eagle, llama2-7b-chat-one-night, " in unknown.err
    missing = mlxspec_command("train", "run", "nothing")
    assert "llama2-7b-chat-one-night" in missing.err


def test_an_included_recipe_names_the_prompts_that_are_missing_and_is_resumed_by_its_name(
    mlxspec_command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlxspec.training.recipe.included_recipes", lambda: {"small": tmp_path / "shipped" / "s.toml"})
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "s.toml").write_text(RECIPE.replace("samples = 6", 'prompts = ["prompts.jsonl"]'))
    outcome = mlxspec_command("train", "run", "small")
    assert outcome.status == 2
    assert "prompts.jsonl" in outcome.err
    assert "shipped" not in outcome.err
    lines = [json.dumps({"prompt": f"A dog {n}"}) for n in range(4)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    first, second = (mlxspec_command("train", "run", "small") for _ in range(2))  # the folder now has the same name
    assert (first.status, second.status) == (0, 0), second.err
    assert first.out == second.out
    assert second.err == ""


@pytest.mark.slow
def test_twenty_kills_during_a_warm_start_and_its_stages_end_with_the_same_drafter(recipe, mlxspec_command, tmp_path):
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    expected = mx.load(str(last_drafter(recipe) / "model.safetensors"))
    copy = recipe.with_name("killed.toml")
    copy.write_text(RECIPE)
    command = [sys.executable, "-c", "from mlxspec.cli import main; main()", "train", "run", str(copy)]
    rng, kills, longest = random.Random(0), 0, 6.0
    while kills < 20:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(rng.uniform(0.5, longest))
        process.send_signal(signal.SIGKILL)
        error = process.communicate()[1]
        if process.returncode == 0:  # it was done; the next one starts from nothing
            shutil.rmtree(copy.with_suffix(""))
            longest = max(2.0, longest * 0.7)
            continue
        assert process.returncode == -signal.SIGKILL, error
        kills += 1
    subprocess.run(command, check=True, capture_output=True)
    found = mx.load(str(last_drafter(copy) / "model.safetensors"))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], weight) for name, weight in expected.items())


def test_the_layers_of_a_model_in_the_old_layout_give_its_logits(tmp_path, stories_folder):
    write_old_layout(stories_folder, tmp_path / "old", mx.float32, quantized=False)
    target = Target(str(tmp_path / "old"))
    drafter, _ = warm_start(target, WarmStart((0, 1, 2, 3, 4)), None)
    tokens = mx.array([[1, 5, 9, 30]])
    assert mx.allclose(drafter(tokens), target.model(tokens), atol=1e-4)
