"""Batches from shards, as a function of (seed, step): to resume, the step is all there is to know."""

import hashlib
from collections.abc import Sequence

import numpy as np

from mlxspec.errors import TrainingError
from mlxspec.training.shards import Rows, TokenShards


class Mixture:
    """Batches that take a fixed share of their rows from each of several shards, as a pure function of the step.

    ``shares`` need not sum to 1. Within one of them rows come in a random order, all of them once before any twice.
    """

    def __init__(self, shards: Sequence[TokenShards], shares: Sequence[float], length: int, batch: int, seed: int):
        self.shards, self.length, self.batch, self.seed = list(shards), length, batch, seed
        self._ends = np.cumsum(shares) / np.sum(shares)
        for part in self.shards:
            if not part.count_rows(length):
                raise TrainingError(f"{part.folder} has nothing to learn; give more text")

    def choice(self, step: int) -> list[tuple[int, int]]:
        """(which shards, which row of them) for each row of the batch of ``step``, counted from 0."""
        return [self._row(step * self.batch + i) for i in range(self.batch)]

    def __call__(self, step: int) -> Rows:
        """ids and mask [batch, length + 1]."""
        rows = [self.shards[which].rows(self.length, [row]) for which, row in self.choice(step)]
        return Rows(np.concatenate([row.ids for row in rows]), np.concatenate([row.mask for row in rows]))

    def _row(self, number: int) -> tuple[int, int]:
        """The ``number``-th row of training. Of the first n rows each has had its share, to within one row."""
        before = 0.0
        for which, end in enumerate(self._ends):
            taken, so_far = (shared_out(number + i, end) - shared_out(number + i, before) for i in (0, 1))
            if so_far > taken:
                epoch, place = divmod(taken, count := self.shards[which].count_rows(self.length))
                return which, shuffled(place, count, seed=(self.seed, which, epoch))
            before = end
        raise AssertionError("shares end at 1")


def shared_out(rows: int, share: float) -> int:
    return int(np.floor(rows * share + 1e-9))


def shuffled(place: int, count: int, seed: tuple[int, ...]) -> int:
    """What a random permutation of ``range(count)`` has at ``place``, without the permutation in memory.

    A Feistel network over the next power of four permutes a larger range; numbers outside are walked on from, which
    keeps it a permutation (Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains").
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
