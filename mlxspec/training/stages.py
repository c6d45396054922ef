"""The stages of training. Each is a function that writes its result to a folder.

A stage's folder records the inputs of the stage. Repeating a stage with the same inputs skips it if it is complete and
resumes it if it is not. A stage with other inputs is refused.
"""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from mlxspec.files import fingerprint_files, read_json
from mlxspec.models.eagle import Eagle
from mlxspec.settings import key_of
from mlxspec.training.batches import Batches
from mlxspec.training.checkpoint import last_step
from mlxspec.training.checks import check_tokenizer, check_training
from mlxspec.training.corpus import BadLines, corpus_files, tokenize_corpus
from mlxspec.training.documents import keeps_documents_apart
from mlxspec.training.drafter_folders import describe, read_drafter, weights_fingerprint, write_drafter
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import DRAFT_STEPS, AnyDrafter, layers_read, objective_for
from mlxspec.training.prompts import read_prompts, split_prompts
from mlxspec.training.responses import (
    AnswerSettings,
    Group,
    batches_like_single,
    bos_groups,
    prompt_groups,
    write_answers,
)
from mlxspec.training.retention import NO_RETENTION, Retention, measured_fisher
from mlxspec.training.robust import UNIFORM, Robust, new_weighting
from mlxspec.training.run_folder import (
    Metrics,
    broadcast,
    complete_stage,
    has_results,
    is_first_process,
    locked_for_all,
    start_stage,
)
from mlxspec.training.scoring import Evaluation
from mlxspec.training.shards import TokenShards
from mlxspec.training.step_memory import check_answers_fit, check_fits, step_bytes
from mlxspec.training.target import DrafterShape, Target
from mlxspec.training.teachers import CachedTeacher, OnlineTeacher, Teacher
from mlxspec.training.trainer import Trainer, TrainingSettings
from mlxspec.training.warm_start import EagleStart, WarmStart, warm_start

NOT_INPUTS = ("checkpoint_every", "log_every", "recompute")  # settings that do not change the result
# Inputs that may change while a stage is unfinished, for a run that diverged or ran out of memory.
CHANGEABLE = ("learning_rate", "clip", "weight_decay", "accumulate", "precision", "evaluate_every", "evaluation")


def pretraining_shards(target: Target, data: Sequence[str], folder: Path) -> TokenShards:
    """Tokenize text for pretraining.

    Args:
        target: The target, for its tokenizer.
        data: Files, folders or patterns.
        folder: The stage's folder.

    Returns:
        The tokenized text.

    Raises:
        TrainingError: The text cannot be read, or the folder was created from other text.
    """
    inputs = {"content": fingerprint_files(corpus_files(data)), "tokenizer": target.tokenizer_fingerprint}
    with locked_for_all(folder):
        if start_stage(folder, inputs):
            target.listener.stage(folder.name, "tokenizing")
            if is_first_process():
                shutil.rmtree(folder / "tokens", ignore_errors=True)  # not resumed, since tokenizing is fast
                _, bad = tokenize_corpus(
                    data,
                    target.tokenizer,
                    target.vocab_size,
                    target.tokenizer_fingerprint,
                    folder / "tokens",
                    target.listener.work,
                )
                target.listener.bad_lines(bad)
            complete_stage(folder)
        return TokenShards(folder / "tokens", verify=True)


def distill(
    target: Target,
    prompts: Sequence[str],
    system: str | None,
    settings: AnswerSettings,
    folder: Path,
    held_out: int = 0,
) -> TokenShards:
    """Let the target answer prompts, or write text from BOS if there are none.

    Args:
        target: The target.
        prompts: Files, folders or patterns.
        system: System prompt for prompts that have none.
        settings: How to sample.
        folder: The stage's folder.
        held_out: Number of prompts that are not answered, from the end of the list.

    Returns:
        The tokenized prompts and answers.

    Raises:
        TrainingError: The prompts cannot be read, a group's caches do not fit into memory, or the folder was created
            with other inputs.
    """
    inputs = {
        **asdict(settings),
        "system": system,
        "held_out": held_out,
        "content": fingerprint_files(corpus_files(prompts)),
        "target": target.fingerprint,
        "tokenizer": target.tokenizer_fingerprint,
    }
    with locked_for_all(folder):
        if start_stage(folder, inputs):
            target.listener.stage(folder.name, "the target answers prompts" if prompts else "the target writes text")
            groups, left_out, bad = distillation_groups(target, prompts, system, settings, held_out)
            target.listener.bad_lines(bad)
            if left_out:
                target.listener.stage(folder.name, left_out)
            together = batches_like_single(target.model, groups)
            if not together:
                target.listener.stage(folder.name, "mlx-lm's batches change this target's logits; one prompt at a time")
            if not has_results(folder):
                check_answers_fit(target, groups, settings, together)
            write_answers(
                target.model,
                target.tokenizer,
                target.vocab_size,
                target.tokenizer_fingerprint,
                groups,
                settings,
                folder / "tokens",
                target.listener.work,
                together,
                target.group is not None,
            )
            complete_stage(folder)
        return TokenShards(folder / "tokens", verify=True)


