"""The MLX layout of 2023: ``weights.npz``, a small config and a bare ``tokenizer.model``.

mlx-lm no longer reads this layout, but the best known 4-bit Llama 2 Chat repository still uses it. The layout has the
weight names of Meta's release, and its order of the rows of q and k. In that order, rotary embedding rotates
neighboring pairs instead of two halves. mlx-lm's Llama supports this as ``rope_traditional``, so the weights are used
unchanged. If a config states ``"rope_traditional": false``, its rows are in the order of Hugging Face's checkpoints.
"""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from mlxspec.errors import ModelLoadError
from mlxspec.files import load_arrays
from mlxspec.models.checks import check_numbers

LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER_NAMES = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
LAYER_KEY = re.compile(r"layers\.(\d+)\.(.+)\.(weight|scales|biases)")
OUTER_KEY = re.compile(r"(tok_embeddings|norm|output)\.(weight|scales|biases)")

LLAMA2_CONTEXT = 4096  # for configs that do not state it


def is_old_config(config: dict[str, Any]) -> bool:
    """Return whether a config.json belongs to the layout of 2023."""
    return "dim" in config and "n_layers" in config


def read_old_model(config: dict[str, Any], files: list[Path]) -> tuple[nn.Module, dict[str, Any]]:
    """Build a Llama model from files in the old layout. The weights are lazy.

    Args:
        config: The content of config.json.
        files: The npz files.

    Returns:
        The model, and its config with Hugging Face's names.

    Raises:
        ModelLoadError: A weight has a name that the layout does not have, or a size in the config is impossible.
    """
    weights = {new_name(name): array for file in files for name, array in load_arrays(file).items()}
    check_numbers(config, files[0].parent / "config.json", tensors=len(weights))
    translated = new_config(config, weights)
    model = llama.Model(llama.ModelArgs.from_dict(translated))
    if quantization := config.get("quantization"):
        translated["quantization"] = quantization
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            class_predicate=lambda path, _: f"{path}.scales" in weights,
        )
    model.load_weights(list(weights.items()))
    return model.eval(), translated


def new_name(name: str) -> str:
    """Translate the name of a weight to Hugging Face's. Raises ModelLoadError for an unknown name."""
    if match := LAYER_KEY.fullmatch(name):
        layer, part, kind = match.groups()
        if part in LAYER_NAMES:
            return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"
    if match := OUTER_KEY.fullmatch(name):
        return f"{OUTER_NAMES[match[1]]}.{match[2]}"
    raise ModelLoadError(f"the old MLX layout has no weight named {name!r}; use a Llama model in this layout")


def new_config(config: dict[str, Any], weights: dict[str, mx.array]) -> dict[str, Any]:
    """Translate a config for mlx-lm's Llama. Sizes that the old config lacks come from the shapes of the weights."""
    vocab_size, _ = weights["model.embed_tokens.weight"].shape
    return {
        "model_type": "llama",
        "hidden_size": config["dim"],
        "num_hidden_layers": config["n_layers"],
        "num_attention_heads": config["n_heads"],
        "num_key_value_heads": config.get("n_kv_heads") or config["n_heads"],
        "head_dim": config.get("head_dim"),
        "intermediate_size": weights["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "vocab_size": vocab_size,
        "rms_norm_eps": config["norm_eps"],
        "rope_theta": config.get("rope_theta", 10000.0),
        "rope_traditional": config.get("rope_traditional", True),
        "max_position_embeddings": config.get("max_seq_len", LLAMA2_CONTEXT),
        "tie_word_embeddings": "lm_head.weight" not in weights,
    }
