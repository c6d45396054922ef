"""Training that keeps what was learned before: the co-natural gradient, and a quadratic penalty.

Both use F, the diagonal of the empirical Fisher information, measured on text that represents earlier training data.
The co-natural gradient divides the gradient by F + α. The penalty grows with the changes of weights, in proportion to
F. F is measured once, before the first step of a stage, and kept in the stage's folder.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlxspec.errors import InvalidRequestError, TrainingError, in_one_line
from mlxspec.files import fingerprint, load_arrays, replacing
from mlxspec.models.eagle import Eagle
from mlxspec.models.sharding import launched_processes
from mlxspec.settings import option
from mlxspec.training.batches import Batches
from mlxspec.training.drafter_folders import weights_fingerprint
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import DRAFT_STEPS, AnyDrafter, Batch, Objective, layers_read, objective_for
from mlxspec.training.run_folder import barrier, broadcast, is_first_process
from mlxspec.training.shards import TokenShards
from mlxspec.training.target import Target
from mlxspec.training.teachers import OnlineTeacher

OPTIMIZERS = ("adamw", "co-natural")
FISHER_EXAMPLES = 256  # documents on which F is measured


@dataclass(frozen=True)
class Retention:
    """Settings against forgetting. Raises InvalidRequestError for a value outside its range."""

    optimizer: str = option(
        "adamw",
        "`co-natural` moves the weights that matter for earlier data less. It is gradient descent without momentum.",
        choices=lambda: list(OPTIMIZERS),
    )
    damping: float = option(
        1e-3,
        "For co-natural: the step is learning_rate · gradient / (F + damping). F is the Fisher information of a weight "
        "on the text of `remember`. A weight with F = 0 moves by learning_rate / damping times its gradient.",
    )
    penalty: float = option(
        0.0,
        "Weight β of the penalty β/2 · Σ F · (change of the weight)² on changes of weights that matter for what was "
        "learned before (EWC). 0 for none.",
    )
    remember: tuple[str, ...] = option(
        (),
        "For co-natural and penalty: text files that represent earlier training data. By default, the pretraining "
        "text.",
    )

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise InvalidRequestError(f"optimizer is {self.optimizer!r}; use one of {', '.join(OPTIMIZERS)}")
        if not 0 < self.damping < math.inf:
            raise InvalidRequestError(f"damping is {self.damping}; use a positive number")
        if not 0 <= self.penalty < math.inf:
            raise InvalidRequestError(f"penalty is {self.penalty}; use 0 or more")

    @property
    def needs_fisher(self) -> bool:
        """Whether the training needs F."""
        return self.optimizer == "co-natural" or self.penalty > 0

    @property
    def inputs(self) -> dict[str, Any]:
        """The settings as inputs of a stage, without the text. Empty if the training does not need F."""
        if not self.needs_fisher:
            return {}
        return {"optimizer": self.optimizer, "damping": self.damping, "penalty": self.penalty}

    def extra_bytes(self, parameters: int) -> int:
        """Return the memory of F and of the first weights, less that of Adam's moments if they are not needed.

        Args:
            parameters: Number of trained parameters.
        """
        if not self.needs_fisher:
            return 0
        moments = 2 * 8 if self.optimizer == "co-natural" else 0  # before and after a step
        return parameters * (4 + 4 - moments)

    def check_text(self, has_text: bool) -> None:
        """Raise InvalidRequestError if F is needed and there is no text to measure it on.

        Args:
            has_text: Whether there is pretraining text.
        """
        if self.needs_fisher and not (self.remember or has_text):
            name = "optimizer co-natural" if self.optimizer == "co-natural" else f"penalty {self.penalty:g}"
            raise InvalidRequestError(
                f"{name} needs text that stands for what was learned before; set remember to text files, or use "
                "pretraining text"
            )


NO_RETENTION = Retention()


class Protection(NamedTuple):
    """What a drafter learned before a stage.

    Attributes:
        settings: The settings.
        fisher: F for each trainable weight.
        anchor: The trainable weights θ0 at the start of the stage.
    """

    settings: Retention
    fisher: Any
    anchor: Any

    @property
    def mean_fisher(self) -> float:
        """The mean of F over all weights."""
        parts = [np.array(part, np.float64) for part in dict(tree_flatten(self.fisher)).values()]
        return sum(part.sum() for part in parts) / sum(part.size for part in parts)

    def penalized(self, gradients: Any, weights: Any) -> Any:
        """Return the gradients of the loss and the penalty β/2 Σ F (θ − θ0)².

        Args:
            gradients: The gradients of the loss.
            weights: The weights θ.

        Source: Kirkpatrick et al. 2017, arXiv 1612.00796 (EWC).
        """
        if not self.settings.penalty:
            return gradients
        beta = self.settings.penalty
        return tree_map(lambda g, f, w, w0: g + beta * f * (w - w0), gradients, self.fisher, weights, self.anchor)


class CoNatural(optim.Optimizer):
    """Gradient descent with the co-natural gradient: θ ← θ − λ (F + α)⁻¹ ∇L.

    Args:
        learning_rate: The learning rate λ.
        fisher: F for each trainable weight.
        damping: α.

    Source: Michel, Salesky and Neubig 2019, "Regularizing Trajectories to Mitigate Catastrophic Forgetting".
    """

    def __init__(self, learning_rate: float, fisher: Any, damping: float):
        super().__init__()
        self._maybe_schedule("learning_rate", learning_rate)
        self.fisher, self.damping = fisher, damping

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Keep no state."""

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the new weights.

        Args:
            gradients: The gradients of the loss.
            parameters: The weights.
        """
        natural = tree_map(lambda g, f: g / (f + self.damping), gradients, self.fisher)
        return super().apply_gradients(natural, parameters)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Return a new weight.

        Args:
            gradient: The co-natural gradient.
            parameter: The weight.
            state: Not used.
        """
        return parameter - self.learning_rate.astype(gradient.dtype) * gradient


