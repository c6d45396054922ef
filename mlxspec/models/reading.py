"""Read one model or tokenizer from a hub id or folder. Code found in a model folder is never executed."""

import contextlib
import difflib
import re
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer

from mlxspec.errors import MlxspecError, ModelLoadError, in_one_line
from mlxspec.files import write_json
from mlxspec.models.attention import attention_windows
from mlxspec.models.catalog import KNOWN_MODELS
from mlxspec.models.checks import (
    OLD_FILES,
    SAFETENSORS,
    TORCH_FILES,
    check_folder,
    check_numbers,
    check_safetensors,
    read_object,
    stored_weights,
)
from mlxspec.models.config import completed
from mlxspec.models.drafter import OWN_KEYS, Drafter
from mlxspec.models.eagle import is_eagle, read_eagle
from mlxspec.models.old_layout import is_old_config, read_old_model
from mlxspec.models.quantizing import dequantized, faster_dequantized
from mlxspec.models.sentencepiece_bpe import sentencepiece_tokenizer
from mlxspec.models.sharding import Group, shard
from mlxspec.models.tokens import LLAMA2_TEMPLATE
from mlxspec.models.torch_files import convert_to_safetensors

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", SAFETENSORS, OLD_FILES]
INDEXES = {SAFETENSORS: "model.safetensors.index.json", TORCH_FILES: "pytorch_model.bin.index.json"}
QUANT_CONFIG = "hf_quant_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
NO_CODE = {"trust_remote_code": False}  # explicit, or else transformers may ask on the terminal
LLAMA2_CHAT = re.compile(r"llama-?2-\d+b-chat", re.IGNORECASE)


def model_folder(name: str | Path) -> Path:
    """Return the local folder of a model: ``name`` itself, or a snapshot of the hub, which is downloaded if missing.

    Raises:
        ModelLoadError: There is no such folder or repository, or it cannot be downloaded.
    """
    if known := KNOWN_MODELS.get(str(name)):
        name = known.hub_id
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise ModelLoadError(f"{name} is a file; use the folder that holds config.json and the weights")
    except (OSError, RuntimeError) as error:  # a name too long for a file, or an unknown ~user
        raise ModelLoadError(f"no such folder: {str(name)[:80]} ({in_one_line(error)}); use a model folder") from None
    if not HUB_ID.fullmatch(str(name)):
        nearest = difflib.get_close_matches(str(name), KNOWN_MODELS, 1)
        meant = f'; did you mean "{nearest[0]}"?' if nearest else ""
        raise ModelLoadError(
            f"no such folder: {name}; use a model folder, a hub id like owner/name, or a short name of "
            f"`mlxspec models`{meant}"
        )
    try:
        folder = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=HUB_FILES))
        if not stored_weights(folder):
            folder = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=[*HUB_FILES, TORCH_FILES]))
        return folder
    except GatedRepoError:
        raise ModelLoadError(f"{name} is gated: accept its license on the hub, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelLoadError(f"no folder and no hub repository is named {name}; check the spelling") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{name} is not a folder, not in the hub's local cache, and cannot be downloaded now "
            f"({in_one_line(error)}); connect to the network once, or give a folder"
        ) from None


def on_disk(name: str) -> Path | None:
    """Return the folder of a short name in the hub's local cache, or None if it is not there with its weights."""
    with contextlib.suppress(LocalEntryNotFoundError):
        folder = Path(huggingface_hub.snapshot_download(KNOWN_MODELS[name].hub_id, local_files_only=True))
        return folder if stored_weights(folder) else None
    return None


def read_model(
    folder: Path,
    dtype: mx.Dtype | None = None,
    widen: bool = False,
    embedding: nn.Module | None = None,
    group: Group | None = None,
) -> nn.Module:
    """Read the model of a folder into memory.

    Args:
        folder: The model's folder.
        dtype: Precision of the weights. None for ``preferred_dtype``.
        widen: Dequantize a quantized model where that is faster (``faster_dequantized``).
        embedding: The target's input embedding, for a drafter that shares it.
        group: Processes over which the model is divided. None for a whole model.

    Raises:
        ModelLoadError: The model cannot be read or has NaN weights.
        UnsupportedModelError: Its cache cannot be rewound.
    """
    model, _ = read_lazily(folder, embedding)
    attention_windows(model)
    cast(model, dtype or preferred_dtype(model))
    if widen and (dtype is None or dtype == mx.float32) and faster_dequantized(model):
        model = dequantized(model)  # after the scales became float32, or else the weights are rounded to 16 bits
    if group is not None:
        shard(model, group)  # before anything is read, so that no process holds the whole model
    for name, weight in dict(tree_flatten(model.parameters())).items():
        try:
            has_nan = mx.issubdtype(weight.dtype, mx.floating) and mx.isnan(weight).any().item()
        except RuntimeError as error:
            raise ModelLoadError(
                f"the weights of {folder} cannot be read: {in_one_line(error)}; copy or download the model again"
            ) from error
        if has_nan:
            raise ModelLoadError(f"{name} in {folder} contains NaN; copy or download the model again")
    mx.eval(model.state)  # not only its parameters: a lazy array cannot be evaluated in another thread
    return model


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Convert a model's weights, except those that mlx-lm keeps as they are, such as a router's correction."""
    converts = getattr(model, "cast_predicate", lambda name: True)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    model.set_dtype(dtype)
    model.load_weights([(name, weight) for name, weight in weights.items() if not converts(name)], strict=False)


def read_lazily(folder: Path, embedding: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model whose weights are read when they are first used, and its config. Raises ModelLoadError."""
    check_folder(folder)
    config = read_config(folder)
    files = weight_files(folder, config)
    try:
        if is_old_config(config):
            return read_old_model(config, files)
        with tempfile.TemporaryDirectory() as scratch:
            files = [as_safetensors(file, Path(scratch)) for file in files]
            tensors = [name for file in files for name in check_safetensors(file)]
            check_numbers(config, folder / "config.json", len(tensors))
            if is_eagle(tensors):
                return read_eagle(folder, config, files), config
            if any(config.get(key) for key in OWN_KEYS):
                return Drafter.load(folder, embedding=embedding), config
            return load_with_mlx_lm(folder, completed(config, tensors), files)
    except MlxspecError:
        raise
    except Exception as error:  # a malformed folder makes the model's code raise anything
        kind = config.get("model_type", "Llama in the old MLX layout")
        raise ModelLoadError(f"{folder} cannot be read as a {kind}: {in_one_line(error)}") from error


