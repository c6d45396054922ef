"""Recorded answers: the answers of a target to real prompts, with its distribution at each token.

Each answer is a file of its own, written in one step. So several processes may record into one folder, and a process
that is killed leaves only complete answers. The folder and its files can be read by their owner alone, since prompts
may hold secrets.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxspec.errors import InvalidRequestError, TrainingError, WriteError
from mlxspec.files import fingerprint, read_json, write_atomically, write_json
from mlxspec.models.export import RECORDING

RECORDED_TOP_K = 64  # tokens kept at each position: 384 bytes, or 6 k
RECORD_LIMIT = 10**9  # bytes
FORMAT = 1


class RecordedAnswer(NamedTuple):
    """An answer of N tokens, and the target's k most likely tokens where each was drawn."""

    prompt: np.ndarray  # [P] int32
    answer: np.ndarray  # [N] int32
    ids: np.ndarray  # [N, k] int32, in no order
    logprobs: np.ndarray  # [N, k] float16, at temperature 1


class Recording:
    """A folder of recorded answers of one target. It is created if it does not exist.

    Args:
        folder: The folder.
        target: The target, whose ``target_fingerprint`` is kept. None to open a folder that exists.
        limit: Bytes that the folder may hold.

    Raises:
        InvalidRequestError: The folder holds something else, or answers of another target.
        WriteError: The folder cannot be created.
    """

    def __init__(self, folder: str | Path, target: nn.Module | None = None, limit: int = RECORD_LIMIT):
        self.folder, self.limit = Path(folder), limit
        check_folder(self.folder)
        record = self.folder / RECORDING
        if target is None or record.exists():
            self.target = stored_target(record)
        else:
            self.target = target_fingerprint(target)
            write_json(record, {"format": FORMAT, "target": self.target})
            self.folder.chmod(0o700)
        if target is not None and self.target != target_fingerprint(target):
            raise InvalidRequestError(f"{self.folder} holds answers of another target; record into another folder")
        self.bytes = sum(file.stat().st_size for file in self.files())

    def files(self) -> list[Path]:
        """Return the file of each answer, the oldest first."""
        return sorted(self.folder.glob("*.npz"))

    def add(self, prompt: list[int], answer: list[int], ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Record an answer. The arguments are the fields of a decoder's ``kept_probs``. An empty answer is left out.

        Args:
            prompt: Token ids of the prompt [P].
            answer: Token ids of the answer [N].
            ids: The target's k most likely tokens where each token was drawn [N, k].
            logprobs: Their log-probabilities [N, k].

        Raises:
            WriteError: The folder is full, or the disk is.
        """
        if not answer:
            return
        if self.bytes >= self.limit:
            raise WriteError(
                f"{self.folder} holds {self.bytes / 1e6:,.0f} MB of recorded answers, which is its limit; delete some, "
                "or record into another folder"
            )
        arrays: dict[str, Any] = {
            "prompt": np.asarray(prompt, np.int32),
            "answer": np.asarray(answer, np.int32),
            "ids": ids.astype(np.int32),
            "logprobs": logprobs.astype(np.float16),
        }

        def write(path: Path) -> None:
            with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                np.savez(file, **arrays)

        file = self.folder / f"{time.time_ns():020d}-{os.getpid()}.npz"
        write_atomically(file, write)
        self.bytes += file.stat().st_size

    def answers(self) -> Iterator[RecordedAnswer]:
        """Yield the recorded answers, the oldest first. Raises TrainingError for a file that is damaged."""
        for file in self.files():
            try:
                with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
                    recorded = RecordedAnswer(*(arrays[name] for name in RecordedAnswer._fields))
                if not len(recorded.answer) == len(recorded.ids) == len(recorded.logprobs) > 0:
                    raise ValueError("its parts have different lengths")
            except FileNotFoundError:  # deleted by another process
                continue
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                raise TrainingError(f"{file} is damaged ({error}); delete it") from None
            yield recorded

    def delete(self) -> None:
        """Delete all recorded answers, and the folder if nothing else is in it."""
        for file in [*self.files(), self.folder / RECORDING]:
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def check_folder(folder: Path) -> None:
    """Raise InvalidRequestError if answers cannot be recorded in a folder, because it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise InvalidRequestError(f"{folder} is a file; name a folder for the recorded answers")
    if folder.is_dir() and not (folder / RECORDING).exists() and any(folder.iterdir()):
        raise InvalidRequestError(f"{folder} holds other files; record into a new folder")


def stored_target(record: Path) -> str:
    """Return the fingerprint of the target whose answers a folder holds."""
    if not record.exists():
        raise InvalidRequestError(f"{record.parent} holds no recorded answers; name a folder that --record has written")
    try:
        content = read_json(record)
        if content["format"] != FORMAT:
            raise InvalidRequestError(f"{record.parent} has another format; record into a new folder")
        return str(content["target"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"{record} is damaged; record into a new folder") from None


def target_fingerprint(target: nn.Module) -> str:
    """Return a fingerprint of a target's 1-D weights. Quantization does not change them."""
    weights: dict[str, Any] = dict(tree_flatten(target.parameters()))
    vectors = sorted((name, weight) for name, weight in weights.items() if weight.ndim == 1)
    return fingerprint(*(part for name, weight in vectors for part in (name, memoryview(weight.astype(mx.float32)))))
