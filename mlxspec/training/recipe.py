"""Recipes: the three stages in one TOML file.

    target = "llama2-7b-chat"      # folder, hub id or short name

    [drafter]                      # a shape, as here, or layers to copy, or the kind of an EAGLE head.
                                   # Or drafter = "the folder of a drafter"
    hidden_size = 1024

    [distill]
    prompts = ["prompts.jsonl"]    # without prompts, the target writes text from BOS

    [pretrain]                     # optional
    data = ["text/*.jsonl.gz"]

    [[finetune]]                   # one or several, run in sequence
    loss = "tvd++"

Every key is a field of one of the settings classes below. Paths are relative to the file.
"""

import difflib
import os
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mlxspec.errors import InvalidRequestError, TrainingError
from mlxspec.settings import key_of, option
from mlxspec.training.drafter_folders import load_drafter
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import DRAFT_STEPS, AnyDrafter
from mlxspec.training.responses import AnswerSettings, DistillData
from mlxspec.training.retention import Retention
from mlxspec.training.robust import Robust
from mlxspec.training.scoring import EvaluationSettings
from mlxspec.training.shards import TokenShards
from mlxspec.training.target import DrafterShape, Target
from mlxspec.training.trainer import TrainingSettings
from mlxspec.training.warm_start import EagleStart, WarmStart, warm_start

LONGEST_UNROLL = 8  # draft steps; the graph of a training step grows with their number
TEXT_SHARE = 0.1  # share of pretraining text in finetuning, the 9:1 of Goel et al.


@dataclass(frozen=True)
class PretrainData:
    """The data of the pretraining stage."""

    data: tuple[str, ...] = option((), "Text files, folders or glob patterns.")


@dataclass(frozen=True)
class FinetuneData:
    """The data of a finetuning stage. Raises InvalidRequestError for a value outside its range."""

    mix: float = option(TEXT_SHARE, "Share of the sequences that come from the pretraining text, if there is any.")
    teacher_top_k: int = option(
        0,
        "Number of the target's most likely tokens to store on disk for each position. For an EAGLE head, the hidden "
        "states that it reads are stored too. Later epochs read them instead of running the target. The acceptance "
        "rate in metrics.jsonl becomes an upper bound, because the remaining "
        "probability is divided in proportion to the drafter's. 0 stores none.",
    )

    draft_steps: int = option(
        DRAFT_STEPS, "For an EAGLE head: number of tokens that it drafts from each position in training."
    )

    def __post_init__(self) -> None:
        if not 1 <= self.draft_steps <= LONGEST_UNROLL:
            raise InvalidRequestError(f"draft_steps is {self.draft_steps}; use 1 to {LONGEST_UNROLL}")
        if not 0 <= self.mix < 1:
            raise InvalidRequestError(f"mix is {self.mix}; use a number in [0, 1)")
        if self.teacher_top_k < 0:
            raise InvalidRequestError(f"teacher_top_k is {self.teacher_top_k}; use 0 or more")

    def sources(self, answers: TokenShards, text: TokenShards | None) -> list[tuple[TokenShards, float]]:
        """Return the data of the stage, each with its share: the answers, and the pretraining text if it is mixed in.

        Args:
            answers: The target's answers.
            text: The pretraining text, if there is any.
        """
        if text is None or not self.mix:
            return [(answers, 1.0)]
        return [(answers, 1 - self.mix), (text, self.mix)]


@dataclass(frozen=True)
class Finetune:
    """A finetuning stage: its data, loss, worst-case weighting, retention and training settings."""

    data: FinetuneData
    loss: Loss
    robust: Robust
    retention: Retention
    training: TrainingSettings


# The tables of a recipe, and the settings whose fields are their keys.
TABLES: dict[str, tuple[type, ...]] = {
    "drafter": (DrafterShape,),
    "drafter with layers": (WarmStart,),
    "drafter with kind": (EagleStart,),
    "pretrain": (PretrainData, TrainingSettings),
    "distill": (DistillData, AnswerSettings),
    "finetune": (FinetuneData, Loss, Robust, Retention, TrainingSettings),
    "evaluation": (EvaluationSettings,),
}


