"""What a recipe will do, before it does it: tokens, memory and time of each stage.

Time is measured: each stage's own step, or a few tokens of the target's answers, run a few times on this machine.
Memory is the sum of ``memory.py``. What is complete is not counted again; evaluations are not in the time.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxspec.models.drafter import Drafter
from mlxspec.training.corpus import BadLines, corpus_files, encoded, read_prompts, records
from mlxspec.training.losses import Loss
from mlxspec.training.memory import check_fits
from mlxspec.training.mixture import Mixture
from mlxspec.training.objectives import objective
from mlxspec.training.recipe import DistillData, PretrainData, Recipe, first_drafter, held_out_prompts
from mlxspec.training.record import is_complete
from mlxspec.training.responses import AnswerSettings, answer_group, check_prompts, groups, groups_from_nothing
from mlxspec.training.shards import Index, ShardWriter, TokenShards
from mlxspec.training.stages import step_bytes
from mlxspec.training.target import Target
from mlxspec.training.teachers import OnlineTeacher
from mlxspec.training.trainer import Trainer, TrainingSettings

TRIED_DOCUMENTS, TRIED_STEPS, TRIED_TOKENS = 200, 3, (8, 24)


@dataclass(frozen=True)
class PlannedStage:
    """A line of the plan. ``tokens`` are those that are made or learnt from, at most; None is not known beforehand."""

    name: str
    what: str
    tokens: int
    bytes: int = 0
    seconds: float = 0.0
    done: bool = False


def plan(recipe: Recipe, folder: Path, target: Target) -> Iterator[PlannedStage]:
    """The stages of ``recipe`` in order. Raises TrainingError for a step that does not fit into memory."""
    drafter, text_tokens = first_drafter(recipe, target), 0
    if recipe.pretrain:
        data, training = recipe.pretrain
        text = plan_text(data, folder / "text", target)
        text_tokens = text.tokens
        yield text
        yield plan_training("pretrain", drafter, Loss("ce"), training, folder / "pretrain", target, text_tokens)
    answer_tokens = 0
    if recipe.distill:
        asked, answers = recipe.distill
        stage = plan_answers(asked, answers, held_out_prompts(recipe), folder / "answers", target)
        answer_tokens = stage.tokens
        yield stage
    for number, stage in enumerate(recipe.finetune, 1):
        name, mix = f"finetune-{number}", stage.data.mix if text_tokens else 0.0
        source = answer_tokens / max(1 - mix, 1e-9)
        yield plan_training(name, drafter, stage.loss, stage.training, folder / name, target, source)


def plan_text(data: PretrainData, folder: Path, target: Target) -> PlannedStage:
    files = corpus_files(data.data)
    size = sum(file.stat().st_size for file in files)
    what = f"{len(files)} files of {size / 1e6:.1f} MB"
    if is_complete(folder):
        return PlannedStage("text", what, Index.read(folder / "tokens").tokens, done=True)
    began, some = time.perf_counter(), list(islice(records(files, bad := BadLines()), TRIED_DOCUMENTS))
    tokens = sum(map(len, encoded(some, target.tokenizer, bad)))
    share = some[-1].bytes / size if some else 1.0
    return PlannedStage("text", what, round(tokens / share), seconds=(time.perf_counter() - began) / share)


def plan_answers(asked: DistillData, settings: AnswerSettings, held_out: int, folder: Path, target: Target):
    if asked.prompts:
        prompts, _ = read_prompts(asked.prompts, target.tokenizer, asked.system)
        work = groups(check_prompts(prompts[: len(prompts) - held_out], settings, target.context), settings)
    else:
        work = groups_from_nothing(target.tokenizer.bos_token_id, settings)
    answers = sum(len(group.prompts) for group in work)
    what = f"{answers} answers in {len(work)} groups"
    if is_complete(folder):
        return PlannedStage("answers", what, Index.read(folder / "tokens").tokens, done=True)
    seconds = []
    for tokens in TRIED_TOKENS:
        began = time.perf_counter()
        answer_group(target.model, target.tokenizer, work[0], replace(settings, max_tokens=tokens))
        seconds.append(time.perf_counter() - began)
    a_token = max(seconds[1] - seconds[0], 0) / (TRIED_TOKENS[1] - TRIED_TOKENS[0])
    most = sum(len(prompt) + settings.max_tokens for group in work for prompt in group.prompts)
    a_group = seconds[0] + a_token * max(settings.max_tokens - TRIED_TOKENS[0], 0)
    return PlannedStage("answers", what, most, target.bytes, a_group * len(work))


def plan_training(
    name: str,
    drafter: Drafter,
    loss: Loss,
    settings: TrainingSettings,
    folder: Path,
    target: Target,
    available: float,
) -> PlannedStage:
    positions = settings.batch * settings.length
    epochs = settings.steps * positions / max(available, 1)
    what = f"{loss.name}, {settings.steps} steps of {positions} positions, {epochs:.1f} times over what there is"
    needed = step_bytes(drafter, target, loss, settings)
    if is_complete(folder):
        return PlannedStage(name, what, settings.steps * positions, needed, done=True)
    check_fits(needed)
    seconds = step_seconds(drafter, loss, settings, target) * settings.steps
    return PlannedStage(name, what, settings.steps * positions, needed, seconds)


def step_seconds(drafter: Drafter, loss: Loss, settings: TrainingSettings, target: Target) -> float:
    """A step's time, tried out with random tokens on a copy of the drafter."""
    moments: list[float] = []
    copy = Drafter(drafter.config)
    copy.update(drafter.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        folder, random = Path(scratch), np.random.default_rng(0)
        with ShardWriter(folder / "tokens", target.vocab_size, target.tokens) as writer:
            for row in random.integers(0, drafter.config.vocab_size, (settings.batch, settings.length + 1)):
                writer.add(row, np.ones_like(row))
            writer.finish()
        batches = Mixture([TokenShards(folder / "tokens")], [1.0], settings.length, settings.batch, 0)
        teacher = OnlineTeacher(target.model) if loss.needs_target else None
        tried = replace(settings, steps=TRIED_STEPS, evaluate_every=0)

        def report(step: int, metrics: dict[str, float]) -> None:
            moments.append(time.perf_counter())

        Trainer(copy, objective(loss, teacher, settings.recompute), batches, tried, folder, None, teacher, report).run()
    mx.clear_cache()
    return statistics.median(np.diff(moments))  # the first step, which compiles, is before the first moment


def in_words(seconds: float) -> str:
    """Of two units at most: "3 h 20 min"."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
