"""The distillation data: the target itself answers the prompts (Goel et al., arXiv 2403.00858, section on data).

Prompts are answered in groups. A group's answers depend on the seed and its number alone, so that a run that was
killed goes on with the group it was at and ends with the same shards, on however many processes.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import batch_generate
from mlx_lm.sample_utils import make_sampler

from mlxspec.errors import InvalidRequestError
from mlxspec.models.tokens import end_token
from mlxspec.settings import option
from mlxspec.training.processes import as_the_first_says, is_first, wait_for_all
from mlxspec.training.shards import Index, ShardWriter, TokenShards

Progress = Callable[[int, int, int], None]  # answers done, answers in all, tokens so far


@dataclass(frozen=True)
class AnswerSettings:
    """How the target answers. Raises InvalidRequestError for a value outside its range."""

    temperatures: tuple[float, ...] = option((0.0, 0.3, 0.7, 1.0), "Every prompt is answered at each of them.")
    top_p: float = option(0.95, "Draw from the most likely tokens that together have this probability.")
    samples: int = option(1, "Answers to a prompt at each temperature above 0; without prompts, texts in all.")
    max_tokens: int = option(256, "Longest answer, in tokens.")
    group: int = option(64, "Prompts that are answered at once.")
    seed: int = option(0, "Runs with the same seed repeat exactly.")

    def __post_init__(self):
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            raise InvalidRequestError(f"temperatures are {self.temperatures}; use numbers of 0 or more")
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError(f"top_p is {self.top_p}; use a number in (0, 1]")
        if not 0 <= self.seed < 2**32:
            raise InvalidRequestError(f"seed is {self.seed}; use a number in [0, 2**32)")
        for name in ("samples", "max_tokens", "group"):
            if getattr(self, name) < 1:
                raise InvalidRequestError(f"{name} is {getattr(self, name)}; use 1 or more")


@dataclass(frozen=True)
class DistillData:
    prompts: tuple[str, ...] = option((), "Files of prompts; without, the target writes from nothing.")
    system: str | None = option(None, "System prompt.")


@dataclass(frozen=True)
class Group:
    """Prompts that are answered at once, at one temperature."""

    number: int
    prompts: list[list[int]]
    temperature: float


def groups(prompts: list[list[int]], settings: AnswerSettings) -> list[Group]:
    """All the work, in a fixed order: some prompts at every temperature, then the next ones."""
    found: list[Group] = []
    for start in range(0, len(prompts), settings.group):
        for temperature in settings.temperatures:
            for _ in range(settings.samples if temperature else 1):  # a second one would be the same
                found.append(Group(len(found), prompts[start : start + settings.group], temperature))
    return found


def groups_from_nothing(bos: int | None, settings: AnswerSettings) -> list[Group]:
    """``samples`` texts from BOS, the temperatures above 0 in turn.

    Raises InvalidRequestError where that makes no sense.
    """
    if bos is None:
        raise InvalidRequestError("the target's tokenizer has no token to begin a text with; give prompts")
    temperatures = [temperature for temperature in settings.temperatures if temperature]
    if settings.samples < 2 or not temperatures:
        raise InvalidRequestError("without prompts, say how many texts with samples, at a temperature above 0")
    count = math.ceil(settings.samples / settings.group)
    sizes = [min(settings.group, settings.samples - number * settings.group) for number in range(count)]
    return [Group(n, [[bos]] * size, temperatures[n % len(temperatures)]) for n, size in enumerate(sizes)]


def answer_all(
    target: nn.Module,
    tokenizer: Any,
    vocab_size: int,
    fingerprint: str,
    work: list[Group],
    settings: AnswerSettings,
    folder: Path,
    progress: Progress = lambda done, total, tokens: None,
) -> Index:
    """Let the target answer all groups into shards; each answer is a document of which the answer is to be learnt.

    Goes on where an earlier call was interrupted. Under ``mlx.launch`` the groups are dealt out to the processes, and
    the first one writes.
    """
    if is_first():
        with ShardWriter(folder, vocab_size, fingerprint) as writer:
            answer_groups(target, tokenizer, work, settings, writer, progress)
    else:
        answer_groups(target, tokenizer, work, settings, None, progress)
    return Index.read(folder)


def answer_groups(
    target: nn.Module,
    tokenizer: Any,
    work: list[Group],
    settings: AnswerSettings,
    writer: ShardWriter | None,
    progress: Progress,
) -> None:
    """Answer what ``writer`` does not have yet; None in all processes but the first."""
    distributed = mx.distributed.init()
    done = as_the_first_says(writer.index.notes.get("groups", 0) if writer else 0)
    total, answered = sum(len(group.prompts) for group in work), sum(len(group.prompts) for group in work[:done])
    while done < len(work):
        turn = work[done : done + distributed.size()]
        mine = turn[distributed.rank()] if distributed.rank() < len(turn) else None
        answers = answer_group(target, tokenizer, mine, settings) if mine else []
        for group, theirs in zip(turn, gathered(answers, turn, settings, distributed), strict=True):
            answered += len(theirs)
            if writer:
                for prompt, answer in zip(group.prompts, theirs, strict=True):
                    writer.add(prompt + answer, [0] * len(prompt) + [1] * len(answer))
        done += len(turn)
        if writer:
            writer.commit(groups=done)
            progress(answered, total, writer.index.tokens)
    if writer:
        writer.finish(groups=done, max_tokens=settings.max_tokens, end=end_token(tokenizer))
    wait_for_all()  # nobody reads the shards before they are finished


def answer_group(target: nn.Module, tokenizer: Any, group: Group, settings: AnswerSettings) -> list[list[int]]:
    """An answer to each prompt, in tokens, with the EOS that ended it; without one if max_tokens did."""
    mx.random.seed(settings.seed * 1_000_003 + group.number)
    answers = batch_generate(
        target,
        tokenizer,
        group.prompts,
        max_tokens=settings.max_tokens,
        sampler=make_sampler(temp=group.temperature, top_p=settings.top_p if settings.top_p < 1 else 0.0),
        return_token_ids=True,
        completion_batch_size=settings.group,
        prefill_batch_size=settings.group,
    ).token_ids
    end = end_token(tokenizer)  # mlx-lm leaves it out
    return [answer if len(answer) == settings.max_tokens else [*answer, end] for answer in answers]


def gathered(
    answers: list[list[int]], turn: list[Group], settings: AnswerSettings, distributed: mx.distributed.Group
) -> Iterator[list[list[int]]]:
    """What each process answered to its group of ``turn``, on all of them."""
    if distributed.size() == 1:
        return iter([answers][: len(turn)])
    table = np.full((settings.group, settings.max_tokens), -1, np.int32)
    for row, answer in enumerate(answers):
        table[row, : len(answer)] = answer
    tables = np.array(mx.distributed.all_gather(mx.array(table)[None], group=distributed))
    return (
        [[token for token in row.tolist() if token >= 0] for row in part[: len(group.prompts)]]
        for part, group in zip(tables, turn, strict=False)
    )


def validated(shards: TokenShards) -> dict[str, int]:
    """Counts of answers that are of little use: given twice, empty, or cut off by max_tokens."""
    seen, counts = set(), {"answers": 0, "tokens": len(shards), "duplicates": 0, "empty": 0, "truncated": 0}
    limit, end = (shards.index.notes.get(name) for name in ("max_tokens", "end"))
    for ids, mask in shards.documents():
        learnt = int(mask.sum())
        digest = hashlib.sha256(ids.tobytes()).digest()
        counts["answers"] += 1
        counts["duplicates"] += digest in seen
        counts["empty"] += learnt <= 1  # nothing but the EOS
        counts["truncated"] += learnt == limit and ids[-1] != end
        seen.add(digest)
    return counts
