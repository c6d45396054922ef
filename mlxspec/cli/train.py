"""``mlxspec train``: make a drafter. Progress goes to standard error, the result to standard output."""

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import click
from mlx.utils import tree_flatten

from mlxspec.cli.bars import Bars
from mlxspec.cli.launched import one_speaker
from mlxspec.errors import InvalidRequestError
from mlxspec.evaluation.curves import can_draw, draw_curves, metrics_files
from mlxspec.evaluation.metrics import served_block_efficiency
from mlxspec.models.memory import gigabytes
from mlxspec.models.sharding import agree, launched_processes
from mlxspec.settings import key_of
from mlxspec.training import adapting, pipeline, stages
from mlxspec.training import recipe as recipes
from mlxspec.training.adapting import AdaptSettings
from mlxspec.training.drafter_folders import describe, load_drafter
from mlxspec.training.estimate import estimate, format_duration
from mlxspec.training.losses import Loss
from mlxspec.training.prompts import Prompt
from mlxspec.training.recipe import FinetuneData, PretrainData, Recipe
from mlxspec.training.recording import Recording, delete_recording
from mlxspec.training.responses import AnswerSettings, DistillData, answer_counts
from mlxspec.training.retention import Retention
from mlxspec.training.robust import Robust
from mlxspec.training.run_folder import Metrics, is_first_process
from mlxspec.training.scoring import Evaluation, EvaluationSettings, new_evaluation
from mlxspec.training.shards import TokenShards
from mlxspec.training.target import DrafterShape, Listener, Target
from mlxspec.training.trainer import Scorer, TrainingSettings
from mlxspec.training.warm_start import WarmStart

T = TypeVar("T")

TABLE_TITLES = {
    "drafter": "[drafter], a new drafter with random weights",
    "drafter with layers": "[drafter] with layers, a drafter that copies them",
    "drafter with kind": "[drafter] with kind, an EAGLE head",
    "finetune": "[[finetune]], once or several times",
}

TARGET = click.option("--target", required=True, help="Folder, hub id or short name of the target.")
OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for the results.")
PROMPTS = click.option(
    "--prompts",
    multiple=True,
    help="Files with prompts. The block efficiency (tokens per pass of the target) is measured on them, every "
    "--evaluate-every steps.",
)
DIVIDE_HELP = (
    "Divide the target over the processes of mlx.launch. By default, each process has all of it. Without mlx.launch, "
    "this has no effect."
)
DIVIDE = click.option("--divide-target", is_flag=True, help=DIVIDE_HELP)
START = click.option("--drafter", help="Start from this drafter. By default, a new one with the sizes below.")


@click.group()
def train() -> None:
    """Train a drafter for a target. To resume an interrupted command, repeat it."""


def settings_options(*classes: type) -> Callable:
    """Add an option for each field of some dataclasses, with its name, type, default and help."""

    def decorate(command: Callable) -> Callable:
        for cls in reversed(classes):
            hints = get_type_hints(cls)
            for field in reversed(fields(cls)):
                command = field_option(field, hints[field.name])(command)
        return command

    return decorate


def field_option(field: Any, kind: Any) -> Callable:
    """Return the option for a dataclass field of some type."""
    name, help = f"--{key_of(field).replace('_', '-')}", field.metadata["help"]
    if get_origin(kind) is tuple:
        default = list(field.default)
        help = f"{help} Can be given several times."
        kind = get_args(kind)[0]
        return click.option(name, field.name, type=kind, multiple=True, default=default, show_default=True, help=help)
    if kind is bool:
        return click.option(f"{name}/--no-{name[2:]}", field.name, default=field.default, show_default=True, help=help)
    if "choices" in field.metadata:
        kind = click.Choice(field.metadata["choices"]())
    kind = next((part for part in get_args(kind) if part is not type(None)), kind)
    return click.option(name, field.name, type=kind, default=field.default, show_default=True, help=help)


