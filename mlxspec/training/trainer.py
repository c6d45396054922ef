"""The training loop and its settings. Every stage uses the same loop.

A batch is a function of the step. To resume, a run needs to know only its step.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxspec.errors import InvalidRequestError, TrainingError, in_one_line
from mlxspec.files import remove_leftovers
from mlxspec.models.quantizing import DRAFTER_BITS, rounded
from mlxspec.settings import option
from mlxspec.training.batches import Batches, StepDocuments
from mlxspec.training.checkpoint import (
    checkpoint_name,
    checkpoints,
    load_checkpoint,
    read_state,
    restore_weights,
    save_checkpoint,
)
from mlxspec.training.objectives import AnyDrafter, Batch, Objective
from mlxspec.training.retention import CoNatural, Protection
from mlxspec.training.robust import Weighting
from mlxspec.training.run_folder import (
    BEST_DRAFTERS,
    Metrics,
    barrier,
    broadcast,
    is_first_process,
    log_metrics,
    truncate_metrics,
)
from mlxspec.training.teachers import Teacher

LARGEST_TEMPERATURE = 10.0
PRECISIONS: dict[str, mx.Dtype | None] = {"auto": None, "float32": mx.float32, "bfloat16": mx.bfloat16}

Report = Callable[[int, Metrics], None]  # step, metrics
Scorer = Callable[[Any], Metrics]  # measures a drafter; "block_efficiency" decides which drafter is kept


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training stage. Raises InvalidRequestError for a value outside its range."""

    steps: int = option(1000, "Number of optimizer steps.")
    batch: int = option(16, "Sequences in a step, summed over all processes of mlx.launch.")
    length: int = option(512, "Tokens in a sequence.")
    learning_rate: float = option(1e-3, "Peak learning rate, after the warmup.")
    warmup: int = option(50, "Steps in which the learning rate rises to its peak.")
    final_rate: float = option(0.05, "Learning rate of the last step, as a fraction of the peak.")
    weight_decay: float = option(0.01, "Weight decay of AdamW. It applies to matrices only.")
    clip: float = option(1.0, "Maximum gradient norm.")
    accumulate: int = option(1, "Gradient accumulation: number of parts in which a batch is computed, to save memory.")
    temperatures: tuple[float, ...] = option(
        (1.0,), "Temperatures of target and drafter in losses that compare the two. The loss ce ignores them."
    )
    precision: str = option(
        "auto", "Precision of the computation. Weights stay float32.", choices=lambda: list(PRECISIONS)
    )
    fake_quantize: str | None = option(
        None,
        "Round the weights to 4 or 8 bits in the forward pass, so that the drafter loses less when it is quantized. "
        "The weights themselves stay float32.",
        choices=lambda: list(DRAFTER_BITS),
    )
    recompute: bool = option(
        False,
        "Activation checkpointing: keep only the layers' inputs for the backward pass and compute the rest again.",
    )
    seed: int = option(0, "Random seed. Runs with the same seed give the same result.")
    checkpoint_every: int = option(200, "Steps between checkpoints.")
    evaluate_every: int = option(0, "Steps between measurements of block efficiency. 0 to measure none.")
    log_every: int = option(10, "Steps between lines of metrics.jsonl.")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "length", "accumulate", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.steps >= 10**8:  # the name of a checkpoint has eight digits
            raise InvalidRequestError(f"steps is {self.steps}; use a number below 10**8")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use a positive number")
        for name in ("warmup", "final_rate", "weight_decay", "seed", "evaluate_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use 0 or more")
        if self.seed >= 2**64:
            raise InvalidRequestError(f"seed is {self.seed}; use a number in [0, 2**64)")
        if self.batch % self.accumulate:
            raise InvalidRequestError(f"accumulate is {self.accumulate}; use a divisor of batch, {self.batch}")
        if self.precision not in PRECISIONS:
            raise InvalidRequestError(f"precision is {self.precision!r}; use one of {', '.join(PRECISIONS)}")
        if self.fake_quantize not in (None, *DRAFTER_BITS):
            raise InvalidRequestError(
                f"fake_quantize is {self.fake_quantize!r}; use one of {', '.join(DRAFTER_BITS)}, or leave it out"
            )
        if not self.temperatures or not all(0 < t <= LARGEST_TEMPERATURE for t in self.temperatures):
            raise InvalidRequestError(
                f"temperatures are {self.temperatures}; use numbers in (0, {LARGEST_TEMPERATURE}]"
            )

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: a linear warmup, then cosine decay."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        decay = (1 + math.cos(math.pi * min(progress, 1))) / 2
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * decay)

    @property
    def dtype(self) -> mx.Dtype:
        """Type of the computation.

        "auto" is bfloat16 on a GPU and float32 on the CPU, where float32 is 50 times faster.
        """
        return PRECISIONS[self.precision] or (mx.float32 if mx.default_device().type == mx.cpu else mx.bfloat16)


