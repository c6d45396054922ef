"""The three engines that are compared: mlx-lm plain, mlx-lm speculative and mlxspec."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.generate import generation_stream
from mlx_lm.sample_utils import make_sampler

from mlxspec.decoding.decoder import SpeculativeDecoder
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.evaluation.energy import energy
from mlxspec.models.pair import ModelPair

PLAIN, PEER, OURS = "mlx-lm plain", "mlx-lm speculative", "mlxspec"
PEER_DRAFT_LENGTH = 3  # mlx-lm's own default

Engine = Callable[[list[int], int], "Answer"]  # prompt, seed


@dataclass
class Answer:
    """Measurements of one answer. ``+`` adds those of two answers, and takes the larger peak memory.

    Args:
        tokens: Number of tokens emitted.
        first_tokens: Number of tokens in the first token or block.
        prompt_tokens: Number of tokens in the prompt.
        seconds: Time of the whole answer in seconds, prefill included.
        first_seconds: Time until the first token or block in seconds.
        peak_memory_bytes: Peak of the memory that MLX allocated, in bytes.
        joules: Energy of the processor, on macOS with its GPU. None where it cannot be read.
        ids: Token ids of one answer. A sum has none.
        stats: mlxspec's statistics of one answer. A sum has none.
    """

    tokens: int = 0
    first_tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    first_seconds: float = 0.0
    peak_memory_bytes: int = 0
    joules: float | None = 0.0
    ids: tuple[int, ...] = ()
    stats: DecodingStats | None = None

    def __add__(self, other: "Answer") -> "Answer":
        return Answer(
            tokens=self.tokens + other.tokens,
            first_tokens=self.first_tokens + other.first_tokens,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            seconds=self.seconds + other.seconds,
            first_seconds=self.first_seconds + other.first_seconds,
            peak_memory_bytes=max(self.peak_memory_bytes, other.peak_memory_bytes),
            joules=None if self.joules is None or other.joules is None else self.joules + other.joules,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as JSON, without ``ids`` and ``stats``."""
        return {name: value for name, value in vars(self).items() if name not in ("ids", "stats")}


def timed(
    prompt: list[int], stream: Callable[[], Iterable[list[int]]], arrived: Callable[[], int] = lambda: 1
) -> Answer:
    """Decode one answer and measure time, memory and, where it can be read, energy.

    Args:
        prompt: Token ids of the prompt.
        stream: Starts the stream of token ids, in pieces.
        arrived: Called when the first piece arrives. Returns how many tokens were decoded so far.

    Returns:
        The measurements.
    """
    mx.synchronize()
    mx.reset_peak_memory()
    with energy() as joules:
        start = time.perf_counter()
        ids: list[int] = []
        first_seconds, first_tokens = 0.0, 0
        for piece in stream():
            if not ids:
                first_seconds, first_tokens = time.perf_counter() - start, arrived()
            ids += piece
        seconds = time.perf_counter() - start
        used = joules(seconds)
    return Answer(len(ids), first_tokens, len(prompt), seconds, first_seconds, mx.get_peak_memory(), used, tuple(ids))


def mlx_lm_engine(
    pair: ModelPair, sampling: Sampling, max_tokens: int, drafter: nn.Module | None = None, draft_length: int = 0
) -> Engine:
    """Return an engine that runs mlx-lm's ``stream_generate``.

    Args:
        pair: The pair whose target and tokenizer are used.
        sampling: How tokens are sampled.
        max_tokens: Maximum length of an answer, in tokens.
        drafter: The drafter. None for plain decoding.
        draft_length: Draft length γ.

    Returns:
        The engine.
    """
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "sampler": make_sampler(sampling.temperature, sampling.top_p, sampling.min_p, top_k=sampling.top_k),
    }
    if drafter is not None:
        options |= {"draft_model": drafter, "num_draft_tokens": draft_length}

    def stream(prompt: list[int]) -> Iterable[list[int]]:
        emitted = 0
        for response in stream_generate(pair.target, pair.tokenizer, prompt, **options):
            if response.generation_tokens > emitted:
                emitted = response.generation_tokens
                yield [response.token]

    def answer(prompt: list[int], seed: int) -> Answer:
        mx.random.seed(seed)
        measured = timed(prompt, lambda: stream(prompt))
        # mlx-lm queues one token more. It must not slow down the next engine, and processes that divide the target must
        # not mix its collective operations with theirs.
        mx.synchronize(generation_stream)
        return measured

    return answer


def mlxspec_engine(decoder: SpeculativeDecoder, max_tokens: int) -> Engine:
    """Return an engine that runs mlxspec. Like mlx-lm, it detokenizes, and it reuses no cache of earlier prompts."""

    def stream(prompt: list[int], seed: int) -> Iterable[list[int]]:
        for segment in decoder.stream(prompt, max_tokens, seed=seed):
            if segment.tokens:
                yield segment.tokens

    def answer(prompt: list[int], seed: int) -> Answer:
        decoder.forget()
        measured = timed(prompt, lambda: stream(prompt, seed), lambda: decoder.stats.tokens)
        measured.stats = decoder.stats
        decoder.forget()  # mlx-lm's memory must not include these caches
        return measured

    return answer
