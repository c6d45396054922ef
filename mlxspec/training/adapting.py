"""Learning from use: finetune a drafter on recorded answers, and keep the result only if it is better.

The target's probabilities were recorded with the answers, so the target need not run on them again, except for the
hidden states that an EAGLE head reads. The co-natural gradient protects what the drafter has learned before. General
answers show whether the drafter has forgotten anything.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np

from mlxspec.errors import InvalidRequestError
from mlxspec.files import explain_write_errors, fingerprint, write_json
from mlxspec.models.eagle import Eagle
from mlxspec.models.export import RECORDING
from mlxspec.models.sharding import agree
from mlxspec.settings import option
from mlxspec.training import stages
from mlxspec.training.batches import Batches
from mlxspec.training.checks import check_tokenizer, check_training
from mlxspec.training.documents import keeps_documents_apart
from mlxspec.training.drafter_folders import write_drafter
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import AnyDrafter, Batch, objective_for, weighted_sums
from mlxspec.training.recording import RecordedAnswer, Recording, answer_files
from mlxspec.training.retention import Retention
from mlxspec.training.run_folder import broadcast, complete_stage, is_first_process, locked_for_all, start_stage
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.target import Listener, Target
from mlxspec.training.teachers import CachedTeacher
from mlxspec.training.trainer import TrainingSettings, check_batch

HELD_OUT_EVERY = 5  # recorded answers: this one is not trained on
FEWEST_ANSWERS = 10
MEASURED_ROWS = 256  # the target runs on the general answers among them
OTHER_TARGET = 0.5  # Σ |p − recorded p|, which is 2 for disjoint distributions; other bits change it by less


@dataclass(frozen=True)
class AdaptSettings:
    """How a drafter is adapted to recorded answers. Raises InvalidRequestError for a value outside its range."""

    steps: int = option(100, "Number of optimizer steps.")
    batch: int = option(8, "Sequences in a step.")
    length: int = option(512, "Tokens in a sequence.")
    loss: str = option("kld", "Divergence between the drafter's and the target's distribution.")
    learning_rate: float = option(1e-3, "Learning rate of the co-natural gradient.")
    damping: float = option(
        1e-3,
        "The step is learning_rate · gradient / (F + damping). F is the Fisher information of a weight on the general "
        "answers.",
    )
    tolerance: float = option(
        0.01, "Largest allowed drop of the acceptance rate on the general answers. 0.01 is one percentage point."
    )

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < 1:
            raise InvalidRequestError(f"tolerance is {self.tolerance}; use a number in [0, 1)")
        if self.length < 2:
            raise InvalidRequestError(f"length is {self.length}; use 2 or more")
        check_batch(self.training)
        Loss(self.loss)
        Retention("co-natural", self.damping)

    @property
    def training(self) -> TrainingSettings:
        """The settings of the training."""
        return TrainingSettings(
            steps=self.steps,
            batch=self.batch,
            length=self.length,
            learning_rate=self.learning_rate,
            warmup=min(10, self.steps),
            checkpoint_every=50,
        )


class Adaptation(NamedTuple):
    """Acceptance rates of the drafter before and after, and whether the new one was kept."""

    recorded: tuple[float, float]  # on the recorded answers that were not trained on
    general: tuple[float, float]  # on the general answers
    kept: bool


def adapt(
    target: Target,
    drafter: AnyDrafter,
    recording: Recording,
    general: TokenShards,
    settings: AdaptSettings,
    folder: Path,
) -> Adaptation:
    """Finetune a drafter on recorded answers, and write it to ``folder/drafter`` if it is better.

    Every fifth recorded answer is held out. The new drafter is kept if its acceptance rate on those is higher, and if
    its acceptance rate on the general answers is not lower by more than the tolerance. Each rate is measured on at most
    ``MEASURED_ROWS`` rows.

    Args:
        target: The target whose answers were recorded.
        drafter: The drafter to start from. Its weights change.
        recording: The recorded answers.
        general: Answers of the target to other prompts, which represent what the drafter can do already.
        settings: The settings.
        folder: The folder of the results. A repeated call resumes an interrupted one.

    Returns:
        The acceptance rates, and whether the new drafter was kept.

    Raises:
        TrainingError: The folder was created with other inputs.
        InvalidRequestError: There are too few recorded answers, they are another target's, the drafter does not fit,
            another process uses the folder, or it holds a drafter or answers that are not of an earlier call.
    """
    with locked_for_all(folder):
        if (folder / "drafter").exists() and not (folder / "training" / "stage.json").exists():
            raise InvalidRequestError(
                f"{folder / 'drafter'} was not made by train adapt; use another folder for the results"
            )
        for copies in (folder / "recorded", folder / "held-out"):
            if answer_files(copies):
                raise InvalidRequestError(f"{copies} holds recorded answers; use another folder for the results")
        return _adapt(target, drafter, recording, general, settings, folder)


def _adapt(
    target: Target,
    drafter: AnyDrafter,
    recording: Recording,
    general: TokenShards,
    settings: AdaptSettings,
    folder: Path,
) -> Adaptation:
    answers = list(recording.answers())
    if len(answers) < FEWEST_ANSWERS:
        raise InvalidRequestError(
            f"{recording.folder} holds {len(answers)} answers; record at least {FEWEST_ANSWERS} to adapt a drafter to"
        )
    if target.group is not None:  # before all of them run it on what they have
        agree(target.group, {"recorded answers": answers_fingerprint(answers), "general answers": general.fingerprint})
    check_answers(answers, target, recording.folder)
    check_tokenizer(general.index, target, general.folder)
    check_training(target, drafter, Loss(settings.loss), settings.training, answers[0].ids.shape[1])
    held_out = answers[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    learned = [answer for number, answer in enumerate(answers, 1) if number % HELD_OUT_EVERY]
    top_k = answers[0].ids.shape[1]
    single = not broadcast(keeps_documents_apart(target.model))
    shards = recorded_shards(target, learned, folder / "recorded")
    unseen = recorded_shards(target, held_out, folder / "held-out")
    batches = [Batches([one], [1.0], settings.length, settings.batch, 0, single) for one in (shards, unseen, general)]
    teachers = [
        cast(CachedTeacher, stages.new_teacher(target, drafter, one, settings.training, top_k)) for one in batches
    ]
    if not isinstance(drafter, Eagle):  # the hidden states that a head reads were not recorded
        store_recorded(teachers[0], learned)
        store_recorded(teachers[1], held_out)
    before = [acceptance_rate(drafter, teacher, target.listener) for teacher in teachers[1:]]
    drafter, _ = stages.train(
        target,
        drafter,
        [(shards, 1.0)],
        Loss(settings.loss),
        settings.training,
        folder / "training",
        None,
        top_k,
        retention=Retention("co-natural", settings.damping),
        text=general,
    )
    after = [acceptance_rate(drafter, teacher, target.listener) for teacher in teachers[1:]]
    kept = after[0] > before[0] and after[1] >= before[1] - settings.tolerance
    if is_first_process():
        shutil.rmtree(folder / "drafter", ignore_errors=True)  # of a run with another tolerance
    if kept and is_first_process():
        result = {"recorded": after[0], "recorded_before": before[0], "general": after[1], "general_before": before[1]}
        write_drafter(drafter, folder / "drafter", target, asdict(settings), result)
    return Adaptation((before[0], after[0]), (before[1], after[1]), kept)


def check_answers(answers: list[RecordedAnswer], target: Target, folder: Path) -> None:
    """Raise InvalidRequestError if recorded answers are not a target's.

    The first answer shows it: the target runs on it, and its probabilities are compared with those that were recorded.

    Args:
        answers: The answers.
        target: The target.
        folder: The folder of the recording, for the message.
    """
    if len({answer.ids.shape[1] for answer in answers}) > 1:
        raise InvalidRequestError(f"{folder} has answers with different keep_top_k; record into a folder for each")
    largest = max(int(part.max()) for answer in answers for part in (answer.prompt, answer.answer, answer.ids))
    prompt, answer, ids, logprobs = answers[0]
    if largest < target.vocab_size:
        text = mx.array(np.concatenate([prompt, answer]))
        logits = target.model(text[None])[0, len(prompt) - 1 : -1].astype(mx.float32)
        p = mx.take_along_axis(mx.softmax(logits, axis=-1), mx.array(ids), axis=-1)
        if float(mx.abs(p - mx.exp(mx.array(logprobs))).sum(-1).mean()) < OTHER_TARGET:
            return
    raise InvalidRequestError(f"{folder} holds answers of another target; set target to the one that was recorded")


def answers_fingerprint(answers: list[RecordedAnswer]) -> str:
    """Return a digest of recorded answers."""
    return fingerprint(*(part.tobytes() for answer in answers for part in answer))


def recorded_shards(target: Target, answers: list[RecordedAnswer], folder: Path) -> TokenShards:
    """Write recorded answers as shards to ``folder/tokens``. The folder can be read by its owner alone.

    Args:
        target: The target.
        answers: The answers.
        folder: The folder.

    Raises:
        TrainingError: The folder was made from other answers.
    """
    inputs = {"answers": answers_fingerprint(answers)}
    with locked_for_all(folder):
        if is_first_process():
            with explain_write_errors(folder):
                folder.chmod(0o700)
            write_json(folder / RECORDING, {"copied": True})  # so that it is not pushed
        if start_stage(folder, inputs):
            if is_first_process():
                shutil.rmtree(folder / "tokens", ignore_errors=True)
                with ShardWriter(folder / "tokens", target.vocab_size, target.tokenizer_fingerprint) as writer:
                    for prompt, answer, _, _ in answers:
                        writer.add([*prompt, *answer], [0] * len(prompt) + [1] * len(answer))
                    writer.finish()
            complete_stage(folder)
        return TokenShards(folder / "tokens", verify=True)


def store_recorded(teacher: CachedTeacher, answers: list[RecordedAnswer]) -> None:
    """Store the recorded probabilities where the teacher looks for them, so that it does not run the target.

    Args:
        teacher: The teacher of the answers' shards.
        answers: The answers, in the order of the shards.
    """
    # Positions before the answers have weight 0. They get equal probabilities, since a stored row has no zeros.
    ids = np.concatenate([shifted(answer, answer.ids, np.arange(teacher.k)) for answer in answers])
    logprobs = np.concatenate([shifted(answer, answer.logprobs, np.log(1 / teacher.k)) for answer in answers])
    (shards,), length = teacher.batches.shards, teacher.batches.length
    for row, (start, end) in enumerate(shards.spans(length, teacher.batches.single)):
        count = end - start - 1
        padding = [(0, length - count), (0, 0)]
        of_row = np.pad(ids[start : end - 1], padding), np.pad(logprobs[start : end - 1], padding)
        of_row[0][count:], of_row[1][count:] = np.arange(teacher.k), np.log(1 / teacher.k)
        teacher.store(0, row, *of_row)


def shifted(recorded: RecordedAnswer, values: np.ndarray, others: np.ndarray | float) -> np.ndarray:
    """Return the values [N, k] of an answer at the positions that predict its tokens, and ``others`` elsewhere."""
    before, count = len(recorded.prompt), len(recorded.answer)
    found = np.empty((before + count, values.shape[1]), values.dtype)
    found[:] = others
    found[before - 1 : before + count - 1] = values
    return found


def acceptance_rate(drafter: AnyDrafter, teacher: CachedTeacher, listener: Listener) -> float:
    """Return the mean acceptance rate Σ min(p, q) over answers and draft steps.

    Args:
        drafter: The drafter.
        teacher: The teacher of the answers' shards. The first ``MEASURED_ROWS`` rows in the order of its batches count.
        listener: Callbacks for the progress.
    """
    goal, batches = objective_for(drafter, Loss("tvd"), teacher), teacher.batches
    measured = min(MEASURED_ROWS, batches.count_rows(0))
    name = batches.shards[0].folder.resolve().parent.name
    listener.stage(name, f"measuring the acceptance rate on {measured} rows")
    total = count = 0.0
    for number in range(measured):
        step, place = divmod(number, batches.batch)
        row = batches.row_numbers(step)[place]
        rows, stored = batches.read([row]), teacher.load_rows([row])
        weights = mx.array(rows.mask[:, 1:].astype(np.float32))
        documents = mx.array(rows.documents[:, :-1])
        batch = Batch(mx.array(rows.ids), documents, weights, stored, mx.array(1.0), mx.random.key(0))
        total += float(weighted_sums(batch, goal(drafter, batch)[1])[1:].mean())
        count += float(weights.sum())
        listener.work(number + 1, measured, int(count))
    return total / max(count, 1)
