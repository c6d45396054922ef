"""The prompts on which a drafter is scored during training.

The caller supplies the function that scores, since training does not import the decoder.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mlxspec.errors import InvalidRequestError, TrainingError
from mlxspec.files import fingerprint
from mlxspec.settings import option
from mlxspec.training.prompts import Prompt, read_prompts, split_prompts
from mlxspec.training.responses import AnswerSettings, DistillData
from mlxspec.training.target import Target
from mlxspec.training.trainer import LARGEST_TEMPERATURE, Scorer


class Evaluation(NamedTuple):
    """The scoring of a drafter.

    Attributes:
        scorer: The function that measures a drafter.
        inputs: Everything that the scores depend on, as JSON. A stage that scores has them among its inputs.
    """

    scorer: Scorer
    inputs: dict[str, Any]


@dataclass(frozen=True)
class EvaluationSettings:
    """How block efficiency is measured. Raises InvalidRequestError for a value outside its range."""

    prompts: tuple[str, ...] = option(
        (),
        "Files with prompts. By default, some prompts of [distill], which are held out of training. If it has no "
        "prompts, every answer starts from BOS alone.",
    )
    count: int = option(20, "Number of prompts.")
    words: int = option(0, "Use this number of words from the start of each prompt of `prompts`. 0 uses all.")
    max_tokens: int = option(120, "Maximum length of an answer, in tokens.")
    draft_length: int = option(4, "Tokens drafted for each pass of the target.")
    temperatures: tuple[float, ...] = option((0.0, 1.0), "Temperatures. The score is the mean over them.")

    def __post_init__(self) -> None:
        for name in ("count", "max_tokens", "draft_length"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.words < 0:
            raise InvalidRequestError(f"words is {self.words}; use 0 (all words) or more")
        if not self.temperatures or not all(t == 0 or 1e-4 <= t <= LARGEST_TEMPERATURE for t in self.temperatures):
            raise InvalidRequestError(
                f"temperatures are {self.temperatures}; use 0, or numbers from 0.0001 to {LARGEST_TEMPERATURE:g}"
            )


# (target, settings, token ids of the prompts) -> scorer
ScorerFactory = Callable[[Target, EvaluationSettings, list[Prompt]], Scorer]


def evaluation_prompts(
    settings: EvaluationSettings, target: Target, distill: tuple[DistillData, AnswerSettings] | None = None
) -> list[Prompt]:
    """Return the prompts to score on.

    Args:
        settings: If they name prompts, the first of those are used.
        target: The target, for its tokenizer and context.
        distill: The data of the distillation stage. If it has prompts, the held-out ones are used.

    Returns:
        The prompts. Without any prompts, each one is only BOS.

    Raises:
        TrainingError: There are no prompts, or none leaves room for an answer.
    """
    data, answers = distill or (DistillData(), AnswerSettings())
    if settings.prompts:
        read, _ = read_prompts(settings.prompts, target.tokenizer, data.system, settings.words)
        return split_prompts(read, 0, settings.max_tokens, target.context)[0][: settings.count]
    if data.prompts:
        read, _ = read_prompts(data.prompts, target.tokenizer, data.system)
        return split_prompts(read, settings.count, answers.max_tokens, target.context)[1]
    if target.tokenizer.bos_token_id is None:
        raise TrainingError(
            "the target's tokenizer has no BOS token to start a text with; set prompts for the evaluation"
        )
    return [Prompt([target.tokenizer.bos_token_id])] * settings.count


def new_evaluation(
    settings: EvaluationSettings,
    target: Target,
    scorer_factory: ScorerFactory,
    distill: tuple[DistillData, AnswerSettings] | None = None,
) -> Evaluation:
    """Create an evaluation. Its inputs contain a fingerprint of the prompts instead of their file names.

    Args:
        settings: The settings.
        target: The target.
        scorer_factory: Makes the scorer.
        distill: The data of the distillation stage, if there is one.

    Returns:
        The evaluation.

    Raises:
        TrainingError: There are no prompts.
    """
    prompts = evaluation_prompts(settings, target, distill)
    inputs = {**asdict(settings), "prompts": fingerprint(json.dumps(prompts))}
    return Evaluation(scorer_factory(target, settings, prompts), inputs)
