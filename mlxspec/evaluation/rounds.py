"""Interleaved rounds: how everything in this package is compared.

Every engine runs once in each round, so that a disturbance of the machine disturbs all engines alike. The first rounds
compile and warm up and are thrown away. Ratios are taken within a round; the median over the rounds is reported, with
the least and the most.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # runs done, runs in all


def interleaved(
    engines: Mapping[Name, Callable[[int], Result]],
    rounds: int,
    warm_up: int = 1,
    progress: Progress = lambda done, total: None,
) -> Iterator[dict[Name, Result]]:
    """Yield the result of every engine, once per counted round.

    Args:
        engines: name -> a function of the number of the round, which serves as its seed.
        rounds: rounds that count.
        warm_up: rounds before them, thrown away.
        progress: is called before each run and after the last.
    """
    total = (warm_up + rounds) * len(engines)
    for number in range(warm_up + rounds):
        results = {}
        for place, (name, engine) in enumerate(engines.items()):
            progress(number * len(engines) + place, total)
            results[name] = engine(number)
        if number >= warm_up:
            yield results
    progress(total, total)


def by_engine(rounds: Iterable[Mapping[Name, Result]]) -> dict[Name, list[Result]]:
    """Return the results of each engine, one per round."""
    found: dict[Name, list[Result]] = {}
    for results in rounds:
        for name, result in results.items():
            found.setdefault(name, []).append(result)
    return found


def seconds(engine: Callable[[int], Any]) -> Callable[[int], float]:
    """Return an engine whose result is the time that ``engine`` takes."""

    def run(number: int) -> float:
        start = time.perf_counter()
        engine(number)
        return time.perf_counter() - start

    return run


def tokens_per_second(engine: Callable[[int], Sized]) -> Callable[[int], float]:
    """Return an engine whose result is the speed at which ``engine`` returns tokens."""

    def run(number: int) -> float:
        start = time.perf_counter()
        return len(engine(number)) / (time.perf_counter() - start)

    return run


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f}-{self.most:.2f})"

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def spread(figures: Sequence[float]) -> Spread:
    """Return the median, the least and the most of one figure per round."""
    return Spread(statistics.median(figures), min(figures), max(figures))


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """Return the spread of the ratios within each round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])
