"""A file or folder is replaced whole or not at all."""

import errno
import hashlib
import os
import subprocess
import sys

import pytest

from mlxspec.errors import TrainingError, WriteError, advice_for, in_one_line
from mlxspec.files import (
    SAMPLE_BYTES,
    SAMPLES,
    explain_write_errors,
    fingerprint,
    fingerprint_files,
    read_json,
    remove_leftovers,
    replacing,
    write_atomically,
    write_json,
)


@pytest.fixture
def folder(tmp_path):
    """A folder with a space in its name."""
    (tmp_path / "a folder").mkdir()
    return tmp_path / "a folder"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["new é", "new é".encode(), lambda path: path.write_text("new é", "utf-8")])
def test_text_bytes_and_a_writer_replace_a_file(folder, content):
    (folder / "a.txt").write_text("old")
    write_atomically(folder / "a.txt", content)
    assert (folder / "a.txt").read_text("utf-8") == "new é"
    assert names(folder) == ["a.txt"]


def test_a_writer_that_fails_in_the_middle_leaves_the_old_file_and_nothing_else(folder):
    def write_half(path):
        path.write_text("ne")
        raise OSError(28, "No space left on device")

    (folder / "a.txt").write_text("old")
    with pytest.raises(WriteError, match=r"cannot write .*a\.txt \(No space left on device\); free some space"):
        write_atomically(folder / "a.txt", write_half)
    assert (folder / "a.txt").read_text() == "old"
    assert names(folder) == ["a.txt"]


def test_a_writer_is_given_a_path_with_the_same_suffix(folder):
    given = []
    write_atomically(folder / "x" / "a.safetensors", lambda path: (given.append(path.suffix), path.touch())[1])
    assert given == [".safetensors"]
    assert (folder / "x" / "a.safetensors").exists()


def test_a_folder_replaces_the_old_folder_and_its_files(folder):
    for name in ("old", "new"):
        with replacing(folder / "model") as aside:
            aside.mkdir()
            (aside / name).write_text(name)
    assert names(folder) == ["model"]
    assert names(folder / "model") == ["new"]


def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "old").touch()
    (folder / "model").symlink_to(folder / "elsewhere")
    with replacing(folder / "model") as aside:
        aside.mkdir()
        (aside / "new").touch()
    assert names(folder / "model") == ["new"]
    assert names(folder / "elsewhere") == ["old"]


@pytest.mark.parametrize("kind", ["a file over a folder", "a folder over a file"])
def test_what_is_of_the_other_kind_is_kept(folder, kind):
    path = folder / "mine"
    if kind == "a file over a folder":
        path.mkdir()
        (path / "precious").write_text("kept")
        with pytest.raises(WriteError, match=f"cannot write {path}"):
            write_atomically(path, "new")
        assert (path / "precious").read_text() == "kept"
    else:
        path.write_text("kept")
        with pytest.raises(WriteError, match=f"cannot write {path}"), replacing(path) as aside:
            aside.mkdir()
        assert path.read_text() == "kept"
    assert names(folder) == ["mine"]


def test_ctrl_c_between_the_two_renames_of_a_folder_brings_the_old_one_back(folder, monkeypatch):
    (folder / "model").mkdir()
    (folder / "model" / "old").touch()
    rename, calls = os.replace, []

    def interrupted(source, target):
        rename(source, target)
        calls.append(target)
        if len(calls) == 1:
            raise KeyboardInterrupt

    def write():
        with replacing(folder / "model") as aside:
            aside.mkdir()
            (aside / "new").touch()

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert calls[0].name == "old 0"
    assert names(folder) == ["model"]
    assert names(folder / "model") == ["old"]


def test_a_folder_that_fails_in_the_middle_leaves_the_old_folder_and_nothing_else(folder):
    (folder / "model").mkdir()
    (folder / "model" / "old").touch()

    def write_half():
        with replacing(folder / "model") as aside:
            aside.mkdir()
            (aside / "new").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert names(folder) == ["model"]
    assert names(folder / "model") == ["old"]


