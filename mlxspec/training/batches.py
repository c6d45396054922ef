"""Batches of rows from token shards.

A batch is a function of the seed and the step. To resume, a run needs to know only its step.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from mlxspec.errors import TrainingError
from mlxspec.training.shards import Rows, TokenShards

MOST_TASKS = 64  # with more, the names are probably not those of tasks, and metrics.jsonl does not list them


class Batches:
    """Batches that take a fixed share of their rows from each of several sources.

    Within a source the order of the rows is random. Every row is used once before any row is used again.

    Args:
        shards: The sources.
        shares: Each source's share of the rows. The shares need not sum to 1.
        length: Positions in a row.
        batch: Rows in a batch.
        seed: Seed of the order.
        single: Whether each row holds at most one document.

    Attributes:
        tasks: Names of the tasks of all sources.

    Raises:
        TrainingError: A source has no rows.
    """

    def __init__(
        self,
        shards: Sequence[TokenShards],
        shares: Sequence[float],
        length: int,
        batch: int,
        seed: int,
        single: bool = False,
    ):
        self.shards, self.length, self.batch, self.seed, self.single = list(shards), length, batch, seed, single
        self._shares = np.array(shares, float) / np.sum(shares)
        left = np.cumsum(shares[::-1], dtype=float)[::-1]  # the share of each source and those after it
        self._shares_of_left = np.divide(shares, left, out=np.ones(len(left)), where=left > 0)
        self.tasks = list(dict.fromkeys(task for source in self.shards for task in source.tasks))
        numbers = {task: number for number, task in enumerate(self.tasks)}
        self._task_numbers = [np.array([numbers[task] for task in source.tasks]) for source in self.shards]
        for source in self.shards:
            if not source.count_rows(length, single):
                raise TrainingError(f"{source.folder} has no tokens to learn; add text")

    def row_numbers(self, step: int) -> list[tuple[int, int]]:
        """Return the rows of a step as pairs (source, row in the source). All are counted from 0."""
        return [self._row_number(step * self.batch + i) for i in range(self.batch)]

    def __call__(self, step: int) -> Rows:
        """Return the batch of a step: ids, mask, documents and tasks [batch, length + 1]."""
        return self.read(self.row_numbers(step))

    def read(self, row_numbers: Sequence[tuple[int, int]]) -> Rows:
        """Return rows by their pairs (source, row in the source). Their tasks are numbers of ``tasks``."""
        found = []
        for source, row in row_numbers:
            rows = self.shards[source].rows(self.length, [row], self.single)
            found.append(rows._replace(tasks=self._task_numbers[source][rows.tasks]))
        return Rows(*map(np.concatenate, zip(*found, strict=True)))

    def count_rows(self, source: int) -> int:
        """Return the number of rows of a source."""
        return self.shards[source].count_rows(self.length, self.single)

    def task_tokens(self) -> np.ndarray:
        """Return the mean number of learned tokens of each task in a step [tasks]. This reads all documents."""
        found = np.zeros(len(self.tasks))
        for number, source in enumerate(self.shards):
            learned = [int(document.mask.sum()) for document in source.documents()]
            tokens = np.bincount(self._task_numbers[number][source.document_tasks], learned, len(found))
            found += self.batch * self._shares[number] * tokens / self.count_rows(number)
        return found

    def _row_number(self, number: int) -> tuple[int, int]:
        """Return the ``number``-th row of training.

        Each source takes its share of the rows that the sources before it leave. After n rows, a source has supplied n
        times its share, to within one row for each other source.
        """
        for source, share in enumerate(self._shares_of_left):
            used, used_after = (rows_below(number + i, share) for i in (0, 1))
            if used_after > used:
                epoch, place = divmod(used, count := self.count_rows(source))
                return source, permuted(place, count, seed=(self.seed, source, epoch))
            number -= used
        raise AssertionError("the last source takes all rows that are left")


class StepDocuments:
    """The documents of a step. A document that is split over several rows counts as several documents.

    Args:
        rows: All rows of the step.

    Attributes:
        rows: The rows.
        learned: Number of learned tokens, at least 1.
        weights: Weight of each position's loss [B, L]. The weights sum to 1.
        places: Number of the document whose token each position predicts [B, L].
        shares: Weight of each document [D], the sum of its positions' weights.
        tasks: Number of each document's task [D].
    """

    def __init__(self, rows: Rows):
        self.rows = rows
        mask = rows.mask[:, 1:]
        self.learned = max(1, int(mask.sum()))
        self.weights = mask / self.learned
        documents = rows.documents[:, 1:]
        numbers = np.arange(len(mask))[:, None] * (documents.max() + 2) + documents + 1
        _, first, places = np.unique(numbers, return_index=True, return_inverse=True)
        self.places = places.reshape(mask.shape)
        self.shares = np.bincount(self.places.ravel(), self.weights.ravel())
        self.tasks = rows.tasks[:, 1:].ravel()[first]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the weighted sum of some values over the positions of each document.

        Args:
            values: K values at each position [K, B, L]. Values at positions of weight 0 are ignored.

        Returns:
            The sums [D, K].
        """
        weighted = np.where(self.weights > 0, values, 0) * self.weights
        count = len(self.shares)
        return np.stack([np.bincount(self.places.ravel(), value.ravel(), count) for value in weighted], axis=-1)

    def task_sums(self, values: np.ndarray, tasks: int) -> np.ndarray:
        """Return the sum of some values [D] or [D, K] over the documents of each task, [tasks] or [tasks, K]."""
        found = np.zeros((tasks, *values.shape[1:]))
        np.add.at(found, self.tasks, values)
        return found

    def task_metrics(self, tasks: list[str], names: list[str], sums: np.ndarray) -> dict[str, float]:
        """Return the mean of each metric over the tokens of each task in the step, and that of the worst task.

        Args:
            tasks: Names of the tasks.
            names: Names of the metrics. The worst loss is the highest, other metrics are worst where they are lowest.
            sums: Weighted sum of each metric over the positions of each document [D, metrics].

        Returns:
            The metrics "name/task" of the tasks in this step, and "worst_name". None if there is only one task in all,
            or more than ``MOST_TASKS``.
        """
        if not 1 < len(tasks) <= MOST_TASKS:
            return {}
        found: dict[str, float] = {}
        shares = self.task_sums(self.shares, len(tasks))
        means = self.task_sums(sums, len(tasks)) / np.where(shares > 0, shares, 1)[:, None]
        for name, values in zip(names, means.T, strict=True):
            known = {f"{name}/{task}": float(values[i]) for i, task in enumerate(tasks) if shares[i]}
            if known:
                found |= {f"worst_{name}": (max if name == "loss" else min)(known.values()), **known}
        return found


def rows_below(rows: int, share: float) -> int:
    """Return how many of the first ``rows`` rows belong to a source with a share of them."""
    return int(np.floor(rows * share + 1e-9))


def permuted(place: int, count: int, seed: tuple[int, ...]) -> int:
    """Return one entry of a random permutation of ``range(count)`` without storing the permutation.

    A Feistel network permutes the numbers below the next power of four. It is applied again until the result is below
    ``count``, which still gives a permutation.

    Args:
        place: Index of the entry, below ``count``.
        count: Length of the permutation.
        seed: Seed of the permutation.

    Returns:
        The entry at ``place``.

    Source: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains" (cycle walking).
    """
    half = max(1, (int(count - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = place >> half, place & low
        for turn in range(4):
            digest = hashlib.blake2b(repr((seed, turn, right)).encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & low)
        place = left << half | right
        if place < count:
            return place
