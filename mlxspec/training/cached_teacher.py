"""A target's most likely tokens, kept on disk: a step after the first epoch costs no pass of the target.

For each row of a corpus two flat files have the ids and the float16 log-probabilities of the ``k`` most likely tokens
at each position, at one temperature: 4k bytes a token, 6k for a vocabulary beyond 65536. A row is filled in when it is
first needed, and what is filled in outlives the process.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxspec.errors import InvalidRequestError
from mlxspec.files import explain_write_errors
from mlxspec.training.chunked import TeacherProbs
from mlxspec.training.mixture import Mixture
from mlxspec.training.teachers import OnlineTeacher

SMALLEST_PROB = 1e-30  # stands for 0 inside logarithms


@dataclass
class TopKFile:
    """What is known of the rows of one folder of shards, each [length, k]."""

    folder: Path
    rows: int
    length: int
    k: int
    id_type: type

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self._parts = [self._open("ids", self.id_type), self._open("logprobs", np.float16)]

    def _open(self, name: str, dtype: type) -> np.ndarray:
        path, shape = self.folder / name, (self.rows, self.length, self.k)
        with path.open("ab") as file:
            file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)  # zeros, which take no room yet
        return np.memmap(path, dtype, "r", shape=shape)

    def has(self, row: int) -> bool:
        """No token is among the most likely twice, so two equal ids are zeros that nobody has written over."""
        ids, logprobs = (part[row] for part in self._parts)
        return bool((ids[:, 0] != ids[:, 1]).all() and (logprobs != 0).any(-1).all())

    def read(self, row: int) -> list[np.ndarray]:
        return [part[row] for part in self._parts]

    def write(self, row: int, ids: np.ndarray, logprobs: np.ndarray) -> None:
        # Through the file and not the map: a full disk is an error here and the end of the process there.
        for name, part in zip(
            ("ids", "logprobs"), (ids.astype(self.id_type), logprobs.astype(np.float16)), strict=True
        ):
            with (self.folder / name).open("r+b") as file:
                file.seek(row * part.nbytes)
                file.write(part.tobytes())


class CachedTeacher:
    """The k largest probabilities of each position and the mass of all others.

    What is lost is how the target spreads that mass. It is taken to be spread as the drafter spreads its own, which
    makes every loss the loss between distributions of k + 1 events. It is kept in the folder of the shards, under a
    name that has the target's ``fingerprint`` in it.
    """

    def __init__(
        self, target: nn.Module, batches: Mixture, vocab_size: int, k: int, temperature: float, fingerprint: str
    ):
        if not 1 < k < vocab_size:
            raise InvalidRequestError(
                f"teacher_top_k is {k}; use 2 to {vocab_size - 1}, or 0 to run the target at every step"
            )
        self.batches, self.temperature, self.k = batches, temperature, k
        self._online = OnlineTeacher(target)
        self._vocabulary = mx.zeros((1, vocab_size))  # tells the teacher how many of its logits count
        # Whatever changes what is stored is in the name; several stages may share it.
        name = f"teacher-{fingerprint}-{k}-of-{batches.length}-at-{temperature:g}"
        id_type = np.uint16 if vocab_size <= 2**16 else np.uint32
        self._files = [
            TopKFile(shards.folder / name, shards.count_rows(batches.length), batches.length, k, id_type)
            for shards in batches.shards
        ]

    def stored(self, choice: Sequence[tuple[int, int]]) -> tuple[mx.array, ...]:
        """For a batch of (which shards, which row): ids and log-probabilities [B, L, k].

        Raises TrainingError if there is no room to keep them.
        """
        if not all(self._files[which].has(row) for which, row in choice):
            self._fill(choice)
        ids, logprobs = zip(*(self._files[which].read(row) for which, row in choice), strict=True)
        return mx.array(np.stack(ids).astype(np.int32)), mx.array(np.stack(logprobs)).astype(mx.float32)

    def _fill(self, choice: Sequence[tuple[int, int]]) -> None:
        """All rows of the batch are run, also those that are known: what is stored depends on the batch alone.

        So a run that was killed here, with some of them written, ends with the same weights.
        """
        rows = [self.batches.shards[which].rows(self.batches.length, [row]).ids[0, :-1] for which, row in choice]
        (states,) = self._online.states(mx.array(np.stack(rows)), ())
        teacher_probs = self._online.probs(mx.array(self.temperature))
        for place, (which, row) in enumerate(choice):
            _, log_p = teacher_probs((states[place],), self._vocabulary)  # [L, V], of one row at a time
            ids = mx.argpartition(-log_p, self.k - 1, axis=-1)[:, : self.k]
            logprobs = mx.take_along_axis(log_p, ids, axis=-1)
            if not self._files[which].has(row):
                with explain_write_errors(self._files[which].folder):
                    self._files[which].write(row, np.array(ids), np.array(logprobs))

    def states(self, inputs: mx.array, stored: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        return stored

    def probs(self, temperature: mx.array) -> TeacherProbs:
        return probs_from_top_k


def probs_from_top_k(states: tuple[mx.array, ...], log_q: mx.array) -> tuple[mx.array, mx.array]:
    """ids and log-probabilities [n, k] of the largest, log q [n, V] -> p and log p [n, V]."""
    ids, top_logprobs = states
    top_p = mx.exp(top_logprobs)
    tail = mx.maximum(1 - top_p.sum(-1, keepdims=True), SMALLEST_PROB)
    log_q_top = mx.take_along_axis(log_q, ids, axis=-1)
    q_tail = mx.maximum(1 - mx.exp(log_q_top).sum(-1, keepdims=True), SMALLEST_PROB)
    log_p = mx.put_along_axis(log_q + mx.log(tail / q_tail), ids, top_logprobs, axis=-1)
    return mx.exp(log_p), log_p
