import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load as mlx_lm_load
from mlx_lm.utils import dequantize_model, load_model

import mlxspec
from mlxspec.models.checks import model_fingerprint
from mlxspec.models.export import CardFacts, export, files_to_push, fitted_row
from mlxspec.models.from_target import drafter_from_target
from mlxspec.models.loading import DEMO
from mlxspec.models.reading import read_config
from tests.models.test_old_layout import write_old_layout

TOKENS = mx.array([[0, 5, 9, 300, 7]])


def logits(folder: Path) -> mx.array:
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return model(TOKENS)


@pytest.fixture
def exported(tmp_path):
    facts = CardFacts(license="mit", base="the demo target", block_efficiency="2.5 at γ=4, T=0")
    export(DEMO / "drafter", tmp_path / "a drafter", facts=facts)
    return tmp_path / "a drafter"


def test_mlx_lm_loads_it_with_the_same_logits(exported):
    model, tokenizer = mlx_lm_load(str(exported))
    assert tokenizer.encode("Once upon a time")[0] == 0
    model.set_dtype(mx.float32)
    assert mx.array_equal(model(TOKENS), logits(DEMO / "drafter"))
    assert json.loads((exported / "generation_config.json").read_text()) == {"bos_token_id": 0, "eos_token_id": 1}


def test_the_card_tells_what_is_known_and_what_is_not(exported):
    card = (exported / "README.md").read_text()
    assert "license: mit" in card
    assert "2.5 at γ=4, T=0" in card
    assert "| training data | not recorded |" in card


