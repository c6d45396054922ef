"""From names to models in memory: a hub id or a folder in, a ``ModelPair`` out.

Only this module touches huggingface_hub and mlx-lm's loader. Nothing found in a model folder is executed.
"""

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_model, load_tokenizer, maybe_set_recommended_wired_limit
from tokenizers import AddedToken

from mlxspec.errors import InvalidRequestError, MlxspecError, ModelLoadError, in_one_line
from mlxspec.models.attention import attention_windows
from mlxspec.models.drafter import PromptLookup
from mlxspec.models.memory import check_memory, declared_context
from mlxspec.models.names import KNOWN_MODELS
from mlxspec.models.old_layout import is_old_config, read_old_model
from mlxspec.models.pair import ModelPair
from mlxspec.models.quantizing import quantized_copy
from mlxspec.models.safety import check_folder, check_numbers, check_safetensors, read_json
from mlxspec.models.sentencepiece_bpe import fast_tokenizer
from mlxspec.models.tokens import LLAMA2_TEMPLATE, check_same_tokens

DEMO = Path(__file__).parent.parent / "demo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.jinja", "tokenizer.model", "model*.safetensors", "weights*.npz"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
NO_CODE = {"trust_remote_code": False}  # said outright, or transformers may ask on the terminal
LLAMA2_CHAT = re.compile(r"llama-?2-\d+b-chat", re.IGNORECASE)


def load(
    target: str | Path | None = None,
    drafter: str | Path | PromptLookup | None = None,
    dtype: mx.Dtype | None = None,
    quantize: str | None = None,
    context: int | None = None,
) -> ModelPair:
    """Load a target and what drafts for it.

    ``target`` is a folder, a hub id or a short name (``mlxspec models`` lists them); None is the embedded demo target.
    ``drafter`` is the same, or "lookup" (prompt lookup), "none", or None: the demo's own drafter for the demo target,
    nobody for any other. With "+lookup" behind a name both may draft, whichever is faster for the text at hand, as long
    as the draft length is "auto"; "auto" is that with the drafter that belongs to the target, if one is known.
    ``dtype`` is the precision of weights and quantisation scales; by default float32 on the CPU back end, where 16 bits
    are ten times slower, and 16 bits on a GPU.
    ``quantize`` the target to "4" or "8" bits, "mxfp4" or "nvfp4"; the copy is kept. None leaves it as it is stored,
    but for short names that say otherwise; "none" for those too.
    ``context`` is the number of tokens whose cache must fit into memory beside the weights, by default the models' own
    context but no more than 4096; decoding is not limited by it.

    Raises ModelLoadError, UnsupportedModelError, InvalidRequestError or TokenizerMismatchError, a line each.
    """
    drafter, lookup = drafters_named(target, drafter)
    known = KNOWN_MODELS.get(str(target))
    target_folder = resolved(DEMO / "target" if target is None else target)
    if (kind := quantize or (known.quantize if known else "none")) != "none":
        target_folder = quantized_copy(target_folder, kind, read_lazily)
    drafter_folder = None if names_no_model(drafter) else resolved(drafter)
    folders = [folder for folder in (target_folder, drafter_folder) if folder]
    check_memory([(folder, read_config(folder)) for folder in folders], context, dtype)
    maybe_set_recommended_wired_limit()

    tokenizer = read_tokenizer(target_folder, str(target))
    context_length = declared_context(read_config(target_folder))
    if drafter_folder and any((drafter_folder / name).exists() for name in TOKENIZER_FILES):
        check_same_tokens(tokenizer, read_tokenizer(drafter_folder))
    target_model = read_model(target_folder, dtype)
    drafting = read_model(drafter_folder, dtype) if drafter_folder else model_free_drafter(drafter)
    return ModelPair(target_model, drafting, tokenizer, context_length, lookup)


def drafters_named(target: Any, drafter: Any) -> tuple[Any, PromptLookup | None]:
    """What "auto", "+lookup" and None mean for a target: its drafter, and whether to look up as well."""
    known = next((model for model in KNOWN_MODELS.values() if str(target) in (model.name, model.hub_id)), None)
    own = DEMO / "drafter" if target is None else known and known.drafter
    if drafter is None and target is None:
        return own, None
    if drafter == "auto":
        return own or "lookup", PromptLookup() if own else None
    if isinstance(drafter, str) and drafter.endswith("+lookup"):
        name = drafter.removesuffix("+lookup")
        if name in ("", "auto", "none", "lookup"):
            raise InvalidRequestError(f'drafter is {drafter!r}; name a model before "+lookup", or use "auto"')
        return name, PromptLookup()
    return drafter, None


def names_no_model(drafter: Any) -> bool:
    return drafter in (None, "none", "lookup") or isinstance(drafter, PromptLookup)


def model_free_drafter(drafter: str | PromptLookup | None) -> PromptLookup | None:
    if isinstance(drafter, PromptLookup):
        return drafter
    return PromptLookup() if drafter == "lookup" else None


def resolved(name: str | Path) -> Path:
    """The local folder of a model: ``name`` itself, or the hub's snapshot of it, downloaded if need be."""
    if known := KNOWN_MODELS.get(str(name)):
        name = known.hub_id
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise ModelLoadError(f"{name} is a file; give the folder that holds config.json and the weights")
    except (OSError, RuntimeError) as error:  # a name too long for a file, or an unknown ~user
        raise ModelLoadError(f"no such folder: {str(name)[:80]} ({in_one_line(error)}); give a model folder") from None
    if not HUB_ID.fullmatch(str(name)):
        raise ModelLoadError(f"no such folder: {name}; give a model folder, or a hub id like owner/name")
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=HUB_FILES))
    except GatedRepoError:
        raise ModelLoadError(f"{name} is gated: accept its licence on the hub, then run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelLoadError(f"no folder and no hub repository is named {name}; check the spelling") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelLoadError(
            f"{name} is not a folder, not in the hub's local cache, and cannot be downloaded now "
            f"({in_one_line(error)}); connect to the network once, or give a folder"
        ) from None


