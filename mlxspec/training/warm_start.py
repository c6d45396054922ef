"""Warm starts: drafters made from the layers of the target, or of another model with its tokenizer; EAGLE heads."""

from dataclasses import dataclass
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np

from mlxspec.errors import InvalidRequestError
from mlxspec.models.eagle import Eagle, fitting_parts
from mlxspec.models.export import to_hugging_face
from mlxspec.models.from_target import check_layers, drafter_from_target, eagle_from_target
from mlxspec.models.reading import TOKENIZER_FILES, model_folder, read_config, read_lazily, read_model, read_tokenizer
from mlxspec.models.tokens import check_same_tokens
from mlxspec.models.vocabulary import most_frequent
from mlxspec.models.width import choose_width
from mlxspec.settings import option
from mlxspec.training.objectives import AnyDrafter
from mlxspec.training.shards import TokenShards
from mlxspec.training.target import Target

CALIBRATION_DOCUMENTS = 64


@dataclass(frozen=True)
class WarmStart:
    """Which weights a drafter starts from. Raises InvalidRequestError without layers."""

    layers: tuple[int, ...] = option(
        (), "Indices of the layers to copy. Negative indices count from the last layer. Required."
    )
    source: str | None = option(
        None,
        "Folder, hub id or short name of the Llama model to copy from. It must have the target's tokenizer. By "
        "default, the target.",
        key="from",
    )
    hidden_size: int | None = option(
        None,
        "Hidden size. The channels with the largest activations on the answers are kept. By default, all. Cannot be "
        "combined with share_embedding.",
    )
    intermediate_size: int | None = option(
        None,
        "Neurons in each MLP. Those with the largest activations on the answers are kept. By default, all.",
    )
    vocabulary_size: int | None = option(
        None,
        "Number of tokens that the drafter can output: those that the target generates most often in the answers, and "
        "those that end an answer. By default, all.",
    )
    share_embedding: bool = option(False, "Use the target's input embedding instead of a copy.")

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidRequestError("there are no layers to copy; set layers, such as 0 and -1")
        for name in ("hidden_size", "intermediate_size", "vocabulary_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use 1 or more, or leave it out")
        if self.share_embedding and self.hidden_size:
            raise InvalidRequestError(
                "share_embedding needs a drafter of the target's width; leave out share_embedding or hidden_size"
            )

    @property
    def needs_answers(self) -> bool:
        """Whether the target's answers decide a part of the drafter."""
        return bool(self.vocabulary_size or self.hidden_size or self.intermediate_size)


@dataclass(frozen=True)
class EagleStart:
    """An EAGLE head that starts from a layer of the target. Raises InvalidRequestError for a wrong value."""

    kind: str = option(
        "eagle",
        "Required for a head: eagle, which makes an EAGLE-3 head. A head cannot be pretrained, nor trained with ce. "
        "recompute has no effect on it.",
    )
    layer: int = option(-1, "Index of the target's layer to copy. Negative indices count from the last layer.")
    read_layers: tuple[int, ...] = option(
        (), "Indices of the target's layers whose inputs the head reads. By default, 2, L/2 and L - 3 of L layers."
    )
    vocabulary_size: int | None = option(
        None,
        "Number of tokens that the EAGLE head can output: those that the target generates most often in the answers, "
        "and those that end an answer. By default, all.",
    )

    def __post_init__(self) -> None:
        if self.kind != "eagle":
            raise InvalidRequestError(f"kind is {self.kind!r}; use eagle, the only kind")

    @property
    def needs_answers(self) -> bool:
        """Whether the target's answers decide a part of the head."""
        return bool(self.vocabulary_size)


