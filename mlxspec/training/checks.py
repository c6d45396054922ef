"""What a training stage refuses before it starts."""

from pathlib import Path

import mlx.core as mx

from mlxspec.errors import InvalidRequestError, TrainingError
from mlxspec.models.attention import position_table
from mlxspec.models.eagle import EAGLE1, Eagle, fitting_parts
from mlxspec.models.quantizing import check_divisible
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import DRAFT_STEPS, AnyDrafter
from mlxspec.training.shards import Index
from mlxspec.training.target import Target
from mlxspec.training.teachers import check_top_k
from mlxspec.training.trainer import TrainingSettings, check_batch


def check_training(
    target: Target,
    drafter: AnyDrafter,
    loss: Loss,
    settings: TrainingSettings,
    top_k: int,
    draft_steps: int = DRAFT_STEPS,
) -> None:
    """Check that a stage can train a drafter, whatever its data are.

    Args:
        target: The target.
        drafter: The drafter to start from.
        loss: The loss.
        settings: The settings.
        top_k: Number of stored tokens of a cached teacher. 0 for an online teacher.
        draft_steps: Number of tokens that an EAGLE head drafts from each position.

    Raises:
        MlxspecError: The drafter has another vocabulary than the target, the target has too few positions, or the
            settings contradict each other.
    """
    if drafter.args.vocab_size != target.vocab_size:
        raise TrainingError(
            f"the drafter has a vocabulary of {drafter.args.vocab_size} but {target.name} has {target.vocab_size}; "
            "start from a drafter made for this target"
        )
    if isinstance(drafter, Eagle):
        fitting_parts(drafter, target.model)
        if drafter.layout == EAGLE1:
            raise InvalidRequestError(
                "the drafter is an EAGLE-1 head; only EAGLE-3 heads can be trained, use one of those"
            )
        if not loss.needs_target:
            raise InvalidRequestError(
                f"an EAGLE head reads the target's hidden states, so it cannot be trained with loss {loss.name}; use a "
                "loss such as kld or tvd++, and no pretraining"
            )
        if settings.length <= draft_steps:
            raise InvalidRequestError(
                f"length is {settings.length}, but an EAGLE head takes {draft_steps} draft steps; use a larger length"
            )
    if loss.needs_target and settings.length > (target.context or 0):  # else the target need not be read
        positions = position_table(target.model)
        if positions and settings.length > positions:
            raise InvalidRequestError(
                f"length is {settings.length}, but {target.name} has a table of {positions} positions; use a length of "
                f"at most {positions}"
            )
    if top_k and loss.needs_target:
        check_top_k(top_k, target.vocab_size)
    if settings.fake_quantize:
        check_divisible(drafter, settings.fake_quantize)
    check_loss(loss, settings, top_k)
    check_batch(settings)


def check_loss(loss: Loss, settings: TrainingSettings, top_k: int) -> None:
    """Check that loss, settings and teacher do not contradict each other.

    Args:
        loss: The loss.
        settings: The settings.
        top_k: Number of stored tokens of a cached teacher. 0 for an online teacher.

    Raises:
        InvalidRequestError: They contradict each other.
    """
    if loss.needs_target and top_k and len(settings.temperatures) > 1:
        raise InvalidRequestError(
            f"temperatures are {settings.temperatures} with teacher_top_k {top_k}, which stores one temperature; use "
            "one temperature, or teacher_top_k 0"
        )
    parts = settings.accumulate * mx.distributed.init().size()
    if loss.needs_batch_statistics and parts > 1:
        raise InvalidRequestError(
            f"statistics is batch, but the batch is computed in {parts} parts; use statistics position, or one process "
            "and accumulate 1"
        )


def check_tokenizer(index: Index, target: Target, folder: Path) -> None:
    """Check that shards were made with the target's tokenizer.

    Args:
        index: The index of the shards.
        target: The target.
        folder: The folder of the shards, for the message.

    Raises:
        TrainingError: They were made with another tokenizer.
    """
    if index.tokenizer != target.tokenizer_fingerprint or index.vocab_size != target.vocab_size:
        raise TrainingError(
            f"{folder} was made with another tokenizer (vocabulary of {index.vocab_size}) than {target.name}'s "
            f"({target.vocab_size}); create the shards again with this target"
        )
