import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

import mlxspec
from mlxspec.models import memory
from mlxspec.models.catalog import KNOWN_MODELS
from mlxspec.models.loading import DEMO
from mlxspec.models.quantizing import QUANTIZATIONS
from mlxspec.models.reading import read_model
from tests.conftest import random_llama
from tests.models.test_old_layout import write_old_layout

LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "max_position_embeddings": 4096, "torch_dtype": "float16",
}  # fmt: skip


def test_a_pair_that_does_not_fit_is_named_before_it_is_loaded(monkeypatch):
    monkeypatch.setattr(memory, "device_limit", lambda: 10_000_000)
    with pytest.raises(
        mlxspec.MlxspecError, match=r"target and drafter need 0\.0 GB .* for 1024 tokens, and this device"
    ):
        mlxspec.load(context=4000)
    monkeypatch.setattr("mlxspec.models.loading.read_model", lambda *_: pytest.fail("loaded all the same"))
    with pytest.raises(mlxspec.MlxspecError, match="fewer tokens"):
        mlxspec.load(context=4000)


def test_each_models_caches_count_for_as_many_tokens_as_it_can_hold(tmp_path, monkeypatch):
    """The drafter's short context does not make the target's caches smaller."""
    monkeypatch.setattr(memory, "device_limit", lambda: 10**10)
    for name in ("target", "drafter"):
        (tmp_path / name).mkdir()
    models = [(tmp_path / "target", LLAMA_2_7B), (tmp_path / "drafter", LLAMA_2_7B | {"max_position_embeddings": 2048})]
    message = r"3\.2 GB for 4096 tokens" if mx.default_device().type != mx.cpu else r"6\.4 GB for 4096 tokens"
    monkeypatch.setattr(memory, "weight_bytes", lambda *_: 10**10)
    with pytest.raises(mlxspec.ModelLoadError, match=message):
        memory.check_memory(models, 30_000, None, False)


def test_this_machine_has_room_for_the_demo():
    assert memory.device_limit() > 1e9
    mlxspec.load(context=1000)


@pytest.mark.parametrize(("dtype", "expected"), [(mx.float16, 2**19), (mx.float32, 2**20)])
def test_llama_2_7b_keeps_half_a_megabyte_a_token_in_16_bits(dtype, expected):
    assert memory.cache_bytes_per_token(LLAMA_2_7B, dtype) == expected
    old = {"dim": 4096, "n_layers": 32, "n_heads": 32}
    assert memory.cache_bytes_per_token(old, dtype) == expected


def held(model: nn.Module) -> int:
    return sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))


def mixed(path: str, module: nn.Module) -> bool | dict:
    """8 bits for one layer, 4 for another, and none for the tables and the other layers."""
    bits = {"model.layers.0.mlp.up_proj": 8, "model.layers.1.mlp.gate_proj": 4}.get(path)
    return {"group_size": 32, "bits": bits} if bits else False


@pytest.fixture(params=["unquantized", "half quantized", "quantized", "mxfp4"])
def folder(request, tmp_path):
    """A model in 16 bits, with a float32 weight."""
    model = random_llama(vocab_size=64, hidden_size=64, intermediate_size=64)
    model.set_dtype(mx.float16)
    model.model.norm.weight = model.model.norm.weight.astype(mx.float32)
    config = {**vars(model.args), "model_type": "llama"}
    if request.param == "half quantized":
        model, config = quantize_model(model, config, 64, 4, quant_predicate=lambda path, module: mixed(path, module))
    elif request.param != "unquantized":
        kind = QUANTIZATIONS["4" if request.param == "quantized" else request.param]
        model, config = quantize_model(model, config, **kind)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("widen", [True, False])
@pytest.mark.parametrize("dtype", [None, mx.float32, mx.float16])
def test_the_weights_count_as_many_bytes_as_the_model_then_has(folder, dtype, widen, monkeypatch):
    monkeypatch.setattr(memory, "has_fast_blas", lambda: True)
    config = json.loads((folder / "config.json").read_text())
    assert memory.weight_bytes(folder, config, dtype, widen) == held(read_model(folder, dtype, widen))


@pytest.mark.parametrize("quantize", [None, "none"])
def test_the_estimate_is_what_the_demo_takes(quantize):
    config = json.loads((DEMO / "target" / "config.json").read_text())
    estimate = memory.weight_bytes(DEMO / "target", config, None, widen=quantize is None)
    assert estimate == held(mlxspec.load(quantize=quantize).target)


@pytest.mark.parametrize("quantized", [True, False])
def test_the_estimate_is_what_a_model_in_the_old_layout_takes(tmp_path, stories_folder, quantized):
    write_old_layout(stories_folder, tmp_path / "old", mx.float16, quantized=quantized)
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    for widen in (True, False):
        estimate = memory.weight_bytes(tmp_path / "old", config, None, widen)
        assert estimate == held(read_model(tmp_path / "old", None, widen))


def test_weights_that_only_torch_reads_count_as_their_files(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(1000))
    assert memory.weight_bytes(tmp_path, LLAMA_2_7B, mx.float16) == 1000
    assert memory.weight_bytes(tmp_path, LLAMA_2_7B, mx.float32) == 2000
    assert memory.weight_bytes(tmp_path, {**LLAMA_2_7B, "torch_dtype": "float32"}, mx.float32) == 1000


def test_the_table_of_short_names_is_whole(mlxspec_command):
    printed = mlxspec_command("models").out
    for model in KNOWN_MODELS.values():
        assert model.name in printed
        assert model.hub_id in printed
        assert model.license in printed
    assert {model.role for model in KNOWN_MODELS.values()} == {"target", "drafter", "head"}


def test_the_memory_is_at_most_what_a_container_may_use(monkeypatch, tmp_path):
    whole = memory.device_limit()
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTROL_GROUP", limit)
    for text, expected in (("max\n", None), ("1000000000\n", 10**9)):
        limit.write_text(text)
        found = memory.device_limit()
        assert found == expected or (expected is None and found >= whole) or mx.default_device().type != mx.cpu
