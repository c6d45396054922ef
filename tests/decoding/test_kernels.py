"""Which Metal kernels a block runs on: by the heads of public models, and by the arrays that it really passes."""

from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import pytest

import mlxspec
from mlxspec import ModelPair, SpeculativeDecoder
from mlxspec.decoding.cache import CachedModel
from mlxspec.decoding.kernels import (
    FULL,
    MLX_VERSION,
    QMM,
    QMV,
    QMV_QUAD,
    QMV_WIDE,
    TWO_PASSES,
    UNFUSED,
    VECTOR,
    Attention,
    Chip,
    attention_kernel,
    attention_of,
    chip_of,
    has_experts,
    has_tf32,
    matmul_kernel,
    matrix_limit,
)
from tests.conftest import random_llama
from tests.models.test_families import FAMILIES, full_config, model_of

README = Path(mlxspec.__file__).parent / "decoding" / "README.md"


def heads(model_type: str, hidden: int, query: int, kv: int, size: int | None = None, **more) -> dict:
    shape = {"hidden_size": hidden, "num_attention_heads": query, "num_key_value_heads": kv}
    return {"model_type": model_type, **shape, **({"head_dim": size} if size else {}), **more}


# The heads in the config.json of public models, by the family in tests/models/test_families.py.
PUBLIC = {
    "Llama 2 7B": ("llama", heads("llama", 4096, 32, 32)),
    "Llama 2 13B": ("llama", heads("llama", 5120, 40, 40)),
    "Llama 2 70B": ("llama", heads("llama", 8192, 64, 8)),
    "Llama 3.1 8B": ("llama with rope scaling", heads("llama", 4096, 32, 8)),
    "Llama 3.2 1B": ("llama with rope scaling", heads("llama", 2048, 32, 8, 64)),
    "Llama 3.2 3B": ("llama with rope scaling", heads("llama", 3072, 24, 8, 128)),
    "Mistral 7B": ("mistral", heads("mistral", 4096, 32, 8)),
    "Ministral 3 8B": ("ministral3", heads("ministral3", 4096, 32, 8, 128)),
    "Mixtral 8x7B": ("mixtral", heads("mixtral", 4096, 32, 8, num_local_experts=8)),
    "Qwen 2.5 0.5B": ("qwen2", heads("qwen2", 896, 14, 2)),
    "Qwen 2.5 7B": ("qwen2", heads("qwen2", 3584, 28, 4)),
    "Qwen 2.5 32B": ("qwen2", heads("qwen2", 5120, 40, 8)),
    "Qwen 3 8B": ("qwen3", heads("qwen3", 4096, 32, 8, 128)),
    "Qwen 3 32B": ("qwen3", heads("qwen3", 5120, 64, 8, 128)),
    "Gemma 2B": ("gemma", heads("gemma", 2048, 8, 1, 256)),
    "Gemma 7B": ("gemma", heads("gemma", 3072, 16, 16, 256)),
    "Gemma 2 9B": ("gemma2", heads("gemma2", 3584, 16, 8, 256)),
    "Gemma 3 4B": ("gemma3_text", heads("gemma3_text", 2560, 8, 4, 256)),
    "Gemma 3 27B": ("gemma3_text", heads("gemma3_text", 5376, 32, 16, 128)),
    "Phi 3 mini": ("phi3", heads("phi3", 3072, 32, 32)),
    "Phi 4": ("phi3", heads("phi3", 5120, 40, 10)),
    "OLMo 2 7B": ("olmo2", heads("olmo2", 4096, 32, 32)),
    "OLMo 3 7B": ("olmo3", heads("olmo3", 4096, 32, 32)),
    "Command R7B": ("cohere2", heads("cohere2", 4096, 32, 8, 128)),
    "StarCoder 2 3B": ("starcoder2", heads("starcoder2", 3072, 24, 2)),
    "StableLM 2 1.6B": ("stablelm", heads("stablelm", 2048, 32, 32)),
    "StableLM 3B": ("stablelm", heads("stablelm", 2560, 32, 32)),
    "gpt-oss 20B": ("gpt_oss", heads("gpt_oss", 2880, 64, 8, 64, num_local_experts=32)),
    "EXAONE 4 1.2B": ("exaone4", heads("exaone4", 2048, 32, 8, 64)),
    "GPT-2": ("gpt2", {"model_type": "gpt2", "n_embd": 768, "n_head": 12}),
    "GLM 4 9B": ("glm4", heads("glm4", 4096, 32, 2, 128)),
    "GLM 4.5 Air": ("glm4_moe", heads("glm4_moe", 4096, 96, 8, 128, n_routed_experts=128)),
    "Granite 3.3 8B": ("granite", heads("granite", 4096, 32, 8)),
    "SmolLM 2 135M": ("llama", heads("llama", 576, 9, 3)),
    "SmolLM 2 1.7B": ("llama", heads("llama", 2048, 32, 32)),
    "SmolLM 3 3B": ("smollm3", heads("smollm3", 2048, 16, 4)),
}
CHIPS = {
    "M1, M2": Chip(13, "g"),
    "M1, M2 Ultra": Chip(14, "d"),
    "M3, M4": Chip(15, "s"),
    "M3 Ultra": Chip(15, "d"),
    "M5": Chip(17, "g"),
}
M2, M2_ULTRA, M3, M3_ULTRA, M5 = CHIPS.values()


