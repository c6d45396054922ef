"""Text and chat files, plain or gzipped, in folders and globs: documents for pretraining, prompts for the target.

A ``.txt`` file is one document, or several of a megabyte if it is larger. A line of a ``.jsonl`` file is an object with
"text", "prompt" or "messages". Files are read a line at a time, so they may be larger than memory.
"""

import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxspec.errors import InvalidRequestError, TrainingError, in_one_line
from mlxspec.models.tokens import Message, encode_conversation, encode_prompt, end_token
from mlxspec.training.shards import Index, ShardWriter

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
MOST_BAD = 0.01  # of the lines
NAMED = 5  # bad lines that are told one by one
ENCODED_AT_ONCE = 256  # documents; the tokenizer spreads them over the cores
LONGEST_TEXT = 2**20  # bytes of a .txt in one document, and roughly of documents that are encoded at once

Progress = Callable[[int, int, int], None]  # bytes read, bytes in all, tokens so far


@dataclass
class BadLines:
    """Lines that were skipped, and why; more than 1 % of all are an error."""

    read: int = 0
    skipped: int = 0
    told: list[str] = field(default_factory=list)

    def skip(self, where: str, reason: str) -> None:
        self.skipped += 1
        if len(self.told) < NAMED:
            self.told.append(f"{where}: {reason}")

    def check(self) -> None:
        """Raise TrainingError if too many lines were bad."""
        if self.skipped > MOST_BAD * self.read:
            raise TrainingError(
                f"{self.skipped} of {self.read} lines are bad, more than 1 %; the first is {self.told[0]}; mend or "
                "remove them"
            )


@dataclass(frozen=True)
class Record:
    """One document, and where it was."""

    content: str | list[Message]
    is_prompt: bool
    where: str  # file:line
    bytes: int  # of the file, up to and with it


def corpus_files(sources: Iterable[str | Path]) -> list[Path]:
    """The files that ``sources`` name: files, folders (searched through) and globs, each once, in order.

    Raises TrainingError for a source that names nothing.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES))
        elif path.exists():
            files = [path]
        else:
            files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise TrainingError(f"{source}: no such file, folder or pattern with {', '.join(SUFFIXES)} in it")
        wrong = next((file for file in files if not file.name.endswith(SUFFIXES)), None)
        if wrong:
            raise TrainingError(f"{wrong} is none of {', '.join(SUFFIXES)}; convert it, or rename it if it is")
        found.update(dict.fromkeys(files))
    return list(found)


def records(files: Iterable[Path], bad: BadLines) -> Iterator[Record]:
    """All documents of the files; lines that are none go into ``bad``. Raises TrainingError for an unreadable file."""
    done = 0
    for file in files:
        try:
            with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
                if file.name.endswith((".txt", ".txt.gz")):
                    yield from text_records(file, lines, done, bad)
                else:
                    yield from line_records(file, lines, done, bad)
            done += file.stat().st_size
        except (OSError, EOFError, zlib.error) as error:  # gzip raises all three for a damaged file
            raise TrainingError(
                f"{file} cannot be read ({in_one_line(error)}); make it readable or leave it out"
            ) from None


def text_records(file: Path, lines: Iterable[bytes], done: int, bad: BadLines) -> Iterator[Record]:
    """The text of a file, cut after the line with which it has grown too long."""
    position = 0
    for number, content in pieces(lines):
        position += len(content)
        bad.read += 1
        try:
            if text := content.decode("utf-8").strip():
                yield Record(text, False, f"{file}:{number}", done + min(position, file.stat().st_size))
            else:
                bad.skip(f"{file}:{number}", "empty")
        except UnicodeDecodeError as error:
            bad.skip(f"{file}:{number}", f"not UTF-8 (byte {error.start})")


def pieces(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, content) of each piece; an empty file has one, which is empty."""
    first, some, size, number = 1, [], 0, 0
    for number, line in enumerate(lines, 1):
        some.append(line)
        size += len(line)
        if size >= LONGEST_TEXT:
            yield first, b"".join(some)
            first, some, size = number + 1, [], 0
    if some or not number:
        yield first, b"".join(some)


def line_records(file: Path, lines: Iterable[bytes], done: int, bad: BadLines) -> Iterator[Record]:
    position = 0
    for number, line in enumerate(lines, 1):
        position += len(line)
        if not line.strip():
            continue
        bad.read += 1
        try:
            content, is_prompt = parsed(line)
            yield Record(content, is_prompt, f"{file}:{number}", done + min(position, file.stat().st_size))
        except ValueError as error:
            bad.skip(f"{file}:{number}", in_one_line(error))


def parsed(line: bytes) -> tuple[str | list[Message], bool]:
    """(content, whether it is a prompt) of a line; ValueError, with the reason, if it is none."""
    entry = json.loads(line.decode("utf-8"))
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    for name in ("text", "prompt"):
        if name in entry:
            if not isinstance(entry[name], str) or not entry[name].strip():
                raise ValueError(f'"{name}" is not a text, or empty')
            entry[name].encode()  # half a surrogate pair is no text
            return entry[name], name == "prompt"
    messages = entry.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError('has neither "text" nor "prompt" nor "messages"')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError('a message lacks "role" or "content"')
    return [{"role": message["role"], "content": message["content"]} for message in messages], True


