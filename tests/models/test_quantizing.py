import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlxspec
from mlxspec import Drafter, DrafterConfig
from mlxspec.errors import InvalidRequestError
from mlxspec.models import quantizing, reading
from mlxspec.models.from_target import drafter_from_target
from mlxspec.models.loading import DEMO
from mlxspec.models.quantizing import QUANTIZATIONS, quantized_copy
from mlxspec.models.reading import read_lazily


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "mlxspec"


def copies(cache) -> list:
    """What the cache holds."""
    return [path for path in cache.glob("*") if not path.name.startswith(".")]


QUANTIZE = """
import sys
from pathlib import Path
from mlxspec.models.reading import read_lazily
from mlxspec.models.quantizing import quantized_copy

print(quantized_copy(Path(sys.argv[1]), "4", read_lazily))
"""


def test_processes_that_quantize_the_same_model_at_once_all_get_the_one_copy(plain_folder, cache):
    environment = {**os.environ, "HF_HOME": str(cache.parent)}
    command = [sys.executable, "-c", QUANTIZE, plain_folder]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert printed == [f"{path}\n" for path in copies(cache)] * 3


@pytest.fixture
def plain_folder(tmp_path):
    config = DrafterConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    Drafter(config).save(tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "plain" / name).write_bytes((DEMO / "target" / name).read_bytes())
    return tmp_path / "plain"


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_target_is_quantized_once_and_found_again(plain_folder, cache, kind):
    pair = mlxspec.load(plain_folder, quantize=kind)
    assert mx.uint32 in {weight.dtype for _, weight in tree_flatten(pair.target.parameters())}
    [copy] = copies(cache)
    assert json.loads((copy / "config.json").read_text())["quantization"]["bits"] == QUANTIZATIONS[kind]["bits"]
    written = (copy / "model.safetensors").stat().st_mtime_ns
    first = mlxspec.generate(pair, "Once upon a time", max_tokens=5)
    again = mlxspec.generate(mlxspec.load(plain_folder, quantize=kind), "Once upon a time", max_tokens=5)
    assert again.tokens == first.tokens
    assert (copy / "model.safetensors").stat().st_mtime_ns == written
    assert copies(cache) == [copy]


def test_other_weights_in_the_same_folder_get_another_copy(plain_folder, cache):
    mlxspec.load(plain_folder, quantize="4")
    Drafter.load(plain_folder).save(plain_folder)
    mlxspec.load(plain_folder, quantize="4")
    assert len(copies(cache)) == 2


def test_the_next_copy_removes_what_a_killed_process_left(plain_folder, cache):
    (cache / ".writing-killed" / "part").mkdir(parents=True)
    quantized_copy(plain_folder, "4", read_lazily)
    assert len(copies(cache)) == 1
    assert not list(cache.glob(".*"))


def test_an_interrupted_copy_leaves_nothing_behind(plain_folder, cache, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("mlxspec.models.quantizing.save_config", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantized_copy(plain_folder, "4", read_lazily)
    assert copies(cache) == []


def test_an_unknown_kind_and_a_quantized_model_are_named(plain_folder):
    with pytest.raises(mlxspec.MlxspecError, match="quantize is '3'; use one of 4, 8, mxfp4, nvfp4, none"):
        mlxspec.load(plain_folder, quantize="3")
    with pytest.raises(mlxspec.MlxspecError, match="quantized already"):
        mlxspec.load(DEMO / "target", quantize="4")


def test_a_widened_model_has_exactly_the_stored_values(monkeypatch):
    monkeypatch.setattr(reading, "faster_dequantized", lambda model: True)
    widened = reading.read_model(DEMO / "target", mx.float32, widen=True)
    stored = quantizing.dequantized(reading.read_model(DEMO / "target", mx.float32))
    theirs = dict(tree_flatten(stored.parameters()))
    assert all(mx.array_equal(weight, theirs[name]) for name, weight in tree_flatten(widened.parameters()))


def test_a_drafter_that_is_quantized_already_is_refused_with_a_fast_blas_too(monkeypatch):
    monkeypatch.setattr("mlxspec.models.loading.faster_dequantized", lambda model: True)
    with pytest.raises(InvalidRequestError, match="quantized already"):
        mlxspec.load(drafter=str(DEMO / "target"), quantize_drafter="4")


def test_a_user_without_a_home_folder_can_use_an_absolute_cache_folder(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(quantizing.Path, "home", no_home)
    assert quantizing.has_home(tmp_path)
    assert not quantizing.has_home(Path("~/cache"))


def test_files_that_do_not_belong_to_the_model_do_not_change_which_copy_is_used(plain_folder):
    before = quantizing.folder_fingerprint(plain_folder)
    for name in (".DS_Store", "README.md"):
        (plain_folder / name).write_text("x")
    (plain_folder / "missing.json").symlink_to("nowhere.json")
    assert quantizing.folder_fingerprint(plain_folder) == before
    (plain_folder / "tokenizer_config.json").write_text("{}")
    assert quantizing.folder_fingerprint(plain_folder) != before


def test_an_embedding_that_a_drafter_shares_is_not_dequantized_into_a_copy_of_its_own():
    target, config = read_lazily(DEMO / "target")
    drafter = drafter_from_target(quantizing.dequantized(read_lazily(DEMO / "target")[0]), config, [0], None, True)
    drafter.share(target.model.embed_tokens)
    quantizing.quantize_in_memory(drafter, "8")
    widened = quantizing.dequantized(drafter)
    assert widened.shared_table.bits == 4
    assert not hasattr(widened.lm_head, "bits")
