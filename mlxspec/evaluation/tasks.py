"""Tasks: named sets of prompts. They come with the package, from files, or from public data sets on the hub.

The paper's four tasks are open-ended instructions (Dolly), news summaries (CNN/DailyMail, XSum) and translation (WMT18,
German to English). Their sampling here is temperature 0.6 with top-p 0.9 for Dolly, and greedy for the others. These
values are quoted from memory, and the wording of the prompts is our own. Both are only defaults.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub

from mlxspec.errors import InvalidRequestError, MlxspecError, in_one_line
from mlxspec.models.tokens import Message, encode_conversation, encode_prompt
from mlxspec.training.corpus import BadLines, Document, corpus_files, parse_line, read_documents
from mlxspec.training.prompts import prompt_of

OWN = Path(__file__).parent / "prompts"
MOST_SKIPPED = 1000  # a task is rejected after this many prompts that do not fit
OWN_TASKS = tuple(path.stem for path in sorted(OWN.glob("*.jsonl")))
ROWS = "https://datasets-server.huggingface.co/rows"  # serves pages of a data set, so it need not be downloaded
PAGE = 100  # the most rows that the service returns at once
TIMEOUT = 30.0  # seconds


@dataclass(frozen=True)
class Task:
    """Prompts as token ids, and the task's default sampling."""

    name: str
    prompts: list[list[int]]
    sampling: dict[str, Any] = field(default_factory=dict)


class HubSet(NamedTuple):
    """A public data set on the hub: its name, config and split."""

    name: str
    config: str
    split: str


def open_instruction(row: dict[str, Any]) -> str | None:
    """Return the instruction of a Dolly row if it needs no accompanying text, else None."""
    return row["instruction"] if row["category"] in ("creative_writing", "brainstorming", "open_qa") else None


GREEDY = {"temperature": 0.0}
HUB_TASKS = {
    "dolly": (HubSet("databricks/databricks-dolly-15k", "default", "train"), open_instruction,
              {"temperature": 0.6, "top_p": 0.9}),
    "cnn-dm": (HubSet("abisee/cnn_dailymail", "3.0.0", "test"),
               lambda row: f"Summarize this news article in three sentences:\n\n{row['article']}", GREEDY),
    "xsum": (HubSet("EdinburghNLP/xsum", "default", "test"),
             lambda row: f"Summarize this article in one sentence:\n\n{row['document']}", GREEDY),
    "wmt-de-en": (HubSet("wmt/wmt18", "de-en", "test"),
                  lambda row: f"Translate this German text to English:\n\n{row['translation']['de']}", GREEDY),
}  # fmt: skip
TASK_NAMES = (*OWN_TASKS, *HUB_TASKS)


def read_tasks(names: Sequence[str], tokenizer: Any, count: int, room: float = float("inf")) -> list[Task]:
    """Read the first prompts of each task that are not too long.

    Args:
        names: Names from ``TASK_NAMES``, or .jsonl files. The lines of a file have "prompt", "text" or "messages", or
            they are those of Spec-Bench. Each category of Spec-Bench is a task, whose prompts are the first turns.
        tokenizer: The target's tokenizer.
        count: Number of prompts for each task.
        room: Largest number of tokens in a prompt.

    Returns:
        The tasks.

    Raises:
        MlxspecError: A name is unknown, a task has no prompt that fits, or a line is malformed. The message names its
            file and number.
    """
    if not names:
        raise InvalidRequestError(f"name at least one task: a .jsonl file or {', '.join(TASK_NAMES)}")
    found = []
    for name in names:
        for title, contents, sampling in named(name):
            prompts = (encoded(content, tokenizer) for content in islice(contents, count + MOST_SKIPPED))
            fitting = list(islice((prompt for prompt in prompts if len(prompt) <= room), count))
            if not fitting:
                raise InvalidRequestError(
                    f"task {title}: no prompt fits into the {room:g} tokens that the answer leaves; use a smaller "
                    "max_tokens"
                )
            found.append(Task(title, fitting, sampling))
    twice = next((title for title, times in Counter(task.name for task in found).items() if times > 1), None)
    if twice:
        raise InvalidRequestError(f"two tasks are named {twice}; give each once, or rename a file")
    return found


Content = str | list[Message]


