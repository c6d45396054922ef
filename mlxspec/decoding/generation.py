"""One call from prompt to answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxspec.decoding.decoder import SpeculativeDecoder
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.models.pair import ModelPair


@dataclass(frozen=True)
class Generation:
    """A whole answer. ``tokens`` are all emitted ones, an EOS included; ``text`` ends before EOS or stop string."""

    text: str
    tokens: list[int]
    stats: DecodingStats
    finish_reason: str


def generate(
    pair: ModelPair,
    prompt: str | Sequence[int],
    max_tokens: int = 256,
    sampling: Sampling | None = None,
    draft_length: int | str = "auto",
    verification: str = "block",
    **stream_options: Any,
) -> Generation:
    """Answer one prompt; for several, keep a ``SpeculativeDecoder`` and its compiled block.

    ``stream_options`` are those of ``SpeculativeDecoder.stream``: stop, system, raw, progress, seed.
    """
    decoder = SpeculativeDecoder(pair, sampling, draft_length, verification)
    segments = list(decoder.stream(prompt, max_tokens, **stream_options))
    return Generation(
        text="".join(segment.text for segment in segments),
        tokens=[token for segment in segments for token in segment.tokens],
        stats=decoder.stats,
        finish_reason=segments[-1].finish_reason,
    )
