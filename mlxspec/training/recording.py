"""Recorded answers: the answers of a target to real prompts, with its distribution at each token.

Each answer is a file of its own, written in one step. So several processes may record into one folder, and a process
that is killed leaves only complete answers. The folder can be read by its owner alone, since prompts may hold secrets.
"""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxspec.errors import InvalidRequestError, TrainingError, WriteError, in_one_line
from mlxspec.files import (
    SCRATCH_PREFIX,
    explain_write_errors,
    fingerprint,
    read_json,
    remove_leftovers,
    write_atomically,
    write_json,
)
from mlxspec.models.export import RECORDING

RECORDED_TOP_K = 64  # tokens kept at each position: 384 bytes, or 6 k
RECORD_LIMIT = 10**9  # bytes
FORMAT = 1
ANSWER_FILE = re.compile(r"\d{20}-\d+\.npz")


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
        self.folder, self.limit = Path(folder).resolve(), limit
        check_folder(self.folder)
        self._record = self.folder / RECORDING
        if target is None or self._record.exists():
            self.target = stored_target(self._record)
        else:
            self.target = target_fingerprint(target)
        if target is not None:
            if self.target != target_fingerprint(target):
                raise InvalidRequestError(f"{self.folder} holds answers of another target; record into another folder")
            self._open()
        self.bytes = sum(file.stat().st_size for file in self.files())

    def _open(self) -> None:
        """Create the folder for its owner alone, and its record."""
        with explain_write_errors(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
        if not self._record.exists():
            write_json(self._record, {"format": FORMAT, "target": self.target})

    def files(self) -> list[Path]:
        """Return the file of each answer, the oldest first."""
        return answer_files(self.folder)

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
                f"{self.folder} has reached its limit of {self.limit / 1e6:g} MB; delete some answers, or record into "
                "another folder"
            )
        self._open()  # it may have been deleted
        arrays: dict[str, np.ndarray] = {
            "prompt": np.asarray(prompt, np.int32),
            "answer": np.asarray(answer, np.int32),
            "ids": ids.astype(np.int32),
            "logprobs": logprobs.astype(np.float16),
        }

        def write(path: Path) -> None:
            with open(path, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            self.bytes += path.stat().st_size

        write_atomically(self.folder / f"{time.time_ns():020d}-{os.getpid()}.npz", write)

    def answers(self) -> Iterator[RecordedAnswer]:
        """Yield the recorded answers, the oldest first. Raises TrainingError for a file that is damaged."""
        for file in self.files():
            try:
                with file.open("rb") as content, np.load(content, allow_pickle=False) as arrays:
                    recorded = RecordedAnswer(*(arrays[name] for name in RecordedAnswer._fields))
                    check_answer(recorded)
            except FileNotFoundError:  # deleted by another process
                continue
            except Exception as error:  # NumPy and zipfile raise many kinds
                raise TrainingError(f"{file} is damaged ({in_one_line(error)}); delete it") from None
            yield recorded


def answer_files(folder: Path) -> list[Path]:
    """Return the files of recorded answers in a folder, the oldest first."""
    return sorted(file for file in folder.glob("*.npz") if ANSWER_FILE.fullmatch(file.name))


def delete_recording(folder: Path) -> int:
    """Delete all recorded answers of a folder, and the folder if nothing else is in it.

    It works on a damaged recording too, and deletes what a killed process had started to write.

    Returns:
        The number of answers.

    Raises:
        InvalidRequestError: The folder holds no recorded answers.
    """
    folder = folder.resolve()
    files = answer_files(folder)
    if not files and not (folder / RECORDING).exists():
        raise InvalidRequestError(f"{folder} holds no recorded answers; name a folder that --record has written")
    for file in [*files, folder / RECORDING]:
        file.unlink(missing_ok=True)
    remove_leftovers(folder)
    if not any(folder.iterdir()):
        folder.rmdir()
    return len(files)


def check_answer(recorded: RecordedAnswer) -> None:
    """Raise ValueError if the arrays of an answer do not belong together."""
    prompt, answer, ids, logprobs = recorded
    if prompt.ndim != 1 or answer.ndim != 1 or not len(prompt) or not len(answer):
        raise ValueError("prompt and answer are not lists of tokens")
    if any(part.dtype != np.int32 or part.min() < 0 for part in (prompt, answer, ids)) or logprobs.dtype != np.float16:
        raise ValueError("its numbers are of another type")
    if ids.ndim != 2 or ids.shape != logprobs.shape or len(ids) != len(answer) or ids.shape[1] < 2:
        raise ValueError("its parts have other shapes")
    if (np.diff(np.sort(ids, axis=1)) == 0).any() or not (np.isfinite(logprobs) & (logprobs <= 0.01)).all():
        raise ValueError("its probabilities are not those of different tokens")


def check_folder(folder: Path) -> None:
    """Raise InvalidRequestError if answers cannot be recorded in a folder, because it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise InvalidRequestError(f"{folder} is a file; name a folder for the recorded answers")
    if folder.is_dir() and not (folder / RECORDING).exists():
        own = [path.name.startswith((SCRATCH_PREFIX, ".DS_Store")) for path in folder.iterdir()]
        if not all(own):
            raise InvalidRequestError(f"{folder} holds other files; record into a new folder")


def stored_target(record: Path) -> str:
    """Return the fingerprint of the target whose answers a folder holds."""
    if not record.exists():
        raise InvalidRequestError(f"{record.parent} holds no recorded answers; name a folder that --record has written")
    try:
        content = read_json(record)
        version, target = content["format"], str(content["target"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InvalidRequestError(f"{record} is damaged; record into a new folder") from None
    if version != FORMAT:
        raise InvalidRequestError(f"{record.parent} has another format; record into a new folder")
    return target


def target_fingerprint(target: nn.Module) -> str:
    """Return a fingerprint of a target's 1-D weights. Quantization does not change them."""
    weights: dict[str, Any] = dict(tree_flatten(target.parameters()))
    vectors = sorted((name, weight) for name, weight in weights.items() if weight.ndim == 1)
    return fingerprint(*(part for name, weight in vectors for part in (name, memoryview(weight.astype(mx.float32)))))
