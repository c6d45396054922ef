"""What a pair is measured on: named sets of prompts, of our own, from files, or from public data sets on the hub.

The paper's four tasks are open-ended instructions (Dolly), news summaries (CNN/DailyMail, XSum) and translation (WMT18,
German to English). Its sampling (temperature 0.6 with top-p 0.9 for the first, greedy for the others) is recalled, not
read, and the words of the prompts are ours; so both are defaults here and nothing more.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mlxspec.errors import InvalidRequestError, MlxspecError
from mlxspec.evaluation.hub_rows import HubSet, rows_of
from mlxspec.models.tokens import Message, encode_conversation, encode_prompt
from mlxspec.training.corpus import BadLines, corpus_files
from mlxspec.training.corpus import Document as Record
from mlxspec.training.corpus import prompt_messages as asked
from mlxspec.training.corpus import read_documents as records

OWN = Path(__file__).parent / "prompts"
MOST_SKIPPED = 1000  # prompts that do not fit, before a set is given up
OWN_TASKS = tuple(path.stem for path in sorted(OWN.glob("*.jsonl")))


@dataclass(frozen=True)
class Task:
    """Prompts in tokens, and how the answers are to be sampled unless something else is asked for."""

    name: str
    prompts: list[list[int]]
    sampling: dict[str, float] = field(default_factory=dict)


def question(row: dict[str, Any]) -> str | None:
    """Dolly's open-ended instructions: those that need no text beside them."""
    return row["instruction"] if row["category"] in ("creative_writing", "brainstorming", "open_qa") else None


GREEDY = {"temperature": 0.0}
HUB_TASKS = {
    "dolly": (HubSet("databricks/databricks-dolly-15k", "default", "train"), question,
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
    """The first ``count`` prompts of each task that have at most ``room`` tokens.

    A name is one of TASK_NAMES or a .jsonl file: Spec-Bench's own, which is one task for each of its categories (the
    first turn of each conversation is asked), or lines with "prompt", "text" or "messages". Raises MlxspecError
    for an unknown name, a task of which no prompt fits, and a malformed line, by file and number.
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
                    f"task {title}: no prompt of it fits into {room:g} tokens beside the answer; use fewer --max-tokens"
                )
            found.append(Task(title, fitting, sampling))
    twice = next((title for title, times in Counter(task.name for task in found).items() if times > 1), None)
    if twice:
        raise InvalidRequestError(f"two tasks are named {twice}; give each once, or rename a file")
    return found


Content = str | list[Message]


def named(name: str) -> Iterator[tuple[str, Iterable[Content], dict[str, float]]]:
    """(title, contents, sampling) of what a name stands for."""
    if name in OWN_TASKS:
        yield name, file_contents(OWN / f"{name}.jsonl")[name], {}
    elif name in HUB_TASKS:
        source, text_of, sampling = HUB_TASKS[name]
        yield name, hub_contents(source, text_of), sampling
    elif Path(name).expanduser().is_file():
        for title, contents in file_contents(Path(name).expanduser()).items():
            yield title, contents, {}
    else:
        raise InvalidRequestError(f"no task and no file is named {name}; use a .jsonl file or {', '.join(TASK_NAMES)}")


def hub_contents(source: HubSet, text_of: Callable[[dict[str, Any]], str | None]) -> Iterator[str]:
    for row in rows_of(source):
        try:
            text = text_of(row)
        except (KeyError, TypeError):
            raise InvalidRequestError(
                f"{source.name} has columns {', '.join(map(str, row))} now, and not those that are asked for; give "
                "prompts in a .jsonl file"
            ) from None
        if text:
            yield text


def file_contents(file: Path) -> dict[str, list[Content]]:
    """Prompts by title: the file's name, or Spec-Bench's categories. Raises InvalidRequestError for a bad line."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # a JSON string may hold what splitlines() splits at
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"{file} cannot be read as UTF-8 text ({error}); give a .jsonl file") from None
    if '"turns"' in next((line for line in lines if line.strip()), ""):
        return spec_bench(file, lines)
    bad = BadLines()
    contents = [content_of(record) for record in records(corpus_files([file]), bad)]
    if bad.told:
        raise InvalidRequestError(f"{bad.told[0]}; mend or remove that line")
    if not contents:
        raise InvalidRequestError(f"{file} has no prompts in it; give a line of JSON for each")
    return {file.name.removesuffix(".jsonl"): contents}


def content_of(record: Record) -> Content:
    try:
        return record.content if isinstance(record.content, str) else asked(record.content, None)
    except MlxspecError as error:
        raise InvalidRequestError(f"{record.where}: {error}; mend or remove that line") from None


def spec_bench(file: Path, lines: list[str]) -> dict[str, list[Content]]:
    """Lines {"question_id", "category", "turns"}."""
    found: dict[str, list[Content]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entry = json.loads(line)
                category, turn = entry["category"], entry["turns"][0]
                if not isinstance(category, str) or not isinstance(turn, str) or not turn:
                    raise TypeError("not text")
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise InvalidRequestError(
                    f'{file}:{number}: no line of Spec-Bench, which has "category" and "turns" ({error}); mend it'
                ) from None
            found.setdefault(category, []).append(turn)
    return found


def encoded(content: Content, tokenizer: Any) -> list[int]:
    if isinstance(content, str):
        return encode_prompt(tokenizer, content)
    return encode_conversation(tokenizer, content)
