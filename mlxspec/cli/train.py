"""``mlxspec train``: progress and results on standard error, what was made where DESIGN says it is."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import click
from tqdm import tqdm

from mlxspec.evaluation.curves import can_draw, draw_curves, metrics_files
from mlxspec.evaluation.metrics import served_block_efficiency
from mlxspec.models.memory import gigabytes
from mlxspec.training import recipe as recipes
from mlxspec.training import stages
from mlxspec.training.corpus import BadLines
from mlxspec.training.evaluation import Evaluate, Evaluation, EvaluationSettings, evaluation_of
from mlxspec.training.losses import Loss
from mlxspec.training.plan import in_words, plan
from mlxspec.training.processes import is_first
from mlxspec.training.recipe import FinetuneData, Recipe, key_of
from mlxspec.training.responses import AnswerSettings, DistillData, validated
from mlxspec.training.shards import TokenShards
from mlxspec.training.target import DrafterShape, Listener, Target
from mlxspec.training.training_settings import TrainingSettings

TARGET = click.option("--target", required=True, help="Folder, hub id or short name of the model to draft for.")
OUT = click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for all that is made.")
PROMPTS = click.option("--prompts", multiple=True, help="Files of prompts to measure block efficiency on.")
START = click.option("--drafter", help="Go on from this drafter, instead of starting a new one of the shape below.")


@click.group()
def train() -> None:
    """Make a drafter for a target. Every command goes on where it was interrupted."""


def settings_options(*classes: type) -> Callable:
    """An option for each field: name, type, default and help are the dataclass's."""

    def decorate(command: Callable) -> Callable:
        for cls in reversed(classes):
            hints = get_type_hints(cls)
            for field in reversed(fields(cls)):
                command = option_of(field, hints[field.name])(command)
        return command

    return decorate


def option_of(field: Any, kind: Any) -> Callable:
    name, help = f"--{key_of(field).replace('_', '-')}", field.metadata["help"]
    if get_origin(kind) is tuple:
        default = list(field.default)
        help = f"{help} May be given several times."
        kind = get_args(kind)[0]
        return click.option(name, field.name, type=kind, multiple=True, default=default, show_default=True, help=help)
    if kind is bool:
        return click.option(f"{name}/--no-{name[2:]}", field.name, default=field.default, show_default=True, help=help)
    if "choices" in field.metadata:
        kind = click.Choice(field.metadata["choices"]())
    kind = next((part for part in get_args(kind) if part is not type(None)), kind)
    return click.option(name, field.name, type=kind, default=field.default, show_default=True, help=help)


def taken(cls: type, given: dict[str, Any]) -> Any:
    """The options that ``settings_options`` made of ``cls``, as one of it."""
    values = {field.name: given.pop(field.name) for field in fields(cls)}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@train.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for all that is made.  [default: beside the recipe]"
)
@click.option("--dry-run", is_flag=True, help="Print what would be done: tokens, memory and time of each stage.")
def run(recipe: Path, out: Path | None, dry_run: bool) -> None:
    """Run the three stages that RECIPE, a TOML file, describes; what is complete is skipped."""
    parsed, folder = Recipe.read(recipe), out or recipe.with_suffix("")
    if dry_run:
        tell_plan(parsed, folder)
        return
    with Bars() as bars:
        target = Target(parsed.target, bars.listener)
        drafter, result = recipes.run(parsed, folder, target, evaluator)
    tell(drafter, result, folder)


@train.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), help="PNG, PDF or SVG.  [default: curves.png in FOLDER]")
def plot(folder: Path, out: Path | None) -> None:
    """Draw loss and block efficiency of the run in FOLDER, also while it goes on."""
    click.echo(draw_curves(folder, out))


def tell_plan(recipe: Recipe, folder: Path) -> None:
    target = Target(recipe.target)
    drafter = recipes.first_drafter(recipe, target)
    click.echo(f"target     {recipe.target}, vocabulary of {target.vocab_size}")
    click.echo(f"drafter    {drafter.num_parameters:,} parameters")
    click.echo(f"folder     {folder}")
    seconds = 0.0
    for stage in plan(recipe, folder, target):
        cost = "done" if stage.done else f"about {in_words(stage.seconds)}"
        memory = f", {gigabytes(stage.bytes)} of memory" if stage.bytes else ""
        disk = f", {gigabytes(stage.disk)} on disk" if stage.disk else ""
        click.echo(f"{stage.name:10s} {stage.what}: {stage.tokens:,} tokens{memory}{disk}, {cost}")
        seconds += stage.seconds
    evaluations = " and the evaluations" if recipe.evaluates else ""
    click.echo(f"in all     about {in_words(seconds)}{evaluations}")


