"""One training loop for every stage: batches are functions of the step, so resuming is an integer."""

import json
import math
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlxspec.errors import InvalidRequestError, TrainingError
from mlxspec.files import explain_write_errors, write_atomically
from mlxspec.models.drafter import Drafter
from mlxspec.training.checkpoint import checkpoint_name, checkpoints, load_checkpoint, save_checkpoint
from mlxspec.training.evaluation import Evaluate
from mlxspec.training.mixture import Mixture
from mlxspec.training.objectives import Batch, Objective, Teacher
from mlxspec.training.processes import as_the_first_says, is_first, wait_for_all
from mlxspec.training.record import Metrics, read_metrics
from mlxspec.training.training_settings import TrainingSettings

Report = Callable[[int, Metrics], None]


class Trainer:
    """Trains a drafter in place; ``folder`` keeps checkpoints, the best drafter and metrics.jsonl.

    With ``evaluate``, what the drafter is worth is measured every ``evaluate_every`` steps and after the last, and the
    best one is what remains; without, the last one. Under ``mlx.launch`` each process takes its share of every batch,
    and the first one writes.
    """

    def __init__(
        self,
        drafter: Drafter,
        objective: Objective,
        batches: Mixture,
        settings: TrainingSettings,
        folder: Path,
        evaluate: Evaluate | None = None,
        teacher: Teacher | None = None,
        report: Report = lambda step, metrics: None,
    ):
        self.drafter, self.objective, self.batches, self.settings = drafter, objective, batches, settings
        self.folder, self.evaluate, self.teacher, self.report = folder, evaluate, teacher, report
        self.group = mx.distributed.init()
        parts = self.group.size() * settings.accumulate
        if settings.batch % parts:
            raise InvalidRequestError(
                f"batch is {settings.batch}; use a multiple of {parts}, the processes times accumulate"
            )
        self.optimizer = optim.MultiOptimizer(
            [
                optim.AdamW(settings.learning_rate, [0.9, 0.98], weight_decay=decay, bias_correction=True)
                for decay in (settings.weight_decay, 0.0)
            ],
            [lambda name, weight: weight.ndim > 1],
        )
        self.best: Metrics = {}

    def run(self) -> Metrics:
        """Train from the last checkpoint, if there is one, to the end. Returns the metrics of the drafter that is kept.

        Raises TrainingError if the loss stops being a number or a checkpoint cannot be written.
        """
        self.drafter.set_dtype(mx.float32)
        self.optimizer.init(self.drafter.trainable_parameters())
        found = load_checkpoint(self.folder, self.drafter, self.optimizer) or {"step": 0, "best": {}}
        start, self.best = found["step"], found["best"]
        if as_the_first_says(start) != start:
            raise TrainingError(f"{self.folder} is not the same for all processes; use a folder that all of them share")
        self._compile()
        self._forget_metrics_after(start)
        for step in range(start, self.settings.steps):
            metrics, done = self._train(step), step + 1
            self.report(done, metrics)
            if self._due(done, self.settings.log_every):
                self._log(done, metrics)
            if self.evaluate and self._due(done, self.settings.evaluate_every):
                self._keep_if_best(done)
            if self._due(done, self.settings.checkpoint_every):
                self._save(done)
        self._restore_best()
        return self.best

    def trial_seconds(self, steps: int = 3) -> float:
        """Time of a step, tried out; the first one, which compiles, is not counted. The drafter is changed by it."""
        self.drafter.set_dtype(mx.float32)
        self.optimizer.init(self.drafter.trainable_parameters())
        self._compile()
        self._train(0)
        began = time.perf_counter()
        for step in range(1, steps):
            self._train(step)
        return (time.perf_counter() - began) / (steps - 1)

    def _due(self, done: int, every: int) -> bool:
        return done == self.settings.steps or bool(every and done % every == 0)

    def _compile(self) -> None:
        # The state is passed and returned, or the compiled function would go on with the weights it was traced with.
        state = [self.drafter.state, self.optimizer.state]
        compiled = partial(mx.compile, inputs=state, outputs=state)
        self._step = compiled(lambda *batch: self._apply(*self._gradients(*batch)))
        self._part = compiled(self._gradients)
        self._finish = compiled(self._apply)
        self._state = state

    def _gradients(self, *batch: Any) -> tuple[mx.array, Any]:
        """(loss, α) [2] and the gradients of this process's rows; over all rows of the step they add up."""
        weights = self.drafter.trainable_parameters()

        def loss(weights: Any) -> tuple[mx.array, mx.array]:
            self.drafter.update(tree_map(lambda weight: weight.astype(self.settings.dtype), weights))
            return self.objective(self.drafter, Batch(*batch))

        (value, alpha), gradients = mx.value_and_grad(loss)(weights)
        self.drafter.update(weights)
        return mx.stack([value, alpha]), gradients

    def _apply(self, values: mx.array, gradients: Any) -> mx.array:
        """Update the weights; (loss, α, the gradient's norm) [3] of the whole step."""
        processes = self.group.size()
        if processes > 1:
            gradients = tree_map(lambda g: g * processes, nn.average_gradients(gradients, self.group))
            values = mx.distributed.all_sum(values, group=self.group)
        gradients, norm = optim.clip_grad_norm(gradients, self.settings.clip)
        self.optimizer.update(self.drafter, gradients)
        return mx.concatenate([values, norm[None]])

    def _train(self, step: int) -> Metrics:
        began = time.perf_counter()
        rate = self.settings.rate(step)
        self.optimizer.learning_rate = mx.array(rate)
        first, *others = self._parts(step)
        if not others:
            result = self._step(*first)
        else:
            values, gradients = self._part(*first)
            for batch in others:
                mx.eval(values, gradients)
                more, further = self._part(*batch)
                values, gradients = values + more, tree_map(mx.add, gradients, further)
            result = self._finish(values, gradients)
        mx.eval(result, self._state)
        loss, alpha, norm = result.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            kept = self._drop_checkpoint(step)
            raise TrainingError(
                f"step {step + 1}: the loss is {loss} and its gradient {norm} (rows {self.batches.choice(step)[:3]} "
                f"and on); {kept}; use a lower learning_rate or clip and run the command again, it goes on from there"
            )
        seconds = time.perf_counter() - began
        speed = self.settings.batch * self.settings.length / seconds
        metrics = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "tokens_per_second": speed}
        if alpha:
            metrics["acceptance_rate"] = alpha
        return metrics

    def _drop_checkpoint(self, step: int) -> str:
        """Of weights whose loss is no number there must be no checkpoint; says which one is the last good one."""
        wait_for_all()
        if is_first():
            shutil.rmtree(self.folder / checkpoint_name(step), ignore_errors=True)
        found = checkpoints(self.folder)
        return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def _parts(self, step: int) -> list[Batch]:
        """This process's share of the step's rows, in as many parts as are asked for."""
        rows, choice = self.batches(step), self.batches.choice(step)
        weights = rows.mask[:, 1:] / max(1, rows.mask[:, 1:].sum())  # known to all processes without asking
        temperatures = self.settings.temperatures
        temperature = mx.array(temperatures[step % len(temperatures)])
        processes, rank, parts = self.group.size(), self.group.rank(), self.settings.accumulate
        batches = []
        for part in range(parts):
            share = slice(rank * parts + part, None, processes * parts)
            batches.append(
                Batch(
                    mx.array(rows.ids[share]),
                    mx.array(weights[share].astype("float32")),
                    self.teacher.stored(choice[share]) if self.teacher else (),
                    temperature,
                    mx.random.key(hash((self.settings.seed, step, rank, part)) % 2**63),
                )
            )
        return batches

    def _keep_if_best(self, done: int) -> None:
        metrics = {"step": done, **self.evaluate(self.drafter)}
        # Processes may round differently, and must agree.
        if as_the_first_says(metrics["block_efficiency"] > self.best.get("block_efficiency", 0)):
            self.best = metrics
            if is_first():
                with explain_write_errors(self.folder / "best"):
                    self.drafter.save(self.folder / "best")
        self._log(done, {name: value for name, value in metrics.items() if name != "step"})
        self.report(done, metrics)

    def _restore_best(self) -> None:
        if self.evaluate and self.best.get("step") != self.settings.steps:
            wait_for_all()
            self.drafter.load_weights(str(self.folder / "best" / "model.safetensors"))
            mx.eval(self.drafter.parameters())

    def _save(self, done: int) -> None:
        if is_first():
            save_checkpoint(self.folder, done, self.drafter, self.optimizer, {"best": self.best})
        wait_for_all()

    def _log(self, step: int, metrics: Metrics) -> None:
        if is_first():
            path = self.folder / "metrics.jsonl"
            with explain_write_errors(path), path.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")

    def _forget_metrics_after(self, step: int) -> None:
        """The steps after a checkpoint will be run, and told of, again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "metrics.jsonl"
        if is_first() and path.exists():
            lines = "".join(json.dumps(line) + "\n" for line in read_metrics(path) if line["step"] <= step)
            with explain_write_errors(path):
                write_atomically(path, lines)
