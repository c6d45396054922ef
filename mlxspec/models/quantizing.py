"""Quantised copies of models: made once, kept beside the hub's cache, found again by what they were made of."""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.nn as nn
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model

from mlxspec.errors import InvalidRequestError
from mlxspec.files import fingerprint, replacing

# --quantize's values -> bits, group size and mode, as mlx-lm has them.
QUANTIZATIONS = {
    "4": {"bits": 4, "group_size": 64, "mode": "affine"},
    "8": {"bits": 8, "group_size": 64, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
}
COPIED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
          "generation_config.json", "chat_template.jinja", "added_tokens.json", "vocab.json", "merges.txt")  # fmt: skip


def quantized_copy(folder: Path, kind: str, read: Callable[[Path], tuple[nn.Module, dict[str, Any]]]) -> Path:
    """The folder of ``folder``'s model quantised as ``kind``; made by ``read`` (lazily) and written if it is not there.

    It is written aside and renamed, so that an interrupted run leaves nothing behind that looks whole.
    Raises InvalidRequestError for an unknown kind or a model that is quantised already.
    """
    if kind not in QUANTIZATIONS:
        raise InvalidRequestError(f"quantize is {kind!r}; use one of {', '.join(QUANTIZATIONS)}, none")
    copy = cache_folder() / f"{folder.resolve().name[:40]}-{folder_fingerprint(folder)}-{kind}"
    if copy.is_dir():
        return copy
    model, config = read(folder)
    if "quantization" in config:
        raise InvalidRequestError(f"{folder} is quantised already; leave --quantize out")
    with replacing(copy) as aside:
        model, config = quantized(model, config, kind)
        save_model(aside, model, donate_model=True)  # the copy is read back from the disk, not kept twice
        save_config(config, aside / "config.json")
        for name in COPIED:
            if (folder / name).exists():
                shutil.copyfile(folder / name, aside / name)
    return copy


def quantized(model: nn.Module, config: dict[str, Any], kind: str) -> tuple[nn.Module, dict[str, Any]]:
    with contextlib.redirect_stdout(sys.stderr):  # mlx-lm prints the bits per weight
        return quantize_model(model, config, **QUANTIZATIONS[kind])


def cache_folder() -> Path:
    return Path(huggingface_hub.constants.HF_HOME) / "mlxspec"


def folder_fingerprint(folder: Path) -> str:
    """Changes when the folder is another one or a file of weights in it has been replaced."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.*"))]
    return fingerprint(json.dumps([str(folder.resolve()), files]), digits=12)


def dequantized(model: nn.Module) -> nn.Module:
    """The same distribution from float weights: on the CPU back end many times faster over a batch of rows."""
    return dequantize_model(model)