def distillation_groups(
    target: Target, prompts: Sequence[str], system: str | None, settings: AnswerSettings, held_out: int
) -> tuple[list[Group], str, BadLines]:
    """Read the prompts of ``distill`` and divide them into groups.

    Args:
        target: The target, for its tokenizer and context.
        prompts: Files, folders or patterns. Without any, the target writes text from BOS.
        system: System prompt for prompts that have none.
        settings: How to sample.
        held_out: Number of prompts that are not answered, from the end of the list.

    Returns:
        The groups, a message about prompts that are not answered (empty if all are), and the lines that were skipped.

    Raises:
        TrainingError: The prompts cannot be read, or the target's context has no room for an answer.
    """
    if not prompts:
        groups = bos_groups(target.tokenizer.bos_token_id, settings)
        split_prompts(groups[0].prompts, 0, settings.max_tokens, target.context)  # or an error
        return groups, "", BadLines()
    read, bad = read_prompts(prompts, target.tokenizer, system)
    training, unseen = split_prompts(read, held_out, settings.max_tokens, target.context)
    left_out = ""
    if len(training) + len(unseen) < len(read):
        left_out = f"{len(training)} of {len(read)} prompts; the others are held out, duplicate those, or too long"
    return prompt_groups(training, settings), left_out, bad


def train(
    target: Target,
    drafter: AnyDrafter,
    sources: Sequence[tuple[TokenShards, float]],
    loss: Loss,
    settings: TrainingSettings,
    folder: Path,
    evaluation: Evaluation | None = None,
    teacher_top_k: int = 0,
    draft_steps: int = DRAFT_STEPS,
    robust: Robust = UNIFORM,
    retention: Retention = NO_RETENTION,
    text: TokenShards | None = None,
) -> tuple[AnyDrafter, Metrics]:
    """Train a drafter and write it to ``folder/drafter``.

    Args:
        target: The target.
        drafter: The drafter to start from. It is trained in place.
        sources: Shards, each with its share of the rows.
        loss: The loss.
        settings: The settings.
        folder: The stage's folder.
        evaluation: How to score the drafter, to keep the best one. None to keep the last one.
        teacher_top_k: Number of the target's most likely tokens to store next to the shards and train on. 0 to run the
            target in every step.
        draft_steps: Number of tokens that an EAGLE head drafts from each position.
        robust: Settings of worst-case training.
        retention: Settings against forgetting.
        text: Pretraining text. ``retention`` uses it if it names no text of its own.

    Returns:
        The trained drafter and its scores.

    Raises:
        TrainingError: Shards, drafter and target have different tokenizers, a step does not fit into memory, or the
            folder was created with other inputs.
        InvalidRequestError: The settings contradict each other.
    """
    for shards, _ in sources:
        check_tokenizer(shards.index, target, shards.folder)
    check_training(target, drafter, loss, settings, teacher_top_k, draft_steps)
    robust.check_tasks({task for shards, _ in sources for task in shards.tasks})
    retention.check_text(text is not None)
    if retention.needs_fisher and retention.remember:
        text = pretraining_shards(target, retention.remember, folder / "remember")
    inputs = {
        **asdict(loss),
        **{name: value for name, value in asdict(settings).items() if name not in NOT_INPUTS},
        "teacher_top_k": teacher_top_k,
        **({"draft_steps": draft_steps} if isinstance(drafter, Eagle) else {}),
        **robust.inputs,
        **({"tasks": [shards.task_fingerprint for shards, _ in sources]} if robust.method == "groups" else {}),
        **retention.inputs,
        **({"remember": text.fingerprint} if retention.needs_fisher and text else {}),
        "rows": "documents apart",
        "evaluation": evaluation.inputs if evaluation else None,
        "drafter": weights_fingerprint(drafter),
        "shards": [[shards.fingerprint, share] for shards, share in sources],
        "tokenizer": target.tokenizer_fingerprint,
        "target": target.fingerprint if loss.needs_target or evaluation else None,
    }
    # A loss that ignores the target depends on it through the evaluation alone, which may change.
    changeable = CHANGEABLE if loss.needs_target else (*CHANGEABLE, "target")
    scored_on = evaluation.inputs if evaluation else None
    if scored_on and not loss.needs_target:
        scored_on = {**scored_on, "target": target.fingerprint}
    out = folder / "drafter"
    with locked_for_all(folder):
        if not start_stage(folder, inputs, changeable):
            return read_drafter(out, target), read_json(folder / "stage.json")["result"]
        what = f"{settings.steps} steps of {settings.batch * settings.length} positions, {loss.name}"
        if done := last_step(folder):
            what += f", continued after step {done} with the learning rate of a run of {settings.steps} steps"
        target.listener.stage(folder.name, what)
        # Processes may round differently but have to agree, since it decides which rows there are.
        single = loss.needs_target and not broadcast(keeps_documents_apart(target.model))
        if single:
            target.listener.stage(folder.name, "this target cannot keep documents apart, so each row has only one")
        batches = Batches(
            [shards for shards, _ in sources],
            [share for _, share in sources],
            settings.length,
            settings.batch,
            settings.seed,
            single,
        )
        teacher = new_teacher(target, drafter, batches, settings, teacher_top_k) if loss.needs_target else None
        check_fits(step_bytes(drafter, target, loss, settings, draft_steps, retention))
        memory = None
        if retention.needs_fisher and text:
            check_tokenizer(text.index, target, text.folder)
            target.listener.stage(folder.name, "measuring which weights matter for what was learned before")
            memory = measured_fisher(
                target, drafter, text, retention, folder, settings.length, settings.seed, draft_steps
            )
            target.listener.stage(folder.name, f"their Fisher information F has a mean of {memory.mean_fisher:.2g}")
        trainer = Trainer(
            drafter,
            objective_for(drafter, loss, teacher, settings.recompute, draft_steps),
            batches,
            settings,
            folder,
            evaluation.scorer if evaluation else None,
            teacher,
            partial(target.listener.step, settings.steps),
            scored_on,
            new_weighting(robust, batches, target.vocab_size, loss),
            memory,
        )
        result = trainer.run()
        if is_first_process():
            write_drafter(drafter, out, target, inputs, result)
        complete_stage(folder, result)
        return drafter, result