@dataclass(frozen=True)
class Recipe:
    """The content of a recipe file.

    Attributes:
        target: Folder, hub id or short name of the target.
        drafter: Shape of a new drafter, the weights to copy, or the folder, hub id or short name of a drafter to
            continue from.
        pretrain: Data and settings of the pretraining stage, or None.
        distill: Prompts and sampling of the distillation data, or None.
        finetune: The finetuning stages in order.
        evaluation: How block efficiency is measured during training.
        divide_target: Whether the processes of ``mlx.launch`` divide the target among them.
    """

    target: str
    drafter: DrafterShape | WarmStart | EagleStart | str
    pretrain: tuple[PretrainData, TrainingSettings] | None
    distill: tuple[DistillData, AnswerSettings] | None
    finetune: list[Finetune]
    evaluation: EvaluationSettings
    divide_target: bool = False

    @property
    def evaluates(self) -> bool:
        """Whether any stage measures block efficiency."""
        return any(training.evaluate_every for training in self.trainings)

    @property
    def trainings(self) -> list[TrainingSettings]:
        """The settings of all training stages in order."""
        return [*([self.pretrain[1]] if self.pretrain else []), *(stage.training for stage in self.finetune)]

    @property
    def held_out_prompts(self) -> int:
        """Number of distillation prompts that are held out for evaluation."""
        if self.distill is None or not self.evaluates or self.evaluation.prompts:
            return 0
        return self.evaluation.count if self.distill[0].prompts else 0

    @property
    def finetune_names(self) -> list[str]:
        """The folder name of each finetuning stage: "finetune", or "finetune-1", "finetune-2", … for several stages."""
        numbers = range(1, len(self.finetune) + 1)
        return ["finetune"] if len(self.finetune) == 1 else [f"finetune-{number}" for number in numbers]

    @property
    def seed(self) -> int:
        """The random seed of a drafter with random weights: that of the first training stage."""
        return self.trainings[0].seed if self.trainings else 0

    def first_drafter(self, target: Target) -> AnyDrafter:
        """Return a drafter of the shape that the first training stage starts from.

        Its weights are lazy. Where they depend on the target's answers, their values are arbitrary.
        """
        if isinstance(self.drafter, str):
            return load_drafter(self.drafter, target)
        if isinstance(self.drafter, DrafterShape):
            return target.new_drafter(self.drafter, self.seed)
        return warm_start(target, self.drafter, None)[0]

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """Read a recipe file, or a recipe that comes with mlxspec by its name.

        The paths in an included recipe are relative to the current folder.

        Raises:
            TrainingError: The file cannot be read, or has an unknown key or a value of the wrong type.
            InvalidRequestError: A value is outside its range.
        """
        path = Path(path)
        home = path.parent
        if not path.is_file() and (included := included_recipes().get(str(path))):
            path = included
        try:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TrainingError(
                f"{path} cannot be read ({error.strerror}); use the path of a recipe, a TOML file, or one of "
                f"{', '.join(included_recipes())}"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TrainingError(f"{path} is not valid TOML: {error}; fix this line") from None
        return cls._parse(content, path, home)

    @classmethod
    def _parse(cls, content: dict[str, Any], path: Path, home: Path) -> "Recipe":
        known = [field.name for field in fields(cls)]
        check_keys(content, known, str(path))
        if not isinstance(content.get("target"), str):
            raise TrainingError(f'{path} has no target; add target = "a folder, hub id or short name"')
        drafter = content.get("drafter", {})
        if not isinstance(drafter, str):
            drafter = parse_drafter(drafter, f"{path}: drafter", home)
        finetunes = content.get("finetune", [])
        finetunes = finetunes if isinstance(finetunes, list) else [finetunes]
        pretrain = distill = None
        if "pretrain" in content:
            data, training = parse_settings(content["pretrain"], f"{path}: pretrain", *TABLES["pretrain"])
            if not data.data:
                raise TrainingError(f"{path}: pretrain has no data; add text files or remove the stage")
            pretrain = replace(data, data=relative_paths(home, data.data)), training
        if "distill" in content:
            prompts, answers = parse_settings(content["distill"], f"{path}: distill", *TABLES["distill"])
            distill = replace(prompts, prompts=relative_paths(home, prompts.prompts)), answers
        if not (pretrain or distill or finetunes):
            raise TrainingError(f"{path} has no stage; add a [pretrain], [distill] or [[finetune]] table")
        if finetunes and not distill:
            raise TrainingError(f"{path}: finetune needs the target's answers; add a [distill] table")
        if isinstance(drafter, WarmStart | EagleStart) and drafter.needs_answers and not distill:
            raise TrainingError(
                f"{path}: the smaller vocabulary or width of the drafter needs the target's answers; add a [distill] "
                "table"
            )
        (evaluation,) = parse_settings(content.get("evaluation", {}), f"{path}: evaluation", *TABLES["evaluation"])
        return cls(
            path_or_name(home, content["target"]),
            path_or_name(home, drafter) if isinstance(drafter, str) else drafter,
            pretrain,
            distill,
            [parse_finetune(table, f"{path}: finetune", home) for table in finetunes],
            replace(evaluation, prompts=relative_paths(home, evaluation.prompts)),
            convert(content.get("divide_target", False), bool, f"{path}: divide_target"),
        )


def included_recipes() -> dict[str, Path]:
    """Return the paths of the recipes that come with mlxspec, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.toml"))}


def parse_drafter(table: Any, where: str, home: Path) -> DrafterShape | WarmStart | EagleStart:
    """Read the table of the drafter.

    The key ``kind`` makes it an EAGLE head. A key that only a warm start has, such as ``layers``, makes it one.

    Args:
        table: The table.
        where: The name of the file and the table, for messages.
        home: The recipe's folder.

    Raises:
        TrainingError: A key is unknown, two keys exclude each other, or a value has the wrong type.
        InvalidRequestError: A value is outside its range.
    """
    if isinstance(table, dict):
        shape_keys, warm_keys, head_keys = (
            [key_of(field) for field in fields(cls)] for cls in (DrafterShape, WarmStart, EagleStart)
        )
        check_keys(table, [*shape_keys, *warm_keys, "kind", *(head_keys if "kind" in table else ())], where)
        if "kind" in table:
            if other := next((key for key in table if key not in head_keys), None):
                raise TrainingError(f'{where}: "{other}" is not a key of an EAGLE head; remove it, or "kind"')
            (head,) = parse_settings(table, where, EagleStart)
            return head
        if warm := [key for key in table if key not in shape_keys]:
            if other := next((key for key in table if key not in warm_keys), None):
                raise TrainingError(
                    f'{where}: "{other}" is for random weights and "{warm[0]}" for copied layers; remove one of them'
                )
            (start,) = parse_settings(table, where, WarmStart)
            return replace(start, source=path_or_name(home, start.source)) if start.source else start
    (shape,) = parse_settings(table, where, DrafterShape)
    return shape


def parse_finetune(table: Any, where: str, home: Path) -> Finetune:
    """Read the table of a finetuning stage, as ``parse_settings`` does. Its paths are relative to ``home``."""
    data, loss, robust, retention, training = parse_settings(table, where, *TABLES["finetune"])
    retention = replace(retention, remember=relative_paths(home, retention.remember))
    return Finetune(data, loss, robust, retention, training)


def parse_settings(table: Any, where: str, *classes: type) -> list[Any]:
    """Read several dataclasses from one flat table.

    Args:
        table: The table.
        where: The name of the file and the table, for messages.
        classes: The dataclasses. A key belongs to the class that has a field of this name.

    Returns:
        One instance of each class.

    Raises:
        TrainingError: A key is unknown, or a value has the wrong type.
        InvalidRequestError: A value is outside its range.
    """
    if not isinstance(table, dict):
        raise TrainingError(f"{where} is {table!r}; use a table")
    keys = {key_of(field): (cls, field) for cls in classes for field in fields(cls)}
    check_keys(table, list(keys), where)
    given: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for key, value in table.items():
        cls, field = keys[key]
        given[cls][field.name] = convert(value, get_type_hints(cls)[field.name], f"{where}: {key}")
    try:
        return [cls(**given[cls]) for cls in classes]
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{where}: {error}") from None


def convert(value: Any, kind: Any, where: str) -> Any:
    """Convert a TOML value to the type of a field.

    An integer is accepted for a float or a string, and a single value for a tuple.

    Args:
        value: The value.
        kind: The type of the field.
        where: The name of the file, table and key, for messages.

    Returns:
        The converted value.

    Raises:
        TrainingError: The value has another type.
    """
    if get_origin(kind) is tuple:
        value = value if isinstance(value, list) else [value]
        return tuple(convert(entry, get_args(kind)[0], where) for entry in value)
    kinds = get_args(kind) or (kind,)
    if float in kinds and type(value) is int:
        return float(value)
    if str in kinds and type(value) is int:
        return str(value)
    if type(value) not in kinds:
        raise TrainingError(f"{where} is {value!r}; use a value of type {' or '.join(k.__name__ for k in kinds)}")
    return value


def check_keys(table: dict[str, Any], known: list[str], where: str) -> None:
    """Check that a table has only known keys.

    Args:
        table: The table.
        known: The known keys.
        where: The name of the file and the table, for messages.

    Raises:
        TrainingError: A key is unknown. The message suggests the most similar known key.
    """
    for key in table:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, 1, cutoff=0)
            raise TrainingError(f'{where}: there is no key "{key}"; the nearest is "{nearest[0]}"')


def relative_paths(home: Path, names: tuple[str, ...]) -> tuple[str, ...]:
    """Resolve paths that are relative to the recipe's folder."""
    return tuple(str(home / os.path.expanduser(name)) for name in names)


def path_or_name(home: Path, name: str) -> str:
    """Return the path of a file or folder next to the recipe if one has this name, else the name."""
    return str(home / name) if (home / name).exists() else name
