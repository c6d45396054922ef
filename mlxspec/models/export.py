"""Export a drafter in the layout that other tools load, and upload it to the hub.

The exported folder has Hugging Face's Llama layout: config.json, model.safetensors, tokenizer files,
generation_config.json and a model card. mlx-lm loads it with ``--draft-model``, transformers as ``assistant_model``,
and llama.cpp's converter reads it.
"""

import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from mlxspec.errors import InvalidRequestError, ModelLoadError, in_one_line
from mlxspec.files import locked, replacing, write_json
from mlxspec.models.attention import model_type
from mlxspec.models.checks import model_fingerprint, read_object
from mlxspec.models.drafter import EMBEDDING, OWN_KEYS, Drafter
from mlxspec.models.eagle import Eagle
from mlxspec.models.quantizing import COPIED, QUANTIZATIONS, quantized
from mlxspec.models.reading import TOKENIZER_FILES, model_folder, read_config, read_lazily, read_tokenizer
from mlxspec.models.tokens import check_same_tokens

UNUSED_LOGITS_BELOW = 60.0  # how far the logit of a token that the drafter cannot output is below log Σ exp of others
RANDOM_TOKENS = (64, 64)  # rows and positions of random tokens whose hidden states are used
RIDGE = 0.01  # regularization, as a share of the states' mean square
RECORDING = "recording.json"  # in a folder of recorded answers
MLX_ONLY = ("quantization", "quantization_config", "rope_traditional")


@dataclass(frozen=True)
class CardFacts:
    """Facts that a model card states about a drafter. The card says "not recorded" where a value is None.

    Attributes:
        license: License identifier, such as "apache-2.0".
        base: The target that the drafter was made for.
        data: The training data.
        loss: The training loss.
        block_efficiency: The measured block efficiency, with the setting.
    """

    license: str | None = None
    base: str | None = None
    data: str | None = None
    loss: str | None = None
    block_efficiency: str | None = None


def export(
    drafter: str | Path,
    out: Path,
    quantize: str | None = None,
    facts: CardFacts = CardFacts(),
    target: str | Path | None = None,
) -> list[Path]:
    """Write a drafter to a new folder, in the layout that other tools load.

    The head of a drafter with a smaller vocabulary is widened to all tokens.

    Args:
        drafter: Folder, hub id or short name of a Llama model.
        out: The folder to create.
        quantize: "4", "8", "mxfp4" or "nvfp4". Only MLX can load the quantized result. None keeps the stored precision,
            and dequantizes a quantized model.
        facts: Facts for the model card.
        target: Folder, hub id or short name of the target. Required for a drafter that uses its embedding.

    Returns:
        The paths of the files that were written.

    Raises:
        ModelLoadError: The drafter cannot be read.
        InvalidRequestError: The model is not a Llama, ``out`` exists, ``quantize`` is unknown, or the target is not
            named or not the one that the drafter was trained for.
        TokenizerMismatchError: The target has another tokenizer than the drafter.
    """
    if out.exists():
        raise InvalidRequestError(f"{out} exists; choose a folder that does not exist yet")
    if quantize not in (None, *QUANTIZATIONS):
        raise InvalidRequestError(f"quantize is {quantize!r}; use one of {', '.join(QUANTIZATIONS)}")
    source = model_folder(drafter)
    embedding = None
    if read_config(source).get("shared_embedding"):
        if target is None:
            raise InvalidRequestError(f"{drafter} uses its target's embedding; name the target with --target")
        check_target(source, model_folder(target))
        whole, _ = read_lazily(model_folder(target))
        embedding = getattr(getattr(whole, "model", None), "embed_tokens", None)
    model, config = read_lazily(source, embedding)
    if isinstance(model, Eagle):
        raise InvalidRequestError(f"{drafter} is an EAGLE head, which needs no export; copy the folder")
    if model_type(model) != "llama" and not isinstance(model, Drafter):
        raise InvalidRequestError(
            f"{drafter} is a {model_type(model)} model; only Llama drafters can be exported, use one of those"
        )
    model, config = to_hugging_face(model, config)
    if isinstance(model, Drafter):
        model, config = plain_llama(model), {key: value for key, value in config.items() if key not in OWN_KEYS}
    if quantize:
        model, config = quantized(model, config, quantize)
    with locked(out, out.with_name(f".{out.name}.lock")), replacing(out) as aside:
        if out.exists():  # another process has created it meanwhile
            raise InvalidRequestError(f"{out} exists; choose a folder that does not exist yet")
        aside.mkdir()
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(aside / "model.safetensors"), weights, metadata={"format": "mlx" if quantize else "pt"})
        write_json(aside / "config.json", config)
        write_tokenizer(source, aside)
        generation = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
        write_json(aside / "generation_config.json", generation)
        card = model_card(out.name, config, sum(weight.size for weight in weights.values()), quantize, facts)
        (aside / "README.md").write_text(card, encoding="utf-8")
    return sorted(out.iterdir())


