"""Load a ``ModelPair`` from hub ids or folders. Code found in a model folder is never executed."""

import contextlib
import difflib
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer

from mlxspec.blas import check_switch
from mlxspec.errors import (
    DisagreementError,
    InvalidRequestError,
    MlxspecError,
    ModelLoadError,
    ProcessError,
    TokenizerMismatchError,
    UnsupportedModelError,
    in_one_line,
)
from mlxspec.files import write_json
from mlxspec.models.attention import attention_windows
from mlxspec.models.catalog import KNOWN_MODELS
from mlxspec.models.checks import (
    OLD_FILES,
    SAFETENSORS,
    TORCH_FILES,
    check_folder,
    check_numbers,
    check_safetensors,
    model_fingerprint,
    read_object,
    stored_weights,
)
from mlxspec.models.config import completed, declared_context
from mlxspec.models.drafter import OWN_KEYS, Drafter, PromptLookup
from mlxspec.models.eagle import Eagle, is_eagle, read_eagle
from mlxspec.models.memory import check_memory
from mlxspec.models.old_layout import is_old_config, read_old_model
from mlxspec.models.pair import ModelPair
from mlxspec.models.quantizing import dequantized, faster_dequantized, quantize_in_memory, quantized_copy
from mlxspec.models.sentencepiece_bpe import sentencepiece_tokenizer
from mlxspec.models.sharding import Group, agree, machine, shard
from mlxspec.models.tokens import LLAMA2_TEMPLATE, check_same_tokens
from mlxspec.models.torch_files import convert_to_safetensors

DEMO = Path(__file__).parent.parent / "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", SAFETENSORS, OLD_FILES]
INDEXES = {SAFETENSORS: "model.safetensors.index.json", TORCH_FILES: "pytorch_model.bin.index.json"}
QUANT_CONFIG = "hf_quant_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
NO_CODE = {"trust_remote_code": False}  # explicit, or else transformers may ask on the terminal
LLAMA2_CHAT = re.compile(r"llama-?2-\d+b-chat", re.IGNORECASE)


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


def on_disk(name: str) -> Path | None:
    """Return the folder of a short name in the hub's local cache, or None if it is not there with its weights."""
    with contextlib.suppress(LocalEntryNotFoundError):
        folder = Path(huggingface_hub.snapshot_download(KNOWN_MODELS[name].hub_id, local_files_only=True))
        return folder if stored_weights(folder) else None
    return None


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


def model_folder(name: str | Path) -> Path:
    """Return the local folder of a model: ``name`` itself, or a snapshot of the hub, which is downloaded if missing.

    Raises:
        ModelLoadError: There is no such folder or repository, or it cannot be downloaded.
    """
    if known := KNOWN_MODELS.get(str(name)):
        name = known.hub_id
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise ModelLoadError(f"{name} is a file; use the folder that holds config.json and the weights")
    except (OSError, RuntimeError) as error:  # a name too long for a file, or an unknown ~user
        raise ModelLoadError(f"no such folder: {str(name)[:80]} ({in_one_line(error)}); use a model folder") from None
    if not HUB_ID.fullmatch(str(name)):
        nearest = difflib.get_close_matches(str(name), KNOWN_MODELS, 1)
        meant = f'; did you mean "{nearest[0]}"?' if nearest else ""
        raise ModelLoadError(
            f"no such folder: {name}; use a model folder, a hub id like owner/name, or a short name of "
            f"`mlxspec models`{meant}"
        )
    try:
        folder = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=HUB_FILES))
        if not stored_weights(folder):
            folder = Path(huggingface_hub.snapshot_download(str(name), allow_patterns=[*HUB_FILES, TORCH_FILES]))
        return folder
    except GatedRepoError:
        raise ModelLoadError(f"{name} is gated: accept its license on the hub, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelLoadError(f"no folder and no hub repository is named {name}; check the spelling") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{name} is not a folder, not in the hub's local cache, and cannot be downloaded now "
            f"({in_one_line(error)}); connect to the network once, or give a folder"
        ) from None


