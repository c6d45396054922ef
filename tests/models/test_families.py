"""Families of mlx-lm's own model classes, tiny and random: greedy text equals mlx-lm's whoever drafts."""

import importlib
import json
import shutil
import threading
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import save_model

import mlxspec
from mlxspec import ModelPair, SpeculativeDecoder
from mlxspec.models.loading import DEMO
from mlxspec.models.reading import read_model
from tests.conftest import decoded, plain_greedy, random_llama

BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SLIDING = {"sliding_window": 12}
FAMILIES = {
    "llama": {},
    "llama with rope scaling": {
        "model_type": "llama",
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 1024},
    },
    "mistral": {"model_type": "llama"},  # as mlx-lm reads it
    "ministral3": {**SLIDING, "layer_types": ["sliding_attention", "full_attention"],
                   "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "llama_4_scaling_beta": 0.1,
                                       "original_max_position_embeddings": 4096}},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {**SLIDING, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8},
    "phi3": {},
    "olmo2": {},
    "olmo3": {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": {**SLIDING, "sliding_window_pattern": 2},
    "starcoder2": {"norm_epsilon": 1e-5},
    "stablelm": {"rope_pct": 0.5, "layer_norm_eps": 1e-5, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2,
                "layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {**SLIDING, "sliding_window_pattern": "LG", "rope_scaling": None,
                "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_ctx": 4096, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 4096, "layer_norm_epsilon": 1e-5},
    "glm4": {"partial_rotary_factor": 0.5, "attention_bias": False},
    "granite": {"logits_scaling": 1.0, "attention_multiplier": 0.35, "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0, "attention_bias": False, "mlp_bias": False},
    "smollm3": {"no_rope_layer_interval": 2},
    "glm4_moe": {"moe_intermediate_size": 16, "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
                 "first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2,
                 "routed_scaling_factor": 1.0, "use_qk_norm": True, "attention_bias": False,
                 "partial_rotary_factor": 0.5, "rope_scaling": None},
}  # fmt: skip


def full_config(name: str) -> dict:
    return {"model_type": name, **BASE, **FAMILIES[name]}


def model_of(config: dict):
    """A tiny random model with a config."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(config))
    # Larger than they are initialised, or the text would be one token over and over; gemma2 saturates its soft caps.
    scale = 2 if config["model_type"] == "gemma2" else 4
    model.update(tree_map(lambda weight: scale * weight if weight.ndim > 1 else weight, model.parameters()))
    mx.eval(model.parameters())
    return model


def family(name: str):
    return model_of(full_config(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text_of_a_family_equals_mlx_lms(name):
    target = family(name)
    decoder = SpeculativeDecoder(ModelPair(target, random_llama(vocab_size=64)), None, 3)
    prompt = [5, 9, 33, 2, 41, 7]
    tokens = decoded(decoder, prompt, 60)
    assert tokens == plain_greedy(target, prompt, 60)
    assert len(set(tokens)) >= 5


@pytest.fixture
def saved(tmp_path):
    """Write a family's model as a folder. It has the demo's tokenizer, some of whose tokens the model lacks."""

    def save(name: str) -> Path:
        model = family(name)
        shutil.copytree(
            DEMO / "target", tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors*", "config.json")
        )
        save_model(tmp_path / name, model)
        (tmp_path / name / "config.json").write_text(json.dumps(full_config(name)))
        return tmp_path / name

    return save


def test_weights_that_mlx_lm_keeps_in_float32_stay_in_float32(saved):
    read = read_model(saved("glm4_moe"), mx.bfloat16)
    types = {name: weight.dtype for name, weight in tree_flatten(read.parameters())}
    kept = {name for name, dtype in types.items() if dtype == mx.float32}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}
    assert set(types.values()) == {mx.float32, mx.bfloat16}


@pytest.mark.parametrize("name", ["llama", "llama with rope scaling"])
def test_a_pair_that_was_loaded_in_one_thread_decodes_in_another(saved, name):
    pair, found = mlxspec.load(saved(name), "lookup"), []
    decoder = threading.Thread(target=lambda: found.append(decoded(SpeculativeDecoder(pair), [5, 9, 33], 20)))
    decoder.start()
    decoder.join()
    assert found == [plain_greedy(pair.target, [5, 9, 33], 20)]


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_a_family_drafts_for_itself_and_is_accepted_whole(name):
    target = family(name)
    decoder = SpeculativeDecoder(ModelPair(target, target), mlxspec.Sampling(1.0, seed=0), 3)
    decoded(decoder, [5, 9, 33], 60)
    assert decoder.stats.block_efficiency == 4


# gpt_bigcode computes position ids on the host, mamba and the hybrid keep states that cannot be rewound.
REFUSED = {
    "mamba": {"state_size": 4, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4},
    "gpt_bigcode": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_inner": 64,
                    "layer_norm_epsilon": 1e-5},
    "recurrent_gemma": {"attention_bias": False, "conv1d_width": 4, "logits_soft_cap": 30.0,
                        "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_be_rewound_is_refused_with_the_reason(name, monkeypatch):
    monkeypatch.setitem(FAMILIES, name, REFUSED[name])
    with pytest.raises(mlxspec.MlxspecError, match=r"which cannot be rewound|cannot run on a cache whose length"):
        SpeculativeDecoder(ModelPair(family(name)))
