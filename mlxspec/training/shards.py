"""Token ids on disk.

A folder of shards holds ``index.json`` and four flat little-endian files for each shard:

- ``00000.ids``: the tokens, uint16 or uint32,
- ``00000.mask``: 1 for a token to learn, else 0, uint8,
- ``00000.docs``: the length of each document, uint32,
- ``00000.tasks``: the number of each document's task in the index's list of tasks, uint32.

The files are memory-mapped, so a corpus may be larger than memory. They hold one document after the other. For
training, documents are packed into rows of a fixed length.
"""

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mlxspec.errors import TrainingError, advice_for
from mlxspec.files import explain_write_errors, fingerprint, read_json, remove_leftovers, write_json

FORMAT = 1
SHARD_TOKENS = 2**26
PARTS = ("ids", "mask", "docs", "tasks")
EMPTY_CHECKSUM = hashlib.sha256().hexdigest()


@dataclass
class Shard:
    """The index's entry for a shard."""

    tokens: int = 0
    documents: int = 0
    checksums: dict[str, str] = field(default_factory=dict)  # SHA-256 of each part


@dataclass
class Index:
    """The content of ``index.json``, whose keys are the names of the fields.

    Attributes:
        vocab_size: Size of the vocabulary.
        tokenizer: Fingerprint of the tokenizer.
        shards: The shards.
        learned: Number of tokens with mask 1, which a drafter learns.
        complete: Whether the writer has finished.
        notes: Additional state of the writer, such as its progress.
        tasks: Names of the tasks.
    """

    vocab_size: int
    tokenizer: str
    shards: list[Shard] = field(default_factory=list)
    learned: int = 0
    complete: bool = False
    notes: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored token ids."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(shard.documents for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Write the index to a folder, in place of an earlier one."""
        write_json(folder / "index.json", {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Read the index of a folder. Raises TrainingError if the folder holds no shards of this format."""
        try:
            content = read_json(folder / "index.json")
            if content.pop("format") != FORMAT:
                raise TrainingError(f"{folder} holds shards of another format; delete it and create them again")
            shards = [Shard(**shard) for shard in content.pop("shards")]
            return cls(shards=shards, **content)
        except OSError as error:
            raise TrainingError(f"{folder} holds no token shards ({error.strerror}); create them first") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, TrainingError):
                raise
            raise TrainingError(
                f"{folder / 'index.json'} is damaged ({error}); delete {folder} and create it again"
            ) from None


class ShardWriter:
    """Appends documents to a folder of shards. A writer of an existing folder continues after its last commit.

    Args:
        folder: The folder. It is created if it does not exist.
        vocab_size: Size of the vocabulary.
        tokenizer: Fingerprint of the tokenizer.
        shard_tokens: A new shard starts once the current one has this many tokens.

    Raises:
        TrainingError: The folder has shards of another tokenizer, or they are damaged.
    """

    def __init__(self, folder: str | Path, vocab_size: int, tokenizer: str, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.shard_tokens = Path(folder), shard_tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        if (self.folder / "index.json").exists():
            self.index = Index.read(self.folder)
            if self.index.tokenizer != tokenizer or self.index.vocab_size != vocab_size:
                raise TrainingError(f"{self.folder} was made with another tokenizer; use another folder")
        else:
            self.index = Index(vocab_size, tokenizer)
        self._task_numbers = {name: number for number, name in enumerate(self.index.tasks)}
        self._open_last()

    def add(self, ids: Sequence[int], mask: Sequence[int], task: str | None = None) -> None:
        """Append one document.

        Args:
            ids: The token ids.
            mask: 1 for each token to learn, else 0.
            task: The document's task. None for ``default_task``.

        Raises:
            TrainingError: The document is empty, an id is outside the vocabulary, or the mask has another length.
            WriteError: The document cannot be written, for example because the disk is full.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        if not 0 < tokens.size == len(mask) or tokens.min() < 0 or tokens.max() >= self.index.vocab_size:
            raise TrainingError(
                f"a document has {tokens.size} tokens, a mask of {len(mask)}, and ids up to {tokens.max(initial=-1)}; "
                f"use as many tokens as mask entries, and ids below {self.index.vocab_size}"
            )
        if self.index.shards[-1].tokens >= self.shard_tokens:
            self._flush()  # not a commit: the index on disk still ends before it
            self.close()
            self.index.shards.append(Shard())
            self._open_last()
        task = task or default_task(self.folder)
        if task not in self._task_numbers:
            self._task_numbers[task] = len(self.index.tasks)
            self.index.tasks.append(task)
        content = {
            "ids": tokens.astype(self.index.dtype),
            "mask": np.asarray(mask, dtype=np.uint8),
            "docs": np.array([tokens.size], "<u4"),
            "tasks": np.array([self._task_numbers[task]], "<u4"),
        }
        with explain_write_errors(self.folder):
            for part, data in content.items():
                self._files[part].write(data.tobytes())
                self._hashes[part].update(data.tobytes())
        self.index.shards[-1].tokens += tokens.size
        self.index.shards[-1].documents += 1
        self.index.learned += int(content["mask"].sum())

    def commit(self, **notes: Any) -> None:
        """Make the documents added so far durable on disk, and add ``notes`` to the index."""
        self._flush()
        self.index.notes.update(notes)
        self.index.write(self.folder)

    def finish(self, **notes: Any) -> None:
        """Commit, mark the shards as complete, and close the files."""
        self.index.complete = True
        self.commit(**notes)
        self.close()

    def _flush(self) -> None:
        for part, file in self._files.items():
            with explain_write_errors(self.folder):
                file.flush()
                os.fsync(file.fileno())
            self.index.shards[-1].checksums[part] = self._hashes[part].hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the files. Documents added since the last commit may be lost."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()

    def _open_last(self) -> None:
        if not self.index.shards:
            self.index.shards.append(Shard())
        shard, number = self.index.shards[-1], len(self.index.shards) - 1
        sizes = part_sizes(shard, self.index.dtype)
        self._files: dict[str, BinaryIO] = {}
        self._hashes: dict[str, Any] = {}
        for part in PARTS:
            path = shard_file(self.folder, number, part)
            try:
                file: BinaryIO = path.open("r+b") if path.exists() else path.open("w+b")
            except OSError as error:
                self.close()
                raise TrainingError(f"{path} cannot be opened ({error.strerror}); {advice_for(error)}") from None
            self._files[part] = file
            file.truncate(min(sizes[part], path.stat().st_size))
            self._hashes[part] = hashlib.sha256(file.read())
            if self._hashes[part].hexdigest() != shard.checksums.get(part, EMPTY_CHECKSUM):
                self.close()
                raise TrainingError(
                    f"{path} has changed since it was written; delete {self.folder.parent} and create it again"
                )
            file.seek(0, os.SEEK_END)


class TokenizedDocument(NamedTuple):
    """A document of a corpus."""

    ids: np.ndarray  # [length]
    mask: np.ndarray  # [length]


class Rows(NamedTuple):
    """Rows of a corpus. They have one more token than positions, since each position predicts the next token."""

    ids: np.ndarray  # [rows, length + 1]
    mask: np.ndarray  # [rows, length + 1]
    documents: np.ndarray  # [rows, length + 1] number of the document; −1 for padding
    tasks: np.ndarray  # [rows, length + 1] number of the document's task; 0 for padding


class TokenShards:
    """Reads a folder of complete shards through memory maps.

    Args:
        folder: The folder.
        verify: Whether to check the checksums of all files.

    Raises:
        TrainingError: The shards are incomplete or empty, or a file is missing or damaged.
    """

    def __init__(self, folder: str | Path, verify: bool = False):
        self.folder = Path(folder)
        self.index = Index.read(self.folder)
        if not self.index.complete:
            raise TrainingError(f"{self.folder} is not finished; repeat the command that creates it")
        if not self.index.tokens:
            raise TrainingError(f"{self.folder} holds no tokens; create it from a corpus that is not empty")
        numbers = range(len(self.index.shards))
        self._ids, self._masks, self._documents, self._tasks = (
            [self._map(number, part, verify) for number in numbers] for part in PARTS
        )
        self._known_spans: dict[tuple[int, bool], np.ndarray] = {}
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.index.shards)])

    def __len__(self) -> int:
        return self.index.tokens

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the tokenizer, tokens and masks, but not of the tasks."""
        content: list[Any] = [self.index.tokenizer]
        for shard in self.index.shards:
            known = {part: checksum for part, checksum in shard.checksums.items() if part != "tasks"}
            content.append({**asdict(shard), "checksums": known})
        return fingerprint(json.dumps(content))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return self.index.tasks

    @property
    def task_fingerprint(self) -> str:
        """Fingerprint of the documents' tasks."""
        checksums = [shard.checksums.get("tasks") for shard in self.index.shards]
        return fingerprint(json.dumps([self.tasks, checksums]))

    def documents(self) -> Iterator[TokenizedDocument]:
        """Yield the documents in the order in which they were added."""
        start = 0
        for lengths in self._documents:
            for length in lengths:
                count = int(length)
                yield TokenizedDocument(self._read(self._ids, start, count), self._read(self._masks, start, count))
                start += int(length)

    def count_rows(self, length: int, single: bool = False) -> int:
        """Return the number of rows of ``length`` positions. With ``single``, each row holds at most one document."""
        return len(self.spans(length, single))

    def rows(self, length: int, chosen: Sequence[int], single: bool = False) -> Rows:
        """Read rows by number.

        A row holds as many whole documents as fit, then padding with mask 0. An answer is therefore never trained on
        without its question. Only a document longer than a row is split. The next row then begins with the last token
        of the row before, so that every token is predicted once. The first token of a document has mask 0, since no
        token predicts it.

        Args:
            length: Positions in a row.
            chosen: Numbers of the rows.
            single: Whether each row holds at most one document.

        Returns:
            ids, mask, documents and tasks, each [rows, length + 1].
        """
        ids, mask, tasks = (np.zeros((len(chosen), length + 1), dtype) for dtype in (np.int32, np.uint8, np.int32))
        documents = np.full((len(chosen), length + 1), -1, np.int32)
        spans = self.spans(length, single)
        for row, number in enumerate(chosen):
            start, end = (int(place) for place in spans[number])
            ids[row, : end - start] = self._read(self._ids, start, end - start)
            mask[row, : end - start] = self._read(self._masks, start, end - start)
            numbers = np.searchsorted(self._document_starts, np.arange(start, end), side="right")
            documents[row, : end - start] = numbers - numbers[0]
            tasks[row, : end - start] = self.document_tasks[numbers - 1]
        mask[:, 1:][documents[:, 1:] != documents[:, :-1]] = 0
        return Rows(ids, mask, documents, tasks)

    @cached_property
    def document_tasks(self) -> np.ndarray:
        """Number of the task of each document [documents]."""
        return np.concatenate(self._tasks)

    @cached_property
    def _document_starts(self) -> np.ndarray:
        """Where each document starts in the sequence of all tokens [documents]."""
        lengths = np.concatenate([np.asarray(part, np.int64) for part in self._documents])
        return np.cumsum(lengths) - lengths

    def spans(self, length: int, single: bool) -> np.ndarray:
        """Return where each row starts and ends in the sequence of all tokens [rows, 2]."""
        if (length, single) not in self._known_spans:
            lengths = (length for documents in self._documents for length in documents.tolist())
            self._known_spans[length, single] = pack(lengths, length + 1, single)
        return self._known_spans[length, single]

    def _read(self, parts: list[np.ndarray], start: int, count: int) -> np.ndarray:
        """Return ``count`` entries from ``start`` of the concatenated parts."""
        pieces, part = [], int(np.searchsorted(self._starts, start, side="right")) - 1
        while count > 0:
            low = start - self._starts[part]
            pieces.append(parts[part][low : low + count])
            start, count, part = start + pieces[-1].size, count - pieces[-1].size, part + 1
        return np.concatenate(pieces)

    def _map(self, number: int, part: str, verify: bool) -> np.ndarray:
        path, shard = shard_file(self.folder, number, part), self.index.shards[number]
        expected = part_sizes(shard, self.index.dtype)[part]
        found = path.stat().st_size if path.exists() else 0
        if found != expected:
            raise TrainingError(f"{path} has {found} bytes but the index says {expected}; create these shards again")
        dtype = {"ids": self.index.dtype, "mask": np.dtype("u1")}.get(part, np.dtype("<u4"))
        content = np.memmap(path, dtype=dtype, mode="r") if expected else np.zeros(0, dtype)
        if verify and hashlib.sha256(content.data).hexdigest() != shard.checksums[part]:
            raise TrainingError(f"{path} has changed since it was written; create these shards again")
        return content