def check_batch(settings: TrainingSettings) -> None:
    """Raise InvalidRequestError if a batch cannot be divided among the processes and parts."""
    parts = mx.distributed.init().size() * settings.accumulate
    if settings.batch % parts:
        raise InvalidRequestError(
            f"batch is {settings.batch}; use a multiple of {parts}, the number of processes times accumulate"
        )


class Trainer:
    """Trains a drafter in place.

    Under ``mlx.launch`` each process computes its share of every batch, and the first process writes.

    Args:
        drafter: The drafter.
        objective: The function to minimize.
        batches: The data.
        settings: The settings.
        folder: Folder for checkpoints, the best drafters and metrics.jsonl.
        scorer: Measures the drafter every ``evaluate_every`` steps and after the last step. The drafter with the best
            block efficiency is kept. None to keep the last drafter.
        teacher: The teacher of ``objective``. It supplies the stored rows of a batch. None for an objective without
            stored rows.
        report: Called with the number of steps taken and the metrics, after every step and every measurement.
        evaluation: Everything that the scores depend on, as JSON. Only scores of the same evaluation are compared.
        weighting: The weights of worst-case training. None to weight all tokens alike.
        memory: What the drafter must not forget. None to train without regard to it.

    Raises:
        InvalidRequestError: The batch cannot be divided among the processes and parts.
    """

    def __init__(
        self,
        drafter: AnyDrafter,
        objective: Objective,
        batches: Batches,
        settings: TrainingSettings,
        folder: Path,
        scorer: Scorer | None = None,
        teacher: Teacher | None = None,
        report: Report = lambda step, metrics: None,
        evaluation: Any = None,
        weighting: Weighting | None = None,
        memory: Protection | None = None,
    ):
        self.drafter, self.objective, self.batches, self.settings = drafter, objective, batches, settings
        self.folder, self.scorer, self.teacher, self.report = folder, scorer, teacher, report
        self.evaluation = json.loads(json.dumps({"of": evaluation})) if scorer else None  # as a checkpoint stores it
        self.weighting, self.memory = weighting, memory
        self.group = mx.distributed.init()
        check_batch(settings)
        self.optimizer: optim.Optimizer = optim.MultiOptimizer(
            [
                optim.AdamW(settings.learning_rate, [0.9, 0.98], weight_decay=decay, bias_correction=True)
                for decay in (settings.weight_decay, 0.0)
            ],
            [lambda name, weight: weight.ndim > 1],
        )
        if memory and memory.settings.optimizer == "co-natural":
            self.optimizer = CoNatural(settings.learning_rate, memory.fisher, memory.settings.damping)
        self.best: Metrics = {}

    def run(self) -> Metrics:
        """Train to the last step, starting from the last checkpoint if there is one.

        Returns:
            The scores of the drafter that is kept. Empty without a scorer.

        Raises:
            TrainingError: The loss, its gradient or a weight is not finite, or a checkpoint cannot be read.
            WriteError: A file cannot be written.
        """
        self.drafter.set_dtype(mx.float32)
        self.optimizer.init(self.drafter.trainable_parameters())
        found = load_checkpoint(self.folder, self.drafter, self.optimizer, self.weighting) or {"step": 0, "best": {}}
        start = found["step"]
        comparable = start == 0 or found.get("evaluation") == self.evaluation
        self.best = found["best"] if self.scorer and comparable else {}
        if broadcast(start) != start:
            raise TrainingError(f"{self.folder} differs between processes; use a folder that all processes share")
        self._compile()
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_first_process():
            for best in self.folder.glob(BEST_DRAFTERS):
                remove_leftovers(best)
            truncate_metrics(self.folder, start)
        # The checkpoint may have no score of this evaluation, and no step may follow if the run was shortened.
        if self.scorer and (not comparable or start == self.settings.steps):
            self._score(start, self.scorer)
            if start == self.settings.steps:
                self._save(start)  # with the score; else the next checkpoint has it
        for step in range(start, self.settings.steps):
            metrics, done = self._train_step(step), step + 1
            self.report(done, metrics)
            if self._due(done, self.settings.log_every):
                self._log(done, metrics)
            if self._due(done, self.settings.checkpoint_every):
                self._check_weights(done)
            if self.scorer and self._due(done, self.settings.evaluate_every):
                self._score(done, self.scorer)
            if self._due(done, self.settings.checkpoint_every):
                self._save(done)
        self._restore_best()
        return self.best

    def time_step(self, steps: int = 3) -> float:
        """Return the mean seconds of ``steps`` − 1 training steps.

        The first step is not counted, since it includes compilation. This method changes the drafter.
        """
        self.drafter.set_dtype(mx.float32)
        self.optimizer.init(self.drafter.trainable_parameters())
        self._compile()
        self._train_step(0)
        start = time.perf_counter()
        for step in range(1, steps):
            self._train_step(step)
        return (time.perf_counter() - start) / (steps - 1)

    def _due(self, done: int, every: int) -> bool:
        """Return whether a periodic action is due: every ``every`` steps, and after the last step."""
        return done == self.settings.steps or bool(every and done % every == 0)

    def _compile(self) -> None:
        # The state is an input and an output. Otherwise the compiled function would keep the weights of its first call.
        state = [self.drafter.state, self.optimizer.state]
        compiled = partial(mx.compile, inputs=state, outputs=state)
        self._compiled_step = compiled(self._step)
        self._compiled_gradients = compiled(self._gradients)
        self._compiled_apply = compiled(self._apply)
        self._state = state

    def _gradients(self, *batch: Any) -> tuple[mx.array, Any]:
        """Return the loss and the acceptance rates at each position, [1 + rates, B, L], and the gradients of some rows.

        The gradients of a step are sums over all its rows.
        """
        weights = self.drafter.trainable_parameters()

        def loss(weights: Any) -> tuple[mx.array, mx.array]:
            self.drafter.update(tree_map(self._computed, weights))
            return self.objective(self.drafter, Batch(*batch))

        (_, values), gradients = mx.value_and_grad(loss)(weights)
        self.drafter.update(weights)
        return values, gradients

    def _step(self, *batch: Any) -> tuple[mx.array, mx.array]:
        """Take a step on a batch. Return the values of ``_gradients`` and the gradient norm."""
        values, gradients = self._gradients(*batch)
        return values, self._apply(gradients)

    def _computed(self, weight: mx.array) -> mx.array:
        """Return a weight as the forward pass uses it. Its gradient is passed on to the weight unchanged.

        Source: Bengio et al. 2013, arXiv 1308.3432, the straight-through estimator (``fake_quantize``).
        """
        if self.settings.fake_quantize and weight.ndim == 2:
            weight = weight + mx.stop_gradient(rounded(weight, self.settings.fake_quantize) - weight)
        return weight.astype(self.settings.dtype)

    def _apply(self, gradients: Any) -> mx.array:
        """Update the weights. Return the gradient norm of the whole step."""
        processes = self.group.size()
        if processes > 1:
            gradients = tree_map(lambda g: g * processes, nn.average_gradients(gradients, self.group))
        if self.memory:
            gradients = self.memory.penalized(gradients, self.drafter.trainable_parameters())
        gradients, norm = optim.clip_grad_norm(gradients, self.settings.clip)
        self.optimizer.update(self.drafter, gradients)
        return norm

    def _train_step(self, step: int) -> Metrics:
        start = time.perf_counter()
        rate = self.settings.rate(step)
        self.optimizer.learning_rate = mx.array(rate)
        documents = StepDocuments(self.batches(step))
        first, *others = self._parts(step, documents)
        if not others:
            values, gradient_norm = self._compiled_step(*first)
            found = [values]
        else:
            values, gradients = self._compiled_gradients(*first)
            found = [values]
            for batch in others:
                mx.eval(found, gradients)
                values, more_gradients = self._compiled_gradients(*batch)
                found, gradients = [*found, values], tree_map(mx.add, gradients, more_gradients)
            gradient_norm = self._compiled_apply(gradients)
        mx.eval(found, gradient_norm, self._state)
        sums = self._document_sums(documents, found)
        loss, *rates = sums.sum(0).tolist()
        norm = float(gradient_norm.item())  # type: ignore[arg-type]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            last = self._drop_checkpoint(step)
            raise TrainingError(
                f"step {step + 1}: the loss is {loss} and its gradient norm {norm} (first rows: "
                f"{self.batches.row_numbers(step)[:3]}); {last}; use a lower learning_rate or clip and repeat the "
                "command to continue from there"
            )
        seconds = time.perf_counter() - start
        speed = self.settings.batch * self.settings.length / seconds
        metrics = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens_per_second": speed}
        names = ["loss"]
        if any(rates):
            names += ["acceptance_rate", *(f"acceptance_rate_{step}" for step in range(2, len(rates) + 1))]
            metrics |= dict(zip(names[1:], rates, strict=True))
        metrics |= documents.task_metrics(self.batches.tasks, names, sums[:, : len(names)])
        if self.weighting:
            metrics |= self.weighting.update(documents, sums)
        return metrics

    def _check_weights(self, done: int) -> None:
        """Raise TrainingError if a weight is not finite. After the last step, no loss would show it."""
        weights: dict[str, mx.array] = dict(tree_flatten(self.drafter.trainable_parameters()))
        if not mx.stack([mx.isfinite(weight).all() for weight in weights.values()]).all().item():
            raise TrainingError(
                f"step {done}: the weights are not finite; {self._last_checkpoint()}; use a lower learning_rate or "
                "clip and repeat the command to continue from there"
            )

    def _document_sums(self, documents: StepDocuments, found: list[mx.array]) -> np.ndarray:
        """Return the weighted sums of the loss and the rates over each document of the step, [D, 1 + rates].

        Args:
            documents: The documents of the step.
            found: The values at the positions of each part of this process, [1 + rates, B, L].
        """
        values = np.zeros((len(found[0]), *documents.weights.shape), np.float32)
        for share, part in zip(self._shares(), found, strict=True):
            values[:, share] = np.array(part)
        sums = documents.sums(values)
        if self.group.size() > 1:
            sums = np.array(mx.distributed.all_sum(mx.array(sums, mx.float32), group=self.group), float)
        return sums

    def _shares(self) -> list[slice]:
        """Return the rows of each part of this process."""
        parts, processes = self.settings.accumulate, self.group.size()
        return [slice(self.group.rank() * parts + part, None, processes * parts) for part in range(parts)]

    def _drop_checkpoint(self, step: int) -> str:
        """Delete a checkpoint whose loss is not finite. Return a message about the last good checkpoint."""
        barrier()
        if is_first_process():
            shutil.rmtree(self.folder / checkpoint_name(step), ignore_errors=True)
        return self._last_checkpoint()

    def _last_checkpoint(self) -> str:
        found = checkpoints(self.folder)
        return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def _parts(self, step: int, documents: StepDocuments) -> list[Batch]:
        """Return this process's rows of a step, in ``accumulate`` parts. Every process knows the whole step."""
        rows, row_numbers, weights = documents.rows, self.batches.row_numbers(step), documents.weights
        if self.weighting:
            weights = weights * self.weighting.factors(documents)[documents.places]
        temperatures = self.settings.temperatures
        temperature = mx.array(temperatures[step % len(temperatures)])
        batches = []
        for part, share in enumerate(self._shares()):
            batches.append(
                Batch(
                    mx.array(rows.ids[share]),
                    mx.array(rows.documents[share, :-1]),
                    mx.array(weights[share].astype("float32")),
                    self.teacher.load_rows(row_numbers[share]) if self.teacher else (),
                    temperature,
                    mx.random.key(hash((self.settings.seed, step, self.group.rank(), part)) % 2**63),
                )
            )
        return batches

    def _score(self, done: int, scorer: Scorer) -> None:
        """Measure the drafter, and keep it if it is the best so far."""
        metrics = {"step": done, **scorer(self.drafter)}
        # Processes may round differently but have to agree.
        if broadcast(metrics["block_efficiency"] > self.best.get("block_efficiency", 0)):
            self.best = metrics
            if is_first_process():
                self.drafter.save(self._best_folder(done))
        self._log(done, {name: value for name, value in metrics.items() if name != "step"})
        self.report(done, metrics)

    def _restore_best(self) -> None:
        if self.best and self.best["step"] != self.settings.steps:
            barrier()
            best = self._best_folder(int(self.best["step"]))
            try:
                restore_weights(self.drafter, best / "model.safetensors")
                mx.eval(self.drafter.parameters())
            except (OSError, RuntimeError, ValueError) as error:
                raise TrainingError(
                    f"{best} cannot be read ({in_one_line(error)}); delete {self.folder} to train again"
                ) from None

    def _best_folder(self, step: int) -> Path:
        """Return the folder of the best drafter of a step. Each checkpoint stores the step of its best drafter."""
        return self.folder / f"best-{step:08d}"

    def _save(self, done: int) -> None:
        if is_first_process():
            state = {"best": self.best, "evaluation": self.evaluation}
            save_checkpoint(self.folder, done, self.drafter, self.optimizer, state, self.weighting)
            steps = [read_state(path)["best"].get("step") for path in checkpoints(self.folder)]
            for best in {*self.folder.glob(BEST_DRAFTERS)} - {self._best_folder(int(step)) for step in steps if step}:
                shutil.rmtree(best, ignore_errors=True)
        barrier()

    def _log(self, step: int, metrics: Metrics) -> None:
        if is_first_process():
            log_metrics(self.folder, step, metrics)
