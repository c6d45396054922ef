"""The three stages from one TOML file.

    target = "llama2-7b-chat"         # folder, hub id or short name
    drafter = { hidden_size = 1024 }  # a shape, or "folder" to go on from

    [pretrain]                        # may be left out
    data = ["text/*.jsonl.gz"]

    [distill]
    prompts = ["prompts.jsonl"]       # without: the target writes from nothing

    [[finetune]]                      # one or several after each other
    loss = "tvd++"

Every key is a field of the settings named below. Paths are relative to the file.
"""

import difflib
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mlxspec.errors import InvalidRequestError, TrainingError
from mlxspec.models.drafter import Drafter
from mlxspec.settings import option
from mlxspec.training import stages
from mlxspec.training.evaluation import EvaluationSettings, Evaluator, evaluation_of
from mlxspec.training.losses import Loss
from mlxspec.training.record import Metrics
from mlxspec.training.responses import AnswerSettings, DistillData
from mlxspec.training.shards import TokenShards
from mlxspec.training.target import DrafterShape, Target
from mlxspec.training.training_settings import TrainingSettings

MIXED_IN = 0.1  # share of pretraining rows in finetuning, Goel et al.'s 9:1


@dataclass(frozen=True)
class PretrainData:
    data: tuple[str, ...] = option((), "Text files, folders or patterns.")


@dataclass(frozen=True)
class FinetuneData:
    """Raises InvalidRequestError for a value outside its range."""

    mix: float = option(MIXED_IN, "Share of the rows that are taken from the pretraining text, where there is some.")
    teacher_top_k: int = option(
        0,
        "Keep this many of the target's most likely tokens on disk instead of running it at every step; 0: run it. "
        "acceptance_rate is then an upper bound.",
    )

    def __post_init__(self):
        if not 0 <= self.mix < 1:
            raise InvalidRequestError(f"mix is {self.mix}; use a number in [0, 1)")
        if self.teacher_top_k < 0:
            raise InvalidRequestError(f"teacher_top_k is {self.teacher_top_k}; use 0 or more")


@dataclass(frozen=True)
class Finetune:
    data: FinetuneData
    loss: Loss
    training: TrainingSettings


