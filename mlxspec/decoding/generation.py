"""Generation of a complete answer in one call."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlxspec.decoding.decoder import Progress, SpeculativeDecoder
from mlxspec.decoding.requests import DEFAULT_DRAFT_LENGTH, DEFAULT_MAX_TOKENS
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.decoding.verification import DEFAULT_RULE
from mlxspec.models.pair import ModelPair


@dataclass(frozen=True)
class Generation:
    """A complete answer.

    Attributes:
        text: The answer. It ends before an EOS or a stop string.
        tokens: Ids of all emitted tokens, an EOS included.
        stats: Speed and acceptance statistics.
        finish_reason: "stop" for an EOS or a stop string, "length" for ``max_tokens`` or the context.
    """

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
    """Answer one prompt. For several prompts, use one ``SpeculativeDecoder``, which compiles its blocks only once.

    Args:
        pair: Target and drafters.
        prompt: Text, which the chat template formats if there is one, or token ids.
        max_tokens: Limit of the answer, in tokens. −1 continues until an EOS or a full context.
        sampling: How tokens are drawn. None for temperature 0.
        draft_length: Draft length γ, or "auto".
        verification: Name of the verification rule, a key of ``RULES``.
        stop: The answer ends before the first of these strings.
        system: System prompt, for the chat template.
        raw: Skip the chat template.
        progress: Called with the number of prompt tokens read and of all prompt tokens.
        seed: Replaces the seed of ``sampling``.

    Returns:
        The answer and its statistics.

    Raises:
        InvalidRequestError: An argument is invalid, or the prompt leaves no room in the context.
        UnsupportedModelError: A model cannot be rewound.
        NumericalError: The target computes NaN where the next token would be drawn.
    """
    decoder = SpeculativeDecoder(pair, sampling, draft_length, verification)
    segments = list(decoder.stream(prompt, max_tokens, stop, system, raw, progress, seed))
    return Generation(
        text="".join(segment.text for segment in segments),
        tokens=[token for segment in segments for token in segment.tokens],
        stats=decoder.stats,
        finish_reason=segments[-1].finish_reason or "length",
    )