def test_mlx_lm_generate_takes_it_as_its_draft_model(exported):
    command = [
        Path(sys.executable).with_name("mlx_lm.generate"),
        "--model",
        DEMO / "target",
        "--prompt",
        "Once upon a time",
    ]
    command += ["--max-tokens", "30", "--temp", "0", "--ignore-chat-template"]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    drafted = subprocess.run(
        [*command, "--draft-model", exported], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert plain.split("==========")[1] == drafted.split("==========")[1]


@pytest.fixture
def small_drafter(tmp_path):
    """With 300 of the 2048 tokens and the target's embedding, in a folder with the tokenizer."""
    target, config = load_model(DEMO / "target")
    target.set_dtype(mx.float32)
    tokens = np.sort(np.random.default_rng(0).choice(2048, 300, replace=False))
    drafter = drafter_from_target(dequantize_model(target), config, [0, -1], tokens, share_embedding=True)
    drafter.save(tmp_path / "small")
    shutil.copyfile(DEMO / "target" / "tokenizer.json", tmp_path / "small" / "tokenizer.json")
    return drafter, tmp_path / "small"


@pytest.mark.parametrize("quantize", [None, "8"])
def test_a_smaller_vocabulary_is_widened_and_the_other_tokens_are_as_good_as_never_drafted(
    tmp_path, small_drafter, quantize
):
    drafter, folder = small_drafter
    export(folder, tmp_path / "wide", quantize, target=DEMO / "target")
    config = json.loads((tmp_path / "wide" / "config.json").read_text())
    assert not {"draft_vocab_size", "shared_embedding"} & config.keys()
    rows = mx.array(np.random.default_rng(1).choice(np.array(drafter.output_tokens), (4, 30)))
    q, expected = (mx.softmax(model(rows), axis=-1) for model in (load_model(tmp_path / "wide")[0], drafter))
    assert mx.abs(q - expected).max() < (0.1 if quantize else 0.01)
    text = mlxspec.generate(mlxspec.load(DEMO / "target", tmp_path / "wide"), "A dog", max_tokens=30, draft_length=2)
    assert text.text == mlxspec.generate(mlxspec.load(DEMO / "target", None), "A dog", max_tokens=30).text


def test_widening_does_not_depend_on_an_offset_of_all_logits(tmp_path, small_drafter):
    drafter, folder = small_drafter
    rows = mx.array(np.random.default_rng(2).integers(0, 2048, (4, 30)))  # also tokens outside its vocabulary
    expected = mx.softmax(drafter(rows), axis=-1)
    states = drafter.model(rows).reshape(-1, drafter.config.hidden_size)
    offset = fitted_row(np.array(states, np.float64), np.full(len(states), -80.0))
    drafter.lm_head.weight = drafter.lm_head.weight + mx.array(offset.astype(np.float32))
    drafter.save(folder)
    export(folder, tmp_path / "wide", target=DEMO / "target")
    q = mx.softmax(load_model(tmp_path / "wide")[0](rows), axis=-1)
    assert mx.abs(q - expected).max() < 0.01


def test_a_shared_embedding_is_exported_only_with_the_target_that_has_it(tmp_path, small_drafter):
    _, folder = small_drafter
    with pytest.raises(mlxspec.MlxspecError, match="name the target with --target"):
        export(folder, tmp_path / "wide")
    with pytest.raises(mlxspec.MlxspecError, match="width"):
        export(folder, tmp_path / "wide", target=DEMO / "drafter")


def test_a_shared_embedding_is_not_taken_from_another_model_of_the_same_shape(tmp_path, small_drafter):
    _, folder = small_drafter
    right = model_fingerprint(DEMO / "target", read_config(DEMO / "target"))
    (folder / "training.json").write_text(json.dumps({"inputs": {"target": right}}))
    export(folder, tmp_path / "wide", target=DEMO / "target")

    other = tmp_path / "other"
    shutil.copytree(DEMO / "target", other)
    weights = mx.load(str(other / "model.safetensors"))
    mx.save_safetensors(
        str(other / "model.safetensors"), {**weights, "model.norm.weight": weights["model.norm.weight"] * 2}
    )
    with pytest.raises(mlxspec.InvalidRequestError, match=r"trained for another model than .*other; name the target"):
        export(folder, tmp_path / "again", target=other)

    shutil.copytree(DEMO / "target", tmp_path / "tokens")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary["a"] = vocabulary["a"], vocabulary["!"]
    (tmp_path / "tokens" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "training.json").unlink()
    with pytest.raises(mlxspec.TokenizerMismatchError):
        export(folder, tmp_path / "again", target=tmp_path / "tokens")


@pytest.mark.parametrize("record", ["{}", '{"inputs": 3}', '{"inputs": {"target": null}}'])
def test_a_record_without_a_target_does_not_keep_a_drafter_from_being_exported(tmp_path, small_drafter, record):
    _, folder = small_drafter
    (folder / "training.json").write_text(record)
    export(folder, tmp_path / "wide", target=DEMO / "target")


@pytest.mark.parametrize("quantize", ["4", "mxfp4"])
def test_it_can_be_quantized_and_still_drafts(tmp_path, quantize):
    export(DEMO / "target", tmp_path / "q", quantize)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization"]["bits"] == 4
    pair = mlxspec.load(DEMO / "target", tmp_path / "q")
    stats = mlxspec.generate(pair, "Once upon a time", max_tokens=40, draft_length=4).stats
    assert stats.acceptance_rate > 0.5


def test_a_quantized_model_is_exported_plain(tmp_path):
    export(DEMO / "target", tmp_path / "plain")
    assert "quantization" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    expected = logits(DEMO / "target")
    assert mx.abs(logits(tmp_path / "plain") - expected).max() < 0.01 * mx.abs(expected).max()


def test_the_old_layout_is_exported_in_hugging_faces_order(tmp_path, stories_folder):
    write_old_layout(stories_folder, tmp_path / "old", mx.float32, quantized=False)
    export(tmp_path / "old", tmp_path / "new")
    assert "rope_traditional" not in json.loads((tmp_path / "new" / "config.json").read_text())
    assert mx.allclose(logits(tmp_path / "new"), logits(stories_folder), atol=1e-4)
    theirs, ours = (mlxspec.load(folder).tokenizer for folder in (stories_folder, tmp_path / "new"))
    assert ours.encode("Once upon a time") == theirs.encode("Once upon a time")


def test_nothing_is_left_behind_or_overwritten(tmp_path, exported, monkeypatch):
    with pytest.raises(mlxspec.MlxspecError, match="exists"):
        export(DEMO / "drafter", exported)
    monkeypatch.setattr("mlxspec.models.export.model_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(DEMO / "drafter", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == [exported.name]


def test_a_dry_run_of_push_shows_what_would_be_sent(mlxspec_command, exported):
    outcome = mlxspec_command("push", str(exported), "somebody/a-drafter", "--dry-run")
    assert outcome.status == 0
    assert len(outcome.out.splitlines()) == len(files_to_push(exported)) == len(list(exported.iterdir()))
    assert "nothing was sent" in outcome.err


def test_export_prints_the_files(mlxspec_command, tmp_path):
    outcome = mlxspec_command("export", str(DEMO / "drafter"), str(tmp_path / "x"), "--license", "mit")
    assert outcome.status == 0
    assert "model.safetensors" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export", "/no/such", "{tmp}/x"], "no such folder"),
        (["export", str(DEMO / "drafter"), "{tmp}"], "exists"),
        (["export", str(DEMO / "drafter"), "{tmp}/x", "--quantize", "5"], "quantize is '5'"),
        (["push", "{tmp}", "somebody/x"], "has no config.json"),
        (["push", "{tmp}", "badname"], "badname is no name of a repository (it has no owner); use owner/name"),
        (["push", "{tmp}", "badname", "--dry-run"], "badname is no name of a repository"),
        (["push", "{tmp}", "a/b/c", "--dry-run"], "a/b/c is no name of a repository"),
        (["push", "{tmp}", "somebody/a b", "--dry-run"], "somebody/a b is no name of a repository"),
        (["push", "{tmp}", "somebody/x..y", "--dry-run"], "somebody/x..y is no name of a repository"),
        (["push", "{tmp}", "somebody/x.git", "--dry-run"], "somebody/x.git is no name of a repository"),
        (["push", "{tmp}", "somebody/x", "--dry-run"], "has no config.json"),
    ],
)
def test_bad_input_is_named_in_one_line(mlxspec_command, tmp_path, arguments, words):
    outcome = mlxspec_command(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert outcome.status == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_push_without_a_network_ends_in_one_line(mlxspec_command, exported, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = mlxspec_command("push", str(exported), "somebody/a-drafter")
    assert outcome.status == 2
    assert "cannot upload to somebody/a-drafter" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.torch
@pytest.mark.parametrize("which", ["demo drafter", "stories260K"])
def test_transformers_computes_the_same_logits(tmp_path, which, request):
    torch = pytest.importorskip("torch")
    from transformers import AutoTokenizer, LlamaForCausalLM

    source = DEMO / "drafter" if which == "demo drafter" else request.getfixturevalue("stories_folder")
    export(source, tmp_path / "x")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS.tolist())).logits.numpy()
    difference = np.abs(np.array(logits(tmp_path / "x")) - expected).max()
    print(f"{which}: largest difference {difference:.1e}")
    assert difference < 1e-4
    assert AutoTokenizer.from_pretrained(tmp_path / "x").encode("Once upon") == mlxspec.load(source).tokenizer.encode(
        "Once upon"
    )
