"""Checkpoints of a training run.

A checkpoint is a folder ``step-00001000`` with the weights, the optimizer's state, the state of worst-case training if
there is one, and ``state.json``. It is written to a temporary folder, which is then renamed. A run that is killed at
any moment therefore finds its last complete checkpoint. Random keys and the position in the data are functions of
(seed, step), so a checkpoint stores only the step for them.
"""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlxspec.errors import TrainingError, in_one_line
from mlxspec.files import load_arrays, read_json, remove_leftovers, replacing, write_json
from mlxspec.training.robust import Weighting
from mlxspec.training.run_folder import CHECKPOINTS

KEPT = 2  # number of checkpoints that are not deleted


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: optim.Optimizer,
    state: dict[str, Any],
    weighting: Weighting | None = None,
) -> None:
    """Write a checkpoint and delete all but the last two.

    Args:
        folder: The run's folder.
        step: Number of steps taken.
        model: The model.
        optimizer: The model's optimizer.
        state: Further state to store, as JSON.
        weighting: The weights of worst-case training.

    Raises:
        WriteError: The checkpoint cannot be written, for example because the disk is full. Earlier checkpoints remain.
    """
    with replacing(folder / checkpoint_name(step)) as aside:
        aside.mkdir()
        mx.save_safetensors(str(aside / "model.safetensors"), dict(tree_flatten(model.trainable_parameters())))
        mx.save_safetensors(str(aside / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
        if weighting:
            mx.save_safetensors(str(aside / "robust.safetensors"), {"state": mx.array(weighting.state)})
        write_json(aside / "state.json", {"step": step, **state})
    for old in checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(
    folder: Path, model: nn.Module, optimizer: optim.Optimizer, weighting: Weighting | None = None
) -> dict[str, Any] | None:
    """Load the last checkpoint into a model, its optimizer and the weights of worst-case training.

    Args:
        folder: The run's folder.
        model: The model.
        optimizer: The model's optimizer.
        weighting: The weights of worst-case training.

    Returns:
        The stored state with the key "step", or None if there is no checkpoint.

    Raises:
        TrainingError: The checkpoint cannot be read, or belongs to another model.
    """
    remove_leftovers(folder)
    found = checkpoints(folder)
    if not found:
        return None
    last = found[-1]
    try:
        restore_weights(model, last / "model.safetensors")
        optimizer.state = tree_unflatten(list(load_arrays(last / "optimizer.safetensors").items()))
        mx.eval(model.parameters(), optimizer.state)
        if weighting:
            stored = np.array(load_arrays(last / "robust.safetensors")["state"])
            if stored.shape != weighting.state.shape:
                raise ValueError("robust.safetensors belongs to another run")
            weighting.state = stored
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise unreadable(last, error) from error
    return read_state(last)


def restore_weights(model: nn.Module, file: Path) -> None:
    """Load stored weights into a model. Frozen weights that the file lacks stay as they are.

    Raises:
        ValueError: The file belongs to another model.
        OSError: The file cannot be read.
    """
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))
    for name in dict(tree_flatten(model.trainable_parameters())):
        del weights[name]
    stored = {name: weight for name, weight in load_arrays(file).items() if name != "t2d"}  # it follows from d2t
    model.load_weights(list({**weights, **stored}.items()))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the state of a checkpoint, which has the keys "step" and "best". Raises TrainingError if it is damaged."""
    try:
        state = read_json(checkpoint / "state.json")
        if not isinstance(state["best"], dict) or checkpoint.name != checkpoint_name(state["step"]):
            raise ValueError("state.json is not that of this checkpoint")
        if state["best"] and not {"step", "block_efficiency"} <= state["best"].keys():
            raise ValueError("state.json has no step or no score of the best drafter")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(checkpoint, error) from error
    return state


def unreadable(checkpoint: Path, error: Exception) -> TrainingError:
    """Return the error for a damaged checkpoint."""
    return TrainingError(
        f"{checkpoint} cannot be read ({in_one_line(error)}); delete it to continue from the checkpoint before it"
    )


def last_step(folder: Path) -> int:
    """Return the step of the last checkpoint, or 0 if there is none. Raises TrainingError if it is damaged."""
    found = checkpoints(folder)
    return read_state(found[-1])["step"] if found else 0


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints, oldest first."""
    return sorted(folder.glob(CHECKPOINTS))
