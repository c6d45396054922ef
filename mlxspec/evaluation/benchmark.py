"""Benchmarks of a pair on this machine against mlx-lm, plain and speculative. The result is JSON.

Engines are compared in interleaved rounds. In a round, every engine in turn answers the first prompt of a task, then
the second, and so on. Speeds and ratios are those of whole answers, prefill included.
"""

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxspec import __version__
from mlxspec.blas import blas_name
from mlxspec.decoding.decoder import SpeculativeDecoder
from mlxspec.decoding.drafting import MODEL
from mlxspec.decoding.requests import DEFAULT_DRAFT_LENGTH, check_options
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.decoding.verification import DEFAULT_RULE
from mlxspec.errors import InvalidRequestError
from mlxspec.evaluation.engines import (
    OURS,
    PEER,
    PEER_DRAFT_LENGTH,
    PLAIN,
    Answer,
    Engine,
    mlx_lm_engine,
    mlxspec_engine,
)
from mlxspec.evaluation.metrics import memory_bound_speedup, parameter_count, step_bytes
from mlxspec.evaluation.rounds import default_pause, interleaved, ratio
from mlxspec.evaluation.tasks import Task
from mlxspec.files import write_json
from mlxspec.models.eagle import Eagle
from mlxspec.models.pair import ModelPair