def as_safetensors(file: Path, scratch: Path) -> Path:
    """Return the file itself or, for a file of PyTorch, a copy in ``scratch`` that is converted to safetensors."""
    if file.suffix != ".bin":
        return file
    converted = scratch / f"{file.stem}.safetensors"
    convert_to_safetensors(file, converted)
    return converted


def load_with_mlx_lm(folder: Path, config: dict[str, Any], files: list[Path]) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model lazily from exactly these files. mlx-lm would take every model*.safetensors that the folder has."""
    with tempfile.TemporaryDirectory() as scratch:
        view = Path(scratch)
        write_json(view / "config.json", config)
        for number, file in enumerate(files):
            (view / f"model-{number:05d}.safetensors").symlink_to(file.resolve())
        if (folder / QUANT_CONFIG).exists():
            (view / QUANT_CONFIG).symlink_to((folder / QUANT_CONFIG).resolve())
        return load_model(view, lazy=True)  # the files stay open until their weights are read


def preferred_dtype(model: nn.Module) -> mx.Dtype:
    """Return float32 on the CPU back end; on a GPU the weights' 16-bit type, or bfloat16 if they are float32."""
    if mx.default_device().type == mx.cpu:
        return mx.float32
    present = {weight.dtype for weight in dict(tree_flatten(model.parameters())).values()}
    return mx.float16 if mx.float16 in present and mx.bfloat16 not in present else mx.bfloat16


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises ModelLoadError if it is missing or not the config of a model."""
    if not (folder / "config.json").exists():
        raise ModelLoadError(f"{folder} has no config.json; use the folder of a model in the Hugging Face layout")
    config = read_object(folder / "config.json")
    if isinstance(layer := config.get("transformer_layer_config"), dict):  # of an EAGLE-3 head by vLLM's speculators
        config = {**layer, **{key: value for key, value in config.items() if value is not None}}
    if not (isinstance(config.get("model_type"), str) or is_old_config(config)):
        raise ModelLoadError(
            f"{folder / 'config.json'} names no model_type; use the folder of a model in the Hugging Face layout"
        )
    return config


def weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Return the files that hold the weights: those that the index names, if there is one.

    Raises:
        ModelLoadError: There are none, or the index is malformed or names a file that is missing.
    """
    patterns = [OLD_FILES] if is_old_config(config) else [SAFETENSORS, TORCH_FILES]
    for pattern in patterns:
        if pattern in INDEXES and (folder / INDEXES[pattern]).exists():
            return indexed_files(folder / INDEXES[pattern])
        if files := sorted(folder.glob(pattern)):
            return files
    others = ", ".join(path.name for path in sorted(folder.glob("*.safetensors"))[:3])
    advice = f"; rename {others}, which mlx-lm would not read either" if others else "; copy the weights into it"
    raise ModelLoadError(f"{folder} has no weights: no file is named {' or '.join(patterns)}{advice}")


def indexed_files(index: Path) -> list[Path]:
    """Return the files that an index names. Raises ModelLoadError as ``weight_files`` does."""
    named = read_object(index).get("weight_map")
    names = set(named.values()) if isinstance(named, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelLoadError(f"{index} does not name the files of the weights; copy or download it again")
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise ModelLoadError(f"{index} names {name}, which is missing; copy or download it")
    return [index.parent / name for name in sorted(names)]


def read_tokenizer(folder: Path, name: str = "") -> Any:
    """Read a folder's tokenizer, in mlx-lm's wrapper.

    Args:
        folder: The model's folder.
        name: The name by which the user asked for the model. It may identify a Llama 2 Chat model.

    Raises:
        ModelLoadError: The tokenizer is missing or cannot be read.
    """
    check_folder(folder)
    config = read_config(folder)
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise ModelLoadError(f"{folder} has no tokenizer; copy {' or '.join(TOKENIZER_FILES)} into it")
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = load_tokenizer(folder, NO_CODE, eos_token_ids=eos_token_ids(folder, config))
        else:
            tokenizer = TokenizerWrapper(sentencepiece_tokenizer(folder), eos_token_ids=eos_token_ids(folder, config))
    except MlxspecError:
        raise
    except Exception as error:  # a malformed tokenizer file makes transformers raise anything
        raise ModelLoadError(f"the tokenizer of {folder} cannot be read: {in_one_line(error)}") from error
    if not tokenizer.has_chat_template and LLAMA2_CHAT.search(f"{name} {folder}"):
        tokenizer.chat_template = LLAMA2_TEMPLATE
        tokenizer.has_chat_template = True
    return tokenizer


def eos_token_ids(folder: Path, config: dict[str, Any]) -> list[int] | None:
    """Return the ids that end an answer. generation_config.json takes precedence over config.json."""
    file = folder / "generation_config.json"
    named = (read_object(file) if file.exists() else {}).get("eos_token_id", config.get("eos_token_id"))
    ids = named if isinstance(named, list) else [named]
    return [token for token in ids if type(token) is int] or None
