"""Checks that a model folder is complete and safe to read, made before anything else opens its files.

Model folders come from strangers. mlxspec reads only safetensors files and npz files without pickled objects, does not
follow links that lead out of the folder, and never imports or runs code from a model folder.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

import huggingface_hub

from mlxspec.errors import ModelLoadError
from mlxspec.files import read_json

LONGEST_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
LAYER_COUNTS = ("num_hidden_layers", "n_layers")


def check_folder(folder: Path) -> None:
    """Refuse a folder that asks for its own code to be run or links to files outside of it.

    The hub's cache consists of links into itself. Those are allowed.

    Raises:
        ModelLoadError: The folder is refused, or one of its JSON files cannot be read.
    """
    roots = [folder.resolve(), Path(huggingface_hub.constants.HF_HUB_CACHE).resolve()]
    for path in folder.iterdir():
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise ModelLoadError(f"{path} is a link to a file outside of the model's folder; copy the file into it")
    settings = read_object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    config = read_object(folder / "config.json") if (folder / "config.json").exists() else {}
    maps = [part.get("auto_map") for part in (settings, config)]
    if "model_file" in config or any(isinstance(one, dict) and "AutoTokenizer" in one for one in maps):
        raise ModelLoadError(
            f"{folder} asks for code of its own to be run, which mlxspec never does; use another model"
        )
    for key, value in settings.items():
        if key.endswith("_file") and isinstance(value, str) and Path(value).name != value:
            raise ModelLoadError(f"{folder / 'tokenizer_config.json'}: {key} points out of the folder; remove it")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises ModelLoadError if it does not."""
    try:
        content = read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} does not contain a JSON object; copy or download it again")
    return content


def check_numbers(config: dict[str, Any], path: Path, tensors: int) -> None:
    """Refuse impossible sizes before a model is built from them.

    Args:
        config: The content of config.json.
        path: The file's path, for the message.
        tensors: The number of tensors in the weight files. Every layer has at least one.

    Raises:
        ModelLoadError: A size is not a positive integer, or there are more layers than tensors.
    """
    for name in LAYER_COUNTS:
        layers = config.get(name, 1)
        if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers <= tensors:
            raise ModelLoadError(f"{path}: {name} is {layers!r} but the weights have {tensors} tensors; check the file")
    context = config.get("max_position_embeddings")
    if context is not None and (not isinstance(context, int) or isinstance(context, bool) or context < 1):
        raise ModelLoadError(
            f"{path}: max_position_embeddings is {context!r}; expected a positive integer, check the file"
        )


def check_safetensors(path: Path) -> int:
    """Return the number of tensors in a file, after checking that the file is complete.

    Without this check, missing bytes would be read as weights. The layout is 8 bytes with the length of the header,
    then the header in JSON, then the tensors' bytes at the offsets that the header gives.

    Raises:
        ModelLoadError: The file is not a safetensors file, or is truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        try:
            if length > min(size - 8, LONGEST_HEADER):
                raise ValueError
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ends = [tensor_end(entry) for entry in header.values()]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise ModelLoadError(f"{path} is not a complete safetensors file; copy or download it again") from None
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        raise ModelLoadError(f"{path} has {size} bytes but its header says {expected}; copy or download it again")
    return len(ends)


def tensor_end(entry: dict[str, Any]) -> int:
    """Return the offset at which a tensor ends. Raises ValueError unless its shape and type fill its bytes exactly."""
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
        raise ValueError
    if end - begin != math.prod(shape) * ITEM_BYTES[entry["dtype"]]:
        raise ValueError
    return end
