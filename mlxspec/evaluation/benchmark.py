"""Measure a pair on this machine, in interleaved rounds, against mlx-lm plain and speculative; write JSON.

In a round every prompt of a task is answered by every engine in turn, so that what disturbs the machine disturbs them
alike. The first round is a warm-up and not counted. Ratios are of whole answers, prefill included, and taken within a
round; figures are medians over the rounds.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlxspec.decoding.decoder import SpeculativeDecoder
from mlxspec.decoding.draft_length import MODEL
from mlxspec.decoding.request import check_options
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.errors import InvalidRequestError
from mlxspec.evaluation.engines import (
    OURS,
    PEER,
    PEER_DRAFT_LENGTH,
    PLAIN,
    Answer,
    Decode,
    mlx_lm_engine,
    mlxspec_engine,
)
from mlxspec.evaluation.machine import machine
from mlxspec.evaluation.metrics import memory_bound_speedup, parameter_count, step_bytes
from mlxspec.evaluation.tasks import Task
from mlxspec.files import write_json
from mlxspec.models.pair import ModelPair

Record = dict[str, Any]  # what is written as JSON
FORMAT = 1


@dataclass(frozen=True)
class BenchmarkSettings:
    """How a benchmark is run. Raises InvalidRequestError for a value outside its range."""

    temperatures: tuple[float, ...] = ()  # none: what each task says, or 0 and 1
    rounds: int = 5
    max_tokens: int = 128
    draft_length: int | str = "auto"
    peer_draft_length: int = PEER_DRAFT_LENGTH
    verification: str = "block"

    def __post_init__(self):
        for name in ("rounds", "max_tokens", "peer_draft_length"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use 1 or more")
        check_options(self.draft_length, self.verification)
        for temperature in self.temperatures:
            Sampling(temperature)
        if len(set(self.temperatures)) < len(self.temperatures):
            raise InvalidRequestError(f"temperatures are {self.temperatures}; give each once")


def new_record(pair: ModelPair, settings: BenchmarkSettings, names: dict[str, Any]) -> Record:
    """A record without results. ``names`` says what the models are called; ``speedup.py`` may add to it."""
    return {
        "format": FORMAT,
        "machine": machine(),
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
    """Fill a record, and write it to ``out`` after every round, so that an interruption keeps what is finished."""
    wanted = [(task, sampling) for task in tasks for sampling in samplings(task, settings)]
    total = len(wanted) * (settings.rounds + 1)
    for number, (task, sampling) in enumerate(wanted):
        result = {"task": task.name, "prompts": len(task.prompts), "sampling": sampling.to_dict(), "rounds": []}
        record["results"].append(result)
        run = Run(pair, sampling, settings)
        for turn in range(settings.rounds + 1):
            progress(f"{task.name}, temperature {sampling.temperature:g}", number * (settings.rounds + 1) + turn, total)
            measured = run.round(task.prompts, turn)
            if turn:
                result["rounds"].append(measured)
                keep(record, out)
    record["complete"] = True
    keep(record, out)
    progress("", total, total)


def keep(record: Record, out: Path | None) -> None:
    if out:
        write_json(out, record)


def samplings(task: Task, settings: BenchmarkSettings) -> list[Sampling]:
    if settings.temperatures:
        return [Sampling(temperature) for temperature in settings.temperatures]
    return [Sampling(**task.sampling)] if task.sampling else [Sampling(0.0), Sampling(1.0)]


def sizes(pair: ModelPair) -> Record:
    """Parameters, and bytes read by a step, of both models."""
    models = {"target": pair.target, "drafter": pair.drafter if isinstance(pair.drafter, nn.Module) else None}
    return {
        f"{name}_{what}": measure(model) if model is not None else 0
        for name, model in models.items()
        for what, measure in (("parameters", parameter_count), ("step_bytes", step_bytes))
    }


@dataclass
class Run:
    """The engines for one task and sampling."""

    pair: ModelPair
    sampling: Sampling
    settings: BenchmarkSettings
    engines: dict[str, Decode] = field(init=False)

    def __post_init__(self):
        settings, pair = self.settings, self.pair
        self.decoder = SpeculativeDecoder(pair, self.sampling, settings.draft_length, settings.verification)
        self.engines = {PLAIN: mlx_lm_engine(pair, self.sampling, settings.max_tokens)}
        if isinstance(pair.drafter, nn.Module):
            self.engines[PEER] = mlx_lm_engine(
                pair, self.sampling, settings.max_tokens, pair.drafter, settings.peer_draft_length
            )
        self.engines[OURS] = mlxspec_engine(self.decoder, settings.max_tokens)

    def round(self, prompts: list[list[int]], seed: int) -> Record:
        """Every prompt by every engine in turn; sums over the prompts."""
        answers = {name: Answer(joules=0.0) for name in self.engines}
        blocks, same = DecodingStats(), 0
        for prompt in prompts:
            ids = {}
            for name, decode in self.engines.items():
                answer = decode(prompt, seed)
                answers[name] += answer
                ids[name] = answer.ids
            same += len(set(ids.values())) == 1
            blocks += self.decoder.stats
        return {
            "engines": {name: answer.to_dict() for name, answer in answers.items()},
            "blocks": blocks.to_dict(),
            "same_text": same if self.sampling.temperature == 0 else None,
        }


def summaries(record: Record) -> list[Record]:
    """A row for each task and temperature that has a finished round: medians over its rounds, with their spread."""
    return [summary(record, result) for result in record["results"] if result["rounds"]]


def summary(record: Record, result: Record) -> Record:
    rounds, pair = result["rounds"], record["pair"]
    blocks = sum_of_blocks(rounds)
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
        "decode_tokens_per_second": medians(rounds, lambda e: later(e) / max(e["seconds"] - e["first_seconds"], 1e-9)),
        "prefill_tokens_per_second": medians(rounds, lambda e: e["prompt_tokens"] / e["first_seconds"]),
        "peak_memory_bytes": medians(rounds, lambda e: e["peak_memory_bytes"]),
        "joules_per_token": medians(rounds, lambda e: e["joules"] / e["tokens"] if e["joules"] else None),
        "ratio": {name: spread(rates[OURS], rates[name]) for name in (PLAIN, PEER) if name in rates},
    }
    length = blocks.drafted_by.get(MODEL, 0) / blocks.blocks  # by the model; prompt lookup reads no weights
    for what in ("parameters", "step_bytes"):
        cost = pair[f"drafter_{what}"] / pair[f"target_{what}"]
        row[f"mbsu_{what}"] = memory_bound_speedup(blocks.block_efficiency, cost, length)
    return row


def sum_of_blocks(rounds: list[Record]) -> DecodingStats:
    total = DecodingStats()
    for turn in rounds:
        total += DecodingStats.from_dict(turn["blocks"])
    return total


def rate(engine: Record) -> float:
    return engine["tokens"] / engine["seconds"]


def later(engine: Record) -> int:
    return engine["tokens"] - engine["first_tokens"]


def medians(rounds: list[Record], of: Callable[[Record], float | None]) -> dict[str, float | None]:
    found = {}
    for name in rounds[0]["engines"]:
        values = [of(turn["engines"][name]) for turn in rounds]
        found[name] = None if None in values else statistics.median(values)
    return found


def spread(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Of the ratios within each round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def worst(rows: list[Record], name: str = "block_efficiency") -> Record:
    """The row of the task that fares worst."""
    return min(rows, key=lambda row: row[name])


def compared(before: Record, after: Record) -> list[Record]:
    """A row for each task and temperature that both records have: the later figures over the earlier ones."""
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
