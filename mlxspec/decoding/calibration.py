"""What a block costs on this device: measured on the real blocks of a pair, and remembered on disk.

The parts of a block cannot be timed one by one without changing them. So passes over 1 … 9 and 17 rows are timed, and
whole blocks that draft nothing or a few tokens, queued behind each other as in decoding; what drafting and verifying
cost is the difference.
"""

import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxspec.decoding.block import CompiledBlocks, State
from mlxspec.decoding.cache import CAPACITY_STEP
from mlxspec.decoding.choice import LONGEST_CHOICE, LOOKUP, MODEL, PLAIN, STEPWISE, BlockCosts, Choice
from mlxspec.decoding.stepwise import Confidence, Draft
from mlxspec.models.quantizing import cache_folder

FORMAT = 4  # of the files; another one is measured anew
QUEUED = 3  # passes timed together
ROUNDS, FEWEST_ROUNDS = 9, 3
SECONDS = 2.0  # after which no round is begun, but for the fewest
MOST_ROWS = LONGEST_CHOICE + 1
TIMED_ROWS = (*range(1, 10), MOST_ROWS)  # no block of "auto" has those between
FEW, MORE = 1, 4  # tokens drafted by the blocks that the costs of drafting are taken from
LONG = 4 * CAPACITY_STEP  # a capacity at which it shows what attention over a longer text costs
DRAFT = "draft"  # one made step by step, among what is timed; by its length and how many tokens it opens with
DRAFTS = ((FEW, 1), (MORE, 1), (MORE, MORE))
TEXT = CAPACITY_STEP // 2  # tokens before the measured ones


def known_costs(compiled: CompiledBlocks) -> BlockCosts:
    """From the disk if this pair was measured on this device with this MLX, else measured now."""
    return stored_costs(compiled) or measure_and_keep(compiled, replace=False)


def are_known(compiled: CompiledBlocks) -> bool:
    return stored_costs(compiled) is not None


