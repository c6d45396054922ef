"""A drafter in the form that other tools load, and on the hub.

What is written is Hugging Face's Llama layout: config.json, model.safetensors, tokenizer files, generation_config.json
and a model card. mlx-lm takes it as ``--draft-model``, transformers as ``assistant_model``, and llama.cpp's converter
reads it.
"""

import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from mlxspec.errors import InvalidRequestError, ModelLoadError, in_one_line
from mlxspec.files import replacing, write_json
from mlxspec.models.attention import model_type
from mlxspec.models.loading import TOKENIZER_FILES, read_lazily, read_tokenizer, resolved
from mlxspec.models.quantizing import COPIED, QUANTIZATIONS, quantized

MLX_ONLY = ("quantization", "quantization_config", "rope_traditional")


@dataclass(frozen=True)
class CardFacts:
    """What a model card says of a drafter's making; what is None is said to be unknown."""

    licence: str | None = None
    base: str | None = None  # the target that it drafts for
    data: str | None = None
    loss: str | None = None
    block_efficiency: str | None = None  # measured, with the setting


def export(drafter: str | Path, out: Path, quantize: str | None = None, facts: CardFacts = CardFacts()) -> list[Path]:
    """Write ``drafter`` (folder, hub id or short name) to the new folder ``out``; returns the files.

    Without ``quantize`` the weights are plain, in the bits they are stored in; quantised they are for MLX only.
    Raises ModelLoadError, or InvalidRequestError for a model that is no Llama or an ``out`` that is there already.
    """
    if out.exists():
        raise InvalidRequestError(f"{out} exists; give a folder that does not")
    if quantize not in (None, *QUANTIZATIONS):
        raise InvalidRequestError(f"quantize is {quantize!r}; use one of {', '.join(QUANTIZATIONS)}")
    source = resolved(drafter)
    model, config = read_lazily(source)
    if model_type(model) != "llama":
        raise InvalidRequestError(f"{drafter} is a {model_type(model)}; only Llama drafters can be exported")
    model, config = plain(model, config)
    if quantize:
        model, config = quantized(model, config, quantize)
    with replacing(out) as aside:
        aside.mkdir()
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(aside / "model.safetensors"), weights, metadata={"format": "mlx" if quantize else "pt"})
        write_json(aside / "config.json", config)
        write_tokenizer(source, aside)
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
        write_json(aside / "generation_config.json", generation)
        card = model_card(out.name, config, sum(weight.size for weight in weights.values()), quantize, facts)
        (aside / "README.md").write_text(card)
    return sorted(out.iterdir())


def plain(model: nn.Module, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """Without quantisation and with q and k in Hugging Face's half-split order."""
    model = dequantize_model(model)
    if config.get("rope_traditional"):
        for layer in model.layers:
            attention = layer.self_attn
            attention.q_proj.weight = half_split(attention.q_proj.weight, attention.n_heads)
            attention.k_proj.weight = half_split(attention.k_proj.weight, attention.n_kv_heads)
    config = {key: value for key, value in config.items() if key not in MLX_ONLY and value is not None}
    # transformers and mlx-lm disagree about what a config means that does not say.
    config["tie_word_embeddings"] = model.args.tie_word_embeddings
    return model, {**config, "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}


def half_split(rows: mx.array, heads: int) -> mx.array:
    """Rows of a projection in the order of Meta's release, pairs next to each other -> first halves, second halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def write_tokenizer(source: Path, out: Path) -> None:
    if not any((source / name).exists() for name in TOKENIZER_FILES):
        raise ModelLoadError(f"{source} has no tokenizer; copy the target's tokenizer.json into it first")
    if (source / "tokenizer.json").exists():
        for name in COPIED:
            if (source / name).exists() and name != "generation_config.json":
                shutil.copyfile(source / name, out / name)
    else:
        read_tokenizer(source).save_pretrained(out)
        shutil.copyfile(source / "tokenizer.model", out / "tokenizer.model")


def model_card(name: str, config: dict[str, Any], parameters: int, quantize: str | None, facts: CardFacts) -> str:
    said = {field.name: getattr(facts, field.name) or "not recorded" for field in fields(facts)}
    shape = f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, {config['vocab_size']} tokens"
    return f"""---
library_name: mlx
license: {facts.licence or "other"}
pipeline_tag: text-generation
tags: [speculative-decoding, drafter, mlxspec]
---

# {name}

A drafter for speculative decoding: it proposes tokens, a larger target decides, and the text is the target's own.

| | |
|---|---|
| target | {said["base"]} |
| training data | {said["data"]} |
| loss | {said["loss"]} |
| block efficiency, measured | {said["block_efficiency"]} |
| shape | {shape} |
| stored values | {parameters:,}{f", quantised ({quantize}), for MLX only" if quantize else ""} |
| licence | {said["licence"]} |

```bash
mlxspec generate --target TARGET --drafter {name} "Once upon a time"
mlx_lm.generate --model TARGET --draft-model {name} --prompt "Once upon a time"
```
"""


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder that ``export`` wrote; returns the address of the repository.

    Raises ModelLoadError for a folder without a model, InvalidRequestError when the hub refuses or is out of reach.
    """
    files_to_push(folder)
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a drafter with mlxspec")
    except Exception as error:  # of the hub's, the network's or the token's making
        raise InvalidRequestError(
            f"cannot upload to {repository}: {in_one_line(error)}; log in with `hf auth login` and check the name"
        ) from None
    return str(address)


def files_to_push(folder: Path) -> list[Path]:
    missing = [name for name in ("config.json", "model.safetensors", "README.md") if not (folder / name).is_file()]
    if missing:
        raise ModelLoadError(f"{folder} has no {' and no '.join(missing)}; write it with `mlxspec export` first")
    return sorted(path for path in folder.rglob("*") if path.is_file())
