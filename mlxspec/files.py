"""Atomic writes, JSON and fingerprints, for the whole package."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxspec.errors import InUseError, TrainingError, WriteError, advice_for, in_one_line

SCRATCH_PREFIX = ".writing-"
SAMPLES, SAMPLE_BYTES = 256, 2**14  # a large file's fingerprint covers this many samples of this many bytes


@contextmanager
def locked(folder: Path, file: Path | None = None) -> Iterator[None]:
    """Hold a folder for this process, so that no other process writes to it.

    The operating system releases the lock when the process ends, however it ends. Where a file system has no locks,
    nothing is locked.

    Args:
        folder: The folder.
        file: The file to lock, ``.lock`` in the folder if not given.

    Raises:
        InUseError: Another process holds the folder.
    """
    file = file or folder / ".lock"
    missing = [parent for parent in file.parents if not parent.exists()]
    descriptor, holder = take_lock(file)
    if holder:
        by = f"process {holder}" if holder > 0 else "another process"
        raise InUseError(f"{folder} is in use by {by}; wait until it has ended, or use another folder")
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                file.unlink()
                for parent in missing:  # those that are still empty
                    parent.rmdir()
            os.close(descriptor)


def take_lock(file: Path) -> tuple[int | None, int]:
    """Lock a file without waiting.

    Returns:
        The descriptor that holds the lock, None if it could not be taken; and the number of the process that holds it,
        -1 if that is not known, 0 if no process does.
    """
    for _ in range(100):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # a process that has just ended deleted the folder
            continue
        except OSError:  # not writable, which the first write reports
            return None, 0
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), file.stat()):
                raise FileNotFoundError
        except FileNotFoundError:  # the process that held it has just ended and deleted it
            os.close(descriptor)
            continue
        except OSError as error:
            content = os.read(descriptor, 20).strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):  # a file system without locks
                return None, 0
            return None, int(content) if content.isdigit() and int(content) else -1
        with suppress(OSError):  # a full disk
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())
        return descriptor, 0
    return None, 0


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file or a folder aside and rename it to ``path`` at the end of the block.

    The block creates a file or a folder at the path it is given, which has the same name in a scratch folder next
    to ``path``. Everything is flushed to disk before the rename, and the rename itself after it. If the block raises,
    ``path`` keeps its old content and nothing else remains. If several processes replace the same path, the last wins.

    A file replaces only a file, and a folder only a folder. A file is replaced in one step. A folder is moved aside
    first: if the process is killed at that moment, it stays in the scratch folder.

    Raises:
        WriteError: The disk is full or not writable, or ``path`` is of the other kind.
    """
    with explain_write_errors(path), scratch_folder(path.parent) as scratch:
        aside = scratch / path.name
        yield aside
        for written in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
            sync(written)
        put(aside, path, scratch)
        sync(path.parent)


def put(aside: Path, path: Path, scratch: Path) -> None:
    """Rename ``aside`` to ``path``. A folder that is there is moved to ``scratch``, and back if the rename fails."""
    old = path
    try:
        for attempt in count():
            try:
                os.replace(aside, path)
                return
            except OSError as error:  # a rename cannot replace a folder that has files in it
                full = error.errno in (errno.ENOTEMPTY, errno.EEXIST)
                if not aside.is_dir() or not (full or path.is_symlink()):
                    raise
            old = scratch / f"old {attempt}"
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(path, old)
    except BaseException:
        if not path.exists() and old.exists():
            os.replace(old, path)
        raise


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Create a temporary folder in ``parent``, which is created too and removed again if the block raises."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=SCRATCH_PREFIX) as scratch:
            yield Path(scratch)
    except BaseException:
        with suppress(OSError):  # such as a folder that another process has used meanwhile
            for folder in missing:
                folder.rmdir()
        raise


def write_atomically(path: Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Replace ``path`` in one step: readers see the old content or the new, never a part.

    Args:
        path: The file to write. Missing parent folders are created.
        content: Text, bytes, or a function that writes the file it is given. That file has the suffix of ``path``.
    """
    # A device, such as /dev/null, is written to and not replaced.
    special = path.exists() and not path.is_file() and not path.is_dir()
    with explain_write_errors(path), nullcontext(path) if special else replacing(path) as aside:
        if callable(content):
            content(aside)
        elif isinstance(content, str):
            aside.write_text(content, encoding="utf-8")
        else:
            aside.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Replace ``path`` in one step with ``content`` as indented JSON."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises OSError or ValueError if that is not possible."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError if that is not possible."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Read the arrays of a safetensors or npz file lazily. Raises OSError, RuntimeError or ValueError."""
    arrays = mx.load(str(path))
    if not isinstance(arrays, dict):
        raise ValueError(f"{path} holds no arrays with names")
    return arrays


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had started to write in ``folder``. Call it only while nothing else writes there."""
    for scratch in folder.glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(scratch, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, so that they survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network file systems cannot flush a folder
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextmanager
def explain_write_errors(what: Path | str) -> Iterator[None]:
    """Turn a failed write, such as on a full disk, into a WriteError of one line that names ``what``."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"cannot write {what} ({error.strerror or in_one_line(error)}); {advice_for(error)} and repeat the command"
        ) from error
    except RuntimeError as error:
        if not str(error).startswith(("[write]", "[save")):  # how MLX reports a failed write
            raise
        raise WriteError(
            f"cannot write {what} ({in_one_line(error)}); free some space and repeat the command"
        ) from error


def fingerprint(*parts: str | bytes | memoryview, digits: int = 16) -> str:
    """Return the first hexadecimal digits of the SHA-256 hash of all parts in sequence."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:digits]


def fingerprint_files(files: Iterable[Path], extra: str = "") -> str:
    """Return a fingerprint of the content of files and of ``extra``. It does not depend on where the files are.

    Of a file larger than 4 MB only 256 samples, spread evenly from its start to its end, are read.

    Raises:
        TrainingError: A file cannot be read.
    """
    digest = hashlib.sha256(extra.encode())
    for file in files:
        try:
            with file.open("rb") as content:
                size = file.stat().st_size
                digest.update(f"{size}".encode())
                if size <= SAMPLES * SAMPLE_BYTES:
                    digest.update(content.read())
                    continue
                for sample in range(SAMPLES):
                    content.seek(sample * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                    digest.update(content.read(SAMPLE_BYTES))
        except OSError as error:
            raise TrainingError(
                f"{file} cannot be read ({error.strerror}); check its permissions or leave it out"
            ) from None
    return digest.hexdigest()[:16]
