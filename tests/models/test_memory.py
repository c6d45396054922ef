import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlxspec
from mlxspec.models import memory
from mlxspec.models.catalog import KNOWN_MODELS
from mlxspec.models.loading import DEMO

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


def test_this_machine_has_room_for_the_demo():
    assert memory.device_limit() > 1e9
    mlxspec.load(context=1000)


@pytest.mark.parametrize(("dtype", "expected"), [(mx.float16, 2**19), (mx.float32, 2**20)])
def test_llama_2_7b_keeps_half_a_megabyte_a_token_in_16_bits(dtype, expected):
    assert memory.cache_bytes_per_token(LLAMA_2_7B, dtype) == expected
    old = {"dim": 4096, "n_layers": 32, "n_heads": 32}
    assert memory.cache_bytes_per_token(old, dtype) == expected


def test_16_bit_weights_count_double_where_they_become_float32(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert memory.weight_bytes(tmp_path, LLAMA_2_7B, mx.float16) == 1000
    assert memory.weight_bytes(tmp_path, LLAMA_2_7B, mx.float32) == 2000
    assert memory.weight_bytes(tmp_path, {**LLAMA_2_7B, "torch_dtype": "float32"}, mx.float32) == 1000
    assert memory.weight_bytes(tmp_path, {**LLAMA_2_7B, "quantization": {}}, mx.float32) == 1000


@pytest.mark.parametrize("quantize", [None, "none"])
def test_the_estimate_is_near_what_the_demo_takes(quantize):
    config = json.loads((DEMO / "target" / "config.json").read_text())
    estimate = memory.weight_bytes(DEMO / "target", config, None, widen=quantize is None)
    target = mlxspec.load(quantize=quantize).target
    assert estimate == pytest.approx(sum(w.nbytes for _, w in tree_flatten(target.parameters())), rel=0.15)


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