def stored_costs(compiled: CompiledBlocks) -> BlockCosts | None:
    """What the disk has; None for nothing, or nothing that can be used."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        stored = json.loads(costs_file(compiled).read_text())["costs"]
        costs = BlockCosts(**{**stored, "verify": tuple(stored["verify"]), "longer": tuple(stored["longer"])})
        model = MODEL in compiled.drafters
        numbers = [*costs.verify, *costs.once.values(), *costs.draft.values(), *costs.catch_up.values()]
        numbers += [costs.trace, costs.step_once, costs.read, *costs.longer]
        whole = len(costs.verify) == MOST_ROWS and len(costs.longer) == 3
        whole = whole and sorted(costs.draft) == sorted(costs.once) == sorted(compiled.drafters)
        whole = whole and (not model or (MODEL in costs.catch_up and {"step_once", "read"} <= stored.keys()))
        whole = whole and costs.draft.get(MODEL, 1.0) > 0
        if whole and min(costs.verify) > 0 and all(math.isfinite(number) and number >= 0 for number in numbers):
            return costs
    return None


def measure_and_keep(compiled: CompiledBlocks, replace: bool = True) -> BlockCosts:
    """Measure, and write down; without ``replace``, what another process has written meanwhile is what counts."""
    costs, file = measured_costs(compiled), costs_file(compiled)
    with suppress(OSError):  # no place to keep it: it is measured again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps({"of": described(compiled), "costs": asdict(costs)}, indent=1))
        theirs = None if replace else stored_costs(compiled)
        if theirs is None:
            os.replace(aside, file)
        else:
            aside.unlink()
            return theirs
    return costs


def costs_file(compiled: CompiledBlocks) -> Path:
    key = hashlib.sha256(json.dumps(described(compiled), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "costs" / f"{key}.json"


def described(compiled: CompiledBlocks) -> dict[str, Any]:
    """All that the costs depend on, in words."""
    sampling, info = compiled.sampling, mx.device_info()
    described = {
        "format": FORMAT,
        "mlx": mx.__version__,
        "device": [str(mx.default_device()), info.get("device_name"), info.get("architecture"), platform.machine()],
        "target": model_described(compiled.pair.target),
        "drafters": sorted(compiled.drafters),
        "ngram": compiled.proposers[LOOKUP].lookup.ngram if LOOKUP in compiled.drafters else None,
        "drafter": model_described(compiled.pair.drafter) if MODEL in compiled.drafters else None,
        "filters": [sampling.temperature > 0, sampling.top_p < 1, sampling.min_p > 0, sampling.top_k > 0],
        "verification": compiled.verification,
    }
    if mx.default_device().type == mx.cpu:
        names = [name for name in sorted(os.environ) if name.startswith(("OPENBLAS_", "OMP_")) or name == "LD_PRELOAD"]
        described["blas"] = [[name, os.environ[name]] for name in names]
        described["cores"] = os.cpu_count()
    return described


def model_described(model: nn.Module) -> str:
    """The kind of a model and the shapes of its weights."""
    shapes = [(name, weight.shape, str(weight.dtype)) for name, weight in tree_flatten(model.parameters())]
    digest = hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
    return f"{type(model).__module__}.{type(model).__name__} {digest}"


def measured_costs(compiled: CompiledBlocks) -> BlockCosts:
    """Time everything in turns; of each the least over the rounds counts, since nothing else disturbed that one."""
    with compiled.weights.safe():
        rounds, trace = timed_rounds(compiled)
        catch_up = {MODEL: catching_up_seconds(compiled)} if MODEL in compiled.drafters else {}
    taken = {what: min(seconds) for what, seconds in rounds.items()}
    beside = max(0.0, taken[PLAIN] - taken[1])  # what a block is more than its pass
    timed = [taken[rows] + beside for rows in TIMED_ROWS]
    verify = tuple(np.interp(range(1, MOST_ROWS + 1), TIMED_ROWS, timed).tolist())

    once, draft = {}, {}
    for name in compiled.drafters:
        few, more = (max(0.0, taken[Choice(name, length)] - verify[length]) for length in (FEW, MORE))
        each = min(max(0.0, (more - few) / (MORE - FEW)), more / MORE)
        draft[name] = step_seconds(taken) if name == MODEL else each
        once[name] = max(0.0, more - MORE * draft[name])
    stepwise = stepwise_costs(rounds, draft[MODEL], beside) if MODEL in draft else (0.0, 0.0)
    return BlockCosts(verify, once, draft, catch_up, trace, *stepwise, longer(compiled, taken))


def step_seconds(taken: dict[Any, float]) -> float:
    """Seconds of a pass of the drafter, from drafts alone: as a difference of blocks it would be lost in the noise."""
    few, more = taken[DRAFT, FEW, 1], taken[DRAFT, MORE, MORE]
    return (more - few) / (MORE - FEW) if more > few else more / MORE


def stepwise_costs(rounds: dict[Any, list[float]], step: float, beside: float) -> tuple[float, float]:
    """Seconds that drafting step by step takes at all, and each time that the host looks.

    What a block is more than its parts is a small difference of large numbers: those of a round belong together.
    """
    looking, at_once = (min(rounds[DRAFT, MORE, opening]) for opening in (1, MORE))
    read = max(0.0, looking - at_once) / (MORE - 1)
    together = zip(rounds[STEPWISE], rounds[MORE + 1], rounds[DRAFT, MORE, 1], strict=True)
    rest = statistics.median(block - verification - draft for block, verification, draft in together)
    return max(0.0, rest - beside + looking - MORE * (step + read)), read


def longer(compiled: CompiledBlocks, taken: dict[Any, float]) -> tuple[float, float, float]:
    """Seconds that a position more adds to a pass over one row, to each row more, to a step of the drafter."""
    positions = LONG - CAPACITY_STEP
    one, most = ((taken[LONG, rows] - taken[rows]) / positions for rows in (1, MOST_ROWS))
    row = max(0.0, (most - one) / (MOST_ROWS - 1))
    step = (taken[LONG, DRAFT] - taken[DRAFT, MORE, MORE]) / MORE / positions if MODEL in compiled.drafters else 0.0
    return max(0.0, one), row, max(0.0, step)


def timed_rounds(compiled: CompiledBlocks) -> tuple[dict[Any, list[float]], float]:
    """Seconds, in each round, of passes over so many rows and of the blocks of some choices; of tracing a block."""
    choices = [PLAIN, *(Choice(name, length) for name in compiled.drafters for length in (FEW, MORE))]
    trace = max(trace_seconds(compiled, choice) for choice in choices)
    runs: dict[Any, Callable[[], float]] = {rows: target_passes(compiled, rows) for rows in TIMED_ROWS}
    runs |= {choice: blocks(compiled, choice) for choice in choices}
    if MODEL in compiled.drafters:
        runs |= {STEPWISE: stepwise_blocks(compiled)} | {(DRAFT, *which): drafts(compiled, *which) for which in DRAFTS}
        runs[LONG, DRAFT] = drafts(compiled, MORE, MORE, LONG)
    runs |= {(LONG, rows): target_passes(compiled, rows, capacity=LONG) for rows in (1, MOST_ROWS)}
    for run in runs.values():
        run()  # traces, and compiles kernels
    rounds: dict[Any, list[float]] = {what: [] for what in runs}
    end = time.perf_counter() + SECONDS
    for number in range(ROUNDS):
        if number >= FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for what, run in runs.items():
            rounds[what].append(run())
    return rounds, trace


def target_passes(
    compiled: CompiledBlocks, rows: int, sampled: bool = True, capacity: int = CAPACITY_STEP
) -> Callable[[], float]:
    """Seconds of a pass of the target over ``rows`` tokens, of several; ``sampled``: each feeds the next."""
    target, sampling = compiled.target, compiled.sampling

    def one(state: Any) -> tuple[mx.array, Any]:
        tokens, buffers = state
        logits, buffers = target(tokens, buffers, mx.array(TEXT))
        if not sampled:
            return logits, (tokens, buffers)
        tokens = mx.argmax(sampling.probs(logits), axis=-1).astype(mx.int32)
        return tokens, (tokens, buffers)

    step = mx.compile(one, inputs=[compiled.pair.target.state])
    return lambda: seconds_of(step, (mx.zeros(rows, mx.int32), target.empty(capacity)))


def blocks(compiled: CompiledBlocks, choice: Choice) -> Callable[[], float]:
    """Seconds of a whole block, of several."""
    return lambda: seconds_of(compiled[choice], state_before(compiled, choice.proposer))


class LongDraft(Draft):
    """A draft of ``length`` tokens, however sure the drafter is of them."""

    def __init__(self, length: int, opening: int = 1):
        super().__init__(BlockCosts((1.0,) * MOST_ROWS, draft={MODEL: 0.0}), Confidence(), 0.0, length, opening)


def stepwise_blocks(compiled: CompiledBlocks) -> Callable[[], float]:
    """Seconds of a whole block whose draft of MORE tokens is made step by step, of several."""

    def one(state: State) -> tuple[mx.array, State]:
        return compiled.stepwise(state, LongDraft(MORE), opening=FEW, missing=math.inf)

    return lambda: seconds_of(one, state_before(compiled, MODEL))


def drafts(compiled: CompiledBlocks, length: int, opening: int, capacity: int = CAPACITY_STEP) -> Callable[[], float]:
    """Seconds of such a draft of so many tokens that opens with so many."""

    def run() -> float:
        state = state_before(compiled, MODEL, capacity)
        mx.eval(state)
        start = time.perf_counter()
        compiled.stepwise.draft(state, LongDraft(length, opening))
        return time.perf_counter() - start

    return run


def trace_seconds(compiled: CompiledBlocks, choice: Choice) -> float:
    """How long it takes to trace a block anew; nothing is evaluated."""
    state = state_before(compiled, choice.proposer)
    start = time.perf_counter()
    compiled[choice](state)
    return time.perf_counter() - start


def seconds_of(step: Callable[[Any], tuple[mx.array, Any]], state: Any) -> float:
    """Seconds of a step that takes its state and gives the next, of QUEUED of them."""
    mx.eval(state)
    start = time.perf_counter()
    for _ in range(QUEUED):
        result, state = step(state)
        mx.async_eval(result, state)
    mx.eval(result)
    return (time.perf_counter() - start) / QUEUED


def state_before(compiled: CompiledBlocks, name: str, capacity: int = CAPACITY_STEP) -> State:
    """A block's state, behind a text of zeros that no cache has really seen."""
    proposer = compiled.proposers[name]
    if name == MODEL:
        drafter = proposer.run.empty(capacity)
    else:
        drafter = proposer.start(None, [0] * TEXT, 0, lambda tokens: None)
    return {
        "recent": mx.zeros(2, mx.int32),
        "committed": mx.array(TEXT, mx.int32),
        "target": compiled.target.empty(CAPACITY_STEP),
        "drafter": drafter,
        "key": mx.random.key(0),
    }


def catching_up_seconds(compiled: CompiledBlocks) -> float:
    """What a token costs that the model drafter reads as one of many."""
    run = compiled.proposers[MODEL].run
    tokens = mx.zeros(TEXT, mx.int32)

    def read() -> float:
        start = time.perf_counter()
        mx.eval(run.prefill(tokens, None, 0, lambda tokens: None))
        return (time.perf_counter() - start) / TEXT

    return min(read() for _ in range(4))
