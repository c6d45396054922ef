"""A folder is one model, whichever library wrote its config.json and whichever keys it left out."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import mlxspec
from mlxspec import Drafter, DrafterConfig
from mlxspec.models.config import declared_context
from mlxspec.models.loading import DEMO
from mlxspec.models.reading import read_model
from tests.conftest import plain_greedy, random_llama
from tests.models.test_families import FAMILIES, full_config, model_of

ROPE = {
    "one theta": {"rope_theta": 500000.0},
    "llama3": {
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
    },
}  # fmt: skip
KNOWN_TO_TRANSFORMERS = [name for name in FAMILIES if full_config(name)["model_type"] in CONFIG_MAPPING]


def save(folder: Path, model, config: dict) -> Path:
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(folder: Path) -> mx.array:
    return read_model(folder)(mx.array([[5, 9, 33, 2, 41, 7, 3, 3, 8, 1, 20, 30, 40, 50, 60]]))


@pytest.mark.parametrize("name", KNOWN_TO_TRANSFORMERS)
def test_a_config_that_transformers_wrote_is_the_same_model_as_one_with_every_key_on_top(name, tmp_path):
    config = {**full_config(name), "rope_theta": 500000.0}
    if "rope_parameters" in config:
        config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 500000.0}
    model = model_of(config)
    on_top = save(tmp_path / "on top", model, config)
    written = save(tmp_path / "written", model, {})
    AutoConfig.for_model(**config).save_pretrained(written)
    assert mx.array_equal(logits(written), logits(on_top))


@pytest.mark.parametrize("rope", ROPE)
def test_keys_of_rotary_embedding_count_where_transformers_5_nests_them(rope, tmp_path):
    on_top = {**full_config("llama"), **ROPE[rope]}
    nested = {key: value for key, value in on_top.items() if not key.startswith("rope_")}
    nested["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default", **on_top.get("rope_scaling", {})}
    model = model_of(on_top)
    expected = logits(save(tmp_path / "on top", model, on_top))
    assert mx.array_equal(logits(save(tmp_path / "nested", model, nested)), expected)
    plain = {key: value for key, value in on_top.items() if not key.startswith("rope_")}
    assert not mx.allclose(logits(save(tmp_path / "plain", model, plain)), expected, atol=0.1)


def test_training_and_decoding_read_the_same_drafter_from_a_folder(tmp_path):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    model = Drafter(DrafterConfig(**shape))
    sparse = {**shape, "model_type": "llama", "rms_norm_eps": 1e-5}
    for number, rope in enumerate(({}, {"rope_theta": 500000.0}, {"rope_parameters": {"rope_theta": 500000.0}})):
        folder = save(tmp_path / str(number), model, {**sparse, **rope})
        tokens = mx.array([[5, 9, 33, 2, 41, 7, 3, 3, 8, 1, 20, 30, 40, 50, 60]])
        assert mx.allclose(Drafter.load(folder)(tokens), logits(folder), atol=1e-4)


@pytest.mark.parametrize("rms_norm_eps", [{}, {"rms_norm_eps": 1e-6}])
def test_a_stored_head_is_used_where_the_config_does_not_say_whether_it_is_tied(tmp_path, rms_norm_eps):
    config = {**full_config("llama"), **rms_norm_eps}
    model = model_of(config)
    expected = logits(save(tmp_path / "stated", model, config))
    del config["tie_word_embeddings"]
    assert mx.array_equal(logits(save(tmp_path / "silent", model, config)), expected)


def test_an_embedding_serves_as_the_head_where_no_head_is_stored(tmp_path):
    config = {**full_config("llama"), "tie_word_embeddings": True}
    model = model_of(config)
    expected = logits(save(tmp_path / "stated", model, config))
    del config["tie_word_embeddings"]
    assert mx.array_equal(logits(save(tmp_path / "silent", model, config)), expected)


@pytest.mark.parametrize("family", ["qwen2", "granite", "olmo2", "glm", "phi", "smollm3"])
def test_a_missing_key_has_the_default_of_transformers(family, tmp_path):
    config = AutoConfig.for_model(
        family, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, pad_token_id=None,
    )  # fmt: skip
    stated = {**config.to_dict(), **{k: v for k, v in config.rope_parameters.items() if k != "rope_type"}}
    model = model_of(stated)
    expected = logits(save(tmp_path / "stated", model, stated))
    written = save(tmp_path / "written", model, {})
    config.save_pretrained(written)
    silent = json.loads((written / "config.json").read_text())
    silent.pop("rope_parameters", None)
    (written / "config.json").write_text(json.dumps(silent))
    assert mx.array_equal(logits(written), expected)


def test_the_files_that_the_index_names_hold_the_weights_and_a_stale_one_does_not(tmp_path):
    config = full_config("llama")
    tensors = list(tree_flatten(model_of(config).parameters()))
    whole = save(tmp_path / "whole", model_of(config), config)
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    halves = {"model-00001-of-00002.safetensors": tensors[::2], "model-00002-of-00002.safetensors": tensors[1::2]}
    for name, half in halves.items():
        mx.save_safetensors(str(folder / name), dict(half))
    stale = {name: mx.zeros_like(weight) for name, weight in tensors}
    for name in ("model-00000.safetensors", "model.safetensors", "model-99999.safetensors"):
        mx.save_safetensors(str(folder / name), stale)
    index = {"weight_map": {name: file for file, half in halves.items() for name, _ in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert mx.array_equal(logits(folder), logits(whole))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(mlxspec.MlxspecError, match=r"names model-00002-of-00002\.safetensors, which is missing"):
        read_model(folder)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 1024}, 1024),
        ({"n_ctx": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "yarn", "factor": 4}}, 2048),
        ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 512, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 1024),
        # The product is stated already, as DeepSeek and Qwen's long models do.
        ({"max_position_embeddings": 2048,
          "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 512}}, 2048),
        ({"max_position_embeddings": 131072,
          "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 512, "rope_scaling": {"type": "linear", "factor": "x"}}, 512),
        ({}, None),
    ],
)  # fmt: skip
def test_the_context_is_what_the_config_declares_times_the_stretch_of_its_rope_scaling(config, expected):
    assert declared_context(config) == expected


def test_a_stretched_context_can_be_used_and_stated_otherwise(tmp_path, stories_folder):
    folder = tmp_path / "stories"
    shutil.copytree(stories_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": {"type": "linear", "factor": 4.0}}))
    pair = mlxspec.load(folder, "none")
    prompt = [1] * 601
    assert mlxspec.generate(pair, prompt, 5).tokens == plain_greedy(pair.target, prompt, 5)
    assert mlxspec.load(folder, "none", context_length=512).context_length == 512


def test_a_learned_table_of_positions_is_a_limit_whatever_is_stated():
    model = model_of({**full_config("gpt2"), "n_ctx": 64, "n_positions": 64})
    assert mlxspec.ModelPair(model, model, context_length=4096).context_length == 64
    assert mlxspec.ModelPair(model, model).drafter_context_length == 64
    assert mlxspec.ModelPair(random_llama(), model).drafter_context_length == 64


def test_a_path_that_exists_on_the_authors_machine_only_is_ignored(tmp_path):
    shutil.copytree(DEMO / "target", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "special_tokens_map_file": "/content/x/special_tokens_map.json"}))
    assert mlxspec.load(tmp_path / "model", "none").tokenizer.encode("Once")
    file.write_text(json.dumps({**settings, "special_tokens_map_file": "/etc/passwd"}))
    with pytest.raises(mlxspec.MlxspecError, match="special_tokens_map_file points out of the folder"):
        mlxspec.load(tmp_path / "model", "none")


def test_a_snapshot_of_the_hubs_cache_loads_as_a_folder_wherever_the_cache_lies(tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--something"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted((DEMO / "target").iterdir())):
        shutil.copyfile(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert mlxspec.load(snapshot, "none").context_length
    monkeypatch.chdir(snapshot)
    assert mlxspec.load(".", "none").context_length
    (snapshot / "README.md").symlink_to("/etc/passwd")
    with pytest.raises(mlxspec.MlxspecError, match="is a link to a file outside"):
        mlxspec.load(snapshot, "none")
