"""What a stage refuses before it starts."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlxspec import Drafter, DrafterConfig
from mlxspec.models.loading import DEMO, TOKENIZER_FILES
from tests.models.test_families import model_of

POSITIONS, V = 64, 2064  # transformers adds a token to the 2048 of the demo's tokenizer


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A folder with a target that has a table of 64 positions, and a drafter for it."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = {"model_type": "gpt2", "vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "n_positions": POSITIONS,
              "n_ctx": POSITIONS, "n_embd": 32, "n_head": 4, "n_layer": 2, "layer_norm_epsilon": 1e-5}  # fmt: skip
    target = folder / "target"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model_of(config).parameters()))
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        if (DEMO / "target" / name).exists():
            shutil.copy(DEMO / "target" / name, target)
    Drafter(DrafterConfig(V, 16, 32, 1, 2)).save(folder / "drafter")
    return folder


@pytest.fixture
def command(gpt2, mlxspec_command):
    return lambda verb, *options: mlxspec_command("train", verb, "--target", str(gpt2 / "target"), *options)


def test_rows_longer_than_the_targets_table_of_positions_are_refused(gpt2, command, tmp_path):
    answers = ("--samples", "2", "--temperatures", "1", "--max-tokens", "8", "--out", str(tmp_path / "answers"))
    assert command("distill", *answers).status == 0
    trained = ("--drafter", str(gpt2 / "drafter"), "--answers", str(tmp_path / "answers"), "--loss", "kld",
               "--steps", "1", "--batch", "1")  # fmt: skip
    outcome = command("finetune", *trained, "--length", str(POSITIONS + 1), "--out", str(tmp_path / "out"))
    assert outcome.status == 2, outcome
    assert outcome.err == (
        f"error: length is 65, but {gpt2 / 'target'} has a table of 64 positions; use a length of at most 64\n"
    )
    assert not (tmp_path / "out").exists()
    fitting = command("finetune", *trained, "--length", str(POSITIONS), "--out", str(tmp_path / "out"))
    assert fitting.status == 0, fitting.err
    text = command("finetune", *trained, "--loss", "ce", "--length", "65", "--out", str(tmp_path / "text"))
    assert text.status == 0, text.err  # the target does not run


def test_texts_from_bos_that_exceed_the_targets_context_are_refused(command, tmp_path):
    drawn = ("--samples", "2", "--temperatures", "1", "--max-tokens", str(POSITIONS), "--out", str(tmp_path / "out"))
    outcome = command("distill", *drawn)
    assert outcome.status == 2, outcome
    assert "the target's context of 64 tokens has no room for a prompt and 64 tokens; use a smaller" in outcome.err
