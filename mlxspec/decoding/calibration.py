"""Measures what a block costs on this device, and stores the figures on disk.

Whole blocks are timed, since the parts of a block behave differently when they are separated. Prompt lookup drafts in
these blocks. It costs next to nothing and needs no model, so the time is that of verification. The draft model's drafts
are timed separately.

The time for measuring is limited, so the figures that decide most come first. Until a figure is measured,
``BlockCosts`` interpolates. The table is refined in use: the next processes measure what is missing, and repeat what
was not measured often enough. The minimum counts, as the least disturbed.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxspec.blas import blas_name
from mlxspec.decoding.block import State
from mlxspec.decoding.cache import CAPACITY_STEP, Buffers, capacity_for
from mlxspec.decoding.compiled import CompiledBlocks, CompiledGraph
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import (
    LOOKUP,
    MODEL,
    NONE,
    PLAIN,
    Choice,
    EagleProposer,
    LookupProposer,
    ModelProposer,
    Proposer,
)
from mlxspec.errors import WriteError
from mlxspec.files import fingerprint, read_json, write_json
from mlxspec.models.drafter import PromptLookup
from mlxspec.models.quantizing import cache_folder, has_home
from mlxspec.models.sharding import Group, broadcast

FORMAT = 6  # version of the file format; figures in another version are measured again
FIRST_CAP = (2.0, 6)  # time limit of the first process: the longer of so many seconds and so many target passes
LATER_CAP = (0.5, 3)  # time limit of a process that only repeats what was measured
ROUNDS, ENOUGH = 6, 3  # rounds of a process, if the time allows; rounds after which a figure is final
QUEUED, SHORT = 3, 0.03  # blocks queued at once, as in decoding, if a block takes less than SHORT seconds
LONG = 16 * CAPACITY_STEP  # capacity for measuring what a longer text costs, at most that of the context
CACHE_SHARE = 1 / 16  # of the device's memory, at most, for the caches that this capacity takes
ROOM = CAPACITY_STEP // 2  # free positions after the text on which blocks are timed
READ = 128  # tokens that the draft model reads at once
FEW, MORE = 1, 4  # draft lengths that give the cost of a drafted token
# The figures that decide most come first. COARSE gets one round, and more within half of the time; FINE the rest.
COARSE = ("rows 1", "draft 4", "rows 2", "rows 5", "rows 9", "rows 17", "draft 1", "read")
FINE = ("rows 3", "rows 4", "rows 7", "long rows 1", "long rows 5", "long draft 4", "long read", "rows 13")

Figures = dict[str, float]  # name -> seconds
Rounds = dict[str, int]  # name -> how often the figure was measured
Progress = Callable[[int, int], None]  # number of figures done, number of missing figures


def is_final(compiled: CompiledBlocks) -> bool:
    """Return whether nothing is left to measure."""
    return not unfinished(compiled, stored(compiled)[1])


def calibrate(
    compiled: CompiledBlocks, progress: Progress = lambda done, total: None, again: bool = False
) -> BlockCosts:
    """Measure the costs that are not on disk yet, or not often enough, and store them.

    Args:
        compiled: The blocks of a pair.
        progress: Called before the first figure and after each, with the number done and the number of figures to
            measure. Not called if there is nothing to measure.
        again: Ignore the figures on disk and measure all of them.
    """
    figures, rounds = ({}, {}) if again else stored(compiled)
    if unfinished(compiled, rounds):
        try:
            measure(compiled, figures, rounds, progress)
        finally:
            keep(compiled, figures, rounds, again)
    return costs_of(broadcast(figures, compiled.pair.group), *long_capacities(compiled))


def costs_of(figures: Figures, target_capacity: int = LONG, drafter_capacity: int = LONG) -> BlockCosts:
    """Return the table of costs. Rows and drafts that were not measured are estimated from the others.

    Args:
        figures: The figures.
        target_capacity: Capacity at which the target's "long" figures were measured, in positions.
        drafter_capacity: The same for the draft model.
    """
    rows = {number_in(name): seconds for name, seconds in figures.items() if name.startswith("rows ")}
    more = figures.get("draft 4", MORE * rows[1])  # if unknown, as costly as the target
    few = min(figures.get("draft 1", more / MORE), more)
    step = (more - few) / (MORE - FEW) if more > few else more / MORE
    longer, drafter_longer = (max(1, capacity - CAPACITY_STEP) for capacity in (target_capacity, drafter_capacity))
    one, five = (max(0.0, figures.get(f"long rows {m}", 0.0) - rows.get(m, math.inf)) / longer for m in (1, 5))
    read = figures.get("read", 0.0)
    return BlockCosts(
        rows=rows,
        draft_once=max(0.0, more - MORE * step),
        draft_step=step,
        draft_read=read / READ,
        trace=figures.get("trace", 0.0),
        position=one,
        position_row=max(0.0, five - one) / 4,
        position_draft=max(0.0, figures.get("long draft 4", 0.0) - more) / MORE / drafter_longer,
        position_read=max(0.0, figures.get("long read", 0.0) - read) / READ / drafter_longer,
    )


def number_in(name: str) -> int:
    """Return the number of rows or of drafted tokens in the name of a figure, 0 if it has none."""
    last = name.split()[-1]
    return int(last) if last.isdigit() else 0


def names(compiled: CompiledBlocks) -> list[str]:
    """Return the names of the figures that a pair needs and can show. The ones that decide most come first."""
    model = MODEL in compiled.drafters
    needed = [name for name in (*COARSE, *FINE) if model or not of_drafter(name)]
    needed = [name for name in needed if not (is_long(name) and capacity_of(compiled, name) == CAPACITY_STEP)]
    shortest = {"rows 1": -math.inf, "read": READ}  # a text needs the two recent tokens; "rows 1" is always needed
    return [name for name in needed if text_length(compiled, name) >= shortest.get(name, 2)]


def of_drafter(name: str) -> bool:
    """Return whether a figure is one of the draft model, not of the target."""
    return "draft" in name or "read" in name


def is_long(name: str) -> bool:
    """Return whether a figure is measured after a longer text."""
    return name.startswith("long ")


def text_length(compiled: CompiledBlocks, name: str) -> int:
    """Return the length of the text, in tokens, after which a figure is measured.

    It leaves room for the steps that are timed together, in the capacity and in the context of the model that runs.
    """
    context, length = context_of(compiled, name), capacity_of(compiled, name) - ROOM
    return length if context is None else min(length, context - QUEUED * max(1, number_in(name)))


def capacity_of(compiled: CompiledBlocks, name: str) -> int:
    """Return the capacity of the caches, in positions, at which a figure is measured."""
    if not is_long(name):
        return CAPACITY_STEP
    stored = sum(math.prod(shape) * dtype.size for layer in compiled.target.shapes for shape, dtype in layer)
    fitting = int(CACHE_SHARE * compiled.memory * CAPACITY_STEP / stored)
    context = context_of(compiled, name)
    return capacity_for(min(LONG, fitting, fitting if context is None else context))


def long_capacities(compiled: CompiledBlocks) -> tuple[int, int]:
    """Return the capacities at which the "long" figures of the target and of the draft model are measured."""
    return capacity_of(compiled, "long rows"), capacity_of(compiled, "long draft")


def context_of(compiled: CompiledBlocks, name: str) -> int | None:
    """Return the context of the model that a figure runs."""
    return compiled.pair.drafter_context_length if of_drafter(name) else compiled.pair.context_length


def unfinished(compiled: CompiledBlocks, rounds: Rounds) -> list[str]:
    """Return the names of the figures that were not measured often enough."""
    return [name for name in names(compiled) if rounds.get(name, 0) < ENOUGH]


# ----------------------------------------------------------------------- on disk


def stored(compiled: CompiledBlocks) -> tuple[Figures, Rounds]:
    """Return the figures on disk and how often each was measured. Of several processes, the first one's count."""
    figures, rounds = broadcast(stored_here(compiled), compiled.pair.group)
    return figures, rounds


