"""The time of a block by its parts, and the speed at each draft length: measured, and predicted by the cost model."""

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
    """Return the name of the pair's drafter, the model before prompt lookup. Raises InvalidRequestError without one."""
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
    """Measure the cost table anew, and the speed at each draft length of ``MENU`` and of "auto".

    Args:
        pair: target and drafters.
        prompts: token ids.
        sampling: how tokens are drawn.
        rounds: interleaved rounds that count.
        max_tokens: of an answer.
        verification: the rule.
        progress: is called with the runs done and all runs.

    Returns:
        For each length the speed-up over drafting nothing: measured, and predicted from the costs and from the
        acceptance of the longest drafts.
    """
    auto = SpeculativeDecoder(pair, sampling, "auto", verification)
    name = drafter_of(auto.compiled)
    auto.calibrate(anew=True)
    assert isinstance(auto.policy, Automatic)
    costs = auto.policy.table
    decoders: dict[int | str, SpeculativeDecoder] = {
        length: SpeculativeDecoder(pair, sampling, length, verification) for length in MENU
    }
    runs = {length: answering(decoder, prompts, max_tokens) for length, decoder in {**decoders, "auto": auto}.items()}
    found = by_engine(interleaved(runs, rounds, progress=progress))
    rates = {length: [stats.tokens_per_second for stats in answers] for length, answers in found.items()}
    seen = sum(found[LONGEST], DecodingStats())
    reached = [seen.blocks, *seen.accepted_at]  # how often all positions before one were accepted
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
    """Return an engine that answers the prompts and returns the statistics of all answers together."""

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
    """Return the speed-up over drafting nothing that the cost model predicts.

    Args:
        costs: the table.
        choice: proposer and draft length.
        rates: acceptance of each draft position, given that those before it were accepted.
        tokens: length of an answer.
    """
    blocks = expected_blocks(rates, choice.length, tokens)
    return tokens * costs.block(PLAIN) / (blocks * costs.block(choice))


# ----------------------------------------------------------------------- parts of a block

PARTS = ("drafting", "verification", "acceptance", "host")


def profile(
    pair: ModelPair, sampling: Sampling, draft_length: int, verification: str = DEFAULT_RULE, rounds: int = 7
) -> Record:
    """Measure the parts of a block, in seconds: medians over interleaved rounds.

    The draft and the target's pass are timed alone. The other two parts are remainders, so that the parts always add
    up to the block, and noise can make a small one negative. ``acceptance`` is what a block takes on the device beyond
    draft and pass. ``host`` is what it takes longer when its result is read and turned into tokens.

    Args:
        pair: target and drafters.
        sampling: how tokens are drawn.
        draft_length: tokens drafted.
        verification: the rule.
        rounds: interleaved rounds that count.

    Returns:
        ``PARTS``, their sum ``block``, and the share of the two remainders in it, ``overhead``.
    """
    # Without a tokenizer no EOS ends the text. How long the context is does not matter for the time.
    endless = replace(pair, tokenizer=None, context_length=2**31)
    decoder = SpeculativeDecoder(endless, sampling, draft_length, verification)
    compiled, name = decoder.compiled, drafter_of(decoder.compiled)
    proposer, block = compiled.proposers[name], compiled[Choice(name, draft_length)]
    timers = {
        "verification": Timer(*target_pass(compiled, draft_length + 1)),
        "device": Timer(block, lambda: block_state(compiled, proposer, CAPACITY_STEP)),
    }
    if name == MODEL:
        timers["drafting"] = Timer(drafting(compiled, draft_length), lambda: draft_state(compiled, CAPACITY_STEP))
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
    """Return an engine of a timer."""
    return lambda number: timer()


def target_pass(compiled: CompiledBlocks, rows: int) -> tuple[Callable[[Any], tuple[Any, Any]], Callable[[], Any]]:
    """Return a step that is one pass of the target over ``rows`` tokens, and what makes its first state."""

    def one(tokens: mx.array, buffers: Any) -> tuple[mx.array, Any]:
        logits, buffers = compiled.target(tokens, buffers, mx.array(TEXT))
        return logits, (tokens, buffers)

    graph = CompiledGraph(one, [compiled.pair.target], compiled.weights)
    return lambda state: graph(*state), lambda: (mx.zeros(rows, mx.int32), compiled.target.empty(CAPACITY_STEP))


def seconds_per_block(decoder: SpeculativeDecoder, draft_length: int) -> float:
    """Return the seconds of a block while a stream is read, until the caches would have to grow."""
    count = max(2 * QUEUED, (CAPACITY_STEP - TEXT) // (draft_length + 1) - 3)
    stream = decoder.blocks([1] * TEXT, CAPACITY_STEP * (draft_length + 1))
    next(stream)
    start = time.perf_counter()
    for _ in range(count):
        next(stream)
    return (time.perf_counter() - start) / count
