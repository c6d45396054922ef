"""What a recipe will do, before it does it: tokens, memory and time of each stage.

Time is measured: each stage's own step, or a few tokens of the target's answers, run a few times on this machine.
Memory is the sum of ``memory.py``. What is complete is not counted again; evaluations are not in the time.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxspec.models.drafter import Drafter
from mlxspec.training.corpus import BadLines, corpus_files, encoded, read_prompts, records, split_prompts
from mlxspec.training.losses import Loss
from mlxspec.training.memory import check_fits
from mlxspec.training.mixture import Mixture
from mlxspec.training.objectives import objective
from mlxspec.training.recipe import PretrainData, Recipe, first_drafter, held_out_prompts
from mlxspec.training.record import is_complete
from mlxspec.training.responses import AnswerSettings, DistillData, answer_group, groups, groups_from_nothing
from mlxspec.training.shards import Index, ShardWriter, TokenShards
from mlxspec.training.stages import step_bytes
from mlxspec.training.target import Target
from mlxspec.training.teachers import OnlineTeacher
from mlxspec.training.trainer import Trainer
from mlxspec.training.training_settings import TrainingSettings

TRIED_DOCUMENTS, TRIED_TOKENS = 200, (8, 24)


@dataclass(frozen=True)
class PlannedStage:
    """A line of the plan. ``tokens`` are those that are made, at most, or learnt from; ``disk`` bytes a teacher's."""

    name: str
    what: str
    tokens: int
    bytes: int = 0
    disk: int = 0
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
        source = answer_tokens / (1 - mix)  # with the text that is mixed in
        planned = plan_training(name, drafter, stage.loss, stage.training, folder / name, target, source)
        # For each token the ids and log-probabilities of the k most likely.
        kept = stage.data.teacher_top_k * (4 if target.vocab_size <= 2**16 else 6)
        yield replace(planned, disk=round(source * kept) if stage.loss.needs_target else 0)


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


def plan_answers(
    asked: DistillData, settings: AnswerSettings, held_out: int, folder: Path, target: Target
) -> PlannedStage:
    if asked.prompts:
        prompts, _ = read_prompts(asked.prompts, target.tokenizer, asked.system)
        learnt, _ = split_prompts(prompts, held_out, settings.max_tokens, target.context)
        work = groups(learnt, settings)
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
    return PlannedStage("answers", what, most, target.bytes, seconds=a_group * len(work))


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
    return PlannedStage(name, what, settings.steps * positions, needed, seconds=seconds)


def step_seconds(drafter: Drafter, loss: Loss, settings: TrainingSettings, target: Target) -> float:
    """A step's time, tried out with random tokens on a copy of the drafter, and with the target itself as teacher."""
    copy = Drafter(drafter.config)
    copy.update(drafter.parameters())
    with tempfile.TemporaryDirectory() as scratch:
        random = np.random.default_rng(0)
        with ShardWriter(scratch, target.vocab_size, target.tokens) as writer:
            for row in random.integers(0, drafter.config.vocab_size, (settings.batch, settings.length + 1)):
                writer.add(row, np.ones_like(row))
            writer.finish()
        batches = Mixture([TokenShards(scratch)], [1.0], settings.length, settings.batch, 0)
        teacher = OnlineTeacher(target.model) if loss.needs_target else None
        trainer = Trainer(copy, objective(loss, teacher, settings.recompute), batches, settings, Path(scratch))
        seconds = trainer.trial_seconds()
    mx.clear_cache()
    return seconds


def in_words(seconds: float) -> str:
    """Of two units at most: "3 h 20 min"."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