def stored_here(compiled: CompiledBlocks) -> tuple[Figures, Rounds]:
    """Return the figures on disk and how often each was measured. Both are empty without a usable file."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        content = read_json(costs_file(compiled))
        figures, rounds = content["seconds"], content["rounds"]
        usable = {"rows 1", "trace"} <= figures.keys() <= {*COARSE, *FINE, "trace"}
        usable = usable and rounds.keys() <= {*COARSE, *FINE} and all(type(n) is int for n in rounds.values())
        if usable and all(math.isfinite(seconds) and seconds > 0 for seconds in figures.values()):
            return figures, rounds
    return {}, {}


def keep(compiled: CompiledBlocks, figures: Figures, rounds: Rounds, again: bool) -> None:
    """Write the figures to disk, together with those of other processes, unless ``again``.

    If that fails, the next process measures them again.
    """
    if not {"rows 1", "trace"} <= figures.keys():
        return  # interrupted before there was anything to keep
    others, other_rounds = ({}, {}) if again else stored_here(compiled)
    figures |= {name: min(seconds, figures.get(name, seconds)) for name, seconds in others.items()}
    rounds |= {name: max(count, rounds.get(name, 0)) for name, count in other_rounds.items()}
    file = costs_file(compiled)
    if not has_home(file):
        return
    with suppress(OSError, WriteError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"of": described(compiled), "seconds": figures, "rounds": rounds})


def costs_file(compiled: CompiledBlocks) -> Path:
    """Return the file with the figures of a pair on this machine."""
    return cache_folder() / "costs" / f"{fingerprint(json.dumps(described(compiled), sort_keys=True))}.json"


def described(compiled: CompiledBlocks) -> dict[str, Any]:
    """Return everything that the costs depend on. It is the key of the figures on disk."""
    sampling, info = compiled.sampling, mx.device_info()
    described: dict[str, Any] = {
        "format": FORMAT,
        "mlx": version("mlx"),
        "device": [str(mx.default_device()), info.get("device_name"), info.get("architecture"), platform.machine()],
        "target": shapes_of(compiled.pair.target),
        "drafter": shapes_of(drafter_of(compiled).model) if MODEL in compiled.drafters else None,
        "filters": [sampling.temperature > 0, sampling.top_p < 1, sampling.min_p > 0, sampling.top_k > 0],
        "verification": compiled.verification,
        "kept probabilities": compiled.target.top_k,
        "long": long_capacities(compiled),
    }
    if compiled.pair.group is not None:
        described["processes"] = compiled.pair.group.size()
    if mx.default_device().type == mx.cpu:
        variables = [name for name in sorted(os.environ) if name.startswith(("OPENBLAS_", "OMP_", "LD_PRELOAD"))]
        described["blas"] = [blas_name(), *([name, os.environ[name]] for name in variables)]
        described["cores"] = os.cpu_count()
    return described


def shapes_of(model: nn.Module) -> str:
    """Return the class of a model and a digest of the shapes of its weights."""
    parameters: Any = tree_flatten(model.parameters())
    shapes = [(name, weight.shape, str(weight.dtype)) for name, weight in parameters]
    return f"{type(model).__module__}.{type(model).__name__} {fingerprint(json.dumps(shapes))}"


# ----------------------------------------------------------------------- measuring


def measure(compiled: CompiledBlocks, figures: Figures, rounds: Rounds, progress: Progress) -> None:
    """Measure what is unfinished, in order and within the time limit, and the time of tracing a block.

    Args:
        compiled: The blocks of a pair.
        figures: The figures that are known. New ones are added.
        rounds: How often each was measured. Counted up.
        progress: Called before the first figure and after each, with the number done and the number of figures.
    """
    wanted = unfinished(compiled, rounds)
    timers = {name: timer_for(compiled, name) for name in wanted}
    with compiled.weights.protected():
        progress(0, len(wanted))
        seconds, passes = LATER_CAP if figures.keys() >= set(wanted) else FIRST_CAP
        if not figures:  # outside the limit: it compiles kernels that decoding needs too
            figures["rows 1"] = timers["rows 1"]()
            figures["trace"] = timers["rows 1"].trace or 0.0
        # ``spent`` counts steps and their tracing. Compiling kernels does not count: decoding needs them too, and on a
        # new machine it would leave no time for the figures.
        spent, cap = 0.0, max(seconds, passes * figures["rows 1"])
        for group, share in ((COARSE, 0.5), (FINE, 1.0)):
            for number in range(ROUNDS):
                limit = (share if number else 1.0) * cap
                for name in (name for name in group if name in timers):
                    timer = timers[name]
                    steps = timer.count + (timer.trace is None)
                    expected = expected_seconds(figures, name) * steps
                    if spent + expected < limit:
                        tracing = timer.trace is None
                        measured = timer()
                        spent += measured * steps + (timer.trace or 0.0) * tracing
                        figures[name] = min(measured, figures.get(name, math.inf))
                        rounds[name] = rounds.get(name, 0) + 1
                    elif not number and expected > cap:
                        rounds[name] = rounds.get(name, 0) + 1  # too costly for ENOUGH processes: it stays interpolated
                    if not number:
                        progress(wanted.index(name) + 1, len(wanted))
        traces = [timer.trace for name, timer in timers.items() if name.startswith("rows") and timer.trace]
        figures["trace"] = max(figures["trace"], statistics.median(traces)) if traces else figures["trace"]


def expected_seconds(figures: Figures, name: str) -> float:
    """Return an estimate of a figure, in seconds, from the figures measured before it."""
    costs, number = costs_of(figures), number_in(name)
    if "draft" in name:
        return costs.draft_once + number * costs.draft_step
    return costs.verify(max(1, number))  # reading takes less than a pass of the target


class Timer:
    """Times a function from a state to a result and the next state. Short steps are queued together, as in decoding.

    Args:
        step: The function to time.
        state: Creates the first state.
        group: Processes that run the step together. The time of the first one counts.
    """

    def __init__(self, step: Callable[[Any], tuple[Any, Any]], state: Callable[[], Any], group: Group | None = None):
        self.step, self.state, self.group = step, state, group
        self.count = 1  # steps that are timed together
        self.trace: float | None = None  # seconds that the first step took to trace, before it was evaluated

    def __call__(self) -> float:
        """Return the seconds of one step. A step before the first one is not counted: it traces and compiles."""
        if self.trace is None:
            start = time.perf_counter()
            result, state = self.step(self.state())
            self.trace = broadcast(time.perf_counter() - start, self.group)
            mx.eval(result, state)
        state = self.state()
        mx.eval(state)
        start = time.perf_counter()
        for _ in range(self.count):
            result, state = self.step(state)
            mx.async_eval(result, state)
        mx.eval(result)
        seconds = broadcast((time.perf_counter() - start) / self.count, self.group)
        self.count = QUEUED if seconds < SHORT else 1
        return seconds


def timer_for(compiled: CompiledBlocks, name: str) -> Timer:
    """Return the timer of a figure."""
    capacity, number, length = capacity_of(compiled, name), number_in(name), max(2, text_length(compiled, name))
    group = compiled.pair.group
    if "read" in name:
        covered = length - READ + 1 if is_long(name) else 0  # + 1: then no buffer is resized
        return Timer(reading(compiled, covered), lambda: read_state(compiled, covered), group)
    if "draft" in name:
        return Timer(drafting(compiled, number), lambda: draft_state(compiled, capacity, length), group)
    choice = Choice(LOOKUP, number - 1) if number > 1 else PLAIN
    lookup = compiled.proposers.get(LOOKUP) or LookupProposer(PromptLookup(), compiled.target.vocab_size)
    proposer = lookup if number > 1 else compiled.proposers[NONE]
    known = choice.proposer in compiled.proposers  # then decoding uses what was traced here
    block = compiled[choice] if known else compiled.block(proposer, choice)
    return Timer(block, lambda: block_state(compiled, proposer, capacity, length), group)


def block_state(compiled: CompiledBlocks, proposer: Proposer, capacity: int, length: int | None = None) -> State:
    """Return the state before a block, for a text of ``length`` zeros. The caches are not filled."""
    length = capacity - ROOM if length is None else length
    target = compiled.target.empty(capacity)
    drafter = proposer.start([], [0] * length, 0, lambda tokens: None, target)
    recent, committed = mx.zeros(2, mx.int32), mx.array(length, mx.int32)
    return State(recent, committed, target, drafter, mx.random.key(0))


def drafting(compiled: CompiledBlocks, length: int) -> Callable[[Any], tuple[Any, Any]]:
    """Return a step that drafts ``length`` tokens with the draft model, and records them as emitted."""
    proposer, greedy = drafter_of(compiled), compiled.sampling.temperature == 0

    def draft(recent: mx.array, committed: mx.array, state: Any, key: mx.array, target: Buffers) -> tuple[Any, Any]:
        key, subkey = mx.random.split(key)
        uniforms = mx.random.uniform(shape=(length,), key=subkey)
        tokens, q, state = proposer.propose(state, recent, committed, uniforms)
        state = proposer.record(state, committed, mx.concatenate([tokens, recent[-1:]]), mx.array(length - 1), target)
        following = mx.concatenate([recent, tokens])[-2:]
        return tokens if greedy else (tokens, q), (following, committed + length, state, key, target)

    graph = CompiledGraph(draft, compiled.weights.models, compiled.weights)
    return lambda state: graph(*state)


def drafter_of(compiled: CompiledBlocks) -> ModelProposer | EagleProposer:
    """Return the proposer of the pair's draft model. The pair must have one."""
    return cast(ModelProposer | EagleProposer, compiled.proposers[MODEL])


