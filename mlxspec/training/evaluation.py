"""What a drafter in training is measured on. Who measures is given by the caller: training does not know decoding."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mlxspec.errors import InvalidRequestError, TrainingError
from mlxspec.files import fingerprint
from mlxspec.models.drafter import Drafter
from mlxspec.settings import option
from mlxspec.training.corpus import read_prompts, split_prompts
from mlxspec.training.record import Metrics
from mlxspec.training.responses import AnswerSettings, DistillData
from mlxspec.training.target import Target
from mlxspec.training.training_settings import LARGEST_TEMPERATURE

Evaluate = Callable[[Drafter], Metrics]  # "block_efficiency" decides which drafter is kept


class Evaluation(NamedTuple):
    """How a drafter is measured, and in words all that the result depends on: one of a stage's inputs."""

    measure: Evaluate
    described: dict[str, Any]


@dataclass(frozen=True)
class EvaluationSettings:
    """What block efficiency is measured on. Raises InvalidRequestError for a value outside its range."""

    prompts: tuple[str, ...] = option(
        (), "Files of prompts; without, the last of the distillation's, held out; without those, text from nothing."
    )
    count: int = option(20, "How many prompts.")
    words: int = option(0, "Take the first words of each text only; 0: all.")
    max_tokens: int = option(120, "Longest answer.")
    draft_length: int = option(4, "Tokens drafted a block.")
    temperatures: tuple[float, ...] = option((0.0, 1.0), "The mean over these is what counts.")

    def __post_init__(self):
        for name in ("count", "max_tokens", "draft_length"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.words < 0:
            raise InvalidRequestError(f"words is {self.words}; use 0 (all) or more")
        if not self.temperatures or not all(t == 0 or 1e-4 <= t <= LARGEST_TEMPERATURE for t in self.temperatures):
            raise InvalidRequestError(
                f"temperatures are {self.temperatures}; use numbers of 0 to {LARGEST_TEMPERATURE:g}"
            )


# Prompts in tokens -> what measures a drafter on them; given by the caller.
Evaluator = Callable[[Target, EvaluationSettings, list[list[int]]], Evaluate]


def evaluation_prompts(
    settings: EvaluationSettings, target: Target, distill: tuple[DistillData, AnswerSettings] | None = None
) -> list[list[int]]:
    """In tokens: the first of those that the settings name, or the ones that the distillation holds out.

    Raises TrainingError if none leaves room for an answer.
    """
    asked, answers = distill or (DistillData(), None)
    if settings.prompts:
        read, _ = read_prompts(settings.prompts, target.tokenizer, asked.system, settings.words)
        return split_prompts(read, 0, settings.max_tokens, target.context)[0][: settings.count]
    if asked.prompts:
        read, _ = read_prompts(asked.prompts, target.tokenizer, asked.system)
        return split_prompts(read, settings.count, answers.max_tokens, target.context)[1]
    if target.tokenizer.bos_token_id is None:
        raise TrainingError("evaluation needs prompts: the target's tokenizer has no token to begin a text with")
    return [[target.tokenizer.bos_token_id]] * settings.count


def evaluation_of(
    settings: EvaluationSettings,
    target: Target,
    evaluator: Evaluator,
    distill: tuple[DistillData, AnswerSettings] | None = None,
) -> Evaluation:
    """What measures a drafter; it is described by its prompts' content, whatever the files are called."""
    prompts = evaluation_prompts(settings, target, distill)
    content = fingerprint(json.dumps(prompts))
    return Evaluation(evaluator(target, settings, prompts), {**asdict(settings), "prompts": content})
