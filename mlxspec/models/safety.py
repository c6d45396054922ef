"""What a model folder must be before anything reads it: whole, about its own files, and free of code.

Model folders come from strangers. Only safetensors and npz without pickle are read; a file that is a link to somewhere
else is not followed; nothing in a folder is imported or run.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

import huggingface_hub

from mlxspec.errors import ModelLoadError

LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
SMALL_NUMBERS = ("num_hidden_layers", "n_layers")


def check_folder(folder: Path) -> None:
    """Raise ModelLoadError for a folder that asks for code to be run or links to files outside of it.

    The hub's cache is made of links into itself; those are followed.
    """
    roots = [folder.resolve(), Path(huggingface_hub.constants.HF_HUB_CACHE).resolve()]
    for path in folder.iterdir():
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise ModelLoadError(f"{path} is a link to a file outside of the model's folder; copy the file into it")
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    maps = [part.get("auto_map") for part in (settings, config)]
    if "model_file" in config or any(isinstance(one, dict) and "AutoTokenizer" in one for one in maps):
        raise ModelLoadError(
            f"{folder} asks for code of its own to be run, which mlxspec never does; use another model"
        )
    for key, value in settings.items():
        if key.endswith("_file") and isinstance(value, str) and Path(value).name != value:
            raise ModelLoadError(f"{folder / 'tokenizer_config.json'}: {key} points out of the folder; remove it")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelLoadError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON ({error}); copy or download it again") from None
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds no JSON object; copy or download it again")
    return content


def check_numbers(config: dict[str, Any], path: Path, tensors: int) -> None:
    """Refuse sizes that no model has, before a model is built from them. Every layer has at least one tensor."""
    for name in SMALL_NUMBERS:
        layers = config.get(name, 1)
        if not isinstance(layers, int) or isinstance(layers, bool) or not 0 < layers <= tensors:
            raise ModelLoadError(
                f"{path}: {name} is {layers!r}, and the weights have {tensors} tensors; check the file"
            )
    context = config.get("max_position_embeddings")
    if context is not None and (not isinstance(context, int) or isinstance(context, bool) or context < 1):
        raise ModelLoadError(f"{path}: max_position_embeddings is {context!r}; expected a positive number")


def check_safetensors(path: Path) -> int:
    """The number of tensors in a file. A torn or mangled one is named here, before missing bytes are read as weights.

    The layout is 8 bytes of header length, a JSON header, then the tensors' bytes at the offsets that it gives.
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
            ends = [checked_end(entry) for entry in header.values()]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            raise ModelLoadError(f"{path} is not a whole safetensors file; copy or download it again") from None
    expected = 8 + length + max(ends, default=0)
    if expected != size:
        raise ModelLoadError(f"{path} is torn: {size} bytes, {expected} by its header; copy or download it again")
    return len(ends)


def checked_end(entry: dict[str, Any]) -> int:
    """Where a tensor ends, if its shape and type fill exactly the bytes that it claims."""
    begin, end = entry["data_offsets"]
    shape = entry["shape"]
    if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
        raise ValueError
    if end - begin != math.prod(shape) * ITEM_BYTES[entry["dtype"]]:
        raise ValueError
    return end
