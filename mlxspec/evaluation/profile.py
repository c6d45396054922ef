"""The time of a block by its parts, and the speed at each draft length.

The speed is both measured and predicted by the cost model.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx

from mlxspec.decoding.acceptance import LONGEST, MENU, expected_blocks
from mlxspec.decoding.cache import CAPACITY_STEP
from mlxspec.decoding.calibration import QUEUED, ROOM, Timer, block_state, draft_state, drafting
from mlxspec.decoding.compiled import CompiledBlocks, CompiledGraph
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.decoder import SpeculativeDecoder
from mlxspec.decoding.drafting import LOOKUP, MODEL, PLAIN, Choice
from mlxspec.decoding.policy import Automatic
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.decoding.verification import DEFAULT_RULE
from mlxspec.errors import InvalidRequestError
from mlxspec.evaluation.rounds import Progress, by_engine, interleaved, ratio, spread
from mlxspec.models.pair import ModelPair

Record = dict[str, Any]
TEXT = CAPACITY_STEP - ROOM  # tokens of text before a block that is timed


def drafter_of(compiled: CompiledBlocks) -> str:
    """Return "model" if the pair has a drafter model, or "lookup" if it has only prompt lookup.

    Raises:
        InvalidRequestError: The pair has no drafter.
    """
    for name in (MODEL, LOOKUP):
        if name in compiled.drafters:
            return name
    raise InvalidRequestError("there is no drafter to measure; choose a pair with one")


# ----------------------------------------------------------------------- speed at each draft length


def calibrated(
    pair: ModelPair,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    rounds: int,
    max_tokens: int,
    verification: str = DEFAULT_RULE,
    progress: Progress = lambda done, total: None,
) -> Record:
    """Measure the cost table again, and the speed at each draft length of ``MENU`` and of "auto".

    Args:
        pair: The target and its drafters.
        prompts: Token ids of each prompt.
        sampling: How tokens are sampled.
        rounds: Number of interleaved rounds that count.
        max_tokens: Maximum length of an answer, in tokens.
        verification: The verification rule.
        progress: Called with the runs done and the number of all runs.

    Returns:
        A record with the cost table, and the speed-up over plain decoding for each draft length: measured, and
        predicted. The prediction uses the costs and the acceptance rates of the longest drafts.

    Raises:
        InvalidRequestError: The pair has no drafter.
    """
    auto = SpeculativeDecoder(pair, sampling, "auto", verification)
    name = drafter_of(auto.compiled)
    auto.calibrate(again=True)
    assert isinstance(auto.policy, Automatic)
    costs = auto.policy.table
    decoders: dict[int | str, SpeculativeDecoder] = {
        length: SpeculativeDecoder(pair, sampling, length, verification) for length in MENU
    }
    runs = {length: answering(decoder, prompts, max_tokens) for length, decoder in {**decoders, "auto": auto}.items()}
    found = by_engine(interleaved(runs, rounds, progress=progress))
    rates = {length: [stats.tokens_per_second for stats in answers] for length, answers in found.items()}
    seen = sum(found[LONGEST], DecodingStats())
    reached = [seen.blocks, *seen.accepted_at]  # [i]: blocks in which all positions before i were accepted
    conditional = [a / b if b else 0.0 for a, b in zip(seen.accepted_at, reached, strict=False)]
    tokens = max(1, round(seen.tokens / (rounds * len(prompts))))  # of an answer
    figures = {
        length: {
            "measured": ratio(rate, rates[0]).median,
            "tokens_per_second": spread(rate).median,
        }
        for length, rate in rates.items()
    }
    return {
        "sampling": sampling.to_dict(),
        "drafter": name,
        "costs": {**asdict(costs), "rows": {str(rows): seconds for rows, seconds in costs.rows.items()}},
        "lengths": [
            {
                "draft_length": length,
                "verify": costs.verify(length + 1),
                "predicted": predicted(costs, Choice(name, length) if length else PLAIN, conditional, tokens),
                **figures[length],
            }
            for length in MENU
        ],
        "auto": figures["auto"],
    }


def answering(
    decoder: SpeculativeDecoder, prompts: Sequence[list[int]], max_tokens: int
) -> Callable[[int], DecodingStats]:
    """Return an engine that answers all prompts and returns the sum of their statistics.

    Args:
        decoder: The decoder.
        prompts: Token ids of each prompt.
        max_tokens: Maximum length of an answer, in tokens.

    Returns:
        A function of the round's number, which serves as the seed.
    """

    def run(number: int) -> DecodingStats:
        total = DecodingStats()
        for prompt in prompts:
            for _ in decoder.blocks(prompt, max_tokens, seed=number):
                pass
            total += decoder.stats
        decoder.forget()
        return total

    return run


def predicted(costs: BlockCosts, choice: Choice, rates: Sequence[float], tokens: int) -> float:
    """Return the speed-up over plain decoding that the cost model predicts.

    Args:
        costs: The cost table.
        choice: The proposer and the draft length.
        rates: Acceptance rate of each draft position, given that all earlier ones were accepted.
        tokens: Length of an answer in tokens.

    Returns:
        The speed-up.
    """
    blocks = expected_blocks(rates, choice.length, tokens)
    return tokens * costs.block(PLAIN) / (blocks * costs.block(choice))


# ----------------------------------------------------------------------- parts of a block

PARTS = ("drafting", "verification", "acceptance", "host")


def profile(
    pair: ModelPair, sampling: Sampling, draft_length: int, verification: str = DEFAULT_RULE, rounds: int = 7
) -> Record:
    """Measure the parts of a block. Times are medians over interleaved rounds, in seconds.

    The draft and the target's pass are timed alone. The other two parts are remainders, so that the parts always add up
    to the block. Noise can make a small remainder negative. ``acceptance`` is the block's device time beyond the draft
    and the pass. ``host`` is the additional time when the host reads the result and turns it into tokens.

    Args:
        pair: The target and its drafters.
        sampling: How tokens are sampled.
        draft_length: Draft length γ.
        verification: The verification rule.
        rounds: Number of interleaved rounds that count.

    Returns:
        The time of each of ``PARTS``, their sum ``block``, and ``overhead``, the share of the two remainders in the
        sum.

    Raises:
        InvalidRequestError: The pair has no drafter.
    """
    # Without a tokenizer, no EOS ends the text. The context length does not affect the time.
    endless = replace(pair, tokenizer=None, context_length=2**31)
    decoder = SpeculativeDecoder(endless, sampling, draft_length, verification)
    compiled, name = decoder.compiled, drafter_of(decoder.compiled)
    proposer, block = compiled.proposers[name], compiled[Choice(name, draft_length)]
    timers = {
        "verification": Timer(*target_pass(compiled, draft_length + 1), pair.group),
        "device": Timer(block, lambda: block_state(compiled, proposer, CAPACITY_STEP), pair.group),
    }
    if name == MODEL:
        timers["drafting"] = Timer(
            drafting(compiled, draft_length), lambda: draft_state(compiled, CAPACITY_STEP), pair.group
        )
    with compiled.weights.protected():
        runs: dict[str, Callable[[int], float]] = {part: timed(timer) for part, timer in timers.items()}
        runs["block"] = lambda number: seconds_per_block(decoder, draft_length)
        found = {part: spread(figures).median for part, figures in by_engine(interleaved(runs, rounds)).items()}
    passes = found["verification"] + found.get("drafting", 0.0)
    return {
        "draft_length": draft_length,
        "drafting": found.get("drafting", 0.0),
        "verification": found["verification"],
        "acceptance": found["device"] - passes,
        "host": found["block"] - found["device"],
        "block": found["block"],
        "overhead": (found["block"] - passes) / found["block"],
    }


def timed(timer: Timer) -> Callable[[int], float]:
    """Return an engine that runs a timer and returns its seconds."""
    return lambda number: timer()


def target_pass(compiled: CompiledBlocks, rows: int) -> tuple[Callable[[Any], tuple[Any, Any]], Callable[[], Any]]:
    """Return a step that runs one target pass over ``rows`` tokens, and a function that makes its first state."""

    def one(tokens: mx.array, buffers: Any) -> tuple[mx.array, Any]:
        logits, buffers = compiled.target(tokens, buffers, mx.array(TEXT))
        return logits, (tokens, buffers)

    graph = CompiledGraph(one, [compiled.pair.target], compiled.weights)
    return lambda state: graph(*state), lambda: (mx.zeros(rows, mx.int32), compiled.target.empty(CAPACITY_STEP))


def seconds_per_block(decoder: SpeculativeDecoder, draft_length: int) -> float:
    """Return the mean seconds of a block while a stream is read, for as many blocks as fit into the caches."""
    count = max(2 * QUEUED, (CAPACITY_STEP - TEXT) // (draft_length + 1) - 3)
    stream = decoder.blocks([1] * TEXT, CAPACITY_STEP * (draft_length + 1))
    next(stream)
    start = time.perf_counter()
    for _ in range(count):
        next(stream)
    return (time.perf_counter() - start) / count