def test_json_comes_back_as_it_was_written(folder):
    content = {"a": [1, 2.5, None], "b": {"c": "é"}}
    write_json(folder / "a.json", content)
    assert read_json(folder / "a.json") == content
    (folder / "a.json").write_text("{")
    with pytest.raises(ValueError, match="Expecting"):
        read_json(folder / "a.json")


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(folder):
    (folder / ".writing-abc").mkdir()
    (folder / ".writing-abc" / "a").touch()
    (folder / "kept").touch()
    remove_leftovers(folder)
    assert names(folder) == ["kept"]


def test_a_write_that_fails_is_one_line_that_names_the_file():
    complaint = r"cannot write the text \(No space left\); free some space"
    with pytest.raises(WriteError, match=complaint), explain_write_errors("the text"):
        raise OSError(28, "No space left")
    with pytest.raises(WriteError, match=r"cannot write the text \(two lines\)"), explain_write_errors("the text"):
        raise OSError("two\nlines")


def test_a_fingerprint_is_the_start_of_the_hash_of_all_parts():
    assert fingerprint("ab", b"c") == hashlib.sha256(b"abc").hexdigest()[:16]
    assert fingerprint("abc", digits=12) == hashlib.sha256(b"abc").hexdigest()[:12]


def test_files_have_the_fingerprint_of_their_content_wherever_they_are(folder):
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (folder / name).write_text(content)
    a, b, c = (fingerprint_files([folder / name]) for name in "abc")
    assert a == b != c
    assert fingerprint_files([folder / "a"], "more") != a
    with pytest.raises(TrainingError, match="none cannot be read"):
        fingerprint_files([folder / "none"])


def test_the_first_and_last_bytes_of_a_large_file_count(folder):
    size = SAMPLES * SAMPLE_BYTES + 1
    found = set()
    for place in (None, 0, size - 1):
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        (folder / "a").write_bytes(content)
        found.add(fingerprint_files([folder / "a"]))
    assert len(found) == 3


def test_a_long_message_ends_after_a_sentence_or_a_word():
    hub = (
        "404 Client Error. (Request ID: Root=1-67;abc)\n\nRepository Not Found for url: https://huggingface.co/api/x.\n"
        "Please make sure you specified the correct `repo_id` and `repo_type`.\nIf you are trying to access a private "
        "or gated repo, make sure you are authenticated."
    )
    assert in_one_line(ValueError(hub)) == (
        "404 Client Error. Repository Not Found for url: https://huggingface.co/api/x. Please make sure you specified "
        "the correct `repo_id` and `repo_type`"
    )
    assert in_one_line(ValueError("word " * 100)) == "word " * 39 + "word ..."
    assert in_one_line(ValueError("short.\nlines.")) == "short. lines"
    assert in_one_line(ValueError()) == "ValueError"
    assert len(in_one_line(ValueError("x" * 500))) <= 204


REPLACE_OFTEN = """
import sys
from pathlib import Path
from mlxspec.files import replacing

path = Path(sys.argv[1])
for number in range(100):
    with replacing(path) as aside:
        aside.mkdir()
        (aside / "a").write_text(sys.argv[2])
        (aside / "b").write_text(sys.argv[2])
"""


def test_processes_that_replace_the_same_folder_at_once_leave_it_whole(folder):
    path = folder / "copy"
    processes = [subprocess.Popen([sys.executable, "-c", REPLACE_OFTEN, path, str(n)]) for n in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert (path / "a").read_text() == (path / "b").read_text()
    assert names(folder) == ["copy"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EACCES, "change its permissions or choose another folder"),
        (errno.EROFS, "change its permissions or choose another folder"),
        (errno.ENAMETOOLONG, "choose a shorter or plainer name"),
        (errno.EIO, "check the path and the disk"),
    ],
)
def test_the_advice_fits_the_error(number, words, folder):
    assert advice_for(OSError(number, "?")) == words
    with pytest.raises(WriteError, match=words), explain_write_errors(folder):
        raise OSError(number, "?")


def test_a_bug_is_not_reported_as_a_failed_write(folder):
    with pytest.raises(RuntimeError, match="shapes"), explain_write_errors(folder):
        raise RuntimeError("[matmul] shapes do not fit")