def take_settings(cls: type[T], options: dict[str, Any]) -> T:
    """Remove the options of ``settings_options`` for a dataclass, and return an instance of it."""
    values = {field.name: options.pop(field.name) for field in fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def recipe_keys() -> str:
    """Return the tables of a recipe with their keys, defaults and meanings, for the help text."""
    lines = [
        "\b",
        "Keys at the top of RECIPE:",
        "  target (required)",
        "    Folder, hub id or short name of the target.",
    ]
    lines += [
        "  drafter",
        "    Folder, hub id or short name of an existing drafter. Use this key or the table drafter.",
        "  divide_target = false",
        *indented(DIVIDE_HELP),
    ]
    for name, classes in recipes.TABLES.items():
        several = TABLE_TITLES.get(name, f"[{name}]")
        lines += ["", "\b", f"{several}:"]
        for field in (field for cls in classes for field in fields(cls)):
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            unset = default is None or default == []
            lines.append(f"  {key_of(field)}" + ("" if unset else f" = {json.dumps(default)}"))
            choices = field.metadata.get("choices", list)()
            text = field.metadata["help"] + (f" One of: {', '.join(choices)}." if choices else "")
            lines += indented(text)
    return "\n".join(lines)


def indented(text: str) -> list[str]:
    """Return the lines of a key's help."""
    return wrap(text, 76, initial_indent="    ", subsequent_indent="    ")


@train.command(epilog=recipe_keys(), short_help="Run the stages that a recipe describes.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for the results.  [default: next to RECIPE, with its name]",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Estimate the tokens, memory and time of each stage. This loads the models and times a few steps.",
)
@one_speaker
def run(recipe: Path, out: Path | None, dry_run: bool) -> None:
    """Run the stages of RECIPE, a TOML file or a name that `train recipes` lists. Complete stages are skipped.

    Paths in a recipe are relative to its file. In a recipe that comes with mlxspec, they are relative to the current
    folder.
    """
    parsed, folder = Recipe.read(recipe), out or recipe.with_suffix("")
    with Bars() as bars:
        target = open_target(parsed.target, parsed.divide_target, bars.listener, parsed)
        if dry_run:
            print_estimate(parsed, folder, target)
            return
        drafter, result = pipeline.run(parsed, folder, target, new_scorer)
    print_result(drafter, result, folder)


@train.command(name="recipes", short_help="List or print the recipes that come with mlxspec.")
@click.argument("name", required=False)
def list_recipes(name: str | None) -> None:
    """List the recipes that come with mlxspec, or print the one called NAME.

    Run a recipe with `mlxspec train run NAME`. To change one, save it: `mlxspec train recipes NAME > my.toml`.
    """
    included = recipes.included_recipes()
    if name is None:
        for recipe, path in included.items():
            click.echo(f"{recipe}\n  {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")
    elif name in included:
        click.echo(included[name].read_text(encoding="utf-8"), nl=False)
    else:
        raise InvalidRequestError(f"there is no recipe {name}; use one of {', '.join(included)}")


@train.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), help="PNG, PDF or SVG file.  [default: curves.png in FOLDER]")
def plot(folder: Path, out: Path | None) -> None:
    """Plot loss and block efficiency of the run in FOLDER. The run may be in progress."""
    click.echo(draw_curves(folder, out))


def open_target(name: str, divide: bool, listener: Listener, recipe: Recipe | None = None) -> Target:
    """Return a target. Its files are read when they are first needed.

    Args:
        name: Folder, hub id or short name.
        divide: Whether to divide it over the processes of ``mlx.launch``.
        listener: Callbacks for the progress of the stages.
        recipe: The recipe that the command runs, if it runs one.

    Raises:
        DisagreementError: The processes that divide the target have other options, or another recipe.
    """
    if (group := launched_processes()) is not None:
        options = asdict(recipe) if recipe else click.get_current_context().params
        asked: dict[str, Any] = tree_flatten(options, destination={}) if divide else {}  # type: ignore[assignment]
        agree(group, {"divide_target": divide} | {key: str(value) for key, value in asked.items()})
    return Target(name, listener, group if divide else None)


