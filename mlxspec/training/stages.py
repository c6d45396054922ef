"""The three stages, each a function from a target and settings to a folder.

A stage's folder has ``stage.json``: what went into it, as settings and fingerprints, and whether it is complete. Run
again with the same inputs, a complete stage is skipped and an unfinished one goes on; with other inputs it refuses.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxspec.errors import InvalidRequestError, TrainingError
from mlxspec.files import explain_write_errors, fingerprint, fingerprint_files, write_json
from mlxspec.models.drafter import Drafter
from mlxspec.models.loading import TOKENIZER_FILES, model_folder, read_config, read_tokenizer
from mlxspec.models.quantizing import COPIED
from mlxspec.models.tokens import check_same_tokens
from mlxspec.training.cached_teacher import CachedTeacher
from mlxspec.training.corpus import corpus_files, read_prompts, split_prompts, tokenize_corpus
from mlxspec.training.evaluation import Evaluation
from mlxspec.training.losses import Loss
from mlxspec.training.memory import check_fits, training_bytes
from mlxspec.training.mixture import Mixture
from mlxspec.training.objectives import Teacher, objective
from mlxspec.training.processes import is_first
from mlxspec.training.record import Metrics, begin, complete
from mlxspec.training.responses import AnswerSettings, answer_all, groups, groups_from_nothing
from mlxspec.training.shards import Index, TokenShards
from mlxspec.training.target import Target
from mlxspec.training.teachers import OnlineTeacher
from mlxspec.training.trainer import Trainer
from mlxspec.training.training_settings import TrainingSettings

UNIMPORTANT = ("checkpoint_every", "log_every", "recompute")  # settings that change nothing about the result
# What an unfinished stage may go on with other values of: where a loss stopped being a number, or memory ran out.
CHANGEABLE = ("learning_rate", "clip", "weight_decay", "accumulate", "precision", "evaluate_every", "evaluation")


def pretraining_shards(target: Target, data: Sequence[str], folder: Path) -> TokenShards:
    """Text files in tokens, made once."""
    inputs = {"content": fingerprint_files(corpus_files(data)), "tokenizer": target.tokens}
    if begin(folder, inputs):
        target.listener.stage(folder.name, "tokenising")
        if is_first():
            shutil.rmtree(folder / "tokens", ignore_errors=True)  # quick to make again, so half of it is not kept
            _, bad = tokenize_corpus(
                data, target.tokenizer, target.vocab_size, target.tokens, folder / "tokens", target.listener.work
            )
            target.listener.bad_lines(bad)
        complete(folder)
    return TokenShards(folder / "tokens", verify=True)


def distill(
    target: Target,
    prompts: Sequence[str],
    system: str | None,
    settings: AnswerSettings,
    folder: Path,
    held_out: int = 0,
) -> TokenShards:
    """The target's answers to prompts, all but the last ``held_out``; without prompts, its texts from BOS."""
    inputs = {
        "content": fingerprint_files(corpus_files(prompts)),
        "system": system,
        "held_out": held_out,
        "target": target.fingerprint,
        "tokenizer": target.tokens,
        **asdict(settings),
    }
    if begin(folder, inputs):
        target.listener.stage(folder.name, "the target answers")
        if prompts:
            read, bad = read_prompts(prompts, target.tokenizer, system)
            target.listener.bad_lines(bad)
            learnt, kept = split_prompts(read, held_out, settings.max_tokens, target.context)
            if len(learnt) + len(kept) < len(read):
                told = f"{len(learnt)} of {len(read)} prompts; others are held out, equal one that is, or are too long"
                target.listener.stage(folder.name, told)
            work = groups(learnt, settings)
        else:
            work = groups_from_nothing(target.tokenizer.bos_token_id, settings)
        answer_all(
            target.model,
            target.tokenizer,
            target.vocab_size,
            target.tokens,
            work,
            settings,
            folder / "tokens",
            target.listener.work,
        )
        complete(folder)
    return TokenShards(folder / "tokens", verify=True)


