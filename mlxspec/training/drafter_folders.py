"""The folders of drafters that are trained: reading, writing and describing them."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxspec.errors import InvalidRequestError
from mlxspec.files import fingerprint, read_json, replacing, write_json
from mlxspec.models.drafter import Drafter
from mlxspec.models.eagle import Eagle
from mlxspec.models.quantizing import COPIED
from mlxspec.models.reading import TOKENIZER_FILES, model_folder, read_config, read_lazily, read_tokenizer
from mlxspec.models.tokens import check_same_tokens
from mlxspec.training.objectives import AnyDrafter
from mlxspec.training.run_folder import Metrics
from mlxspec.training.target import Target


def load_drafter(name: str | Path, target: Target) -> AnyDrafter:
    """Load a drafter to continue training from.

    Args:
        name: Folder, hub id or short name.
        target: The target that the drafter will be trained for.

    Raises:
        MlxspecError: The drafter cannot be read, is quantized, or has another tokenizer than the target.
    """
    folder = model_folder(name)
    if "quantization" in read_config(folder):
        raise InvalidRequestError(f"{folder} is quantized and cannot be trained; start from the unquantized drafter")
    if any((folder / file).exists() for file in TOKENIZER_FILES):
        check_same_tokens(target.tokenizer, read_tokenizer(folder))
    return read_drafter(folder, target)


def read_drafter(folder: Path, target: Target) -> AnyDrafter:
    """Return a drafter that was made for this target, in float32. Raises MlxspecError if it cannot be read."""
    if read_config(folder).get("shared_embedding"):  # else the target need not be loaded
        return Drafter.load(folder, mx.float32, target.embedding)
    model, _ = read_lazily(folder)
    if not isinstance(model, Eagle):
        return Drafter.load(folder, mx.float32)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def write_drafter(drafter: AnyDrafter, out: Path, target: Target, inputs: dict[str, Any], result: Metrics) -> None:
    """Write a stage's drafter with its tokenizer and the record ``training.json``.

    Args:
        drafter: The drafter.
        out: The folder to write.
        target: The target, for its tokenizer.
        inputs: The inputs of the stage.
        result: The result of the stage.
    """
    with replacing(out) as aside:
        drafter.save(aside)
        for name in (*COPIED, *TOKENIZER_FILES):
            if (target.folder / name).exists():
                shutil.copyfile(target.folder / name, aside / name)
        write_json(aside / "training.json", {"inputs": inputs, "result": result})


def trained_steps(drafter: Path) -> int | None:
    """Return the number of steps after which a stage wrote its drafter, or None if no stage did."""
    try:
        steps = read_json(drafter / "training.json")["inputs"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return steps if isinstance(steps, int) else None


def describe(drafter: AnyDrafter, coverage: float | None) -> str:
    """Return the size of a new drafter, and the share of the answers' tokens that it can output, in words."""
    share = "" if coverage is None else f", {100 * coverage:.2f}% of the answers' tokens are in its vocabulary"
    return f"{drafter.num_parameters:,} parameters{share}"


def weights_fingerprint(drafter: AnyDrafter) -> str:
    """Return a fingerprint of a drafter's shape and weights."""
    weights = sorted(dict(tree_flatten(drafter.parameters())).items())
    parts = (memoryview(weight.astype(mx.float32).flatten()) for _, weight in weights)
    return fingerprint(repr(drafter.config), *parts)
