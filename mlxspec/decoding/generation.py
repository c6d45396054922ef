"""A whole answer in one call."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlxspec.decoding.decoder import DEFAULT_DRAFT_LENGTH, DEFAULT_MAX_TOKENS, Progress, SpeculativeDecoder
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.decoding.verification import DEFAULT_RULE
from mlxspec.models.pair import ModelPair


@dataclass(frozen=True)
class Generation:
    """A whole answer. ``tokens`` are all that were emitted, an EOS included; ``text`` ends before it."""

    text: str
    tokens: list[int]
    stats: DecodingStats
    finish_reason: str


def generate(
    pair: ModelPair,
    prompt: str | Sequence[int],
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampling: Sampling | None = None,
    draft_length: int | str = DEFAULT_DRAFT_LENGTH,
    verification: str = DEFAULT_RULE,
    stop: Sequence[str] = (),
    system: str | None = None,
    raw: bool = False,
    progress: Progress = lambda done, total: None,
    seed: int | None = None,
) -> Generation:
    """Answer one prompt. For several, keep a ``SpeculativeDecoder``: its blocks are compiled once.

    Args:
        pair: Target and drafters.
        prompt: Text or token ids.
        max_tokens: Limit of the answer, as for ``SpeculativeDecoder.blocks``.
        sampling: As for ``SpeculativeDecoder``, like the two that follow.
        draft_length: Tokens drafted per block, or "auto".
        verification: The rule.
        stop: As for ``SpeculativeDecoder.stream``, like the four that follow.
        system: A system prompt.
        raw: Leave out the chat template.
        progress: Called with the number of prompt tokens read and of all prompt tokens.
        seed: Replaces the seed of the sampling.
    """
    decoder = SpeculativeDecoder(pair, sampling, draft_length, verification)
    segments = list(decoder.stream(prompt, max_tokens, stop, system, raw, progress, seed))
    return Generation(
        text="".join(segment.text for segment in segments),
        tokens=[token for segment in segments for token in segment.tokens],
        stats=decoder.stats,
        finish_reason=segments[-1].finish_reason or "length",
    )
