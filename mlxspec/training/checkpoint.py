"""Checkpoints: whole or not there.

A checkpoint is a folder ``step-00001000`` with the weights, the optimizer's state and ``state.json``. It is written
under another name and renamed, so a run that is killed at any moment finds its last whole one. Random keys and the
position in the data are functions of (seed, step), so the step is all there is to know of them.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlxspec.errors import TrainingError, in_one_line
from mlxspec.training.files import write_json, writing

KEPT = 2
ASIDE = ".writing-"


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write the checkpoint of ``step`` under ``folder`` and delete all but the last two.

    Raises TrainingError if the disk is full or not writable; the checkpoints before it stay.
    """
    whole, aside = folder / checkpoint_name(step), folder / f"{ASIDE}{step:08d}"
    with writing(f"{folder}: the checkpoint of step {step}"):
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_arrays(aside / "model.safetensors", model.parameters())
            save_arrays(aside / "optimizer.safetensors", optimizer.state)
            write_json(aside / "state.json", {"step": step, **state})
            shutil.rmtree(whole, ignore_errors=True)
            os.replace(aside, whole)
            sync_folder(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)  # nothing, once it has its name
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return whole


def load_checkpoint(folder: Path, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any] | None:
    """Put the last checkpoint under ``folder`` into model and optimizer; its state, None if there is none.

    Raises TrainingError if it cannot be read or is of another model.
    """
    for stale in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(stale, ignore_errors=True)
    found = checkpoints(folder)
    if not found:
        return None
    try:
        model.load_weights(str(found[-1] / "model.safetensors"))
        optimizer.state = tree_unflatten(list(mx.load(str(found[-1] / "optimizer.safetensors")).items()))
        state = json.loads((found[-1] / "state.json").read_text())
        mx.eval(model.parameters(), optimizer.state)
    except (OSError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"{found[-1]} cannot be read ({in_one_line(error)}); delete it to go on from the checkpoint before it"
        ) from error
    return state


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """All whole ones, the latest last."""
    return sorted(folder.glob("step-*"))


def save_arrays(path: Path, tree: Any) -> None:
    mx.save_safetensors(str(path), dict(tree_flatten(tree)))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