def test_the_conditions_are_those_of_the_installed_mlx():
    assert version("mlx") == MLX_VERSION, (
        f"mlxspec/decoding/kernels.py and the tables in mlxspec/decoding/README.md are of MLX {MLX_VERSION}, and "
        f"{version('mlx')} is installed. Compare them with `has_fused_kernel`, `use_fallback` and `eval_gpu` "
        "(`kv_copy_unless`, `mask_copy_unless`) in mlx/backend/metal/scaled_dot_product_attention.cpp and with "
        "`get_qmv_batch_limit`, `use_qmv_wide`, `dispatch_qmv` and `GatherQMM` in mlx/backend/metal/quantized.cpp of "
        "the new version, then change MLX_VERSION."
    )


# ----------------------------------------------------------------------- attention


def test_every_family_has_a_public_model():
    assert {family for family, _ in PUBLIC.values()} == set(FAMILIES)


def attention_table() -> str:
    """The public models by the kernels of their attention."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, (_, config) in PUBLIC.items():
        found = attention_of(config)
        fast = [rows for rows in range(1, 9) if attention_kernel(found, rows).name == VECTOR]
        longest = max(fast) - 1 if fast else None
        vector = "none" if longest is None else f"1 to {longest + 1}"
        few = {attention_kernel(found, rows).name for rows in range(1 if longest is None else longest + 2, 9)}
        [many] = {attention_kernel(found, rows).name for rows in range(9, 18)}
        shape = f"{name} ({found.heads}/{found.kv_heads}, {found.head_dim}{'' if found.fused else ', own code'})"
        groups.setdefault((vector, "".join(few) or "–", many), []).append(shape)
    heading = (
        "rows on the vector kernel",
        "other rows up to 8",
        "9 rows and more",
        "models (query heads/KV heads, head size)",
    )
    rows = [(*kernels, ", ".join(models)) for kernels, models in groups.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, ("---",) * 4, *rows)).replace(" --- ", "---")


def test_the_readmes_table_of_attention_is_what_the_code_says():
    table = attention_table()
    assert table in README.read_text(), f"the table should be\n{table}"


@pytest.mark.parametrize(
    ("model", "rows", "kernel"),
    [
        ("Llama 2 7B", 8, VECTOR),
        ("Llama 2 7B", 9, FULL),
        ("Llama 3.1 8B", 8, VECTOR),
        ("Llama 2 70B", 4, VECTOR),  # 4 rows × 8 query heads are 32
        ("Llama 2 70B", 5, UNFUSED),
        ("Llama 2 70B", 9, FULL),
        ("Qwen 2.5 7B", 4, VECTOR),
        ("Qwen 2.5 7B", 5, UNFUSED),
        ("GLM 4 9B", 2, VECTOR),
        ("GLM 4 9B", 3, UNFUSED),
        ("Gemma 3 4B", 8, VECTOR),
        ("Gemma 3 4B", 9, UNFUSED),
        ("Gemma 2 9B", 1, UNFUSED),
        ("StableLM 3B", 1, UNFUSED),  # head size 80
        ("StableLM 3B", 9, FULL),
    ],
)
def test_the_kernel_of_attention(model, rows, kernel):
    found = attention_kernel(attention_of(PUBLIC[model][1]), rows)
    assert found.name == kernel
    assert found.reason


def test_long_texts_take_the_vector_kernel_in_two_passes():
    own, shared = Attention(32, 32, 128, 128), Attention(32, 8, 128, 128)
    assert attention_kernel(own, 1, 8192, M2).name == VECTOR
    assert attention_kernel(shared, 1, 3840, M2).name == VECTOR
    assert attention_kernel(shared, 1, 4096, M2).name == TWO_PASSES
    for chip in (M3, M2_ULTRA):
        assert attention_kernel(own, 1, 768, chip).name == VECTOR
        assert attention_kernel(own, 1, 1024, chip).name == TWO_PASSES


def test_head_sizes_that_have_a_kernel_of_their_own():
    assert attention_kernel(Attention(16, 16, 96, 64), 8).name == VECTOR
    assert attention_kernel(Attention(16, 16, 192, 128), 1).name == VECTOR
    assert attention_kernel(Attention(16, 16, 192, 192), 1).name == UNFUSED
    assert attention_kernel(Attention(16, 2, 512, 512), 1).name == UNFUSED  # takes no array mask


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heads_of_a_model_are_those_of_its_caches(family):
    config = full_config(family)
    if family == "gpt2":
        del config["num_key_value_heads"]  # which its config.json does not have
    model = model_of(config)
    found, [(keys, _), (values, _)] = attention_of(vars(model.args)), CachedModel(model).shapes[0]
    assert (found.kv_heads, found.head_dim, found.value_dim) == (keys[1], keys[3], values[3])


def test_only_models_with_their_own_attention_do_not_call_the_fused_function(monkeypatch):
    calls = []
    fused = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(
        mx.fast, "scaled_dot_product_attention", lambda *arrays, **more: calls.append(1) or fused(*arrays, **more)
    )
    for family in FAMILIES:
        calls.clear()
        CachedModel(model_of(full_config(family)))
        assert bool(calls) == attention_of(full_config(family)).fused, family


def contiguous(array: mx.array) -> bool:
    """Whether keys or values [1, H, positions, D] are as the vector kernel reads them, with no copy."""
    return memoryview(array).strides[-1] == array.itemsize and array.shape[0] == 1


@pytest.mark.parametrize("draft_length", [0, 3])
def test_a_block_passes_a_boolean_mask_and_keys_that_need_no_copy(monkeypatch, draft_length):
    passed = []
    fused = mx.fast.scaled_dot_product_attention

    def spy(queries, keys, values, scale, mask, sinks):
        passed.append((queries, keys, values, mask))
        return fused(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    target = CachedModel(random_llama(vocab_size=64))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    logits, _ = target(mx.zeros(draft_length + 1, mx.int32), target.empty(256), mx.array(100))
    mx.eval(logits)
    assert passed
    for queries, keys, values, mask in passed:
        assert (mask.dtype, mask.shape) == (mx.bool_, (draft_length + 1, 256))
        assert queries.shape == (1, 2, draft_length + 1, 8)
        assert keys.shape == values.shape == (1, 1, 256, 8)
        assert contiguous(keys)
        assert contiguous(values)


def test_every_block_of_a_decoder_passes_an_array_mask(monkeypatch):
    masks = []
    fused = mx.fast.scaled_dot_product_attention

    def spy(queries, keys, values, scale, mask, sinks):
        masks.append((queries.shape[2], mask if isinstance(mask, str) else mask.dtype))
        return fused(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    decoder = SpeculativeDecoder(ModelPair(random_llama(vocab_size=64), mlxspec.PromptLookup()), None, 3)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", spy)
    list(decoder.blocks([5, 6, 7, 5, 6], 8))
    assert (4, mx.bool_) in masks
    assert (4, "causal") in masks  # of the prompt, whose length the host knows: all tokens but the last


# ----------------------------------------------------------------------- quantized weights

SIZES = {"at most 2048": (2048, 2048), "at most 4096": (4096, 4096), "larger": (4096, 11008)}


def rows_of(chip: Chip, inputs: int, outputs: int) -> str:
    """What takes which number of rows, for affine 4-bit weights."""
    names = [matmul_kernel(rows, inputs, outputs, chip).name for rows in range(1, 41)]
    order = list(dict.fromkeys(names))
    assert names == sorted(names, key=order.index)  # each kernel has one range of rows
    ends = [len(names) - names[::-1].index(name) for name in order]
    starts = [1, *(end + 1 for end in ends)]
    spans = [f"{start} to {end}" if start < end else f"{start}" for start, end in zip(starts, ends, strict=False)]
    return ", ".join(
        f"`{name}` {span if name != order[-1] else f'from {start}'}"
        for name, span, start in zip(order, spans, starts, strict=False)
    )


def test_the_readmes_table_of_quantized_products_is_what_the_code_says():
    lines = [f"| chip | {' | '.join(SIZES)} |", "|---|---|---|---|"]
    for name, chip in CHIPS.items():
        lines.append(f"| {name} | {' | '.join(rows_of(chip, *size) for size in SIZES.values())} |")
    table = "\n".join(lines)
    assert table in README.read_text(), f"the table should be\n{table}"


@pytest.mark.parametrize(
    ("rows", "chip", "mode", "kernel"),
    [
        (1, M3, "affine", QMV),
        (2, M3, "affine", QMV_WIDE),
        (12, M3, "affine", QMV_WIDE),
        (13, M3, "affine", QMM),
        (5, M2, "affine", QMV),
        (6, M2, "affine", QMM),
        (5, M2, "mxfp4", QMV_WIDE),
        (11, M2_ULTRA, "affine", QMV),
        (12, M2_ULTRA, "affine", QMM),
        (11, M3_ULTRA, "affine", QMV_WIDE),
        (12, M5, "affine", QMV_WIDE),
        (13, M5, "affine", QMM),
    ],
)
def test_the_kernel_of_a_product_with_a_matrix_of_llama_2_7b(rows, chip, mode, kernel):
    assert matmul_kernel(rows, 4096, 11008, chip, mode).name == kernel


def test_small_and_expert_matrices():
    assert matmul_kernel(3, 128, 512, M3).name == QMV_QUAD
    assert matmul_kernel(3, 128, 512, M3, bits=6).name == QMV_WIDE
    assert matmul_kernel(17, 4096, 14336, M3, expert=True).name == QMV
    assert has_experts(PUBLIC["Mixtral 8x7B"][1])
    assert not has_experts(PUBLIC["Llama 2 7B"][1])
    assert matrix_limit(2048, 2048, Chip(12, "p")) == 18  # before M1


def test_tf32_is_of_m5_and_newer():
    assert [has_tf32(chip) for chip in CHIPS.values()] == [False, False, False, False, True]
    assert not has_tf32(Chip(17, "p"))
    assert not has_tf32(None)


def test_the_chip_is_read_as_mlx_reads_it():
    assert chip_of("applegpu_g15s") == Chip(15, "s")
    assert chip_of("applegpu_g13g") == Chip(13, "g")
    assert chip_of("x86_64") is chip_of(None) is None
