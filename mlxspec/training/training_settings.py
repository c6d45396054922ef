"""How a stage of training is run: steps, batches, the optimizer, and how often what is saved."""

import math
from dataclasses import dataclass

import mlx.core as mx

from mlxspec.errors import InvalidRequestError
from mlxspec.settings import option

LARGEST_TEMPERATURE = 10.0


@dataclass(frozen=True)
class TrainingSettings:
    """How a stage trains. Raises InvalidRequestError for a value outside its range."""

    steps: int = option(1000, "Optimizer steps.")
    batch: int = option(16, "Rows a step, over all processes.")
    length: int = option(512, "Positions in a row.")
    learning_rate: float = option(1e-3, "Peak, after the warm-up.")
    warmup: int = option(50, "Steps in which the learning rate rises to its peak.")
    final_rate: float = option(0.05, "Learning rate of the last step, as a fraction of the peak.")
    weight_decay: float = option(0.01, "AdamW's, on matrices.")
    clip: float = option(1.0, "Largest norm of a gradient.")
    accumulate: int = option(1, "Parts that a batch is worked off in, to save memory.")
    temperatures: tuple[float, ...] = option(
        (1.0,), "Of both distributions in a distillation loss, a step each in turn."
    )
    precision: str = option("auto", "Of the arithmetic; weights are float32.", choices=lambda: list(PRECISIONS))
    recompute: bool = option(False, "Keep only the layers' inputs for the backward pass, and compute the rest again.")
    seed: int = option(0, "Runs with the same seed repeat exactly.")
    checkpoint_every: int = option(200, "Steps between checkpoints.")
    evaluate_every: int = option(0, "Steps between measurements of block efficiency; 0: none.")
    log_every: int = option(10, "Steps between lines of metrics.jsonl.")

    def __post_init__(self):
        for name in ("steps", "batch", "length", "accumulate", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use 1 or more")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use a positive number")
        for name in ("warmup", "final_rate", "weight_decay", "seed", "evaluate_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use 0 or more")
        if self.batch % self.accumulate:
            raise InvalidRequestError(f"accumulate is {self.accumulate}; use a divisor of batch, {self.batch}")
        if self.precision not in PRECISIONS:
            raise InvalidRequestError(f"precision is {self.precision!r}; use one of {', '.join(PRECISIONS)}")
        if not self.temperatures or not all(0 < t <= LARGEST_TEMPERATURE for t in self.temperatures):
            raise InvalidRequestError(
                f"temperatures are {self.temperatures}; use numbers in (0, {LARGEST_TEMPERATURE}]"
            )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: a linear rise, then half a cosine down."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - 1 - self.warmup)
        fall = (1 + math.cos(math.pi * min(progress, 1))) / 2
        return self.learning_rate * (self.final_rate + (1 - self.final_rate) * fall)

    @property
    def dtype(self) -> mx.Dtype:
        """bfloat16 where the device favours it; on the CPU back end it is fifty times slower than float32."""
        if self.precision == "auto":
            return mx.float32 if mx.default_device().type == mx.cpu else mx.bfloat16
        return PRECISIONS[self.precision]


PRECISIONS = {"auto": None, "float32": mx.float32, "bfloat16": mx.bfloat16}
