"""Quantized copies of models, made once and kept next to the hub's cache."""

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

from mlxspec.errors import InUseError, InvalidRequestError
from mlxspec.files import fingerprint, locked, remove_leftovers, replacing
from mlxspec.models.memory import fits_widened

# The values of quantize, with the arguments of mlx-lm's quantize_model.
QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "4": {"bits": 4, "group_size": 64, "mode": "affine"},
    "8": {"bits": 8, "group_size": 64, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}
MODEL_SUFFIXES = (".json", ".safetensors", ".npz", ".bin", ".model", ".jinja", ".txt")
DRAFTER_BITS = ("4", "8")  # for a draft model that is quantized in memory
COPY_NAME = re.compile(rf".+-[0-9a-f]{{12}}-({'|'.join(QUANTIZATIONS)})")
COPIED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
          "generation_config.json", "chat_template.jinja", "added_tokens.json", "vocab.json", "merges.txt")  # fmt: skip


def quantized_copy(folder: Path, kind: str, read: Callable[[Path], tuple[nn.Module, dict[str, Any]]]) -> Path:
    """Return the folder of a quantized copy of a model, which is created if it does not exist.

    Args:
        folder: The folder of the original.
        kind: A key of QUANTIZATIONS.
        read: Reads a model, lazily, and its config.

    Raises:
        InvalidRequestError: The kind is unknown or the model is quantized already.
    """
    if kind not in QUANTIZATIONS:
        raise InvalidRequestError(f"quantize is {kind!r}; use one of {', '.join(QUANTIZATIONS)}, none")
    copy = cache_folder() / f"{folder.resolve().name[:40]}-{folder_fingerprint(folder)}-{kind}"
    if not has_home(copy):
        raise InvalidRequestError("the quantized copy has no place, since the home folder does not exist; set HF_HOME")
    while not copy.is_dir():
        try:
            with locked(copy, cache_folder() / ".lock"):  # one copy at a time, so that leftovers belong to no process
                remove_leftovers(cache_folder())
                if not copy.is_dir():
                    write_copy(folder, kind, copy, read)
        except InUseError:
            time.sleep(0.2)  # another process is making it, or another copy
    return copy


def write_copy(folder: Path, kind: str, copy: Path, read: Callable[[Path], tuple[nn.Module, dict[str, Any]]]) -> None:
    """Write a quantized copy of a model."""
    model, config = read(folder)
    if "quantization" in config:
        raise InvalidRequestError(f"{folder} is quantized already; load it without quantize")
    with replacing(copy) as aside:
        model, config = quantized(model, config, kind)
        save_model(aside, model, donate_model=True)  # frees each weight once it is written
        save_config(config, aside / "config.json")
        for name in COPIED:
            if (folder / name).exists():
                shutil.copyfile(folder / name, aside / name)


def quantized(model: nn.Module, config: dict[str, Any], kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model and its config quantized as ``kind``, a key of QUANTIZATIONS."""
    with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints the bits per weight
        return quantize_model(model, config, **QUANTIZATIONS[kind])


def quantize_in_memory(model: nn.Module, kind: str) -> None:
    """Quantize the linear layers and tables of a model in place, but not a table that it shares with another model.

    Args:
        model: The model.
        kind: "4" or "8".

    Raises:
        InvalidRequestError: The kind is unknown, the model is quantized already, or its shapes do not fit.
    """
    if kind not in DRAFTER_BITS:
        raise InvalidRequestError(f"quantize_drafter is {kind!r}; use one of {', '.join(DRAFTER_BITS)}")
    shared = getattr(model, "shared_table", None)
    tables = [module for module in model.modules() if hasattr(module, "weight") and module is not shared]
    if any(hasattr(module, "bits") for module in tables):
        raise InvalidRequestError("the draft model is quantized already; leave out quantize_drafter")
    check_divisible(model, kind)
    numbers = {id(module) for module in tables if hasattr(module, "to_quantized")}
    nn.quantize(model, **QUANTIZATIONS[kind], class_predicate=lambda _, module: id(module) in numbers)


def check_divisible(model: nn.Module, kind: str) -> None:
    """Check that the rows of a draft model's weights can be divided into groups for quantization.

    Args:
        model: The model.
        kind: "4" or "8".

    Raises:
        InvalidRequestError: A row cannot be divided.
    """
    size, shared = QUANTIZATIONS[kind]["group_size"], getattr(model, "shared_table", None)
    modules: list[Any] = [module for module in model.modules() if module is not shared]
    for module in modules:
        if hasattr(module, "to_quantized") and module.weight.shape[-1] % size:
            raise InvalidRequestError(
                f"the draft model has rows of {module.weight.shape[-1]} weights, which groups of {size} do not divide; "
                "leave out the quantization"
            )


def rounded(weight: mx.array, kind: str) -> mx.array:
    """Return the weights [N, M] as quantizing and dequantizing them as ``kind`` leaves them, "4" or "8"."""
    how = QUANTIZATIONS[kind]
    return mx.dequantize(*mx.quantize(weight, **how), **how)


def cache_folder() -> Path:
    """Return the folder for what mlxspec keeps between runs: quantized copies and costs of blocks."""
    return Path(huggingface_hub.constants.HF_HOME) / "mlxspec"


def has_home(folder: Path) -> bool:
    """Return whether a folder may be created. A home folder that does not exist is not created."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home folder
        return folder.is_absolute()
    return home.is_dir() or not folder.is_relative_to(home)


def copies() -> list[Path]:
    """Return the quantized copies on disk."""
    return sorted(path for path in cache_folder().glob("*") if COPY_NAME.fullmatch(path.name) and path.is_dir())


def folder_fingerprint(folder: Path) -> str:
    """Return a fingerprint of the folder's path and of the size and time of the files that belong to a model."""
    own = [path for path in sorted(folder.iterdir()) if path.suffix in MODEL_SUFFIXES and path.is_file()]
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in own]
    return fingerprint(json.dumps([str(folder.resolve()), files]), digits=12)


def dequantized(model: nn.Module) -> nn.Module:
    """Return the model with float32 weights. On the CPU back end it is then many times faster over a batch of rows.

    A table that it shares with another model stays as it is. Set the model to float32 before, since scales in 16 bits
    round the weights.
    """
    shared = getattr(model, "shared_table", None)
    floats: Any = dequantize_model(model)
    floats.set_dtype(mx.float32)  # mxfp4 and nvfp4 become bfloat16
    if shared is not None:
        floats.model.embed_tokens = shared
    return floats


def faster_dequantized(model: nn.Module) -> bool:
    """Return whether a quantized model should be held in float32 on this device (``fits_widened``)."""
    shared = getattr(model, "shared_table", None)
    modules: list[Any] = [module for module in model.modules() if module is not shared]
    layers = [module for module in modules if hasattr(module, "bits") and "weight" in module]
    return fits_widened(sum(4 * layer.weight.size * 32 // layer.bits for layer in layers))