def named(name: str) -> Iterator[tuple[str, Iterable[Content], dict[str, Any]]]:
    """Yield (title, contents, sampling) of each task that a name refers to."""
    if name in OWN_TASKS:
        yield name, file_contents(OWN / f"{name}.jsonl")[name], {}
    elif name in HUB_TASKS:
        source, text_of, sampling = HUB_TASKS[name]
        yield name, hub_contents(source, text_of), sampling
    elif (file := Path(os.path.expanduser(name))).is_file():
        for title, contents in file_contents(file).items():
            yield title, contents, {}
    else:
        raise InvalidRequestError(
            f"there is no task and no file named {name}; use a .jsonl file or {', '.join(TASK_NAMES)}"
        )


def hub_contents(source: HubSet, text_of: Callable[[dict[str, Any]], str | None]) -> Iterator[str]:
    """Yield the prompts of a public data set, as ``text_of`` makes them from its rows.

    Raises:
        InvalidRequestError: The data set cannot be read, or a row has other columns than ``text_of`` expects.
    """
    for row in rows_of(source):
        try:
            text = text_of(row)
        except (KeyError, TypeError):
            raise InvalidRequestError(
                f"{source.name} now has the columns {', '.join(map(str, row))}, not the expected ones; give prompts in "
                "a .jsonl file"
            ) from None
        if text:
            yield text


def rows_of(source: HubSet) -> Iterator[dict[str, Any]]:
    """Yield all rows of a public data set in order. Raises InvalidRequestError if they cannot be read."""
    offset = 0
    while True:
        page: dict[str, Any] = {"offset": offset, "length": PAGE}
        page |= {"dataset": source.name, "config": source.config, "split": source.split}
        try:
            reply = huggingface_hub.get_session().get(ROWS, params=page, timeout=TIMEOUT)
            reply.raise_for_status()
            rows = [entry["row"] for entry in reply.json()["rows"]]
        except Exception as error:  # the network, the service or its reply may fail in many ways
            raise InvalidRequestError(
                f"{source.name} cannot be read from the hub now ({in_one_line(error)}); connect to the network, or "
                "give prompts in a .jsonl file"
            ) from None
        yield from rows
        offset += len(rows)
        if len(rows) < PAGE:
            return


def file_contents(file: Path) -> dict[str, list[Content]]:
    """Return prompts by title. A title is the name of the file or a category of Spec-Bench.

    Raises:
        InvalidRequestError: The file cannot be read, has no prompts, or has a bad line.
    """
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # a JSON string may hold what splitlines() splits at
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{file} cannot be read as UTF-8 text ({error}); give a .jsonl file") from None
    if '"turns"' in next((line for line in lines if line.strip()), ""):
        return spec_bench(file, lines)
    bad = BadLines()
    contents = [content_of(record) for record in read_documents(corpus_files([file]), bad, prompts=True)]
    if bad.examples:
        raise InvalidRequestError(f"{bad.examples[0]}; fix or remove this line")
    if not contents:
        raise InvalidRequestError(f"{file} contains no prompts; write one JSON object per line")
    return {file.name.removesuffix(".jsonl"): contents}


def content_of(record: Document) -> Content:
    """Return the prompt of a document. Raises InvalidRequestError, with the file and line, if it has none."""
    try:
        return prompt_of(record.content)
    except MlxspecError as error:
        raise InvalidRequestError(f"{record.where}: {error}; fix or remove this line") from None


def spec_bench(file: Path, lines: list[str]) -> dict[str, list[Content]]:
    """Return prompts by category from the lines of Spec-Bench. Raises InvalidRequestError for a bad line."""
    found: dict[str, list[Content]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = json.loads(line)
                category = entry["category"]
                turn = parse_line(json.dumps({"turns": entry["turns"]}).encode(), prompts=True)
                if not isinstance(category, str):
                    raise TypeError("the category is no text")
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InvalidRequestError(
                    f'{file}:{number}: not a line of Spec-Bench, which has "category" and "turns" ({error}); fix or '
                    "remove this line"
                ) from None
            found.setdefault(category, []).append(turn)
    return found


def encoded(content: Content, tokenizer: Any) -> list[int]:
    """Return the token ids of a prompt."""
    if isinstance(content, str):
        return encode_prompt(tokenizer, content)
    return encode_conversation(tokenizer, content)