Record = dict[str, Any]  # what is written as JSON
FORMAT = 2
THROTTLED = 0.1  # loss of speed, from the first round to the last, of every engine
LONGEST_PAUSE = 3600  # seconds


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of a benchmark. Raises InvalidRequestError for a value outside its range.

    Attributes:
        temperatures: Temperatures to measure at. Empty for the sampling of each task, or 0 and 1 if it has none.
        rounds: Number of interleaved rounds that count.
        max_tokens: Maximum length of an answer, in tokens.
        draft_length: Draft length γ of mlxspec, or "auto".
        peer_draft_length: Draft length γ of mlx-lm's speculative decoding.
        verification: The verification rule.
        pause: Seconds without work before each answer, for the machine to cool down.
    """

    temperatures: tuple[float, ...] = ()
    rounds: int = 5
    max_tokens: int = 128
    draft_length: int | str = DEFAULT_DRAFT_LENGTH
    peer_draft_length: int = PEER_DRAFT_LENGTH
    verification: str = DEFAULT_RULE
    pause: float = field(default_factory=default_pause)

    def __post_init__(self) -> None:
        for name in ("rounds", "max_tokens", "peer_draft_length"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use 1 or more")
        if not 0 <= self.pause <= LONGEST_PAUSE:
            raise InvalidRequestError(f"pause is {self.pause:g} seconds; use 0 to {LONGEST_PAUSE}")
        check_options(self.draft_length, self.verification)
        for temperature in self.temperatures:
            Sampling(temperature)
        if len(set(self.temperatures)) < len(self.temperatures):
            raise InvalidRequestError(f"temperatures are {self.temperatures}; give each once")


# ----------------------------------------------------------------------- measuring


def new_record(pair: ModelPair, settings: BenchmarkSettings, names: dict[str, Any]) -> Record:
    """Return a record without results. ``profile.py`` may add to it.

    Args:
        pair: The target and its drafters.
        settings: The settings of the benchmark.
        names: Names of the models, with the keys "target" and "drafter".

    Returns:
        The record.
    """
    return {
        "format": FORMAT,
        "machine": machine(),
        "processes": pair.group.size() if pair.group is not None else 1,
        "pair": {**names, **sizes(pair)},
        "settings": asdict(settings),
        "results": [],
        "complete": False,
    }


def run_benchmark(
    pair: ModelPair,
    tasks: Sequence[Task],
    settings: BenchmarkSettings,
    record: Record,
    out: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> None:
    """Run a benchmark and add the results to a record.

    The record is written after every round, so an interruption loses only the current round.

    Args:
        pair: The target and its drafters.
        tasks: The tasks, with their prompts.
        settings: The settings of the benchmark.
        record: The record, as ``new_record`` returns it.
        out: File to write the record to, if any.
        progress: Called with the current task, the answers done, and the number of all answers.
    """
    wanted = [(task, sampling) for task in tasks for sampling in samplings(task, settings)]
    runs_per_prompt = (settings.rounds + 1) * len(engine_names(pair))
    before, total = 0, runs_per_prompt * sum(len(task.prompts) for task, _ in wanted)
    for task, sampling in wanted:
        result: Record = {"task": task.name, "prompts": len(task.prompts), "sampling": sampling.to_dict(), "rounds": []}
        record["results"].append(result)
        what, engines = f"{task.name}, temperature {sampling.temperature:g}", engines_for(pair, sampling, settings)
        runs = {(i, name): partial(engine, prompt) for i, prompt in enumerate(task.prompts)
                for name, engine in engines.items()}  # fmt: skip

        def advanced(done: int, of_task: int, what: str = what, before: int = before) -> None:
            progress(what, before + done, total)

        for answers in interleaved(runs, settings.rounds, progress=advanced, pause=settings.pause):
            result["rounds"].append(round_of(answers, sampling))
            result["slowdown"] = slowdown(result["rounds"])
            keep(record, out)
        before += len(task.prompts) * runs_per_prompt
    record["complete"] = True
    keep(record, out)


def keep(record: Record, out: Path | None) -> None:
    """Write the record to ``out``, if it is given."""
    if out:
        write_json(out, record)


def samplings(task: Task, settings: BenchmarkSettings) -> list[Sampling]:
    """Return the sampling settings that a task is measured with."""
    if settings.temperatures:
        return [Sampling(temperature) for temperature in settings.temperatures]
    return [Sampling(**task.sampling)] if task.sampling else [Sampling(0.0), Sampling(1.0)]


def engine_names(pair: ModelPair) -> list[str]:
    """Return the names of the engines that can decode with a pair, in the order in which they run."""
    return [PLAIN, *([PEER] if peer_drafter(pair) else []), OURS]


def peer_drafter(pair: ModelPair) -> nn.Module | None:
    """Return the drafter with which mlx-lm can draft, or None. It cannot draft with an EAGLE head."""
    drafter = pair.drafter
    return drafter if isinstance(drafter, nn.Module) and not isinstance(drafter, Eagle) else None


def engines_for(pair: ModelPair, sampling: Sampling, settings: BenchmarkSettings) -> dict[str, Engine]:
    """Return the engines for one sampling.

    Args:
        pair: The target and its drafters.
        sampling: How tokens are sampled.
        settings: The settings of the benchmark.

    Returns:
        The engines by name, in the order in which they run.
    """
    decoder = SpeculativeDecoder(pair, sampling, settings.draft_length, settings.verification)
    decoder.calibrate()  # not inside an answer that is timed
    engines = {PLAIN: mlx_lm_engine(pair, sampling, settings.max_tokens)}
    if peer := peer_drafter(pair):
        engines[PEER] = mlx_lm_engine(pair, sampling, settings.max_tokens, peer, settings.peer_draft_length)
    engines[OURS] = mlxspec_engine(decoder, settings.max_tokens)
    return {name: engines[name] for name in engine_names(pair)}


def round_of(answers: dict[tuple[int, str], Answer], sampling: Sampling) -> Record:
    """Return the record of one round, summed over the prompts."""
    prompts = {prompt for prompt, _ in answers}
    names = list(dict.fromkeys(name for _, name in answers))
    sums = {name: sum((answers[prompt, name] for prompt in prompts), Answer()) for name in names}
    blocks = sum((answers[prompt, OURS].stats or DecodingStats() for prompt in prompts), DecodingStats())
    same = sum(len({answers[prompt, name].ids for name in names}) == 1 for prompt in prompts)
    return {
        "engines": {name: total.to_dict() for name, total in sums.items()},
        "blocks": blocks.to_dict(),
        "same_text": same if sampling.temperature == 0 else None,
    }


def slowdown(rounds: list[Record]) -> float:
    """Return the share of its tokens per second that every engine lost from the first round to the last.

    It is that of the engine that lost least, and 0 if one did not lose any. A machine that heats up slows down all
    engines, while the text of a round affects some.
    """
    lost = [1 - rate(rounds[-1]["engines"][name]) / rate(first) for name, first in rounds[0]["engines"].items()]
    return max(0.0, min(lost))


def throttled(record: Record) -> str:
    """Return one line that says that the machine was throttled while it was measured, or "" if it was not."""
    worst_loss = max((result.get("slowdown", 0.0) for result in record["results"]), default=0.0)
    if worst_loss <= THROTTLED:
        return ""
    return (
        f"The machine slowed down: in the last round every engine was at least {worst_loss:.0%} slower than in the "
        "first; repeat with a longer --pause."
    )


def sizes(pair: ModelPair) -> Record:
    """Return the number of parameters of target and drafter, and the bytes that a step of each reads."""
    models = {"target": pair.target, "drafter": pair.drafter if isinstance(pair.drafter, nn.Module) else None}
    return {
        f"{name}_{what}": measure(model) if model is not None else 0
        for name, model in models.items()
        for what, measure in (("parameters", parameter_count), ("step_bytes", step_bytes))
    }


def machine() -> Record:
    """Return what the measurements depend on: chip, memory, versions and the git revision of a checkout."""
    info = mx.device_info()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "chip": info.get("device_name") or platform.processor(),
        "device": str(mx.default_device().type).removeprefix("DeviceType."),
        "blas": blas_name() if mx.default_device().type == mx.cpu else None,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "mlxspec": __version__,
        "revision": git_revision(),
    }


def git_revision() -> str | None:
    """Return the git revision of the checkout that contains this package, or None.

    A "+" is appended if tracked files were changed.
    """
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):
            return None
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ----------------------------------------------------------------------- summaries


def summaries(record: Record) -> list[Record]:
    """Return one row for each task and temperature that has a finished round. Values are medians over its rounds."""
    return [summary(record, result) for result in record["results"] if result["rounds"]]


def summary(record: Record, result: Record) -> Record:
    """Return the row of ``summaries`` for one result of a record."""
    rounds, pair = result["rounds"], record["pair"]
    blocks = sum((DecodingStats.from_dict(turn["blocks"]) for turn in rounds), DecodingStats())
    rates = {name: [rate(turn["engines"][name]) for turn in rounds] for name in rounds[0]["engines"]}
    row = {
        "task": result["task"],
        "temperature": result["sampling"]["temperature"],
        "rounds": len(rounds),
        "block_efficiency": blocks.block_efficiency,
        "acceptance_rate": blocks.acceptance_rate,
        "acceptance_by_position": blocks.acceptance_by_position,
        "draft_length": blocks.draft_length,
        "blocks_by": blocks.blocks_by,
        "same_text": all(turn["same_text"] == result["prompts"] for turn in rounds)
        if rounds[0]["same_text"] is not None
        else None,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "decode_tokens_per_second": medians(rounds, decode_rate),
        "prefill_tokens_per_second": medians(rounds, lambda e: e["prompt_tokens"] / e["first_seconds"]),
        "peak_memory_bytes": medians(rounds, lambda e: e["peak_memory_bytes"]),
        "watts": medians(rounds, lambda e: None if e["joules"] is None else e["joules"] / e["seconds"]),
        "joules_per_token": medians(rounds, lambda e: e["joules"] / e["tokens"] if e["joules"] else None),
        "ratio": {name: ratio(rates[OURS], rates[name]).to_dict() for name in (PLAIN, PEER) if name in rates},
    }
    length = blocks.drafted_by.get(MODEL, 0) / blocks.blocks  # by the model; prompt lookup reads no weights
    for what in ("parameters", "step_bytes"):
        cost = pair[f"drafter_{what}"] / pair[f"target_{what}"]
        row[f"mbsu_{what}"] = memory_bound_speedup(blocks.block_efficiency, cost, length)
    return row


def rate(engine: Record) -> float:
    """Return the tokens per second of whole answers."""
    return engine["tokens"] / engine["seconds"]


def decode_rate(engine: Record) -> float:
    """Return the tokens per second after the first token or block of each answer."""
    return (engine["tokens"] - engine["first_tokens"]) / max(engine["seconds"] - engine["first_seconds"], 1e-9)


def medians(rounds: list[Record], figure: Callable[[Record], float | None]) -> dict[str, float | None]:
    """Return the median of a figure for each engine, or None if a round lacks the figure."""
    found: dict[str, float | None] = {}
    for name in rounds[0]["engines"]:
        values = [value for turn in rounds if (value := figure(turn["engines"][name])) is not None]
        found[name] = statistics.median(values) if len(values) == len(rounds) else None
    return found


def worst(rows: list[Record], name: str = "block_efficiency") -> Record:
    """Return the row with the lowest value of a figure."""
    return min(rows, key=lambda row: row[name])


def compared(before: Record, after: Record) -> list[Record]:
    """Return the ratios of a later record's figures to an earlier one's.

    There is one row for each task and temperature that both records have.
    """
    first = {(row["task"], row["temperature"]): row for row in summaries(before)}
    rows = []
    for row in summaries(after):
        if old := first.get((row["task"], row["temperature"])):
            rows.append({
                "task": row["task"],
                "temperature": row["temperature"],
                "block_efficiency": row["block_efficiency"] / old["block_efficiency"],
                "tokens_per_second": row["tokens_per_second"][OURS] / old["tokens_per_second"][OURS],
                "over_plain": row["ratio"][PLAIN]["median"] / old["ratio"][PLAIN]["median"],
            })  # fmt: skip
    return rows
