"""Load a ``ModelPair``: the target and its drafter, which may be a recommended one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxspec.blas import check_switch
from mlxspec.errors import (
    DisagreementError,
    InvalidRequestError,
    MlxspecError,
    ModelLoadError,
    ProcessError,
    TokenizerMismatchError,
    UnsupportedModelError,
)
from mlxspec.models.catalog import KNOWN_MODELS
from mlxspec.models.checks import model_fingerprint
from mlxspec.models.config import declared_context
from mlxspec.models.drafter import PromptLookup
from mlxspec.models.eagle import Eagle
from mlxspec.models.memory import check_memory
from mlxspec.models.pair import ModelPair
from mlxspec.models.quantizing import dequantized, faster_dequantized, quantize_in_memory, quantized_copy
from mlxspec.models.reading import (
    TOKENIZER_FILES,
    model_folder,
    on_disk,
    read_config,
    read_lazily,
    read_model,
    read_tokenizer,
)
from mlxspec.models.sharding import Group, agree, machine
from mlxspec.models.tokens import check_same_tokens

DEMO = Path(__file__).parent.parent / "demo"


def load(
    target: str | Path | None = None,
    drafter: str | Path | PromptLookup | None = None,
    dtype: mx.Dtype | None = None,
    quantize: str | None = None,
    context: int | None = None,
    context_length: int | None = None,
    before_weights: Callable[[Any, int | None], None] = lambda tokenizer, context_length: None,
    quantize_drafter: str | None = None,
    group: Group | None = None,
) -> ModelPair:
    """Load a target and its drafter.

    Args:
        target: Folder, hub id or short name (``mlxspec models`` lists them). None for the built-in demo target.
        drafter: Folder, hub id or short name of a draft model; "lookup" for prompt lookup; or "none". Append "+lookup"
            to a name to try prompt lookup as well; that needs the draft length "auto". None or "auto" for the
            recommended drafter of this target together with prompt lookup. If there is none, or it cannot be loaded,
            that is prompt lookup alone, and the pair's ``drafter_note`` says why. For the demo target, None stands for
            its own drafter alone.
        dtype: Precision of weights and quantization scales. None for float32 on the CPU back end, where 16 bits are
            ten times slower, and for 16 bits on a GPU.
        quantize: "4", "8", "mxfp4" or "nvfp4" to quantize the target. The copy is kept on disk. "none" for as stored.
            None for the short name's default, or else for as stored. With None, a small quantized target is held in
            float32 on the CPU back end where that is faster. The weights have the same values then.
        context: Number of tokens whose caches must fit into memory next to the weights. None for the models' own
            context, but at most 4096. It does not limit decoding.
        context_length: Maximum number of positions of the target. None for what its config declares. A table of
            positions in the model is a limit in any case.
        before_weights: Called with the tokenizer and the context length before any weights are read. It may raise an
            error, for instance for a prompt that does not fit.
        quantize_drafter: "4" or "8" to quantize the draft model in memory. None for as stored.
        group: Processes over which to divide the target, ``mx.distributed.init()`` under ``mlx.launch``. Each of them
            must make the same calls. None, or a group of one, for a whole target.

    Returns:
        The models, evaluated, with the target's tokenizer.

    Raises:
        ModelLoadError: A model or tokenizer cannot be read or does not fit into memory.
        UnsupportedModelError: A model cannot be decoded speculatively.
        InvalidRequestError: An argument or the environment variable MLXSPEC_OPENBLAS is invalid.
        TokenizerMismatchError: Target and drafter have different tokenizers.
        DisagreementError: Another process of the group cannot load this, or has other models.
        ProcessError: Another process of the group has stopped.
    """
    check_switch()
    group = group if group is not None and group.size() > 1 else None
    one = partial(
        load_pair,
        dtype=dtype,
        quantize=quantize,
        context=context,
        context_length=context_length,
        before_weights=before_weights,
        quantize_drafter=quantize_drafter,
        group=group,
    )
    try:
        return load_best(target, drafter, one)
    except (DisagreementError, ProcessError):
        raise
    except MlxspecError as error:
        if group is not None:
            agree(group, {}, error)
        raise


def load_best(target: str | Path | None, drafter: Any, load_one: Callable[..., ModelPair]) -> ModelPair:
    """Load a target and the drafter that is named, or the first recommended one that can be used.

    Args:
        target: As for ``load``.
        drafter: As for ``load``.
        load_one: ``load_pair`` with all but its first three arguments.
    """
    if drafter not in (None, "auto"):
        proposer, lookup = parse_drafter(drafter)
        return load_one(target, proposer, lookup)
    if target is None:
        return load_one(None, DEMO / "drafter", PromptLookup() if drafter == "auto" else None)
    recommended = recommended_drafters(target)
    notes = [] if recommended else [f"no drafter is known for {Path(target).name}"]
    for name, source in recommended:
        try:
            pair = load_one(target, source, PromptLookup())
            pair.drafter_name = f"{name}+lookup"
            break
        except (ModelLoadError, UnsupportedModelError, TokenizerMismatchError) as error:
            notes.append(f"{name} cannot be used: {error}")
    else:
        pair = load_one(target, PromptLookup(), None)  # if the target was to blame, it is named here
    pair.drafter_note = "; ".join(notes)
    return pair


def load_pair(
    target: str | Path | None,
    drafter: str | Path | PromptLookup | None,
    lookup: PromptLookup | None,
    dtype: mx.Dtype | None,
    quantize: str | None,
    context: int | None,
    context_length: int | None,
    before_weights: Callable[[Any, int | None], None],
    quantize_drafter: str | None,
    group: Group | None,
) -> ModelPair:
    """Load a target and exactly this drafter. The other arguments are those of ``load``."""
    if context_length is not None and context_length < 2:
        raise InvalidRequestError(f"context_length is {context_length}; use 2 or more")
    drafter_folder = model_folder(drafter) if isinstance(drafter, str | Path) else None
    if quantize_drafter and not drafter_folder:
        raise InvalidRequestError("quantize_drafter needs a draft model; name one, or leave it out")
    known = KNOWN_MODELS.get(str(target))
    target_folder = model_folder(DEMO / "target" if target is None else target)
    if (kind := quantize or (known.quantize if known else "none")) != "none":
        target_folder = quantized_copy(target_folder, kind, read_lazily)
    folders = [folder for folder in (target_folder, drafter_folder) if folder]
    widen = quantize is None
    processes = group.size() if group is not None else 1
    check_memory([(folder, read_config(folder)) for folder in folders], context, dtype, widen, processes)

    tokenizer = read_tokenizer(target_folder, str(target))
    if drafter_folder and any((drafter_folder / name).exists() for name in TOKENIZER_FILES):
        check_same_tokens(tokenizer, read_tokenizer(drafter_folder))
    context_length = context_length or declared_context(read_config(target_folder))
    before_weights(tokenizer, context_length)
    target_model = read_model(target_folder, dtype, widen, group=group)
    if isinstance(target_model, Eagle):
        raise ModelLoadError(f"{target_folder} is an EAGLE head, which only drafts; name it as the drafter")
    draft_model: Any = drafter
    if drafter_folder:
        embedding = getattr(getattr(target_model, "model", None), "embed_tokens", None)
        draft_model = read_model(drafter_folder, dtype, widen and not quantize_drafter, embedding)
        if quantize_drafter:
            quantize_in_memory(draft_model, quantize_drafter)
            draft_model = dequantized(draft_model) if widen and faster_dequantized(draft_model) else draft_model
            mx.eval(draft_model.state)
    drafter_context = declared_context(read_config(drafter_folder)) if drafter_folder else None
    name = name_of(drafter) + ("+lookup" if lookup else "")
    if group is not None:
        prints = [model_fingerprint(folder, read_config(folder)) for folder in folders]
        agree(group, dict(zip(("target", "draft model"), prints, strict=False)) | {"drafter": name} | machine())
    pair = ModelPair(target_model, draft_model, tokenizer, context_length, lookup, drafter_context, group=group)
    pair.drafter_name = name
    return pair


def recommended_drafters(target: str | Path) -> list[tuple[str, str | Path]]:
    """Return a target's drafters and what to load for each: its EAGLE head if it is on disk, then its draft model."""
    known = next((model for model in KNOWN_MODELS.values() if str(target) in (model.name, model.hub_id)), None)
    if known is None:
        return []
    head = on_disk(known.head) if known.head else None
    return [(name, source) for name, source in ((known.head, head), (known.drafter, known.drafter)) if name and source]


def parse_drafter(drafter: Any) -> tuple[Any, PromptLookup | None]:
    """Interpret a drafter other than "auto" as ``load`` documents it.

    Returns:
        The drafter, and prompt lookup if it is a second drafter.

    Raises:
        InvalidRequestError: No model is named before "+lookup".
    """
    if isinstance(drafter, str) and drafter.endswith("+lookup"):
        name = drafter.removesuffix("+lookup")
        if name in ("", "auto", "none", "lookup"):
            raise InvalidRequestError(f'drafter is {drafter!r}; name a model before "+lookup", or use "auto"')
        return name, PromptLookup()
    return {"none": None, "lookup": PromptLookup()}.get(drafter, drafter) if isinstance(drafter, str) else drafter, None


def name_of(drafter: str | Path | PromptLookup | None) -> str:
    """Return the name of a drafter for users."""
    if drafter == DEMO / "drafter":
        return "demo"
    return "none" if drafter is None else "lookup" if isinstance(drafter, PromptLookup) else str(drafter)
