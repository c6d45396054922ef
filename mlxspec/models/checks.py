"""Checks that a model folder is complete and safe to read. They run before anything else opens its files.

Model folders are untrusted. mlxspec reads safetensors files, npz files without pickled objects, and PyTorch files whose
pickle names tensors only (``torch_files``). It does not follow links that lead out of the folder, and never imports or
runs code from a model folder.
"""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import SafetensorError, safe_open

from mlxspec.errors import ModelLoadError, in_one_line
from mlxspec.files import fingerprint_files, read_json

# Names of weight files: of Hugging Face, of MLX's layout of 2023, and of PyTorch if there are no others.
SAFETENSORS, OLD_FILES, TORCH_FILES = "model*.safetensors", "weights*.npz", "pytorch_model*.bin"
LAYER_COUNTS = ("num_hidden_layers", "n_layers")


def check_folder(folder: Path) -> None:
    """Refuse a folder that requires its own code to be run, or that links to files outside of it.

    The hub's cache consists of links into itself. Those are allowed, wherever the cache lies.

    Raises:
        ModelLoadError: The folder is refused, or one of its JSON files cannot be read.
    """
    roots = [folder.resolve(), Path(huggingface_hub.constants.HF_HUB_CACHE).resolve()]
    if roots[0].parent.name == "snapshots":
        roots.append(roots[0].parents[1] / "blobs")
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
        if key.endswith("_file") and isinstance(value, str) and leads_out(value, folder):
            raise ModelLoadError(f"{folder / 'tokenizer_config.json'}: {key} points out of the folder; remove it")


def stored_weights(folder: Path) -> list[Path]:
    """Return the weight files of a model's folder, sorted. PyTorch's files count only if there are no others."""
    return sorted([*folder.glob(SAFETENSORS), *folder.glob(OLD_FILES)]) or sorted(folder.glob(TORCH_FILES))


def model_fingerprint(folder: Path, config: dict[str, Any]) -> str:
    """Return a fingerprint of a model's stored weights and of the content of its config.json."""
    return fingerprint_files(stored_weights(folder), json.dumps(config, sort_keys=True))


def leads_out(name: str, folder: Path) -> bool:
    """Return whether a path in a config names an existing file outside of the folder.

    Configs often contain paths of the machine that they were written on. Paths that do not exist are harmless.
    """
    try:
        found = [path.resolve() for path in (Path(name), folder / name) if path.exists()]
    except (OSError, ValueError):  # not a valid path: too long, or with a zero byte
        return False
    return not all(path.is_relative_to(folder.resolve()) for path in found)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that contains an object. Raises ModelLoadError if it cannot be read or is something else."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
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


def check_safetensors(path: Path) -> list[str]:
    """Check that a safetensors file is complete, and return the names of its tensors.

    MLX does not check this, and would use arbitrary numbers for missing bytes.

    Raises:
        ModelLoadError: The file is not a safetensors file, or is truncated.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{path} is not a complete safetensors file ({in_one_line(error)}); copy or download it again"
        ) from None