def default_task(folder: Path) -> str:
    """Return the task of documents that have none: the name of the stage's folder, such as "answers"."""
    return folder.resolve().parent.name


def pack(lengths: Iterable[int], room: int, single: bool = False) -> np.ndarray:
    """Pack documents into rows.

    Args:
        lengths: Length of each document in tokens, in order.
        room: Tokens in a row.
        single: Whether each row holds at most one document.

    Returns:
        Start and end of each row in the sequence of all tokens [rows, 2].
    """
    rows, start, end = array("q"), 0, 0  # an array, since there may be a hundred million rows
    for length in lengths:
        if end > start and (single or end + length - start > room):
            rows.extend((start, end))
            start = end
        end += length
        while end - start > room:
            rows.extend((start, start + room))
            start += room - 1  # the last token of a row is only predicted there; the next row starts with it
        if end - start == 1 < length:  # this token was predicted in the row before, and none follows
            start = end
    if end > start:
        rows.extend((start, end))
    return np.array(rows).reshape(-1, 2)


def shard_file(folder: Path, number: int, part: str) -> Path:
    """Return the path of one file of a shard.

    Args:
        folder: The folder of the shards.
        number: Number of the shard, counted from 0.
        part: One of ``PARTS``.

    Returns:
        The path.
    """
    return folder / f"{number:05d}.{part}"


def part_sizes(shard: Shard, dtype: np.dtype) -> dict[str, int]:
    """Return the size of each file of a shard in bytes."""
    documents = shard.documents * 4
    return {"ids": shard.tokens * dtype.itemsize, "mask": shard.tokens, "docs": documents, "tasks": documents}