def tokenize_corpus(
    sources: Iterable[str | Path],
    tokenizer: Any,
    vocab_size: int,
    fingerprint: str,
    folder: Path,
    progress: Progress = lambda done, total, tokens: None,
) -> tuple[Index, BadLines]:
    """Text files -> shards in ``folder``: each document with BOS before and EOS behind it, everything to be learnt.

    A conversation goes through the chat template. Raises TrainingError for an empty corpus, an unreadable file or too
    many bad lines.
    """
    files, bad = corpus_files(sources), BadLines()
    total = sum(file.stat().st_size for file in files)
    stream = records(files, bad)
    with ShardWriter(folder, vocab_size, fingerprint) as writer:
        for some in grouped(stream):
            for ids in encoded(some, tokenizer, bad):
                writer.add(ids, [0] + [1] * (len(ids) - 1))
            progress(some[-1].bytes, total, writer.index.tokens)
        if not bad.read:
            raise TrainingError(f"{files[0]} and {len(files) - 1} more files hold no text; give some")
        bad.check()
        writer.finish(skipped=bad.skipped, files=[str(file) for file in files])
        return writer.index, bad


def grouped(stream: Iterable[Record]) -> Iterator[list[Record]]:
    """So many records that the tokenizer has something to do, and no more than fit into memory easily."""
    some, size = [], 0
    for record in stream:
        some.append(record)
        texts = [record.content] if isinstance(record.content, str) else [part["content"] for part in record.content]
        size += sum(map(len, texts))
        if len(some) == ENCODED_AT_ONCE or size >= LONGEST_TEXT:
            yield some
            some, size = [], 0
    if some:
        yield some


def encoded(some: list[Record], tokenizer: Any, bad: BadLines) -> Iterator[list[int]]:
    """Token ids of each record; plain texts in one call, as the tokenizer then works on them in parallel."""
    texts = [record.content for record in some if isinstance(record.content, str)]
    encode = tokenizer._tokenizer  # mlx-lm's wrapper takes one text at a time
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    batch = iter(encode(texts, **options)["input_ids"] if texts else [])
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = end_token(tokenizer)
    eos = [] if end is None else [end]
    for record in some:
        if isinstance(record.content, str):
            yield [*bos, *next(batch), *eos]
            continue
        *before, last = record.content
        try:
            if last["role"] != "assistant":
                yield encode_conversation(tokenizer, record.content)
            else:
                answer = tokenizer.encode(last["content"], add_special_tokens=False, split_special_tokens=True)
                yield [*encode_conversation(tokenizer, before), *answer, *eos]
        except InvalidRequestError as error:
            bad.skip(record.where, str(error))


def read_prompts(
    sources: Iterable[str | Path], tokenizer: Any, system: str | None, words: int = 0
) -> tuple[list[list[int]], BadLines]:
    """The token ids of each prompt in the files; of a conversation, everything before its last answer.

    With ``words``, only that many at the beginning of each text.

    Raises TrainingError if there are none.
    """
    bad, prompts = BadLines(), []
    for record in records(corpus_files(sources), bad):
        try:
            if isinstance(record.content, str):
                text = " ".join(record.content.split()[:words]) if words else record.content
                prompts.append(encode_prompt(tokenizer, text, system))
            else:
                prompts.append(encode_conversation(tokenizer, asked(record.content, system)))
        except InvalidRequestError as error:
            bad.skip(record.where, str(error))
    if not bad.read:
        raise TrainingError(
            f"{', '.join(map(str, sources))}: no prompts in there; give some, or none to sample from BOS"
        )
    bad.check()
    return prompts, bad


def split_prompts(
    prompts: list[list[int]], held_out: int, max_tokens: int, context: int | None
) -> tuple[list[list[int]], list[list[int]]]:
    """(to learn from, held out): the last ``held_out`` are kept apart, and what equals one of them is not learnt.

    Left out of both are prompts that leave no room for ``max_tokens`` in the target's ``context``. Raises TrainingError
    if there are none to learn from.
    """
    fitting = [prompt for prompt in prompts if context is None or len(prompt) + max_tokens <= context]
    if not fitting:
        raise TrainingError(
            f"the target's context of {context} tokens has no room for a prompt and {max_tokens} tokens; use fewer "
            "max_tokens"
        )
    kept = fitting[len(fitting) - min(held_out, len(fitting)) :]
    unseen = {tuple(prompt) for prompt in kept}
    learnt = [prompt for prompt in fitting if tuple(prompt) not in unseen]
    if not learnt:
        raise TrainingError(
            f"there are {len(fitting)} prompts and {held_out} are held out for evaluation; give more, or a lower count"
        )
    return learnt, kept


def asked(messages: list[Message], system: str | None) -> list[Message]:
    """The conversation up to its last question."""
    if messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if system is not None and messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if not messages:
        raise InvalidRequestError("nobody asks anything")
    return messages