def draft_state(compiled: CompiledBlocks, capacity: int, length: int | None = None) -> tuple[Any, ...]:
    """Return the state before a draft of the draft model, for a text of ``length`` zeros."""
    length = capacity - ROOM if length is None else length
    proposer: Proposer = drafter_of(compiled)
    target = compiled.target.empty(capacity)
    state = proposer.with_room(proposer.start([], [0, 0], 0, lambda tokens: None, target), capacity)
    return mx.zeros(2, mx.int32), mx.array(length, mx.int32), state, mx.random.key(0), target


def read_state(compiled: CompiledBlocks, covered: int) -> list[Any]:
    """Return a list with the draft model's state for a text of ``covered`` zeros, or an empty list for no text."""
    return [draft_state(compiled, capacity_for(covered), covered)[2]] if covered else []


def reading(compiled: CompiledBlocks, covered: int) -> Callable[[Any], tuple[Any, Any]]:
    """Return a step in which the draft model reads ``READ`` tokens after ``covered`` others."""
    proposer, length = drafter_of(compiled), covered + READ + 2
    target = compiled.target.empty(length)

    def read(kept: list[Any]) -> tuple[Any, Any]:
        state = proposer.start(kept, [0] * length, covered, lambda count: None, target)
        return (), [state] if covered else []

    return read
