"""Text and chat files, as documents: for pretraining, and for prompts (``prompts.py``).

Sources are files, folders or glob patterns. Files may be gzipped. A ``.txt`` file is one document, unless it exceeds
one megabyte. Larger files are split into several documents. Each line of a ``.jsonl`` file is an object with one of
these contents:

- "text",
- "prompt", with or without "completion",
- "messages",
- for prompts only, "turns" as in Spec-Bench, of which the first is used.

The task of a document is the "task" or "category" of its line, or else the name of its file.

A line is bad if a part of its content would be left out. Files are read line by line, so they may exceed the memory.
"""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxspec.errors import InvalidRequestError, TrainingError, in_one_line
from mlxspec.files import parse_json
from mlxspec.models.tokens import (
    Message,
    encode_formatted,
    encode_texts,
    end_token,
)
from mlxspec.training.shards import Index, ShardWriter

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
MAX_BAD_SHARE = 0.01  # of the lines
MAX_EXAMPLES = 5  # bad lines that are reported one by one
ENCODE_BATCH = 256  # documents; the tokenizer distributes them over the cores
# Fields of a line, and of a message, that hold text in common formats. Others, such as "id", are not content.
CONTENT = ("text", "prompt", "completion", "messages", "response", "instruction", "input", "output", "context",
           "question", "answer", "chosen", "rejected", "conversations", "turns", "tools", "functions",
           "documents")  # fmt: skip
MESSAGE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking", "tool_responses")
TASK_FIELDS = ("task", "category")
FORMATS = 'use one of "text", "prompt", "prompt" with "completion", and "messages"'
LONGEST_TEXT = 2**20  # bytes of a document from a .txt file, and roughly of a batch of documents to encode

Progress = Callable[[int, int, int], None]  # bytes of the files read, all bytes of the files, tokens so far


@dataclass
class BadLines:
    """Counts the lines that were skipped and keeps the first reasons.

    Attributes:
        read: Number of lines, including skipped ones.
        skipped: Number of skipped lines.
        examples: File, line and reason of the first skipped lines.
    """

    read: int = 0
    skipped: int = 0
    examples: list[str] = field(default_factory=list)

    def skip(self, where: str, reason: str) -> None:
        """Count a skipped line."""
        self.skipped += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f"{where}: {reason}")

    def check(self) -> None:
        """Raise TrainingError if more than 1 % of the lines were skipped."""
        if self.skipped > MAX_BAD_SHARE * self.read:
            raise TrainingError(
                f"{self.skipped} of {self.read} lines are bad, more than 1 %; the first is {self.examples[0]}; fix or "
                "remove these lines"
            )


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
        content: A text or a conversation.
        where: The file and line where it starts, "file:line".
        task: The task.
        bytes: Bytes of the files up to the end of the document. In a gzipped file, compressed bytes, a few kB too many.
    """

    content: str | list[Message]
    where: str
    task: str | None = None
    bytes: int = 0


class SmallReads(io.FileIO):
    """A gzipped file that is read a little at a time, so that its position shows how much has been decompressed."""

    def read(self, size: int | None = -1) -> bytes:
        """Return up to 1 kB, or the rest of the file if no size is given."""
        return super().read(size and min(size, 1024))


def corpus_files(sources: Iterable[str | Path]) -> list[Path]:
    """Return the files that ``sources`` name, each once, in order.

    Args:
        sources: Files, folders (searched recursively) and glob patterns.

    Raises:
        TrainingError: A source matches no file, or a file has the wrong suffix.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(os.path.expanduser(source))  # the method raises RuntimeError for an unknown user
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        elif path.exists():
            files = [path]
        else:
            files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise TrainingError(
                f"{source}: no such file, folder or pattern with {', '.join(SUFFIXES)} files; check the name"
            )
        wrong = next((file for file in files if not file.name.endswith(SUFFIXES)), None)
        if wrong:
            raise TrainingError(f"{wrong} is not a {', '.join(SUFFIXES)} file; convert or rename it")
        found.update(dict.fromkeys(files))
    return list(found)


