"""Token ids on disk.

A folder of shards holds ``index.json`` and for each shard three flat little-endian files: ``00000.ids`` (uint16 or
uint32, a token each), ``00000.mask`` (uint8, 1 where a token is to be learnt) and ``00000.docs`` (uint32, a document's
length each). They are memory-mapped, so a corpus may be larger than memory. Documents follow each other without gaps;
for training they are packed into rows of a fixed length.
"""

import contextlib
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxspec.errors import TrainingError
from mlxspec.files import explain_write_errors, fingerprint, write_json

FORMAT = 1
SHARD_TOKENS = 2**26
PARTS = ("ids", "mask", "docs")
EMPTY = hashlib.sha256().hexdigest()


@dataclass
class Shard:
    tokens: int = 0
    documents: int = 0
    checksums: dict[str, str] = field(default_factory=dict)  # part -> sha256


@dataclass
class Index:
    """``index.json``: everything that is known without opening the shards."""

    vocab_size: int
    tokenizer: str  # fingerprint
    shards: list[Shard] = field(default_factory=list)
    learnt: int = 0  # tokens whose mask is 1
    complete: bool = False
    notes: dict[str, Any] = field(default_factory=dict)  # the writer's: where it got to, what it skipped

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def write(self, folder: Path) -> None:
        write_json(folder / "index.json", {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> "Index":
        """Raises TrainingError for a folder that holds no shards of this format."""
        try:
            content = json.loads((folder / "index.json").read_text())
            if content.pop("format") != FORMAT:
                raise TrainingError(f"{folder} holds shards of another format; make them again")
            shards = [Shard(**shard) for shard in content.pop("shards")]
            return cls(shards=shards, **content)
        except OSError as error:
            raise TrainingError(f"{folder} holds no token shards ({error.strerror}); make some first") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, TrainingError):
                raise
            raise TrainingError(
                f"{folder / 'index.json'} is damaged ({error}); delete {folder} and make it again"
            ) from None


class ShardWriter:
    """Appends documents to a folder of shards; ``commit`` makes durable what was added, with the writer's own notes.

    Reopened, it goes on from the last commit: what was written after it is cut off.
    """

    def __init__(self, folder: str | Path, vocab_size: int, tokenizer: str, shard_tokens: int = SHARD_TOKENS):
        self.folder, self.shard_tokens = Path(folder), shard_tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / "index.json").exists():
            self.index = Index.read(self.folder)
            if self.index.tokenizer != tokenizer or self.index.vocab_size != vocab_size:
                raise TrainingError(f"{self.folder} was made with another tokenizer; choose another folder")
        else:
            self.index = Index(vocab_size, tokenizer)
        self._open_last()

    def add(self, ids: Sequence[int], mask: Sequence[int]) -> None:
        """Append one document; ``mask`` is 1 for each token that is to be learnt."""
        tokens = np.asarray(ids, dtype=np.int64)
        if not 0 < tokens.size == len(mask) or tokens.min() < 0 or tokens.max() >= self.index.vocab_size:
            raise TrainingError(
                f"a document has {tokens.size} tokens, {len(mask)} of a mask, and ids up to {tokens.max(initial=-1)}; "
                f"expected as many of both, below {self.index.vocab_size}"
            )
        if self.index.shards[-1].tokens >= self.shard_tokens:
            self._flush()  # not yet committed: the index on disk still ends before it
            self.close()
            self.index.shards.append(Shard())
            self._open_last()
        content = (tokens.astype(self.index.dtype), np.asarray(mask, dtype=np.uint8), np.array([tokens.size], "<u4"))
        with explain_write_errors(self.folder):
            for part, data in zip(PARTS, content, strict=True):
                self._files[part].write(data.tobytes())
                self._hashes[part].update(data.tobytes())
        self.index.shards[-1].tokens += tokens.size
        self.index.shards[-1].documents += 1
        self.index.learnt += int(content[1].sum())

    def commit(self, **notes: Any) -> None:
        """Everything added so far, and ``notes``, survive whatever happens next."""
        self._flush()
        self.index.notes.update(notes)
        with explain_write_errors(self.folder):
            self.index.write(self.folder)

    def finish(self, **notes: Any) -> None:
        """Commit for the last time."""
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
        """Leave it at the last commit."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what is not committed may be lost
                file.close()

    def _open_last(self) -> None:
        if not self.index.shards:
            self.index.shards.append(Shard())
        shard, number = self.index.shards[-1], len(self.index.shards) - 1
        sizes = part_sizes(shard, self.index.dtype)
        self._files, self._hashes = {}, {}
        for part in PARTS:
            path = shard_file(self.folder, number, part)
            file = self._files[part] = path.open("r+b" if path.exists() else "w+b")
            file.truncate(min(sizes[part], path.stat().st_size))
            self._hashes[part] = hashlib.sha256(file.read())
            if self._hashes[part].hexdigest() != shard.checksums.get(part, EMPTY):
                self.close()
                raise TrainingError(f"{path} is not what was written; delete {self.folder.parent} to make it again")
            file.seek(0, os.SEEK_END)


class Rows(NamedTuple):
    """Some rows of a corpus. The loss at a position is on the token after it, so rows are a token longer."""

    ids: np.ndarray  # [rows, length + 1]
    mask: np.ndarray  # [rows, length + 1]


class TokenShards:
    """A folder of finished shards, read through memory maps.

    Raises TrainingError if a file is missing, has another size than the index says, or, with ``verify``, another
    checksum.
    """

    def __init__(self, folder: str | Path, verify: bool = False):
        self.folder = Path(folder)
        self.index = Index.read(self.folder)
        if not self.index.complete:
            raise TrainingError(f"{self.folder} is not finished; run the command that makes it again, it goes on")
        if not self.index.tokens:
            raise TrainingError(f"{self.folder} holds no tokens; the corpus was empty")
        self._ids = [self._map(number, "ids", verify) for number in range(len(self.index.shards))]
        self._masks = [self._map(number, "mask", verify) for number in range(len(self.index.shards))]
        self._documents = [self._map(number, "docs", verify) for number in range(len(self.index.shards))]
        self._known_spans: dict[int, np.ndarray] = {}
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.index.shards)])

    def __len__(self) -> int:
        return self.index.tokens

    @property
    def fingerprint(self) -> str:
        """Of the content: the same for the same tokens and masks in the same shards."""
        content = [self.index.tokenizer, *(asdict(shard) for shard in self.index.shards)]
        return fingerprint(json.dumps(content))

    def documents(self) -> Iterator[Rows]:
        """The documents one by one, as they were added; ids and mask [length]."""
        start = 0
        for lengths in self._documents:
            for length in lengths:
                yield Rows(self._read(self._ids, start, int(length)), self._read(self._masks, start, int(length)))
                start += int(length)

    def count_rows(self, length: int) -> int:
        """How many rows of ``length`` positions there are."""
        return len(self._spans(length))

    def rows(self, length: int, chosen: Sequence[int]) -> Rows:
        """Rows by number: as many whole documents as fit, then padding, of which nothing is learnt.

        Only a document longer than a row is cut; its next row begins with the token that the one before ended with. So
        an answer is not learnt without the question, as it would be if the stream were cut anywhere.
        """
        ids, mask = (np.zeros((len(chosen), length + 1), dtype) for dtype in (np.int32, np.uint8))
        spans = self._spans(length)
        for row, number in enumerate(chosen):
            start, end = (int(place) for place in spans[number])
            ids[row, : end - start] = self._read(self._ids, start, end - start)
            mask[row, : end - start] = self._read(self._masks, start, end - start)
        return Rows(ids, mask)

    def _spans(self, length: int) -> np.ndarray:
        """[rows, 2]: where in the stream each row starts and ends."""
        if length not in self._known_spans:
            lengths = (length for documents in self._documents for length in documents.tolist())
            self._known_spans[length] = packed(lengths, length + 1)
        return self._known_spans[length]

    def _read(self, parts: list[np.ndarray], start: int, count: int) -> np.ndarray:
        """``count`` entries from ``start`` of the parts in a row."""
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
            raise TrainingError(f"{path} has {found} bytes and the index says {expected}; make these shards again")
        dtype = {"ids": self.index.dtype, "mask": np.dtype("u1"), "docs": np.dtype("<u4")}[part]
        content = np.memmap(path, dtype=dtype, mode="r") if expected else np.zeros(0, dtype)
        if verify and hashlib.sha256(content).hexdigest() != shard.checksums[part]:
            raise TrainingError(f"{path} was changed since it was written; make these shards again")
        return content


def packed(lengths: Iterable[int], room: int) -> np.ndarray:
    """Documents that follow each other, of ``lengths``, into rows of ``room`` tokens: [rows, 2], start and end."""
    rows, start, end = array("q"), 0, 0  # not a list: there may be a hundred million
    for length in lengths:
        if end > start and end + length - start > room:
            rows.extend((start, end))
            start = end
        end += length
        while end - start > room:
            rows.extend((start, start + room))
            start += room - 1  # the last token of a row is only predicted in it; from it the next goes on
        if end - start == 1 < length:  # which was predicted already, and no more follow
            start = end
    if end > start:
        rows.extend((start, end))
    return np.array(rows).reshape(-1, 2)


def shard_file(folder: Path, number: int, part: str) -> Path:
    return folder / f"{number:05d}.{part}"


def part_sizes(shard: Shard, dtype: np.dtype) -> dict[str, int]:
    """Bytes."""
    return {"ids": shard.tokens * dtype.itemsize, "mask": shard.tokens, "docs": shard.documents * 4}