def check_target(drafter: Path, target: Path) -> None:
    """Check that a drafter that uses its target's embedding was made for this target.

    Args:
        drafter: The drafter's folder. Its ``training.json`` may have a fingerprint of the target.
        target: The target's folder.

    Raises:
        InvalidRequestError: The drafter was trained for another model.
        TokenizerMismatchError: The two have different tokenizers.
    """
    if any((drafter / name).exists() for name in TOKENIZER_FILES):
        check_same_tokens(read_tokenizer(target), read_tokenizer(drafter))
    record = drafter / "training.json"
    inputs = read_object(record).get("inputs") if record.exists() else None
    trained_for = inputs.get("target") if isinstance(inputs, dict) else None
    if trained_for not in (None, model_fingerprint(target, read_config(target))):
        raise InvalidRequestError(
            f"{drafter} was trained for another model than {target}; name the target that it was trained for"
        )


def to_hugging_face(model: nn.Module, config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Convert a Llama model and its config to Hugging Face's layout.

    Quantized weights are dequantized. The rows of q and k are put in Hugging Face's half-split order.
    """
    llama: Any = dequantize_model(model)
    if config.get("rope_traditional"):
        for layer in llama.layers:
            attention = layer.self_attn
            attention.q_proj.weight = half_split(attention.q_proj.weight, attention.n_heads)
            attention.k_proj.weight = half_split(attention.k_proj.weight, attention.n_kv_heads)
    config = {key: value for key, value in config.items() if key not in MLX_ONLY and value is not None}
    # If the key is missing, the defaults of transformers and mlx-lm differ.
    config["tie_word_embeddings"] = llama.args.tie_word_embeddings
    return llama, {**config, "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}


def plain_llama(drafter: Drafter) -> Drafter:
    """Return a Llama model with the embedding and the whole vocabulary of the target.

    All tokens that the drafter cannot output get the same row in the head. Its logit is far below the others'.

    Args:
        drafter: A drafter with float weights.
    """
    config, output_tokens = drafter.config, drafter.output_tokens
    head, table = drafter.lm_head.weight, drafter.model.embed_tokens.weight
    if output_tokens is not None:
        tokens = mx.random.randint(0, config.vocab_size, RANDOM_TOKENS, key=mx.random.key(0))
        states = drafter.model(tokens).astype(mx.float32).flatten(0, 1)
        wanted = mx.logsumexp(states @ head.T.astype(mx.float32), axis=-1) - UNUSED_LOGITS_BELOW
        row = mx.array(fitted_row(np.array(states, np.float64), np.array(wanted, np.float64))).astype(head.dtype)
        every = mx.broadcast_to(row, (config.vocab_size, config.hidden_size))
        head = mx.put_along_axis(every, mx.broadcast_to(output_tokens[:, None], head.shape), head, axis=0)
    plain = Drafter(replace(config, draft_vocab_size=None, shared_embedding=False))
    weights: dict[str, mx.array] = dict(tree_flatten(drafter.parameters()))
    weights.pop("d2t", None)
    plain.load_weights([*{**weights, "lm_head.weight": head, EMBEDDING: table.astype(head.dtype)}.items()])
    return plain


def fitted_row(states: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return the row w [H] of a head for which w · h is near a logit for each hidden state h, by ridge regression.

    Args:
        states: Hidden states [N, H].
        logits: The logit for each state [N].
    """
    moments = states.T @ states / len(states)
    ridge = RIDGE * np.trace(moments) / len(moments) * np.eye(len(moments))
    return np.linalg.solve(moments + ridge, states.T @ logits / len(states))


def half_split(rows: mx.array, heads: int) -> mx.array:
    """Reorder the rows of a projection [rows, H] from Meta's interleaved pairs to Hugging Face's two halves."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def write_tokenizer(source: Path, out: Path) -> None:
    """Copy the tokenizer of ``source`` to ``out``, converted to Hugging Face's layout if needed.

    Raises:
        ModelLoadError: ``source`` has no tokenizer.
    """
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
    """Return the text of the model card, README.md on the hub.

    Args:
        name: Name of the model.
        config: The exported config.
        parameters: Number of stored values.
        quantize: The quantization, or None.
        facts: Facts about the drafter.
    """
    stated = {field.name: getattr(facts, field.name) or "not recorded" for field in fields(facts)}
    shape = f"{config['num_hidden_layers']} layers, hidden size {config['hidden_size']}, {config['vocab_size']} tokens"
    return f"""---
library_name: mlx
license: {facts.license or "other"}
pipeline_tag: text-generation
tags: [speculative-decoding, drafter, mlxspec]
---

# {name}

A drafter for speculative decoding: it proposes tokens and a larger target model verifies them, so that the text
follows the target's own distribution.

| | |
|---|---|
| target | {stated["base"]} |
| training data | {stated["data"]} |
| loss | {stated["loss"]} |
| measured block efficiency | {stated["block_efficiency"]} |
| shape | {shape} |
| stored values | {parameters:,}{f", quantized ({quantize}), for MLX only" if quantize else ""} |
| license | {stated["license"]} |

```bash
mlxspec generate --target TARGET --drafter {name} "Once upon a time"
mlx_lm.generate --model TARGET --draft-model {name} --prompt "Once upon a time"
```
"""


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder that ``export`` wrote to the hub.

    Args:
        folder: The exported folder.
        repository: Repository name on the hub, owner/name. It is created if it does not exist.
        private: Whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        ModelLoadError: The folder has no exported model.
        InvalidRequestError: The hub refuses the upload or cannot be reached.
    """
    check_repository_name(repository)
    files_to_push(folder)
    try:
        api = huggingface_hub.HfApi()
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a drafter with mlxspec")
    except Exception as error:  # the hub, the network or the token may fail in many ways
        raise InvalidRequestError(
            f"cannot upload to {repository}: {in_one_line(error)}; log in with `hf auth login` and check the name"
        ) from None
    return str(address)


def check_repository_name(repository: str) -> None:
    """Check a repository name. Raises InvalidRequestError if the hub does not allow it or it has no owner."""
    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise InvalidRequestError(
            f"{repository} is no name of a repository ({in_one_line(error)}); use owner/name, such as "
            "somebody/llama2-drafter"
        ) from None


def files_to_push(folder: Path) -> list[Path]:
    """Return the files that ``push`` uploads.

    Raises:
        ModelLoadError: The folder has no exported model.
        InvalidRequestError: It holds recorded answers, which are never uploaded.
    """
    missing = [name for name in ("config.json", "model.safetensors", "README.md") if not (folder / name).is_file()]
    if missing:
        raise ModelLoadError(f"{folder} has no {' and no '.join(missing)}; create it with `mlxspec export` first")
    for record in (*folder.rglob(RECORDING), *folder.rglob("[0-9]*-[0-9]*.npz")):
        raise InvalidRequestError(f"{record.parent} holds recorded answers, which are private; move it elsewhere")
    return sorted(path for path in folder.rglob("*") if path.is_file())
