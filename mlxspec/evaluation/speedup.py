"""Where the time of a block goes, and the speed at each draft length: as measured and as the cost model has it."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx

from mlxspec.decoding.cache import CAPACITY_STEP
from mlxspec.decoding.calibration import QUEUED, TEXT, blocks, measure_and_keep, seconds_of, target_passes
from mlxspec.decoding.choice import (
    LONGEST_CHOICE,
    LOOKUP,
    MODEL,
    PLAIN,
    BlockCosts,
    Choice,
    expected_blocks,
)
from mlxspec.decoding.decoder import SpeculativeDecoder
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.errors import InvalidRequestError
from mlxspec.models.pair import ModelPair

Record = dict[str, Any]

SHOWN = (*range(9), LONGEST_CHOICE)  # draft lengths


def drafter_of(decoder: SpeculativeDecoder) -> str:
    """The name of its proposer, the model before prompt lookup. Raises InvalidRequestError if there is none."""
    for name in (MODEL, LOOKUP):
        if name in decoder.compiled.proposers:
            return name
    raise InvalidRequestError("there is no drafter to measure; name one with --drafter")


def calibrated(
    pair: ModelPair,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    rounds: int,
    max_tokens: int,
    verification: str = "block",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Record:
    """The cost table, measured anew and kept, and the speed-up over drafting nothing at γ = 0 … 8, 16 and of "auto".

    Predicted from the costs and from the acceptance of the γ = 16 runs, and measured in interleaved rounds.
    """
    decoder = SpeculativeDecoder(pair, sampling, "auto", verification)
    name = drafter_of(decoder)
    costs = measure_and_keep(decoder.compiled)
    decoders = [SpeculativeDecoder(pair, sampling, length, verification) for length in SHOWN]
    decoders.append(decoder)
    rates: list[list[float]] = [[] for _ in decoders]
    seen = DecodingStats()
    for turn in range(rounds + 1):
        for which, one in enumerate(decoders):
            progress(turn * len(decoders) + which, (rounds + 1) * len(decoders))
            stats = decoded(one, prompts, max_tokens, turn)
            if turn:  # the first round traces
                rates[which].append(stats.tokens_per_second)
                seen = seen + stats if one.draft_length == LONGEST_CHOICE else seen
    progress((rounds + 1) * len(decoders), (rounds + 1) * len(decoders))
    reached = [seen.blocks, *seen.accepted_at]  # how often each position's predecessors were all accepted
    answer = max(1, round(seen.tokens / (rounds * len(prompts))))  # tokens
    conditional = [a / b if b else 0.0 for a, b in zip(seen.accepted_at, reached, strict=False)]
    figures = [
        {
            "measured": statistics.median(a / b for a, b in zip(found, rates[0], strict=True)),
            "tokens_per_second": statistics.median(found),
        }
        for found in rates
    ]
    return {
        "sampling": sampling.to_dict(),
        "drafter": name,
        "costs": table(costs, name),
        "lengths": [
            {
                "draft_length": length,
                "predicted": predicted(costs, Choice(name, length), conditional, answer),
                **measured,
            }
            for length, measured in zip(SHOWN, figures[:-1], strict=True)
        ],
        "auto": figures[-1],
    }


def table(costs: BlockCosts, name: str) -> Record:
    return {**asdict(costs), "verify": list(costs.verify), "once": costs.once[name], "draft": costs.draft[name]}


def predicted(costs: BlockCosts, choice: Choice, rates: Sequence[float], tokens: int) -> float:
    """Speed-up over drafting nothing, for answers of so many tokens."""
    blocks = expected_blocks(rates, choice.length, tokens)
    return tokens * costs.block(PLAIN) / (blocks * costs.block(choice))


def decoded(decoder: SpeculativeDecoder, prompts: Sequence[list[int]], max_tokens: int, seed: int) -> DecodingStats:
    total = DecodingStats()
    for prompt in prompts:
        for _ in decoder.blocks(prompt, max_tokens, seed=seed):
            pass
        total += decoder.stats
    decoder.forget()
    return total


def profile(
    pair: ModelPair, sampling: Sampling, draft_length: int, verification: str = "block", rounds: int = 7
) -> Record:
    """Seconds of a block: the drafter's passes, the target's pass, the rest on the device, and what the host adds.

    The passes are those of the two models alone, compiled as in a block; the rest is drawing and verifying; the host's
    part is what a block takes longer while its result is read and turned into tokens. Medians over interleaved rounds.
    """
    # Without a tokenizer nothing ends the text that is timed, and how long the context is does not matter for that.
    endless = replace(pair, tokenizer=None, context_length=2**31)
    decoder = SpeculativeDecoder(endless, sampling, draft_length, verification)
    name = drafter_of(decoder)
    choice = Choice(name, draft_length)
    runs = {
        "verification": target_passes(decoder.compiled, draft_length + 1, sampled=False),
        "drafting": drafter_passes(decoder, draft_length) if name == MODEL else lambda: 0.0,
        "device": blocks(decoder.compiled, choice),
        "whole": lambda: served_seconds(decoder),
    }
    rounds_of: dict[str, list[float]] = {what: [] for what in runs}
    for turn in range(rounds + 1):
        for what, run in runs.items():
            with decoder.compiled.weights.safe():
                seconds = run()
            if turn:
                rounds_of[what].append(seconds)
    taken = {what: statistics.median(values) for what, values in rounds_of.items()}
    passes = taken["verification"] + taken["drafting"]
    return {
        "draft_length": draft_length,
        "drafting": taken["drafting"],
        "verification": taken["verification"],
        "acceptance": max(0.0, taken["device"] - passes),
        "host": max(0.0, taken["whole"] - taken["device"]),
        "block": taken["whole"],
        "outside_the_models": max(0.0, taken["whole"] - passes) / taken["whole"],
    }


def drafter_passes(decoder: SpeculativeDecoder, count: int) -> Callable[[], float]:
    """Seconds of ``count`` passes of the drafter, over two tokens and then one each, as in a block."""
    run = decoder.compiled.proposers[MODEL].run

    def one(state: Any) -> tuple[mx.array, Any]:
        tokens, buffers = state
        found, feed = [], tokens
        for step in range(count):
            logits, buffers = run(feed, buffers, mx.array(TEXT + step))
            feed = mx.argmax(logits[-1:], axis=-1).astype(mx.int32)  # the next pass has to wait for this one
            found.append(feed)
        return mx.concatenate(found), (tokens, buffers)

    compiled = mx.compile(one, inputs=[decoder.pair.drafter.state])
    return lambda: seconds_of(compiled, (mx.zeros(2, mx.int32), run.empty(CAPACITY_STEP)))


def served_seconds(decoder: SpeculativeDecoder) -> float:
    """Seconds of a block while a stream is read: as many blocks as fit before the caches have to grow."""
    length = decoder.draft_length + 1
    count = max(2 * QUEUED, (CAPACITY_STEP - TEXT) // length - 3)
    stream = decoder.blocks([1] * TEXT, CAPACITY_STEP * length)
    next(stream)
    start = time.perf_counter()
    for _ in range(count):
        next(stream)
    seconds = time.perf_counter() - start
    stream.close()
    return seconds / count