def read_documents(files: Iterable[Path], bad: BadLines, prompts: bool = False) -> Iterator[Document]:
    """Yield the documents of text and chat files.

    Args:
        files: The files.
        bad: Counts malformed lines.
        prompts: Whether to accept lines with "turns", as in Spec-Bench.

    Raises:
        TrainingError: A file cannot be read.
    """
    done = 0
    for file in files:
        zipped = file.suffix == ".gz"
        try:
            with SmallReads(file) if zipped else file.open("rb") as stored:
                lines = gzip.GzipFile(fileobj=stored) if zipped else stored
                text = file.name.endswith((".txt", ".txt.gz"))
                for document in text_documents(file, lines, bad) if text else line_documents(file, lines, bad, prompts):
                    yield replace(document, bytes=done + stored.tell())
            done += file.stat().st_size
        except (OSError, EOFError, zlib.error) as error:  # gzip raises any of these for a damaged file
            raise TrainingError(f"{file} cannot be read ({in_one_line(error)}); replace it or leave it out") from None


def text_documents(file: Path, lines: Iterable[bytes], bad: BadLines) -> Iterator[Document]:
    """Yield the documents of a text file. A document ends after the line that reaches ``LONGEST_TEXT``.

    Args:
        file: The file, for messages and the task.
        lines: The content of the file.
        bad: Counts documents that are empty or not UTF-8.
    """
    for number, content in split_lines(lines):
        bad.read += 1
        try:
            if text := content.decode("utf-8").strip():
                yield Document(text, f"{file}:{number}", file_task(file))
            else:
                bad.skip(f"{file}:{number}", "empty")
        except UnicodeDecodeError as error:
            bad.skip(f"{file}:{number}", f"not UTF-8 (byte {error.start})")


def split_lines(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces of a text as (number of the first line, content). An empty file yields one empty piece."""
    first, size, number = 1, 0, 0
    some: list[bytes] = []
    for number, line in enumerate(lines, 1):
        some.append(line)
        size += len(line)
        if size >= LONGEST_TEXT:
            yield first, b"".join(some)
            first, some, size = number + 1, [], 0
    if some or not number:
        yield first, b"".join(some)


def line_documents(file: Path, lines: Iterable[bytes], bad: BadLines, prompts: bool) -> Iterator[Document]:
    """Yield the documents of a file that has one document on each line.

    Args:
        file: The file, for messages and the task.
        lines: The content of the file.
        bad: Counts malformed lines.
        prompts: As for ``read_documents``.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        bad.read += 1
        try:
            yield Document(parse_line(line, prompts), f"{file}:{number}", line_task(line) or file_task(file))
        except ValueError as error:
            bad.skip(f"{file}:{number}", in_one_line(error))


def file_task(file: Path) -> str:
    """Return the task of a file's documents: its name without the suffix."""
    return file.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".txt")


def line_task(line: bytes) -> str | None:
    """Return the task that a well-formed line names, or None."""
    if not any(name.encode() in line for name in TASK_FIELDS):
        return None
    tasks = map(parse_json(line.decode("utf-8")).get, TASK_FIELDS)
    return next((task for task in tasks if isinstance(task, str) and task), None)


def parse_line(line: bytes, prompts: bool = False) -> str | list[Message]:
    """Return the content of a line. A prompt with a completion becomes a conversation, as in mlx-lm.

    Raises:
        ValueError: The line is malformed, or has content that would be left out. The message states the reason.
    """
    entry = parse_json(line.decode("utf-8"))
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    names = [name for name in CONTENT if name in entry and (entry[name] or name in ("text", "prompt", "messages"))]
    if names in (["text"], ["prompt"]):
        return text_of(entry, names[0])
    if names == ["prompt", "completion"]:
        prompt, completion = (text_of(entry, name) for name in names)
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if names == ["turns"] and prompts:  # Spec-Bench: what the user says, turn by turn
        if not isinstance(entry["turns"], list) or not entry["turns"]:
            raise ValueError('"turns" is empty or not a list')
        return text_of({"turns": entry["turns"][0]}, "turns")
    if names != ["messages"]:
        has = " and ".join(f'"{name}"' for name in names)
        raise ValueError(f"has {has}; {FORMATS}" if names else f"has no text; {FORMATS}")
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError('"messages" is empty or not a list')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError('a message lacks "role" or "content"')
        if unused := next((name for name in MESSAGE_CONTENT if message.get(name)), None):
            raise ValueError(f'a message has "{unused}", which would be left out')
        (message["role"] + message["content"]).encode()  # raises for half a surrogate pair
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def text_of(entry: dict[str, Any], name: str) -> str:
    """Return a field that holds text. Raises ValueError, with the reason, if it does not hold text."""
    text = entry[name]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'"{name}" is empty or not a string')
    text.encode()  # raises for half a surrogate pair
    return text