def print_estimate(recipe: Recipe, folder: Path, target: Target) -> None:
    """Print what each stage of a recipe will cost."""
    drafter = recipe.first_drafter(target) if recipe.trainings else None
    pipeline.check(recipe, folder, target, drafter)
    click.echo(f"target     {recipe.target}, vocabulary of {target.vocab_size}")
    if drafter:
        click.echo(f"drafter    {drafter.num_parameters:,} parameters")
    click.echo(f"folder     {folder}")
    seconds = 0.0
    for stage in estimate(recipe, folder, target, drafter, new_scorer):
        left = stage.tokens - stage.tokens_done
        speed = f" at {left / stage.seconds:,.0f} tokens/s" if stage.seconds else ""
        cost = f"about {format_duration(stage.seconds)}{speed}" if left else "done"
        done = f" ({stage.tokens_done:,} done)" if left and stage.tokens_done else ""
        memory = f", {gigabytes(stage.bytes)} of memory" if stage.bytes else ""
        disk = f", {gigabytes(stage.disk)} on disk" if stage.disk else ""
        click.echo(f"{stage.name:10s} {stage.what}: {stage.tokens:,} tokens{done}{memory}{disk}, {cost}")
        seconds += stage.seconds
    click.echo(f"total      about {format_duration(seconds)}")


@train.command()
@TARGET
@click.option("--data", multiple=True, required=True, help="Text file, folder or pattern. Can be given several times.")
@OUT
@START
@PROMPTS
@DIVIDE
@settings_options(TrainingSettings, DrafterShape)
@one_speaker
def pretrain(
    target: str,
    data: tuple[str, ...],
    out: Path,
    drafter: str | None,
    prompts: tuple[str, ...],
    divide_target: bool,
    **options: Any,
) -> None:
    """Train a drafter to predict the next token of text."""
    settings, shape = take_settings(TrainingSettings, options), take_settings(DrafterShape, options)
    check_prompts(prompts, settings)
    stage = PretrainData(data), settings
    recipe = Recipe(target, drafter or shape, stage, None, [], EvaluationSettings(prompts), divide_target)
    with Bars() as bars:
        model = open_target(target, divide_target, bars.listener)
        trained, result = pipeline.run(recipe, out, model, new_scorer)
    print_result(trained, result, out / "pretrain")


@train.command()
@TARGET
@OUT
@DIVIDE
@settings_options(DistillData, AnswerSettings)
@click.option("--validate", is_flag=True, help="Count duplicate, empty and truncated answers.")
@one_speaker
def distill(target: str, out: Path, divide_target: bool, validate: bool, **options: Any) -> None:
    """Generate the target's answers, as training data for finetune."""
    data, settings = take_settings(DistillData, options), take_settings(AnswerSettings, options)
    with Bars() as bars:
        model = open_target(target, divide_target, bars.listener)
        shards = stages.distill(model, data.prompts, data.system, settings, out)
    click.echo(f"{len(shards)} tokens in {shards.folder}", err=True)
    if validate:
        click.echo(", ".join(f"{count} {name}" for name, count in answer_counts(shards).items()))


@train.command(short_help="Make a drafter from some of the target's layers.")
@TARGET
@settings_options(WarmStart)
@click.option(
    "--answers",
    type=click.Path(path_type=Path),
    help="Folder written by train distill. Required for a smaller vocabulary or width.",
)
@OUT
@DIVIDE
@one_speaker
def init(target: str, answers: Path | None, out: Path, divide_target: bool, **options: Any) -> None:
    """Make a warm start: a drafter from some of the target's layers, as a start for pretrain or finetune."""
    start = take_settings(WarmStart, options)
    if start.needs_answers and not answers:
        raise click.UsageError(
            "--vocabulary-size, --hidden-size and --intermediate-size need --answers, a folder written by train distill"
        )
    shards = TokenShards(answers / "tokens", verify=True) if answers else None
    model = open_target(target, divide_target, Listener())
    drafter, coverage = stages.start_drafter(model, start, shards, out)
    click.echo(f"{out / 'drafter'}: {describe(drafter, coverage)}")


@train.command(short_help="Train a drafter to match the target on the target's answers.")
@TARGET
@click.option("--drafter", required=True, help="The drafter to start from.")
@click.option("--answers", required=True, type=click.Path(path_type=Path), help="Folder written by train distill.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Pretraining text to mix in and to remember: the folder `text` in the --out folder of train pretrain.",
)
@PROMPTS
@OUT
@DIVIDE
@settings_options(FinetuneData, Loss, Robust, Retention, TrainingSettings)
@one_speaker
def finetune(
    target: str,
    drafter: str,
    answers: Path,
    text: Path | None,
    prompts: tuple[str, ...],
    out: Path,
    divide_target: bool,
    **options: Any,
) -> None:
    """Train a drafter to match the target's distribution on the target's answers."""
    data, loss = take_settings(FinetuneData, options), take_settings(Loss, options)
    robust, retention = take_settings(Robust, options), take_settings(Retention, options)
    settings = take_settings(TrainingSettings, options)
    check_prompts(prompts, settings)
    with Bars() as bars:
        model = open_target(target, divide_target, bars.listener)
        start, evaluation = load_drafter(drafter, model), evaluation_on(model, prompts, settings)
        answered = TokenShards(answers / "tokens", verify=True)
        known = TokenShards(text / "tokens", verify=True) if text else None
        _, result = stages.train(
            model,
            start,
            data.sources(answered, known),
            loss,
            settings,
            out,
            evaluation,
            data.teacher_top_k,
            data.draft_steps,
            robust,
            retention,
            known,
        )
    print_result(out / "drafter", result, out)


