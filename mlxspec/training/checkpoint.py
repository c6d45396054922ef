"""Checkpoints: whole or not there.

A checkpoint is a folder ``step-00001000`` with the weights, the optimizer's state and ``state.json``. It is written
under another name and renamed, so a run that is killed at any moment finds its last whole one. Random keys and the
position in the data are functions of (seed, step), so the step is all there is to know of them.
"""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlxspec.errors import TrainingError, in_one_line
from mlxspec.files import explain_write_errors, read_json, remove_leftovers, replacing, write_json

KEPT = 2


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write the checkpoint of ``step`` under ``folder`` and delete all but the last two.

    Raises TrainingError if the disk is full or not writable; the checkpoints before it stay.
    """
    whole = folder / checkpoint_name(step)
    with explain_write_errors(f"the checkpoint of step {step} in {folder}"), replacing(whole) as aside:
        aside.mkdir()
        mx.save_safetensors(str(aside / "model.safetensors"), dict(tree_flatten(model.parameters())))
        mx.save_safetensors(str(aside / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
        write_json(aside / "state.json", {"step": step, **state})
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return whole


def load_checkpoint(folder: Path, model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any] | None:
    """Put the last checkpoint under ``folder`` into model and optimizer; its state, None if there is none.

    Raises TrainingError if it cannot be read or is of another model.
    """
    remove_leftovers(folder)
    found = checkpoints(folder)
    if not found:
        return None
    try:
        model.load_weights(str(found[-1] / "model.safetensors"))
        optimizer.state = tree_unflatten(list(mx.load(str(found[-1] / "optimizer.safetensors")).items()))
        state = read_json(found[-1] / "state.json")
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
