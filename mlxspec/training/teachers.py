"""Teachers: sources of the target's probabilities during training.

``OnlineTeacher`` runs the target in every step. ``CachedTeacher`` stores the target's most likely tokens on disk when a
row is first used, and the hidden states that an EAGLE head reads. From the second epoch on, a step then does not run
the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxspec.errors import InvalidRequestError
from mlxspec.files import explain_write_errors
from mlxspec.models.attention import attention_windows
from mlxspec.models.parts import parts_of, run_with_states
from mlxspec.models.sharding import Group, gathered
from mlxspec.models.vocabulary import places
from mlxspec.training.batches import Batches
from mlxspec.training.chunked_loss import TeacherProbs, log_softmax
from mlxspec.training.documents import document_masks, keeps_documents_apart

SMALLEST_PROB, SMALLEST_LOGPROB = 1e-30, -1e30  # replace 0 in logarithms, and −∞
LARGEST_STATE = 65504.0  # the largest float16


class OnlineTeacher:
    """Runs the target in the same graph as the drafter's step.

    If the target is a body and a linear head, its logits are computed in chunks from its hidden states. A trial on a
    few tokens decides that. The logits of other targets, which cap or scale them, are computed as a whole.

    Args:
        target: The target model.
        apart: Whether to keep the documents of a row apart. If False, a row should hold only one document. None to
            decide by a trial whether the target can keep them apart.
        read_layers: Numbers of the layers whose inputs an EAGLE-3 head reads. None without a head.
        group: Processes over which the target is divided. All of them run it on the rows of all of them, and each
            keeps the result for its own rows. They must have the same number of rows. None for a whole target.
    """

    def __init__(
        self,
        target: nn.Module,
        apart: bool | None = None,
        read_layers: Sequence[int] | None = None,
        group: Group | None = None,
    ):
        self.target = target
        self.read_layers = read_layers
        self.group = group
        self.apart = keeps_documents_apart(target) if apart is None else apart
        self._windows = attention_windows(target) if self.apart else []
        self.parts = parts_of(target)

    def load_rows(self, row_numbers: Sequence[tuple[int, int]]) -> tuple[mx.array, ...]:
        """Return no arrays, since the target runs within the step."""
        return ()

    def states(self, inputs: mx.array, documents: mx.array, stored: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        """Run the target on rows.

        Args:
            inputs: Token ids [B, L].
            documents: Number of the document at each position [B, L].
            stored: The result of ``load_rows``. It is not used.

        Returns:
            The target's last hidden states [B, L, H], or its logits [B, L, V]. Then, for an EAGLE head, the hidden
            states [B, L, F] that it reads.
        """
        count = len(inputs)
        if self.group is not None:
            # A sum, since all_gather may wait for ever for a killed process.
            others = [(count * self.group.rank(), count * (self.group.size() - 1 - self.group.rank())), (0, 0)]
            inputs, documents = (
                mx.distributed.all_sum(mx.pad(part, others), group=self.group) for part in (inputs, documents)
            )
        model: Any = self.parts.body if self.parts else self.target
        options = {"cache": document_masks(self._windows, documents)} if self.apart else {}
        if self.read_layers is None:
            found: tuple[mx.array, ...] = (model(inputs, **options),)
        else:
            found = run_with_states(self.target, self.read_layers, lambda: model(inputs, **options))
        if self.group is None:
            return found
        first = count * self.group.rank()
        return tuple(part[first : first + count] for part in found)

    def probs(self, temperature: mx.array, columns: mx.array | None = None) -> TeacherProbs:
        """Return the function that computes p and log p from a chunk of ``states``.

        Args:
            temperature: Temperature of p.
            columns: The tokens of the drafter's smaller vocabulary, [K]. The probabilities of these tokens are
                returned. They sum to less than 1, since the other tokens keep theirs. None for all tokens.
        """

        def teacher_probs(states: tuple[mx.array, ...], log_q: mx.array) -> tuple[mx.array, mx.array]:
            logits = (self.parts.head(states[0]) if self.parts else states[0]).astype(mx.float32) / temperature
            if columns is not None:
                log_p = logits[:, columns] - mx.logsumexp(logits, axis=-1, keepdims=True)
                return mx.exp(log_p), log_p
            # A target may pad its vocabulary beyond the drafter's. The padding is never sampled.
            log_p, p = log_softmax(logits[:, : log_q.shape[-1]])
            return p, log_p

        return teacher_probs


@dataclass
class TeacherStore:
    """Stores what a target computes for the rows of one folder of shards.

    Two flat files hold the k most likely tokens at each position and their float16 log-probabilities, each
    [rows, length, k]. For an EAGLE head, a third file holds float16 hidden states [rows, length, F]. A position takes
    4k + 2F bytes, or 6k + 2F for a vocabulary beyond 65536. The files are sparse: a row takes space only once it is
    written.

    Args:
        folder: Folder of the files.
        rows: Number of rows.
        length: Positions in a row.
        k: Number of tokens at each position.
        id_type: NumPy type of the token ids.
        states: Number of values F of the hidden states at a position. 0 to store none.
    """

    folder: Path
    rows: int
    length: int
    k: int
    id_type: type
    states: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._parts = {"ids": self._open("ids", self.id_type, self.k)}
        self._parts["logprobs"] = self._open("logprobs", np.float16, self.k)
        if self.states:
            self._parts["states"] = self._open("states", np.float16, self.states)

    def _open(self, name: str, dtype: type, width: int) -> np.ndarray:
        path, shape = self.folder / name, (self.rows, self.length, width)
        with path.open("ab") as file:
            file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.memmap(path, dtype, "r", shape=shape)

    def has(self, row: int) -> bool:
        """Return whether a row was written.

        A position that was not written has zeros. The k token ids of a position differ, so it has two equal ids.
        """
        ids, *others = (part[row] for part in self._parts.values())
        return bool((ids[:, 0] != ids[:, 1]).all()) and all(bool(part.any(-1).all()) for part in others)

    def read(self, row: int) -> list[np.ndarray]:
        """Return the token ids and the log-probabilities of a row, each [length, k], then its states [length, F]."""
        return [part[row] for part in self._parts.values()]

    def write(self, row: int, ids: np.ndarray, logprobs: np.ndarray, *states: np.ndarray) -> None:
        """Store a row.

        The row is not written through the memory map, since a full disk would then kill the process.

        Args:
            row: Number of the row.
            ids: Token ids [length, k].
            logprobs: Log-probabilities [length, k].
            states: Hidden states [length, F], if this store has any.

        Raises:
            OSError: The file cannot be written, for example because the disk is full.
        """
        for (name, stored), values in reversed(list(zip(self._parts.items(), (ids, logprobs, *states), strict=True))):
            part = values.astype(stored.dtype)
            with (self.folder / name).open("r+b") as file:
                file.seek(row * part.nbytes)
                file.write(part.tobytes())


class CachedTeacher:
    """Stores the target's k largest probabilities at each position.

    The remaining probability is assumed to be distributed as in the drafter. Every loss is then the loss between two
    distributions over k + 1 events. The store is next to the shards, in a folder named after the target's fingerprint
    and everything else that changes its content. Several stages can therefore share it.

    Args:
        target: The target model.
        batches: The batches to be trained on.
        vocab_size: Size of the vocabulary.
        k: Number of tokens at each position.
        temperature: The temperature of the stored probabilities.
        fingerprint: The target's fingerprint.
        apart: As for ``OnlineTeacher``.
        read_layers: As for ``OnlineTeacher``. With it, the hidden states are stored too.
        group: As for ``OnlineTeacher``. All processes must load rows at the same time.

    Raises:
        InvalidRequestError: k is out of range.
    """

    def __init__(
        self,
        target: nn.Module,
        batches: Batches,
        vocab_size: int,
        k: int,
        temperature: float,
        fingerprint: str,
        apart: bool | None = None,
        read_layers: Sequence[int] | None = None,
        group: Group | None = None,
    ):
        check_top_k(k, vocab_size)
        self.batches, self.temperature, self.k, self.group = batches, temperature, k, group
        self._online = OnlineTeacher(target, apart, read_layers, group)
        self.parts = self._online.parts
        self._log_q = mx.zeros((1, vocab_size))  # only its shape is used, for the size of the vocabulary
        rows = "single" if batches.single else "apart"
        name = f"teacher-{fingerprint}-{k}-of-{batches.length}-{rows}-at-{temperature:g}"
        width = 0
        if read_layers is not None:
            name += "-".join(["-states", *map(str, read_layers)])
            some = mx.zeros((1, 2), mx.int32)
            width = self._online.states(some, some, ())[1].shape[-1]
        id_type = np.uint16 if vocab_size <= 2**16 else np.uint32
        self._stores = []
        for number, shards in enumerate(batches.shards):
            folder = shards.folder / name
            with explain_write_errors(folder):
                self._stores.append(TeacherStore(folder, batches.count_rows(number), batches.length, k, id_type, width))

    def load_rows(self, row_numbers: Sequence[tuple[int, int]]) -> tuple[mx.array, ...]:
        """Read a batch from disk. If one of its rows is missing, run the target on the batch first.

        Args:
            row_numbers: (source, row in the source) for each row.

        Returns:
            Token ids and log-probabilities, each [B, L, k]. Then, for an EAGLE head, hidden states [B, L, F].

        Raises:
            WriteError: A row cannot be stored, for example because the disk is full.
        """
        missing = not all(self._stores[source].has(row) for source, row in row_numbers)
        if missing if self.group is None else any(gathered(missing, self.group)):
            self._fill(row_numbers)
        parts = zip(*(self._stores[source].read(row) for source, row in row_numbers), strict=True)
        ids, *others = (np.stack(part) for part in parts)
        return mx.array(ids.astype(np.int32)), *(mx.array(other).astype(mx.float32) for other in others)

    def _fill(self, row_numbers: Sequence[tuple[int, int]]) -> None:
        """Run the target on all rows of the batch, and store those that are missing.

        Known rows are run too, so that the stored numbers depend only on the batch. A resumed run then ends with the
        same weights, even if it was killed after only some of the rows were written.
        """
        rows = self.batches.read(row_numbers)
        hidden, *states = self._online.states(mx.array(rows.ids[:, :-1]), mx.array(rows.documents[:, :-1]), ())
        states = [mx.clip(part.astype(mx.float32), -LARGEST_STATE, LARGEST_STATE) for part in states]
        teacher_probs = self._online.probs(mx.array(self.temperature))
        for place, (source, row) in enumerate(row_numbers):
            _, log_p = teacher_probs((hidden[place],), self._log_q)  # [L, V], one row at a time
            ids = mx.argpartition(-log_p, self.k - 1, axis=-1)[:, : self.k]
            logprobs = mx.take_along_axis(log_p, ids, axis=-1)
            self.store(source, row, np.array(ids), np.array(logprobs), *(np.array(part[place]) for part in states))

    def store(self, source: int, row: int, ids: np.ndarray, logprobs: np.ndarray, *states: np.ndarray) -> None:
        """Store a row, unless it is there already.

        The tokens of a position are sorted by their ids. Another run may write the same row at the same time, and the
        ids in the file may then be its ids. A token has its own probability all the same if both have the same tokens.

        Args:
            source: Number of the source.
            row: Number of the row in the source.
            ids: Token ids [L, k]. Those of a position differ.
            logprobs: Log-probabilities [L, k].
            states: Hidden states [L, F], for an EAGLE head.

        Raises:
            WriteError: The row cannot be written, for example because the disk is full.
        """
        store = self._stores[source]
        if not store.has(row):
            order = np.argsort(ids, axis=-1)
            ids, logprobs = (np.take_along_axis(part, order, axis=-1) for part in (ids, logprobs))
            with explain_write_errors(store.folder):
                store.write(row, ids, logprobs, *states)

    def states(self, inputs: mx.array, documents: mx.array, stored: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        """Return the arrays that ``load_rows`` read.

        Args:
            inputs: Token ids [B, L]. They are not used.
            documents: Number of the document at each position [B, L]. They are not used.
            stored: The result of ``load_rows``.

        Returns:
            Token ids and log-probabilities, each [B, L, k]. Then, for an EAGLE head, hidden states [B, L, F].
        """
        return stored

    def probs(self, temperature: mx.array, columns: mx.array | None = None) -> TeacherProbs:
        """Return the function that computes p and log p from a chunk of ``states``.

        Args:
            temperature: Temperature of p. It is not used, since the stored probabilities have one already.
            columns: The tokens of the drafter's smaller vocabulary, [K]. None for all tokens.
        """

        def teacher_probs(states: tuple[mx.array, ...], log_q: mx.array) -> tuple[mx.array, mx.array]:
            ids, top_logprobs = states
            if columns is None:
                return probs_from_top_k(ids, top_logprobs, log_q)
            count = columns.shape[0]
            found, known = places(ids, columns, self._log_q.shape[-1])
            # One column more, for the tokens that the drafter cannot output. It is cut off again below.
            wider = mx.concatenate([log_q, mx.full((len(log_q), 1), -mx.inf)], axis=-1)
            p, log_p = probs_from_top_k(mx.where(known, found, count), top_logprobs, wider)
            return p[:, :count], log_p[:, :count]

        return teacher_probs


Teacher = OnlineTeacher | CachedTeacher


def check_top_k(k: int, vocab_size: int) -> None:
    """Raise InvalidRequestError if a teacher cannot store k tokens for each position."""
    if not 1 < k < vocab_size:
        raise InvalidRequestError(
            f"teacher_top_k is {k}; use 2 to {vocab_size - 1}, or 0 to run the target in every step"
        )


def probs_from_top_k(ids: mx.array, top_logprobs: mx.array, log_q: mx.array) -> tuple[mx.array, mx.array]:
    """Complete the target's top k probabilities to a distribution over the vocabulary.

    Args:
        ids: Token ids [n, k].
        top_logprobs: Their log-probabilities [n, k].
        log_q: The drafter's log-probabilities [n, V].

    Returns:
        p and log p, each [n, V].
    """
    tail = mx.maximum(1 - mx.exp(top_logprobs).sum(-1, keepdims=True), SMALLEST_PROB)
    # The sum over the other tokens, not 1 minus that of the k: a difference of nearly equal numbers would be noise.
    others = mx.put_along_axis(log_q, ids, mx.array(-mx.inf), axis=-1)
    log_q_tail = mx.maximum(mx.logsumexp(others, axis=-1, keepdims=True), SMALLEST_LOGPROB)
    log_p = mx.put_along_axis(log_q + mx.log(tail) - log_q_tail, ids, top_logprobs, axis=-1)
    return mx.exp(log_p), log_p
