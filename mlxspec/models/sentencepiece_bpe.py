"""A fast tokenizer built from a bare SentencePiece ``tokenizer.model``. It encodes text as SentencePiece does.

transformers 5 reads such a file without the leading-space rule and without BOS. So the tokenizer is built here, from
the pieces, their scores and types, and the normalization rules that the file contains.
"""

from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf

from mlxspec.errors import ModelLoadError

SPACE = "▁"  # SentencePiece's symbol for a space
LONGEST_RUN = 2**20  # of spaces; the decoder requires a number
BPE = 2  # TrainerSpec.ModelType
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type


def fast_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a SentencePiece file. Raises ModelLoadError if the file holds no BPE model."""
    # The schema that transformers uses: protobuf allows only one in a process.
    model = import_protobuf().ModelProto()
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
    tokenizer.normalizer = normalizer(model.normalizer_spec)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *without_dummy_prefix(model.normalizer_spec),
        ]
    )
    add_special(tokenizer, model)
    bos, eos = (piece_or_none(model, i) for i in (model.trainer_spec.bos_id, model.trainer_spec.eos_id))
    if bos is not None:
        bos_id = model.trainer_spec.bos_id
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, bos_id)])
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


def merges(model: Any) -> list[tuple[str, str]]:
    """Return all pairs of pieces that form a third, best score first: SentencePiece merges the best-scoring pair.

    Only normal pieces are formed, so text that spells "<0x0A>" or "</s>" stays text.
    """
    score = {piece.piece: piece.score for piece in model.pieces if piece.type in (NORMAL, USER_DEFINED)}
    pairs = [
        (-whole_score, i, whole[:cut], whole[cut:])
        for i, (whole, whole_score) in enumerate(score.items())
        for cut in range(1, len(whole))
        if whole[:cut] in score and whole[cut:] in score
    ]
    return [(left, right) for _, _, left, right in sorted(pairs)]


def normalizer(spec: Any) -> normalizers.Normalizer:
    """Return SentencePiece's normalization rules as a normalizer of the tokenizers library."""
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), "")]
        steps += [normalizers.Replace(Regex(" +"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def without_dummy_prefix(spec: Any) -> list[decoders.Decoder]:
    """Return the decoder that removes the leading space, or all leading spaces if extra white space is removed."""
    if not spec.add_dummy_prefix:
        return []
    return [decoders.Strip(" ", LONGEST_RUN if spec.remove_extra_whitespaces else 1, 0)]


def add_special(tokenizer: Tokenizer, model: Any) -> None:
    """Add the control tokens and the user-defined tokens."""
    special = [piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    defined = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in defined])


def piece_or_none(model: Any, index: int) -> str | None:
    """Return a piece by id, or None for an id that the model lacks, such as −1 for no BOS."""
    return model.pieces[index].piece if 0 <= index < len(model.pieces) else None