def train(
    target: Target,
    drafter: Drafter,
    sources: Sequence[tuple[TokenShards, float]],
    loss: Loss,
    settings: TrainingSettings,
    folder: Path,
    evaluation: Evaluation | None = None,
    teacher_top_k: int = 0,
) -> tuple[Drafter, Metrics]:
    """Train ``drafter`` on a mixture of shards (each with its share) and leave it in ``folder/drafter``.

    With ``teacher_top_k`` the target's most likely tokens are kept beside the shards and read from there.

    Raises TrainingError if shards, drafter and target do not have the same tokens, or a step would not fit.
    """
    for shards, _ in sources:
        check_tokens(shards.index, target, shards.folder)
    if drafter.config.vocab_size != target.vocab_size:
        raise TrainingError(
            f"the drafter has a vocabulary of {drafter.config.vocab_size} and {target.name} one of {target.vocab_size}"
            "; start from a drafter made for this target"
        )
    inputs = {
        "drafter": weights_fingerprint(drafter),
        "shards": [[shards.fingerprint, share] for shards, share in sources],
        "tokenizer": target.tokens,
        "target": target.fingerprint if loss.needs_target or evaluation else None,
        "evaluation": evaluation.described if evaluation else None,
        "teacher_top_k": teacher_top_k,
        **asdict(loss),
        **{name: value for name, value in asdict(settings).items() if name not in UNIMPORTANT},
    }
    check_loss(loss, settings, teacher_top_k)
    out = folder / "drafter"
    if not begin(folder, inputs, CHANGEABLE):
        trained = Drafter.load(out)
        return trained, json.loads((folder / "stage.json").read_text())["result"]
    target.listener.stage(
        folder.name, f"{settings.steps} steps of {settings.batch * settings.length} positions, {loss.name}"
    )
    batches = Mixture(
        [s for s, _ in sources], [share for _, share in sources], settings.length, settings.batch, settings.seed
    )
    teacher = teacher_of(target, batches, settings, teacher_top_k) if loss.needs_target else None
    check_fits(step_bytes(drafter, target, loss, settings))
    trainer = Trainer(
        drafter,
        objective(loss, teacher, settings.recompute),
        batches,
        settings,
        folder,
        evaluation.measure if evaluation else None,
        teacher,
        partial(target.listener.step, settings.steps),
    )
    result = trainer.run()
    if is_first():
        with explain_write_errors(out):
            drafter.save(out)
            copy_tokenizer(target.folder, out)
            write_json(out / "training.json", {"inputs": inputs, "result": result})
    complete(folder, result)
    return drafter, result


def step_bytes(drafter: Drafter, target: Target, loss: Loss, settings: TrainingSettings) -> int:
    """What a step will need of memory in this process."""
    processes = mx.distributed.init().size()
    beside = (target.bytes, target.config) if loss.needs_target else ()
    return training_bytes(drafter.config, settings, processes, *beside)


def check_loss(loss: Loss, settings: TrainingSettings, top_k: int) -> None:
    """Raises InvalidRequestError for settings that do not go together."""
    if loss.needs_target and top_k and len(settings.temperatures) > 1:
        raise InvalidRequestError(
            f"temperatures are {settings.temperatures} and teacher_top_k {top_k}; what is stored is of one temperature:"
            " use one, or teacher_top_k 0"
        )
    parts = settings.accumulate * mx.distributed.init().size()
    if loss.needs_batch_statistics and parts > 1:
        raise InvalidRequestError(
            f"statistics are of the batch, and it is worked off in {parts} parts; use statistics position, or one "
            "process and accumulate 1"
        )


def teacher_of(target: Target, batches: Mixture, settings: TrainingSettings, top_k: int) -> Teacher:
    if not top_k:
        return OnlineTeacher(target.model)
    return CachedTeacher(target.model, batches, target.vocab_size, top_k, settings.temperatures[0], target.fingerprint)


def check_tokens(index: Index, target: Target, folder: Path) -> None:
    if index.tokenizer != target.tokens or index.vocab_size != target.vocab_size:
        raise TrainingError(
            f"{folder} was made with another tokenizer (vocabulary of {index.vocab_size}) than {target.name}'s "
            f"({target.vocab_size}); make the shards again with this target"
        )


def weights_fingerprint(drafter: Drafter) -> str:
    weights = sorted(tree_flatten(drafter.parameters()))
    return fingerprint(
        repr(drafter.config), *(memoryview(weight.astype(mx.float32).flatten()) for _, weight in weights)
    )


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in (*COPIED, *TOKENIZER_FILES):
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def start_from(name: str | Path, target: Target) -> Drafter:
    """A drafter to go on with. Raises an MlxspecError if it is none, or one with other tokens than the target."""
    folder = model_folder(name)
    if "quantization" in read_config(folder):
        raise InvalidRequestError(f"{folder} is quantised and cannot be trained; start from the unquantised drafter")
    if any((folder / file).exists() for file in TOKENIZER_FILES):
        check_same_tokens(target.tokenizer, read_tokenizer(folder))
    return Drafter.load(folder, mx.float32)
