"""The three ways to decode that are compared: mlx-lm plain, mlx-lm speculative, mlxspec."""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from mlxspec.decoding.decoder import SpeculativeDecoder
from mlxspec.decoding.sampling import Sampling
from mlxspec.evaluation.machine import joules
from mlxspec.models.pair import ModelPair

PLAIN, PEER, OURS = "mlx-lm plain", "mlx-lm speculative", "mlxspec"
PEER_DRAFT_LENGTH = 3  # mlx-lm's own default

Decode = Callable[[list[int], int], "Answer"]  # prompt, seed


@dataclass
class Answer:
    """One answer, or several added up. Times in seconds; ``first_seconds`` is until the first token or block."""

    tokens: int = 0
    first_tokens: int = 0  # that came with it
    prompt_tokens: int = 0
    seconds: float = 0.0
    first_seconds: float = 0.0
    peak_memory_bytes: int = 0
    joules: float | None = None
    ids: tuple[int, ...] = ()

    def __add__(self, other: "Answer") -> "Answer":
        names = ("tokens", "first_tokens", "prompt_tokens", "seconds", "first_seconds")
        sums = {name: getattr(self, name) + getattr(other, name) for name in names}
        energy = None if None in (self.joules, other.joules) else self.joules + other.joules
        peak = max(self.peak_memory_bytes, other.peak_memory_bytes)
        return Answer(**sums, peak_memory_bytes=peak, joules=energy)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "ids"}


def timed(
    prompt: list[int], pieces: Callable[[], Iterable[list[int]]], arrived: Callable[[], int] = lambda: 1
) -> Answer:
    """Decode, with a clock, a look at the memory and, where there is one, at the energy counter.

    ``arrived`` tells, with the first piece, how many tokens came at once.
    """
    mx.synchronize()
    mx.reset_peak_memory()
    energy, start = joules(), time.perf_counter()
    ids: list[int] = []
    first_seconds = first_tokens = 0
    for piece in pieces():
        if not ids:
            first_seconds, first_tokens = time.perf_counter() - start, arrived()
        ids += piece
    seconds = time.perf_counter() - start
    later = joules()
    used = None if energy is None or later is None or later < energy else later - energy  # the counter goes round
    return Answer(len(ids), first_tokens, len(prompt), seconds, first_seconds, mx.get_peak_memory(), used, tuple(ids))


def mlx_lm_engine(
    pair: ModelPair, sampling: Sampling, max_tokens: int, drafter: nn.Module | None = None, draft_length: int = 0
) -> Decode:
    """mlx-lm's own ``stream_generate``, with ``drafter`` as its draft model if one is given."""
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sampler": make_sampler(sampling.temperature, sampling.top_p, sampling.min_p, top_k=sampling.top_k),
    }
    if drafter is not None:
        options |= {"draft_model": drafter, "num_draft_tokens": draft_length}

    def pieces(prompt: list[int]) -> Iterable[list[int]]:
        emitted = 0
        for response in stream_generate(pair.target, pair.tokenizer, prompt, **options):
            if response.generation_tokens > emitted:
                emitted = response.generation_tokens
                yield [response.token]

    def decode(prompt: list[int], seed: int) -> Answer:
        mx.random.seed(seed)
        return timed(prompt, lambda: pieces(prompt))

    return decode


def mlxspec_engine(decoder: SpeculativeDecoder, max_tokens: int) -> Decode:
    """Our stream, text included, as mlx-lm's includes it; of earlier prompts nothing is reused, as mlx-lm does not."""

    def pieces(prompt: list[int], seed: int) -> Iterable[list[int]]:
        for segment in decoder.stream(prompt, max_tokens, seed=seed):
            if segment.tokens:
                yield segment.tokens

    def decode(prompt: list[int], seed: int) -> Answer:
        decoder.forget()
        answer = timed(prompt, lambda: pieces(prompt, seed), lambda: decoder.stats.tokens)
        decoder.forget()  # nor does it have our caches in its memory
        return answer

    return decode
