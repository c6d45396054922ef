"""Batches of rows from token shards.

A batch is a function of the seed and the step. To resume, a run needs to know only its step.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from mlxspec.errors import TrainingError
from mlxspec.training.shards import Rows, TokenShards


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
        self._ends = np.cumsum(shares) / np.sum(shares)
        for source in self.shards:
            if not source.count_rows(length, single):
                raise TrainingError(f"{source.folder} has no tokens to learn; add text")

    def row_numbers(self, step: int) -> list[tuple[int, int]]:
        """Return the rows of a step as pairs (source, row in the source). All are counted from 0."""
        return [self._row_number(step * self.batch + i) for i in range(self.batch)]

    def __call__(self, step: int) -> Rows:
        """Return the batch of a step: ids, mask and documents [batch, length + 1]."""
        return self.read(self.row_numbers(step))

    def read(self, row_numbers: Sequence[tuple[int, int]]) -> Rows:
        """Return rows by their pairs (source, row in the source)."""
        rows = [self.shards[source].rows(self.length, [row], self.single) for source, row in row_numbers]
        return Rows(*map(np.concatenate, zip(*rows, strict=True)))

    def count_rows(self, source: int) -> int:
        """Return the number of rows of a source."""
        return self.shards[source].count_rows(self.length, self.single)

    def _row_number(self, number: int) -> tuple[int, int]:
        """Return the ``number``-th row of training. After n rows, each source has supplied n times its share, ± 1."""
        start = 0.0
        for source, end in enumerate(self._ends):
            used, used_after = (rows_below(number + i, end) - rows_below(number + i, start) for i in (0, 1))
            if used_after > used:
                epoch, place = divmod(used, count := self.count_rows(source))
                return source, permuted(place, count, seed=(self.seed, source, epoch))
            start = end
        raise AssertionError("the last share ends at 1")


def rows_below(rows: int, share: float) -> int:
    """Return how many of the first ``rows`` rows belong to the sources up to a cumulative share."""
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
