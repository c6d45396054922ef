"""Estimates of a training run's cost before it starts: tokens, memory and time of each stage.

Time is measured on this machine, on a few steps of each stage, short answers of the target and short evaluations. What
an earlier run has done is not counted.
"""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxspec.errors import TrainingError
from mlxspec.files import fingerprint, read_json
from mlxspec.models.eagle import Eagle
from mlxspec.models.sharding import agree
from mlxspec.training.batches import Batches
from mlxspec.training.checkpoint import last_step
from mlxspec.training.corpus import BadLines, corpus_files, encode_documents, read_documents
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import AnyDrafter, layers_read, objective_for
from mlxspec.training.recipe import PretrainData, Recipe
from mlxspec.training.responses import AnswerSettings, DistillData, answer_group, batches_like_single
from mlxspec.training.retention import FISHER_EXAMPLES, NO_RETENTION, Retention
from mlxspec.training.run_folder import is_complete, is_longer
from mlxspec.training.scoring import ScorerFactory, evaluation_prompts
from mlxspec.training.shards import Index, ShardWriter, TokenShards
from mlxspec.training.stages import distillation_groups
from mlxspec.training.step_memory import check_answers_fit, check_fits, step_bytes
from mlxspec.training.target import Target
from mlxspec.training.teachers import OnlineTeacher
from mlxspec.training.trainer import Trainer, TrainingSettings

TRIAL_DOCUMENTS, TRIAL_TOKENS = 200, (8, 24)


@dataclass(frozen=True)
class StageEstimate:
    """The cost of one stage.

    Attributes:
        name: The stage.
        what: A description of the work.
        tokens: Number of tokens to train on, or the largest number of tokens to create.
        tokens_done: Number of these that an earlier run has trained on or created.
        bytes: Peak memory in bytes.
        disk: Bytes on disk for a cached teacher.
        seconds: Time in seconds for the other tokens.
    """

    name: str
    what: str
    tokens: int
    tokens_done: int = 0
    bytes: int = 0
    disk: int = 0
    seconds: float = 0.0


def estimate(
    recipe: Recipe, folder: Path, target: Target, drafter: AnyDrafter | None, scorer_factory: ScorerFactory
) -> Iterator[StageEstimate]:
    """Yield the cost of each stage of a recipe in order.

    Args:
        recipe: The recipe.
        folder: The folder of the recipe's run. What is done there takes no time.
        target: The recipe's target.
        drafter: The drafter to start from. None if no stage trains one.
        scorer_factory: Makes the function that scores drafters.

    Raises:
        TrainingError: A step does not fit into memory, or there is no data.
    """
    text_tokens, evaluation = 0, 0.0
    if recipe.evaluates and drafter:
        evaluation = evaluation_seconds(recipe, drafter, target, scorer_factory)
    answer_tokens = 0
    if recipe.distill:
        prompts, answers = recipe.distill
        answering = estimate_answers(prompts, answers, recipe.held_out_prompts, folder / "answers", target)
        answer_tokens = answering.tokens
        yield answering
    if recipe.pretrain and drafter:
        data, training = recipe.pretrain
        text = estimate_text(data, folder / "text", target)
        text_tokens = text.tokens
        yield text
        yield estimate_training(
            "pretrain", drafter, Loss("ce"), training, folder / "pretrain", target, text_tokens, evaluation
        )
    for name, stage in zip(recipe.finetune_names, recipe.finetune, strict=True):
        assert drafter
        mix = stage.data.mix if text_tokens else 0.0
        available = answer_tokens / (1 - mix)  # with the pretraining text that is mixed in
        cost = estimate_training(
            name,
            drafter,
            stage.loss,
            stage.training,
            folder / name,
            target,
            available,
            evaluation,
            stage.data.draft_steps,
            stage.retention,
        )
        # For each token the ids and log-probabilities of the top k, and the hidden states that a head reads.
        stored = 0
        if top_k := stage.data.teacher_top_k:
            states = drafter.width_read if isinstance(drafter, Eagle) else 0
            stored = top_k * (4 if target.vocab_size <= 2**16 else 6) + 2 * states
        yield replace(cost, disk=round(available * stored) if stage.loss.needs_target else 0)