def warm_start(
    target: Target, start: WarmStart | EagleStart, answers: TokenShards | None
) -> tuple[AnyDrafter, float | None]:
    """Return a drafter with copied weights, in float32.

    Args:
        target: The target.
        start: Which weights to copy.
        answers: The target's answers. If they are needed but None, the drafter has the right shape, and its vocabulary
            and its width are arbitrary.

    Returns:
        The drafter, and the share of the answers' tokens that it can output. None if that was not counted.

    Raises:
        MlxspecError: The weights cannot be copied.
    """
    if isinstance(start, EagleStart):
        return eagle_start(target, start, answers)
    if target.group is not None and not start.source and (start.hidden_size or start.intermediate_size):
        raise InvalidRequestError(
            "hidden_size and intermediate_size need the activations of the whole target; leave them out, or make the "
            "drafter by `mlxspec train init` in one process and set drafter to it"
        )
    folder = model_folder(start.source) if start.source else target.folder
    if start.source and any((folder / name).exists() for name in TOKENIZER_FILES):
        check_same_tokens(target.tokenizer, read_tokenizer(folder))
    # The layers that are not copied stay on disk.
    embedding = None
    if read_config(folder).get("shared_embedding"):
        whole: Any = read_lazily(target.folder)[0]
        embedding = whole.model.embed_tokens
        embedding.set_dtype(mx.float32)
    source, config = read_lazily(folder, embedding)
    check_layers(source, start.layers)
    source.set_dtype(mx.float32)  # before dequantizing, or else the weights are rounded to the type of the scales
    source, config = to_hugging_face(source, config)
    if config.get("vocab_size") != target.vocab_size:
        raise InvalidRequestError(
            f"{folder} has a vocabulary of {config.get('vocab_size')} and {target.name} one of {target.vocab_size}; "
            "copy from a model with the target's tokenizer"
        )
    tokens = coverage = width = None
    if start.vocabulary_size:
        tokens, coverage = frequent_tokens(target, start.vocabulary_size, answers)
    if start.hidden_size or start.intermediate_size:
        some = [ids for ids, _ in islice(answers.documents(), CALIBRATION_DOCUMENTS)] if answers else []
        calibrated: Any = source
        if some:  # all layers run, in the stored precision
            calibrated = read_model(folder, embedding=target.embedding) if start.source else target.model
        width = choose_width(calibrated, start.layers, start.hidden_size, start.intermediate_size, some)
    drafter = drafter_from_target(source, config, start.layers, tokens, start.share_embedding, width)
    drafter.set_dtype(mx.float32)  # some quantizations become 16 bits
    if start.share_embedding:
        drafter.share(target.embedding)
    return drafter, coverage


def eagle_start(target: Target, start: EagleStart, answers: TokenShards | None) -> tuple[Eagle, float | None]:
    """Return an EAGLE head with copied weights, in float32. Arguments and result are those of ``warm_start``."""
    tokens = coverage = None
    if start.vocabulary_size:
        tokens, coverage = frequent_tokens(target, start.vocabulary_size, answers)
    source, config = read_lazily(target.folder)  # the layers that are not copied stay on disk
    check_layers(source, [start.layer])
    source.set_dtype(mx.float32)  # before dequantizing, or else the weights are rounded to the type of the scales
    source, _ = to_hugging_face(source, config)
    head = eagle_from_target(source, start.layer, start.read_layers or None, tokens)
    head.set_dtype(mx.float32)
    fitting_parts(head, target.model)
    return head, coverage


def frequent_tokens(target: Target, size: int, answers: TokenShards | None) -> tuple[np.ndarray, float | None]:
    """Return the tokens of a smaller vocabulary [K], and their share of the answers' tokens.

    Args:
        target: The target.
        size: Number of tokens K.
        answers: The target's answers. Without them, the tokens are arbitrary and the share is None.
    """
    counts = token_counts(answers, target.vocab_size)
    tokens = most_frequent(counts, size, target.tokenizer.eos_token_ids)
    return tokens, float(counts[tokens].sum() / counts.sum()) if counts.sum() else None


def token_counts(answers: TokenShards | None, vocab_size: int) -> np.ndarray:
    """Return how often each token occurs in the answers, [V]."""
    counts = np.zeros(vocab_size, np.int64)
    for ids, mask in answers.documents() if answers else ():
        counts += np.bincount(ids[mask > 0], minlength=vocab_size)
    return counts
