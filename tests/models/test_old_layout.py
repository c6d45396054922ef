"""The public story model rewritten into the MLX layout of 2023, against its Hugging Face folder."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

import mlxspec
from mlxspec import ModelPair, SpeculativeDecoder
from mlxspec.models.old_layout import LAYER_NAMES, OUTER_NAMES
from tests.conftest import decoded

GROUP, BITS = 64, 4


def interleaved(rows: mx.array, heads: int) -> mx.array:
    """Reorder a projection's rows from Hugging Face's two halves to Meta's interleaved pairs."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def old_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        module, kind = rest.rsplit(".", 1)
        return f"layers.{layer}.{ {new: old for old, new in LAYER_NAMES.items()}[module] }.{kind}"
    module, kind = name.rsplit(".", 1)
    return f"{ {new: old for old, new in OUTER_NAMES.items()}[module] }.{kind}"


def write_old_layout(source, folder, dtype, quantized, pairs=True, **more):
    model, config = load_model(source)
    model.set_dtype(dtype)
    if quantized:
        nn.quantize(model, GROUP, BITS, class_predicate=quantized_in_2023)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        projection = name.split(".")[-2]
        reorder = pairs and projection in heads
        weights[old_name(name)] = interleaved(array, heads[projection]) if reorder else array
    folder.mkdir()
    np.savez(folder / "weights.npz", **{name: np.array(array) for name, array in weights.items()})
    old_config = {"dim": 64, "n_layers": 5, "n_heads": 8, "n_kv_heads": 4, "norm_eps": 1e-5, "vocab_size": -1,
                  "max_seq_len": 512, **more}  # fmt: skip
    if quantized:
        old_config["quantization"] = {"group_size": GROUP, "bits": BITS}
    (folder / "config.json").write_text(json.dumps(old_config))
    shutil.copy(source / "tokenizer.model", folder)
    return model


def quantized_in_2023(path: str, module: nn.Module) -> bool:
    """Linear layers only, and only those whose rows are whole groups."""
    return isinstance(module, nn.Linear) and module.weight.shape[-1] % GROUP == 0


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [mx.float16, mx.float32])
def test_it_generates_the_same_text_as_the_hugging_face_folder(tmp_path, stories_folder, dtype, quantized):
    model = write_old_layout(stories_folder, tmp_path / "old", dtype, quantized)
    model.set_dtype(mx.float32)
    pair = mlxspec.load(tmp_path / "old", "none", dtype=mx.float32)
    same = decoded(SpeculativeDecoder(ModelPair(model, context_length=512)), [1], 300)
    assert decoded(SpeculativeDecoder(pair), [1], 300) == same
    assert pair.context_length == 512


@pytest.mark.parametrize(("pairs", "more"), [
    (False, {"rope_traditional": False}),
    (True, {"rope_traditional": True}),
    (True, {"model_type": "llama"}),
    (True, {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}),
    (False, {"model_type": "llama", "rope_traditional": False}),
])  # fmt: skip
def test_every_key_that_its_converters_wrote_is_heeded(tmp_path, stories_folder, pairs, more):
    model = write_old_layout(stories_folder, tmp_path / "old", mx.float32, False, pairs, **more)
    pair = mlxspec.load(tmp_path / "old", "none")
    same = decoded(SpeculativeDecoder(ModelPair(model, context_length=512)), [1], 100)
    assert decoded(SpeculativeDecoder(pair), [1], 100) == same


def test_its_bare_tokenizer_gives_the_same_prompt_and_text(tmp_path, stories_folder):
    write_old_layout(stories_folder, tmp_path / "old", mx.float32, quantized=False)
    old, new = mlxspec.load(tmp_path / "old"), mlxspec.load(stories_folder)
    answer = mlxspec.generate(old, "Once upon a time", max_tokens=100)
    assert answer.text == mlxspec.generate(new, "Once upon a time", max_tokens=100).text
    assert answer.text.startswith(", there was a little girl named Lily.")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "weights.npz").unlink(), r"no file is named weights\*\.npz"),
        (lambda f: (f / "weights.npz").write_bytes(b"PK\x03\x04 torn"), "cannot be read as a Llama in the old"),
        (lambda f: (f / "weights.npz").write_bytes((f / "weights.npz").read_bytes()[:50_000]), "cannot be read as a"),
        (lambda f: np.savez(f / "weights.npz", unheard_of=np.zeros(3)), "no weight named 'unheard_of'"),
        (lambda f: (f / "tokenizer.model").unlink(), "has no tokenizer"),
    ],
)
def test_damage_is_named(tmp_path, stories_folder, damage, words):
    folder = tmp_path / "old"
    write_old_layout(stories_folder, folder, mx.float32, quantized=False)
    damage(folder)
    with pytest.raises(mlxspec.MlxspecError, match=words):
        mlxspec.load(folder)