@dataclass(frozen=True)
class Recipe:
    """A parsed file."""

    target: str
    drafter: DrafterShape | str
    pretrain: tuple[PretrainData, TrainingSettings] | None
    distill: tuple[DistillData, AnswerSettings] | None
    finetune: list[Finetune]
    evaluation: EvaluationSettings

    @property
    def evaluates(self) -> bool:
        """Whether any stage measures block efficiency."""
        return any(training.evaluate_every for training in self.trainings)

    @property
    def trainings(self) -> list[TrainingSettings]:
        return [*([self.pretrain[1]] if self.pretrain else []), *(stage.training for stage in self.finetune)]

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """Raises TrainingError or InvalidRequestError, with the nearest known key for one that is not known."""
        path = Path(path)
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TrainingError(f"{path} cannot be read ({error.strerror}); give a recipe, a TOML file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise TrainingError(f"{path} is not TOML: {error}; mend that line") from None
        return cls._parsed(content, path)

    @classmethod
    def _parsed(cls, content: dict[str, Any], path: Path) -> "Recipe":
        known = [field.name for field in fields(cls)]
        check_keys(content, known, str(path))
        if not isinstance(content.get("target"), str):
            raise TrainingError(f'{path} names no target; add target = "a folder, hub id or short name"')
        home = path.parent
        drafter = content.get("drafter", {})
        if not isinstance(drafter, str):
            (drafter,) = settings(drafter, f"{path}: drafter", DrafterShape)
        finetunes = content.get("finetune", [])
        finetunes = finetunes if isinstance(finetunes, list) else [finetunes]
        pretrain = distill = None
        if "pretrain" in content:
            data, training = settings(content["pretrain"], f"{path}: pretrain", PretrainData, TrainingSettings)
            if not data.data:
                raise TrainingError(f"{path}: pretrain has no data; name text files, or leave the stage out")
            pretrain = replace(data, data=beside(home, data.data)), training
        if "distill" in content:
            asked, answers = settings(content["distill"], f"{path}: distill", DistillData, AnswerSettings)
            distill = replace(asked, prompts=beside(home, asked.prompts)), answers
        if finetunes and not distill:
            raise TrainingError(f"{path}: finetune needs the target's answers; add a [distill] table")
        (evaluation,) = settings(content.get("evaluation", {}), f"{path}: evaluation", EvaluationSettings)
        return cls(
            local(home, content["target"]),
            local(home, drafter) if isinstance(drafter, str) else drafter,
            pretrain,
            distill,
            [
                Finetune(*settings(table, f"{path}: finetune", FinetuneData, Loss, TrainingSettings))
                for table in finetunes
            ],
            replace(evaluation, prompts=beside(home, evaluation.prompts)),
        )


def run(recipe: Recipe, folder: Path, target: Target, evaluator: Evaluator) -> tuple[Path, Metrics]:
    """Run what is still to be run of the stages, each in a folder of its own under ``folder``.

    Returns the folder of the last stage's drafter and what it is worth.
    """
    drafter, result, last = first_drafter(recipe, target), {}, None
    evaluation = None
    if recipe.evaluates:
        evaluation = evaluation_of(recipe.evaluation, target, evaluator, recipe.distill)
    text: TokenShards | None = None
    if recipe.pretrain:
        data, training = recipe.pretrain
        text = stages.pretraining_shards(target, data.data, folder / "text")
        last = folder / "pretrain"
        measured = evaluation if training.evaluate_every else None
        drafter, result = stages.train(target, drafter, [(text, 1.0)], Loss("ce"), training, last, measured)
    if recipe.distill:
        asked, answers = recipe.distill
        held_out = held_out_prompts(recipe)
        shards = stages.distill(target, asked.prompts, asked.system, answers, folder / "answers", held_out)
    for number, stage in enumerate(recipe.finetune, 1):
        sources = [(shards, 1 - stage.data.mix), (text, stage.data.mix)] if text and stage.data.mix else [(shards, 1.0)]
        last = folder / f"finetune-{number}"
        measured = evaluation if stage.training.evaluate_every else None
        drafter, result = stages.train(
            target, drafter, sources, stage.loss, stage.training, last, measured, stage.data.teacher_top_k
        )
    if last is None:
        raise TrainingError("the recipe has neither pretrain nor finetune; add what is to be done")
    return last / "drafter", result


def held_out_prompts(recipe: Recipe) -> int:
    """How many of the distillation's prompts are kept for evaluation."""
    asked, _ = recipe.distill
    return recipe.evaluation.count if recipe.evaluates and asked.prompts and not recipe.evaluation.prompts else 0


def first_drafter(recipe: Recipe, target: Target) -> Drafter:
    if isinstance(recipe.drafter, str):
        return stages.start_from(recipe.drafter, target)
    seed = recipe.pretrain[1].seed if recipe.pretrain else recipe.finetune[0].training.seed if recipe.finetune else 0
    return target.new_drafter(recipe.drafter, seed)


def settings(table: Any, where: str, *classes: type) -> list[Any]:
    """One flat table as several dataclasses; a key belongs to the one that has a field of this name."""
    if not isinstance(table, dict):
        raise TrainingError(f"{where} is {table!r}; it must be a table")
    keys = {key_of(field): (cls, field) for cls in classes for field in fields(cls)}
    check_keys(table, list(keys), where)
    given: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for key, value in table.items():
        cls, field = keys[key]
        given[cls][field.name] = converted(value, get_type_hints(cls)[field.name], f"{where}: {key}")
    try:
        return [cls(**given[cls]) for cls in classes]
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{where}: {error}") from None


def key_of(field: Any) -> str:
    """The name that users know a setting by."""
    return field.metadata.get("key", field.name)


def converted(value: Any, kind: Any, where: str) -> Any:
    """A TOML value as what the field wants. Raises TrainingError if it is something else."""
    if get_origin(kind) is tuple:
        value = value if isinstance(value, list) else [value]
        return tuple(converted(entry, get_args(kind)[0], where) for entry in value)
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        return float(value)
    if str in kinds and type(value) is int:
        return str(value)
    if type(value) not in kinds:
        raise TrainingError(f"{where} is {value!r}; it must be of type {' or '.join(k.__name__ for k in kinds)}")
    return value


def check_keys(table: dict[str, Any], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, cutoff=0)
            raise TrainingError(f'{where}: there is no "{key}"; the nearest is "{nearest[0]}"')


def beside(home: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(str(home / Path(name).expanduser()) for name in names)


def local(home: Path, name: str) -> str:
    """A folder beside the recipe, if there is one of that name; else the name."""
    return str(home / name) if (home / name).exists() else name