def read_model(
    folder: Path,
    dtype: mx.Dtype | None = None,
    widen: bool = False,
    embedding: nn.Module | None = None,
    group: Group | None = None,
) -> nn.Module:
    """Read the model of a folder into memory.

    Args:
        folder: The model's folder.
        dtype: Precision of the weights. None for ``preferred_dtype``.
        widen: Dequantize a quantized model where that is faster (``faster_dequantized``).
        embedding: The target's input embedding, for a drafter that shares it.
        group: Processes over which the model is divided. None for a whole model.

    Raises:
        ModelLoadError: The model cannot be read or has NaN weights.
        UnsupportedModelError: Its cache cannot be rewound.
    """
    model, _ = read_lazily(folder, embedding)
    attention_windows(model)
    cast(model, dtype or preferred_dtype(model))
    if widen and (dtype is None or dtype == mx.float32) and faster_dequantized(model):
        model = dequantized(model)  # after the scales became float32, or else the weights are rounded to 16 bits
    if group is not None:
        shard(model, group)  # before anything is read, so that no process holds the whole model
    for name, weight in dict(tree_flatten(model.parameters())).items():
        try:
            has_nan = mx.issubdtype(weight.dtype, mx.floating) and mx.isnan(weight).any().item()
        except RuntimeError as error:
            raise ModelLoadError(
                f"the weights of {folder} cannot be read: {in_one_line(error)}; copy or download the model again"
            ) from error
        if has_nan:
            raise ModelLoadError(f"{name} in {folder} contains NaN; copy or download the model again")
    mx.eval(model.state)  # not only its parameters: a lazy array cannot be evaluated in another thread
    return model


def cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Convert a model's weights, except those that mlx-lm keeps as they are, such as a router's correction."""
    converts = getattr(model, "cast_predicate", lambda name: True)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    model.set_dtype(dtype)
    model.load_weights([(name, weight) for name, weight in weights.items() if not converts(name)], strict=False)


def read_lazily(folder: Path, embedding: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model whose weights are read when they are first used, and its config. Raises ModelLoadError."""
    check_folder(folder)
    config = read_config(folder)
    files = weight_files(folder, config)
    try:
        if is_old_config(config):
            return read_old_model(config, files)
        with tempfile.TemporaryDirectory() as scratch:
            files = [as_safetensors(file, Path(scratch)) for file in files]
            tensors = [name for file in files for name in check_safetensors(file)]
            check_numbers(config, folder / "config.json", len(tensors))
            if is_eagle(tensors):
                return read_eagle(folder, config, files), config
            if any(config.get(key) for key in OWN_KEYS):
                return Drafter.load(folder, embedding=embedding), config
            return load_with_mlx_lm(folder, completed(config, tensors), files)
    except MlxspecError:
        raise
    except Exception as error:  # a malformed folder makes the model's code raise anything
        kind = config.get("model_type", "Llama in the old MLX layout")
        raise ModelLoadError(f"{folder} cannot be read as a {kind}: {in_one_line(error)}") from error


def as_safetensors(file: Path, scratch: Path) -> Path:
    """Return the file itself or, for a file of PyTorch, a copy in ``scratch`` that is converted to safetensors."""
    if file.suffix != ".bin":
        return file
    converted = scratch / f"{file.stem}.safetensors"
    convert_to_safetensors(file, converted)
    return converted


