"""Interleaved rounds, with which engines are compared.

Every engine runs once in each round, so a disturbance of the machine affects all engines alike. The first rounds
compile and warm up, and their results are discarded. Ratios are taken within a round. Their median, minimum and maximum
over the rounds are reported. On a GPU, each run comes after a pause, so that the heat of one does not slow down the
next.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import mlx.core as mx

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # runs done, number of all runs
PAUSE = 0.1  # seconds of the default pause on a GPU


def default_pause() -> float:
    """Return the default pause before each run, in seconds: none on the CPU back end."""
    return 0.0 if mx.default_device().type == mx.cpu else PAUSE


def interleaved(
    engines: Mapping[Name, Callable[[int], Result]],
    rounds: int,
    warm_up: int = 1,
    progress: Progress = lambda done, total: None,
    pause: float = 0.0,
) -> Iterator[dict[Name, Result]]:
    """Yield the results of all engines, once for each counted round.

    Args:
        engines: The engines by name. An engine is a function of the round's number, which serves as its seed.
        rounds: Number of rounds that count.
        warm_up: Number of earlier rounds, whose results are discarded.
        progress: Called before each run and after the last one, with the runs done and the number of all runs.
        pause: Seconds without work before each run.
    """
    total = (warm_up + rounds) * len(engines)
    for number in range(warm_up + rounds):
        results = {}
        for place, (name, engine) in enumerate(engines.items()):
            progress(number * len(engines) + place, total)
            time.sleep(pause)
            results[name] = engine(number)
        if number >= warm_up:
            yield results
    progress(total, total)


def by_engine(rounds: Iterable[Mapping[Name, Result]]) -> dict[Name, list[Result]]:
    """Return the results of each engine, one for each round."""
    found: dict[Name, list[Result]] = {}
    for results in rounds:
        for name, result in results.items():
            found.setdefault(name, []).append(result)
    return found


def seconds(engine: Callable[[int], Any]) -> Callable[[int], float]:
    """Return an engine that measures the seconds that another engine takes."""

    def run(number: int) -> float:
        start = time.perf_counter()
        engine(number)
        return time.perf_counter() - start

    return run


def tokens_per_second(engine: Callable[[int], Sized]) -> Callable[[int], float]:
    """Return an engine that measures the tokens per second of another engine."""

    def run(number: int) -> float:
        start = time.perf_counter()
        return len(engine(number)) / (time.perf_counter() - start)

    return run


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of a figure over the rounds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"

    def to_dict(self) -> dict[str, float]:
        """Return the three values as JSON."""
        return asdict(self)


def spread(figures: Sequence[float]) -> Spread:
    """Return the median, minimum and maximum of a figure that has one value for each round."""
    return Spread(statistics.median(figures), min(figures), max(figures))


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return the spread of the ratio ``over`` / ``under``, taken within each round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])