def evaluation_seconds(recipe: Recipe, drafter: AnyDrafter, target: Target, scorer_factory: ScorerFactory) -> float:
    """Estimate the time of one evaluation from short trials on one prompt.

    The trials use the drafter before training. A trained drafter is usually faster, since more of its tokens are
    accepted.

    Args:
        recipe: The recipe.
        drafter: The drafter that training starts from.
        target: The recipe's target.
        scorer_factory: Makes the function that scores drafters.

    Returns:
        The time in seconds.
    """
    settings = recipe.evaluation
    prompts = evaluation_prompts(settings, target, recipe.distill)
    seconds = []
    for tokens in TRIAL_TOKENS:
        score = scorer_factory(target, replace(settings, max_tokens=tokens), prompts[:1])
        score(drafter)  # compiles
        start = time.perf_counter()
        score(drafter)
        seconds.append(time.perf_counter() - start)
    token_seconds = max(seconds[1] - seconds[0], 0) / (TRIAL_TOKENS[1] - TRIAL_TOKENS[0])
    return len(prompts) * max(seconds[0] + token_seconds * (settings.max_tokens - TRIAL_TOKENS[0]), 0)


def estimate_text(data: PretrainData, folder: Path, target: Target) -> StageEstimate:
    """Estimate the cost of tokenizing a corpus from its first documents.

    Args:
        data: The corpus.
        folder: The stage's folder.
        target: The target, for its tokenizer.

    Returns:
        The cost of the stage.

    Raises:
        TrainingError: The corpus contains no text, or cannot be read.
    """
    files = corpus_files(data.data)
    size = sum(file.stat().st_size for file in files)
    what = f"{len(files)} files of {size / 1e6:.1f} MB"
    if is_complete(folder):
        tokens = Index.read(folder / "tokens").tokens
        return StageEstimate("text", what, tokens, tokens)
    start, some = time.perf_counter(), list(islice(read_documents(files, bad := BadLines()), TRIAL_DOCUMENTS))
    if not some:
        raise TrainingError(f"the {len(files)} files of the pretraining data contain no text; use files with text")
    tokens = sum(len(ids) for ids, _ in encode_documents(some, target.tokenizer, bad))
    share = some[-1].bytes / size
    return StageEstimate("text", what, round(tokens / share), seconds=(time.perf_counter() - start) / share)


def estimate_answers(
    data: DistillData, settings: AnswerSettings, held_out: int, folder: Path, target: Target
) -> StageEstimate:
    """Estimate the cost of the target's answers from two short trials on the first group that is not answered.

    Args:
        data: The prompts.
        settings: How the answers are sampled.
        held_out: Number of prompts that are not answered.
        folder: The stage's folder.
        target: The target.

    Returns:
        The cost of the stage.
    """
    groups, *_ = distillation_groups(target, data.prompts, data.system, settings, held_out)
    answers = sum(len(group.prompts) for group in groups)
    what = f"{answers} answers in {len(groups)} groups"
    written = Index.read(folder / "tokens") if (folder / "tokens" / "index.json").exists() else Index(0, "")
    left = groups[written.notes.get("groups", 0) :]
    if written.complete or not left:
        return StageEstimate("answers", what, written.tokens, written.tokens)
    if target.group is not None:  # before all of them run it on these
        agree(target.group, {"set of prompts": fingerprint(json.dumps([group.prompts for group in groups]))})
    seconds, together = [], batches_like_single(target.model, groups)
    needed = check_answers_fit(target, groups, settings, together)
    for tokens in TRIAL_TOKENS:
        start = time.perf_counter()
        answer_group(target.model, target.tokenizer, left[0], replace(settings, max_tokens=tokens), together)
        seconds.append(time.perf_counter() - start)
    token_seconds = max(seconds[1] - seconds[0], 0) / (TRIAL_TOKENS[1] - TRIAL_TOKENS[0])
    most = sum(len(prompt) + settings.max_tokens for group in left for prompt in group.prompts)
    group_seconds = seconds[0] + token_seconds * max(settings.max_tokens - TRIAL_TOKENS[0], 0)
    tokens = written.tokens + most
    return StageEstimate("answers", what, tokens, written.tokens, needed, seconds=group_seconds * len(left))