def read_model(folder: Path, dtype: mx.Dtype | None = None) -> nn.Module:
    """The model of a folder, in the precision that suits the device, refused if its cache cannot be rewound."""
    model, _ = read_lazily(folder)
    attention_windows(model)
    model.set_dtype(dtype or preferred_dtype(model))
    for name, weight in tree_flatten(model.parameters()):
        try:
            spoilt = mx.issubdtype(weight.dtype, mx.floating) and mx.isnan(weight).any().item()
        except RuntimeError as error:
            raise ModelLoadError(f"the weights of {folder} cannot be read: {in_one_line(error)}") from error
        if spoilt:
            raise ModelLoadError(f"{name} in {folder} is not a number (NaN) in places; copy or download it again")
    mx.eval(model.parameters())
    return model


def read_lazily(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """A model whose weights are read when they are first used, and its config."""
    check_folder(folder)
    config = read_config(folder)
    files = weight_files(folder, config)
    try:
        if is_old_config(config):
            return read_old_model(config, files)
        check_numbers(config, folder / "config.json", tensors=sum(check_safetensors(file) for file in files))
        return load_model(folder, lazy=True)
    except MlxspecError:
        raise
    except Exception as error:  # whatever a malformed folder makes the model code raise
        kind = config.get("model_type", "Llama in the old MLX layout")
        raise ModelLoadError(f"{folder} cannot be read as a {kind}: {in_one_line(error)}") from error


def preferred_dtype(model: nn.Module) -> mx.Dtype:
    """float32 on the CPU back end; on a GPU the 16-bit type of the weights, bfloat16 where they are float32."""
    if mx.default_device().type == mx.cpu:
        return mx.float32
    present = {parameter.dtype for _, parameter in tree_flatten(model.parameters())}
    return mx.float16 if mx.float16 in present and mx.bfloat16 not in present else mx.bfloat16


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise ModelLoadError(f"{folder} has no config.json; give the folder of a model in the HF layout")
    config = read_json(folder / "config.json")
    if not (isinstance(config.get("model_type"), str) or is_old_config(config)):
        raise ModelLoadError(f"{folder / 'config.json'} names no model_type; give a model's folder in the HF layout")
    return config


def weight_files(folder: Path, config: dict[str, Any]) -> list[Path]:
    pattern = "weights*.npz" if is_old_config(config) else "model*.safetensors"
    files = sorted(folder.glob(pattern))
    if not files:
        others = ", ".join(path.name for path in sorted(folder.glob("*.safetensors"))[:3])
        found = f"; it has {others}, which mlx-lm would not read either: rename them" if others else ""
        raise ModelLoadError(f"{folder} has no weights: no file is named {pattern}{found}")
    return files


def read_tokenizer(folder: Path, name: str = "") -> Any:
    """mlx-lm's wrapper around the folder's tokenizer. ``name`` is what the user calls the model."""
    check_folder(folder)
    config = read_config(folder)
    if not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise ModelLoadError(f"{folder} has no tokenizer; expected {' or '.join(TOKENIZER_FILES)} in it")
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = load_tokenizer(folder, NO_CODE, eos_token_ids=eos_token_ids(folder, config))
        else:
            tokenizer = TokenizerWrapper(bare_tokenizer(folder), eos_token_ids=eos_token_ids(folder, config))
    except MlxspecError:
        raise
    except Exception as error:  # whatever a malformed tokenizer file makes transformers raise
        raise ModelLoadError(f"the tokenizer of {folder} cannot be read: {in_one_line(error)}") from error
    if not tokenizer.has_chat_template and LLAMA2_CHAT.search(f"{name} {folder}"):
        tokenizer.chat_template = LLAMA2_TEMPLATE
        tokenizer.has_chat_template = True
    return tokenizer


def bare_tokenizer(folder: Path) -> Any:
    """From ``tokenizer.model``, with the chat template and the further tokens that lie beside it."""
    tokenizer = fast_tokenizer(folder / "tokenizer.model")
    if (folder / "added_tokens.json").exists():
        added = sorted(read_json(folder / "added_tokens.json").items(), key=lambda item: item[1])
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token, _ in added])
        if any(tokenizer.convert_tokens_to_ids(token) != token_id for token, token_id in added):
            raise ModelLoadError(f"{folder / 'added_tokens.json'} does not fit tokenizer.model; check both files")
    if (folder / "chat_template.jinja").exists():
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif (folder / "tokenizer_config.json").exists():
        template = read_json(folder / "tokenizer_config.json").get("chat_template")
        tokenizer.chat_template = template if isinstance(template, str) else None
    return tokenizer


def eos_token_ids(folder: Path, config: dict[str, Any]) -> list[int] | None:
    """The ids that end an answer: generation_config.json's word counts before config.json's."""
    file = folder / "generation_config.json"
    named = (read_json(file) if file.exists() else {}).get("eos_token_id", config.get("eos_token_id"))
    ids = named if isinstance(named, list) else [named]
    return [token for token in ids if type(token) is int] or None