def load_with_mlx_lm(folder: Path, config: dict[str, Any], files: list[Path]) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model lazily from exactly these files. mlx-lm would take every model*.safetensors that the folder has."""
    with tempfile.TemporaryDirectory() as scratch:
        view = Path(scratch)
        write_json(view / "config.json", config)
        for number, file in enumerate(files):
            (view / f"model-{number:05d}.safetensors").symlink_to(file.resolve())
        if (folder / QUANT_CONFIG).exists():
            (view / QUANT_CONFIG).symlink_to((folder / QUANT_CONFIG).resolve())
        return load_model(view, lazy=True)  # the files stay open until their weights are read


def preferred_dtype(model: nn.Module) -> mx.Dtype:
    """Return float32 on the CPU back end; on a GPU the weights' 16-bit type, or bfloat16 if they are float32."""
    if mx.default_device().type == mx.cpu:
        return mx.float32
    present = {weight.dtype for weight in dict(tree_flatten(model.parameters())).values()}
    return mx.float16 if mx.float16 in present and mx.bfloat16 not in present else mx.bfloat16


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises ModelLoadError if it is missing or not the config of a model."""
    if not (folder / "config.json").exists():
        raise ModelLoadError(f"{folder} has no config.json; use the folder of a model in the Hugging Face layout")
    config = read_object(folder / "config.json")
    if isinstance(layer := config.get("transformer_layer_config"), dict):  # of an EAGLE-3 head by vLLM's speculators
        config = {**layer, **{key: value for key, value in config.items() if value is not None}}
    if not (isinstance(config.get("model_type"), str) or is_old_config(config)):
        raise ModelLoadError(
            f"{folder / 'config.json'} names no model_type; use the folder of a model in the Hugging Face layout"
        )
    return config


def weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    """Return the files that hold the weights: those that the index names, if there is one.

    Raises:
        ModelLoadError: There are none, or the index is malformed or names a file that is missing.
    """
    patterns = [OLD_FILES] if is_old_config(config) else [SAFETENSORS, TORCH_FILES]
    for pattern in patterns:
        if pattern in INDEXES and (folder / INDEXES[pattern]).exists():
            return indexed_files(folder / INDEXES[pattern])
        if files := sorted(folder.glob(pattern)):
            return files
    others = ", ".join(path.name for path in sorted(folder.glob("*.safetensors"))[:3])
    advice = f"; rename {others}, which mlx-lm would not read either" if others else "; copy the weights into it"
    raise ModelLoadError(f"{folder} has no weights: no file is named {' or '.join(patterns)}{advice}")


def indexed_files(index: Path) -> list[Path]:
    """Return the files that an index names. Raises ModelLoadError as ``weight_files`` does."""
    named = read_object(index).get("weight_map")
    names = set(named.values()) if isinstance(named, dict) else set()
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelLoadError(f"{index} does not name the files of the weights; copy or download it again")
    for name in sorted(names):
        if not (index.parent / name).is_file():
            raise ModelLoadError(f"{index} names {name}, which is missing; copy or download it")
    return [index.parent / name for name in sorted(names)]


def read_tokenizer(folder: Path, name: str = "") -> Any:
    """Read a folder's tokenizer, in mlx-lm's wrapper.

    Args:
        folder: The model's folder.
        name: The name by which the user asked for the model. It may identify a Llama 2 Chat model.

    Raises:
        ModelLoadError: The tokenizer is missing or cannot be read.
    """
    check_folder(folder)
    config = read_config(folder)
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise ModelLoadError(f"{folder} has no tokenizer; copy {' or '.join(TOKENIZER_FILES)} into it")
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = load_tokenizer(folder, NO_CODE, eos_token_ids=eos_token_ids(folder, config))
        else:
            tokenizer = TokenizerWrapper(sentencepiece_tokenizer(folder), eos_token_ids=eos_token_ids(folder, config))
    except MlxspecError:
        raise
    except Exception as error:  # a malformed tokenizer file makes transformers raise anything
        raise ModelLoadError(f"the tokenizer of {folder} cannot be read: {in_one_line(error)}") from error
    if not tokenizer.has_chat_template and LLAMA2_CHAT.search(f"{name} {folder}"):
        tokenizer.chat_template = LLAMA2_TEMPLATE
        tokenizer.has_chat_template = True
    return tokenizer


def eos_token_ids(folder: Path, config: dict[str, Any]) -> list[int] | None:
    """Return the ids that end an answer. generation_config.json takes precedence over config.json."""
    file = folder / "generation_config.json"
    named = (read_object(file) if file.exists() else {}).get("eos_token_id", config.get("eos_token_id"))
    ids = named if isinstance(named, list) else [named]
    return [token for token in ids if type(token) is int] or None