def estimate_training(
    name: str,
    drafter: AnyDrafter,
    loss: Loss,
    settings: TrainingSettings,
    folder: Path,
    target: Target,
    available: float,
    evaluation: float = 0.0,
    draft_steps: int = 1,
    retention: Retention = NO_RETENTION,
) -> StageEstimate:
    """Estimate the cost of a training stage from a few of its steps.

    Args:
        name: The stage.
        drafter: A drafter of the right shape.
        loss: The loss.
        settings: The settings.
        folder: The stage's folder.
        target: The target.
        available: Number of tokens in the training data.
        evaluation: Time of one evaluation in seconds.
        draft_steps: Draft steps that an EAGLE head is trained on.
        retention: Settings against forgetting.

    Returns:
        The cost of the stage.

    Raises:
        TrainingError: A step does not fit into memory.
    """
    positions = settings.batch * settings.length
    epochs = settings.steps * positions / max(available, 1)
    what = f"{loss.name}, {settings.steps} steps of {positions} positions, {epochs:.1f} epochs"
    needed = step_bytes(drafter, target, loss, settings, draft_steps, retention)
    done = steps_done(folder, settings)
    cost = StageEstimate(name, what, settings.steps * positions, done * positions, needed)
    if done == settings.steps:
        return cost
    check_fits(needed)
    left = settings.steps - done
    steps = left + (FISHER_EXAMPLES / settings.batch if retention.needs_fisher and not done else 0)
    seconds = step_seconds(drafter, loss, settings, target, draft_steps) * steps
    if settings.evaluate_every:
        seconds += evaluation * math.ceil(left / settings.evaluate_every)
    return replace(cost, seconds=seconds)


def steps_done(folder: Path, settings: TrainingSettings) -> int:
    """Return the number of steps that a run with these settings need not take, since an earlier one took them.

    Raises:
        TrainingError: The last checkpoint is damaged.
    """
    if is_complete(folder) and not is_longer(read_json(folder / "stage.json").get("inputs", {}), asdict(settings)):
        return settings.steps  # whether or not its checkpoints are still there
    return min(last_step(folder), settings.steps)


def step_seconds(
    drafter: AnyDrafter, loss: Loss, settings: TrainingSettings, target: Target, draft_steps: int = 1
) -> float:
    """Measure the time of a training step on random tokens.

    The measurement trains a copy of the drafter. The teacher is an online teacher.

    Args:
        drafter: A drafter of the right shape.
        loss: The loss.
        settings: The settings of the stage.
        target: The target.
        draft_steps: Draft steps that an EAGLE head is trained on.

    Returns:
        The time in seconds.
    """
    copy = deepcopy(drafter)
    with tempfile.TemporaryDirectory() as scratch:
        random = np.random.default_rng(0)
        with ShardWriter(scratch, target.vocab_size, target.tokenizer_fingerprint) as writer:
            for row in random.integers(0, drafter.args.vocab_size, (settings.batch, settings.length + 1)):
                writer.add(row, np.ones_like(row))
            writer.finish()
        batches = Batches([TokenShards(scratch)], [1.0], settings.length, settings.batch, 0)
        teacher = None
        if loss.needs_target:
            teacher = OnlineTeacher(target.model, None, layers_read(copy, target.model), target.group)
        goal = objective_for(copy, loss, teacher, settings.recompute, draft_steps)
        trainer = Trainer(copy, goal, batches, settings, Path(scratch))
        seconds = trainer.time_step()
    mx.clear_cache()
    return seconds


def format_duration(seconds: float) -> str:
    """Format a time in at most two units, such as "3 h 20 min"."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
