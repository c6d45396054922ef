"""A fast tokenizer built from a bare SentencePiece ``tokenizer.model``. It encodes text as SentencePiece does.

transformers 5 reads such a file without the leading-space rule and without BOS. So this module builds the tokenizer
from the pieces, their scores and types, and the normalization rules in the file.
"""

from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxspec.errors import ModelLoadError
from mlxspec.models.checks import read_object

SPACE = "▁"  # SentencePiece's symbol for a space
LONGEST_RUN = 2**20  # of spaces; the decoder requires a number
BPE = 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def sentencepiece_tokenizer(folder: Path) -> Any:
    """Build the tokenizer of a folder that has only ``tokenizer.model``.

    What the files next to it say counts as it does for transformers' LlamaTokenizer: the special tokens, whether a text
    begins with BOS and ends with EOS, the added tokens, and the chat template.
    """
    files = {name: folder / f"{name}.json" for name in ("tokenizer_config", "special_tokens_map", "added_tokens")}
    content = {name: read_object(file) if file.exists() else {} for name, file in files.items()}
    config, added = content["tokenizer_config"], content["added_tokens"]
    if "added_tokens_decoder" not in config:  # a newer config replaces the two other files
        config |= content["special_tokens_map"]
    options: dict[str, Any] = {name: token_text(config[name]) for name in SPECIAL_TOKENS if name in config}
    named = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = [token_text(token) for token in named]
    special = {*extra, *options.values()}
    options |= {name: config[name] for name in ("add_bos_token", "add_eos_token") if name in config}
    stated = {i: {"content": token, "special": token in special} for token, i in added.items()}
    decoder: dict[int, Any] = {int(i): token for i, token in config.get("added_tokens_decoder", stated).items()}
    # They are found in the text as it is, so that what follows them is a new piece of text for SentencePiece.
    options["added_tokens_decoder"] = {i: AddedToken(**{**token, "normalized": False}) for i, token in decoder.items()}
    # "legacy" is transformers' word for SentencePiece's way.
    scheme = "never" if config.get("add_prefix_space") is False else "first" if config.get("legacy") is False else None
    tokenizer = fast_tokenizer(folder / "tokenizer.model", scheme, extra_special_tokens=extra, **options)
    wrong = next((i for i, token in decoder.items() if tokenizer.convert_tokens_to_ids(token["content"]) != i), None)
    if wrong is not None:
        raise ModelLoadError(
            f"the added token {decoder[wrong]['content']!r} of {folder} cannot have the id {wrong}, by its "
            "tokenizer.model; check added_tokens.json and tokenizer_config.json"
        )
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    elif isinstance(template, list):  # of several, by name
        template = {one["name"]: one["template"] for one in template}
    tokenizer.chat_template = template
    return tokenizer


def token_text(token: str | dict[str, Any] | None) -> str | None:
    """Return the text of a special token, which is a string or an object in a tokenizer's files."""
    return token["content"] if isinstance(token, dict) else token


def fast_tokenizer(file: Path, prepend_scheme: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a SentencePiece file.

    Args:
        file: The file.
        prepend_scheme: Where a space is put before text, in the terms of the tokenizers library. "first" puts one only
            at the start of the whole text, "never" puts none. None follows SentencePiece: if the file's rules put a
            space before text, it is put after each added token too.
        options: Arguments of PreTrainedTokenizerFast, such as ``eos_token``. By default the special tokens are those of
            the file, and a text begins with BOS.

    Raises:
        ModelLoadError: The file is not a SentencePiece BPE model.
    """
    # transformers reads such files with this module too; protobuf allows only one schema of a name in a process.
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf defines it at run time
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(file))  # checks the whole file
        model.ParseFromString(file.read_bytes())
    except Exception as error:
        raise ModelLoadError(f"{file} is not a SentencePiece model; copy or download it again") from error
    if model.trainer_spec.model_type != BPE:
        raise ModelLoadError(f"{file} is not a BPE model; use a folder with a tokenizer.json")

    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.piece: i for i, piece in enumerate(model.pieces)},
            merges=merges(model),
            unk_token=model.pieces[model.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = normalizer(model.normalizer_spec, marks_spaces=prepend_scheme is None)
    if prepend_scheme is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([] if prepend_scheme == "never" else without_dummy_prefix(model.normalizer_spec)),
        ]
    )
    add_special(tokenizer, model)
    named = {f"{name}_token": piece_or_none(model, getattr(model.trainer_spec, f"{name}_id"))
             for name in ("bos", "eos", "unk", "pad")}  # fmt: skip
    usual = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**named, **usual, **options})


def merges(model: Any) -> list[tuple[str, str]]:
    """Return all pairs of pieces that form another piece, best score first, as SentencePiece merges them.

    Only normal and user-defined pieces are formed, so text that spells "<0x0A>" or "</s>" stays text.
    """
    score = {piece.piece: piece.score for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)}
    pairs = [
        (-whole_score, i, whole[:cut], whole[cut:])
        for i, (whole, whole_score) in enumerate(score.items())
        for cut in range(1, len(whole))
        if whole[:cut] in score and whole[cut:] in score
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def normalizer(spec: Any, marks_spaces: bool) -> normalizers.Normalizer:
    """Convert SentencePiece's normalization rules to a normalizer of the tokenizers library.

    Args:
        spec: The rules, a NormalizerSpec.
        marks_spaces: Whether to include the rules that mark spaces. False if the pre-tokenizer marks them.
    """
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), "")]
        steps += [normalizers.Replace(Regex(" +"), " ")]
    if spec.add_dummy_prefix and marks_spaces:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces and marks_spaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def without_dummy_prefix(spec: Any) -> list[decoders.Decoder]:
    """Return the decoders that remove the space that encoding puts before a text, or none if it puts none.

    They remove all leading spaces if the file's rules remove extra white space.
    """
    if not spec.add_dummy_prefix:
        return []
    return [decoders.Strip(" ", LONGEST_RUN if spec.remove_extra_whitespaces else 1, 0)]


def add_special(tokenizer: Tokenizer, model: Any) -> None:
    """Add the model's unknown, control and user-defined tokens to the tokenizer."""
    special = [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in defined])


def piece_or_none(model: Any, index: int) -> str | None:
    """Return the piece with an id, or None if the model has no such id. An id of −1 means, for example, no BOS."""
    return model.pieces[index].piece if 0 <= index < len(model.pieces) else None