def measured_fisher(
    target: Target,
    drafter: AnyDrafter,
    shards: TokenShards,
    settings: Retention,
    folder: Path,
    length: int,
    seed: int,
    draft_steps: int = DRAFT_STEPS,
) -> Protection:
    """Measure what a drafter has learned, or read it if an interrupted run has measured it.

    Args:
        target: The target, whose hidden states an EAGLE head reads.
        drafter: The drafter at the start of the stage.
        shards: Text that stands for what was learned before.
        settings: The settings.
        folder: The stage's folder.
        length: Positions in a row. Longer documents are split.
        seed: Decides which documents are used.
        draft_steps: Number of tokens that an EAGLE head drafts from each position.

    Raises:
        TrainingError: The file with F cannot be read.
        WriteError: It cannot be written.
    """
    of = [weights_fingerprint(drafter), shards.fingerprint, length, seed, draft_steps, FISHER_EXAMPLES]
    path = folder / f"fisher-{fingerprint(json.dumps(of))}.safetensors"
    if not broadcast(path.exists()):
        layers = layers_read(drafter, target.model) if isinstance(drafter, Eagle) else None
        teacher = OnlineTeacher(target.model, False, layers) if layers else None
        goal = objective_for(drafter, Loss("ce"), teacher, False, draft_steps)
        divided = teacher is not None and target.group is not None
        fisher = diagonal_fisher(drafter, goal, Batches([shards], [1.0], length, 1, seed, single=True), divided=divided)
        if is_first_process():
            with replacing(path) as aside:
                mx.save_safetensors(str(aside), dict(tree_flatten(fisher)))
        barrier()
    weights = drafter.trainable_parameters()
    try:
        stored = load_arrays(path)
        fisher = tree_map_with_path(lambda name, _: stored[name], weights)
        mx.eval(fisher)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"{path} cannot be read ({in_one_line(error)}); delete it to measure it again") from None
    anchor = tree_map(lambda weight: weight + 0, weights)  # mx.compile needs array objects of its own
    mx.eval(anchor)
    return Protection(settings, fisher, anchor)


def diagonal_fisher(
    drafter: AnyDrafter, goal: Objective, batches: Batches, examples: int = FISHER_EXAMPLES, divided: bool = False
) -> Any:
    """Measure the diagonal F of the empirical Fisher information for each token.

    F = Σ_x (∇ Σ_t log q(x_t | x_<t))² / Σ_x |x|, over examples x of |x| learned tokens. The processes of
    ``mlx.launch`` divide the examples among them, unless the objective runs a target that is divided itself.

    Args:
        drafter: The drafter.
        goal: The objective with the loss ce.
        batches: Batches of one row of one document.
        examples: Number of documents.
        divided: Whether the objective runs a target that is divided over the processes.

    Returns:
        F for each trainable weight, as a tree like ``drafter.trainable_parameters()``.
    """
    weights = drafter.trainable_parameters()

    def log_likelihood(weights: Any, *batch: Any) -> mx.array:
        drafter.update(weights)
        return goal(drafter, Batch(*batch))[0]

    gradient = mx.compile(mx.grad(log_likelihood))
    group = None if divided else launched_processes()
    rank, processes = (group.rank(), group.size()) if group is not None else (0, 1)
    fisher, tokens = tree_map(mx.zeros_like, weights), mx.array(0.0)
    for number in range(rank, min(examples, batches.count_rows(0)), processes):
        rows = batches(number)
        learned = mx.array(rows.mask[:, 1:].astype("float32"))
        documents = mx.array(rows.documents[:, :-1])
        found = gradient(weights, mx.array(rows.ids), documents, learned, (), mx.array(1.0), mx.random.key(0))
        fisher = tree_map(lambda f, g: f + g * g, fisher, found)
        tokens = tokens + learned.sum()
        mx.eval(fisher, tokens)
    drafter.update(weights)
    if group is not None:
        fisher, tokens = tree_map(lambda part: mx.distributed.all_sum(part, group=group), (fisher, tokens))
    fisher = tree_map(lambda part: part / mx.maximum(tokens, 1), fisher)
    mx.eval(fisher)  # in all processes, since the sums need all of them
    return fisher