@train.command(short_help="Finetune a drafter on answers that --record has kept.")
@TARGET
@click.option("--drafter", required=True, help="The drafter to adapt.")
@click.option("--recorded", required=True, type=click.Path(path_type=Path), help="Folder that `--record` has written.")
@click.option(
    "--general",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder written by train distill, with answers to other prompts. Training protects the quality on them.",
)
@OUT
@DIVIDE
@settings_options(AdaptSettings)
@one_speaker
def adapt(
    target: str,
    drafter: str,
    recorded: Path,
    general: Path,
    out: Path,
    divide_target: bool,
    **options: Any,
) -> None:
    """Finetune a drafter on recorded answers, and keep the result only if it is better.

    Every fifth recorded answer is held out. The new drafter is kept if its acceptance rate on those answers is higher,
    and if its acceptance rate on the general answers falls by no more than the tolerance.
    """
    settings, recording = take_settings(AdaptSettings, options), Recording(recorded)
    with Bars() as bars:
        model = open_target(target, divide_target, bars.listener)
        start, answers = load_drafter(drafter, model), TokenShards(general / "tokens", verify=True)
        result = adapting.adapt(model, start, recording, answers, settings, out)
    for name, (before, after) in (("recorded", result.recorded), ("general", result.general)):
        click.echo(f"acceptance rate on {name} answers: {before:.4f} before, {after:.4f} after")
    click.echo(f"{out / 'drafter'}" if result.kept else "the drafter was not kept, since it is not better")


@train.command(short_help="Count or delete recorded answers.")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--delete", is_flag=True, help="Delete all of them.")
def recorded(folder: Path, delete: bool) -> None:
    """Count or delete the answers that `generate --record` and `chat --record` have kept in FOLDER."""
    if delete:
        click.echo(f"deleted in {folder}: {delete_recording(folder)}")
        return
    recording = Recording(folder)
    lengths = [len(one.answer) for one in recording.answers()]
    size = f"{recording.bytes / 1e6:,.1f} MB"
    click.echo(f"{folder}: answers: {len(lengths)}, tokens: {sum(lengths):,}, size: {size}")


def new_scorer(target: Target, settings: EvaluationSettings, prompts: list[Prompt]) -> Scorer:
    """Return a function that measures a drafter's block efficiency with the decoder."""
    return served_block_efficiency(
        target.model,
        target.tokenizer,
        prompts,
        settings.temperatures,
        settings.draft_length,
        settings.max_tokens,
        group=target.group,
    )


def check_prompts(prompts: tuple[str, ...], settings: TrainingSettings) -> None:
    """Raise InvalidRequestError if there are prompts for an evaluation that never takes place."""
    if prompts and not settings.evaluate_every:
        raise InvalidRequestError("--prompts needs --evaluate-every, such as --evaluate-every 500; add it")


def evaluation_on(target: Target, files: tuple[str, ...], settings: TrainingSettings) -> Evaluation | None:
    """Return an evaluation on the prompts of some files, or None if the settings ask for no evaluation."""
    if not settings.evaluate_every:
        return None
    return new_evaluation(EvaluationSettings(files), target, new_scorer)


def print_result(drafter: Path, result: Metrics, run: Path) -> None:
    """Print the drafter's folder and block efficiency, and plot the run if matplotlib is installed."""
    if is_first_process():
        score = f", block efficiency {result['block_efficiency']:.2f} at step {result['step']}" if result else ""
        click.echo(f"{drafter}{score}")
        if can_draw() and metrics_files(run):
            draw_curves(run)