def tokenize_corpus(
    sources: Iterable[str | Path],
    tokenizer: Any,
    vocab_size: int,
    fingerprint: str,
    folder: Path,
    progress: Progress = lambda done, total, tokens: None,
) -> tuple[Index, BadLines]:
    """Tokenize text files into shards.

    A text is encoded like a prompt: the tokenizer decides whether it starts with BOS. A conversation is formatted by
    the chat template. Every document ends with EOS, except a conversation without a last answer. All tokens but the
    first of a document are learned, since no token precedes the first one.

    Args:
        sources: Files, folders or patterns.
        tokenizer: mlx-lm's tokenizer.
        vocab_size: Size of the vocabulary.
        fingerprint: The tokenizer's fingerprint.
        folder: Folder for the shards.
        progress: Called after each batch of documents.

    Returns:
        The index of the shards, and the lines that were skipped.

    Raises:
        TrainingError: The corpus is empty, a file cannot be read, or too many lines are malformed.
    """
    files, bad = corpus_files(sources), BadLines()
    total = sum(file.stat().st_size for file in files)
    stream = read_documents(files, bad)
    with ShardWriter(folder, vocab_size, fingerprint) as writer:
        for some in group_documents(stream):
            for ids, task in encode_documents(some, tokenizer, bad):
                writer.add(ids, [0] + [1] * (len(ids) - 1), task)
            progress(some[-1].bytes, total, writer.index.tokens)
        if not bad.read:
            raise TrainingError(f"{files[0]} and {len(files) - 1} more files contain no text; use files with text")
        bad.check()
        writer.finish(skipped=bad.skipped, files=[str(file) for file in files])
        return writer.index, bad


def group_documents(stream: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield groups of documents that keep the tokenizer busy and fit into memory."""
    some: list[Document] = []
    size = 0
    for document in stream:
        some.append(document)
        content = document.content
        texts = [content] if isinstance(content, str) else [message["content"] for message in content]
        size += sum(map(len, texts))
        if len(some) == ENCODE_BATCH or size >= LONGEST_TEXT:
            yield some
            some, size = [], 0
    if some:
        yield some


def encode_documents(some: list[Document], tokenizer: Any, bad: BadLines) -> Iterator[tuple[list[int], str | None]]:
    """Yield the token ids and the task of each document.

    Texts are encoded in one call, so that the tokenizer runs in parallel.

    Args:
        some: The documents.
        tokenizer: mlx-lm's tokenizer.
        bad: Counts conversations that the chat template rejects.
    """
    texts = [document.content for document in some if isinstance(document.content, str)]
    batch = iter(encode_texts(tokenizer, texts))
    for document in some:
        if isinstance(document.content, str):
            yield ended(next(batch), tokenizer), document.task
            continue
        answered = document.content[-1]["role"] == "assistant"
        try:
            tokens = encode_formatted(tokenizer, document.content, answered).ids
            yield ended(tokens, tokenizer) if answered else tokens, document.task
        except InvalidRequestError as error:
            bad.skip(document.where, str(error))


def ended(tokens: list[int], tokenizer: Any) -> list[int]:
    """Return a document that ends with EOS.

    White space after the last EOS is removed: a chat template may write line breaks there, but a model stops at EOS. If
    other text follows the last EOS, or there is no EOS, one is appended.
    """
    last = next((i for i in range(len(tokens) - 1, -1, -1) if tokens[i] in tokenizer.eos_token_ids), -1)
    if last >= 0 and not tokenizer.decode(tokens[last + 1 :]).strip():
        return tokens[: last + 1]
    end = end_token(tokenizer)
    return tokens if end is None else [*tokens, end]