@train.command()
@TARGET
@click.option("--data", multiple=True, required=True, help="Text file, folder or pattern; may be given several times.")
@OUT
@START
@PROMPTS
@settings_options(TrainingSettings, DrafterShape)
def pretrain(target, data, out, drafter, prompts, **given) -> None:
    """Next-token training on text."""
    settings, shape = taken(TrainingSettings, given), taken(DrafterShape, given)
    with Bars() as bars:
        model = Target(target, bars.listener)
        text = stages.pretraining_shards(model, data, out / "text")
        start = stages.start_from(drafter, model) if drafter else model.new_drafter(shape, settings.seed)
        evaluation = evaluation_on(model, prompts, settings)
        _, result = stages.train(model, start, [(text, 1.0)], Loss("ce"), settings, out / "pretrain", evaluation)
    tell(out / "pretrain" / "drafter", result, out / "pretrain")


@train.command()
@TARGET
@OUT
@settings_options(DistillData, AnswerSettings)
@click.option("--validate", is_flag=True, help="Report duplicates, empty and truncated answers.")
def distill(target, out, validate, **given) -> None:
    """Let the target answer prompts; finetuning learns from its answers."""
    data, settings = taken(DistillData, given), taken(AnswerSettings, given)
    with Bars() as bars:
        shards = stages.distill(Target(target, bars.listener), data.prompts, data.system, settings, out)
    click.echo(f"{len(shards)} tokens in {shards.folder}", err=True)
    if validate:
        click.echo(", ".join(f"{count} {name}" for name, count in validated(shards).items()))


@train.command()
@TARGET
@click.option("--drafter", required=True, help="The drafter to finetune.")
@click.option("--answers", required=True, type=click.Path(path_type=Path), help="What train distill has made.")
@click.option(
    "--text", type=click.Path(path_type=Path), help="Pretraining text to mix in, what train pretrain has made."
)
@PROMPTS
@OUT
@settings_options(FinetuneData, Loss, TrainingSettings)
def finetune(target, drafter, answers, text, prompts, out, **given) -> None:
    """Teach the drafter the target's own distribution on the target's answers."""
    data, loss, settings = taken(FinetuneData, given), taken(Loss, given), taken(TrainingSettings, given)
    with Bars() as bars:
        model = Target(target, bars.listener)
        sources = [(TokenShards(answers / "tokens", verify=True), 1.0)]
        if text:
            sources = [(sources[0][0], 1 - data.mix), (TokenShards(text / "tokens", verify=True), data.mix)]
        evaluation = evaluation_on(model, prompts, settings)
        start = stages.start_from(drafter, model)
        _, result = stages.train(model, start, sources, loss, settings, out, evaluation, data.teacher_top_k)
    tell(out / "drafter", result, out)


def evaluator(target: Target, settings: EvaluationSettings, prompts: list[list[int]]) -> Evaluate:
    """Measures block efficiency as served."""
    return served_block_efficiency(
        target.model, target.tokenizer, prompts, settings.temperatures, settings.draft_length, settings.max_tokens
    )


def evaluation_on(target: Target, files: tuple[str, ...], settings: TrainingSettings) -> Evaluation | None:
    """On the prompts of ``files``; None where nothing is measured."""
    if not settings.evaluate_every:
        return None
    return evaluation_of(EvaluationSettings(files), target, evaluator)


def tell(folder: Path, result: dict[str, float], run: Path) -> None:
    """The drafter that was made; and the picture of its ``run``, if there is something to draw with."""
    if is_first():
        if can_draw() and metrics_files(run):
            draw_curves(run)
        tell_drafter(folder, result)


def tell_drafter(folder: Path, result: dict[str, float]) -> None:
    measured = f", block efficiency {result['block_efficiency']:.2f} at step {result['step']}" if result else ""
    click.echo(f"{folder}{measured}")


class Bars:
    """Progress bars on standard error, if that is a terminal; the lines between them always."""

    def __enter__(self) -> "Bars":
        self._bar: tqdm | None = None
        self.listener = Listener(self._stage, self._work, self._step, self._bad_lines)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def _stage(self, name: str, what: str) -> None:
        self.__exit__()
        self._bar = None
        if is_first():
            click.echo(f"{name}: {what}", err=True)

    def _work(self, done: int, total: int, tokens: int) -> None:
        self._show(done, total, f"{tokens} tokens")

    def _step(self, steps: int, step: int, metrics: dict[str, float]) -> None:
        self._show(step, steps, " ".join(f"{name} {metrics[name]:.3g}" for name in SHOWN if name in metrics))

    def _show(self, done: int, total: int | None, words: str) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, disable=None, dynamic_ncols=True)
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(done - self._bar.n)

    def _bad_lines(self, bad: BadLines) -> None:
        if bad.skipped:
            click.echo(f"skipped {bad.skipped} of {bad.read} lines: {'; '.join(bad.told)}", err=True)


SHOWN = ("loss", "acceptance_rate", "block_efficiency")