def new_teacher(
    target: Target, drafter: AnyDrafter, batches: Batches, settings: TrainingSettings, top_k: int
) -> Teacher:
    """Create the teacher of a training stage.

    Args:
        target: The target.
        drafter: The drafter. An EAGLE head reads the target's hidden states.
        batches: The batches to be trained on.
        settings: The settings. A cached teacher uses the first temperature.
        top_k: Number of tokens that a cached teacher stores. 0 for an online teacher.

    Returns:
        The teacher.
    """
    apart = not batches.single  # all processes agree on it
    layers = layers_read(drafter, target.model)
    if not top_k:
        return OnlineTeacher(target.model, apart, layers, target.group)
    temperature = settings.temperatures[0]
    return CachedTeacher(
        target.model, batches, target.vocab_size, top_k, temperature, target.fingerprint, apart, layers, target.group
    )


def start_drafter(
    target: Target,
    start: WarmStart | EagleStart | DrafterShape,
    answers: TokenShards | None,
    folder: Path,
    seed: int = 0,
) -> tuple[AnyDrafter, float | None]:
    """Make the drafter that training starts from, and write it to ``folder/drafter``.

    Args:
        target: The target.
        start: Which weights to copy, or the shape of a drafter with random weights.
        answers: The target's answers. None if ``start`` does not need them.
        folder: The stage's folder.
        seed: Seed of random weights.

    Returns:
        The drafter, and the share of the answers' tokens that it can output. None if that was not counted.

    Raises:
        MlxspecError: The weights cannot be copied, or the folder was created with other inputs.
    """
    if answers:
        check_tokenizer(answers.index, target, answers.folder)
    inputs: dict[str, Any] = {key_of(field): getattr(start, field.name) for field in fields(start)}
    if isinstance(start, WarmStart) and start.source:
        inputs["from"] = Target(start.source).fingerprint  # wherever it lies
    if not isinstance(start, DrafterShape):
        inputs["answers"] = answers.fingerprint if answers and start.needs_answers else None
        inputs["target"] = target.fingerprint
    else:
        inputs |= {"seed": seed, "vocab_size": target.vocab_size, "context": target.context}
    inputs["tokenizer"] = target.tokenizer_fingerprint
    out = folder / "drafter"
    with locked_for_all(folder):
        if start_stage(folder, inputs):
            drafter: AnyDrafter
            result = {}
            if is_first_process() or target.group is not None:  # a warm start may run the target
                if isinstance(start, DrafterShape):
                    drafter, coverage = target.new_drafter(start, seed), None
                else:
                    drafter, coverage = warm_start(target, start, answers)
                result = {} if coverage is None else {"coverage": coverage}
            if is_first_process():
                write_drafter(drafter, out, target, inputs, result)
                target.listener.stage(folder.name, describe(drafter, coverage))
            complete_stage(folder, result)
        return read_drafter(out, target), read_json(folder / "stage.json")["result"].get("coverage")
