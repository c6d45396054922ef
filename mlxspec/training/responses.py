"""The distillation data: the target's own answers to prompts.

Prompts are answered in groups. The answers of a group depend only on the seed and the group's number. An interrupted
run therefore continues with the next group. It ends with the same shards, whatever the number of processes.

Source: Goel et al., arXiv 2403.00858, section on data.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import make_sampler

from mlxspec.errors import InvalidRequestError, NumericalError
from mlxspec.models.sharding import gathered, launched_processes
from mlxspec.settings import option
from mlxspec.training.batched_answers import BatchSteps, sample_answers
from mlxspec.training.prompts import Prompt
from mlxspec.training.run_folder import barrier, broadcast, is_first_process
from mlxspec.training.shards import Index, ShardWriter, TokenShards

TRIED_TOKENS = 32  # length of the longest prompt in a trial
# How far logits may differ, as a share of their spread: rounding is below it, another prompt's mask far above.
TOLERANCE, TOLERANCE_16_BIT = 0.02, 0.2
LEAST_LOGPROB = -50.0  # some models have tokens of log-probability -inf

Progress = Callable[[int, int, int], None]  # answers done, total answers, tokens so far


@dataclass(frozen=True)
class AnswerSettings:
    """How the target samples its answers. Raises InvalidRequestError for a value outside its range."""

    temperatures: tuple[float, ...] = option(
        (0.0, 0.3, 0.7, 1.0), "Sampling temperatures. Every prompt is answered at each of them."
    )
    top_p: float = option(0.95, "Sample from the most likely tokens that together have this probability.")
    samples: int = option(
        1,
        "Answers to each prompt at each temperature above 0. Without prompts: the total number of texts, divided among "
        "the temperatures above 0.",
    )
    max_tokens: int = option(256, "Maximum length of an answer, in tokens.")
    group: int = option(64, "Prompts that are answered in one batch.")
    seed: int = option(0, "Random seed. Runs with the same seed give the same result.")

    def __post_init__(self) -> None:
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
    """The prompts that the target answers."""

    prompts: tuple[str, ...] = option(
        (),
        "Files with prompts. Answers in them are not used. Without prompts, "
        "the target writes texts that start with BOS.",
    )
    system: str | None = option(None, "System prompt for prompts that have none.")


@dataclass(frozen=True)
class Group:
    """Prompts that are answered in one batch at one temperature.

    Attributes:
        number: Number of the group, counted from 0.
        prompts: The prompts.
        temperature: Sampling temperature.
    """

    number: int
    prompts: list[Prompt]
    temperature: float


def prompt_groups(prompts: list[Prompt], settings: AnswerSettings) -> list[Group]:
    """Return all groups in a fixed order: the first prompts at every temperature, then the next prompts."""
    groups: list[Group] = []
    for start in range(0, len(prompts), settings.group):
        for temperature in settings.temperatures:
            for _ in range(settings.samples if temperature else 1):  # at temperature 0 all answers are equal
                groups.append(Group(len(groups), prompts[start : start + settings.group], temperature))
    return groups


def bos_groups(bos: int | None, settings: AnswerSettings) -> list[Group]:
    """Return groups for ``samples`` texts that start from BOS. The groups alternate between the temperatures above 0.

    Raises:
        InvalidRequestError: There is no BOS token, no temperature above 0, or only one sample.
    """
    if bos is None:
        raise InvalidRequestError("the target's tokenizer has no BOS token to start a text with; use prompts")
    temperatures = [temperature for temperature in settings.temperatures if temperature]
    if settings.samples < 2 or not temperatures:
        raise InvalidRequestError("without prompts, set samples to the number of texts, and use a temperature above 0")
    count = math.ceil(settings.samples / settings.group)
    sizes = [min(settings.group, settings.samples - number * settings.group) for number in range(count)]
    return [Group(n, [Prompt([bos])] * size, temperatures[n % len(temperatures)]) for n, size in enumerate(sizes)]


def write_answers(
    target: nn.Module,
    tokenizer: Any,
    vocab_size: int,
    fingerprint: str,
    groups: list[Group],
    settings: AnswerSettings,
    folder: Path,
    progress: Progress = lambda done, total, tokens: None,
    together: bool = True,
    divided: bool = False,
) -> Index:
    """Let the target answer all groups, and write prompts with answers into shards.

    Each document is a prompt and its answer. Only the answer is learned. A repeated call resumes an interrupted one.
    Under ``mlx.launch`` the groups are distributed over the processes, or, if the target is divided, all processes
    answer all groups. The first process writes.

    Args:
        target: The target model.
        tokenizer: The target's tokenizer.
        vocab_size: Size of the vocabulary.
        fingerprint: The tokenizer's fingerprint.
        groups: All groups of the stage, including those that an earlier call answered.
        settings: How to sample.
        folder: Folder for the shards.
        progress: Called after each group with the answers done, all answers, and the tokens so far.
        together: Whether to answer the prompts of a group in one batch. If False, they are answered one at a time.
        divided: Whether the target is divided over the processes.

    Returns:
        The index of the shards.

    Raises:
        NumericalError: The target computes NaN.
    """
    if is_first_process():
        with ShardWriter(folder, vocab_size, fingerprint) as writer:
            answer_missing_groups(target, tokenizer, groups, settings, writer, progress, together, divided)
    else:
        answer_missing_groups(target, tokenizer, groups, settings, None, progress, together, divided)
    return Index.read(folder)


def answer_missing_groups(
    target: nn.Module,
    tokenizer: Any,
    groups: list[Group],
    settings: AnswerSettings,
    writer: ShardWriter | None,
    progress: Progress,
    together: bool,
    divided: bool,
) -> None:
    """Answer the groups that the shards do not contain yet.

    Args:
        target: The target model.
        tokenizer: The target's tokenizer.
        groups: All groups of the stage.
        settings: How to sample.
        writer: Writer of the shards in the first process, None in the others.
        progress: Called after each group with the answers done, all answers, and the tokens so far.
        together: Whether to answer the prompts of a group in one batch.
        divided: Whether the target is divided over the processes.

    Raises:
        NumericalError: The target computes NaN.
    """
    distributed = None if divided else launched_processes()
    rank, processes = (distributed.rank(), distributed.size()) if distributed is not None else (0, 1)
    done = broadcast(writer.index.notes.get("groups", 0) if writer else 0)
    total, answered = sum(len(group.prompts) for group in groups), sum(len(group.prompts) for group in groups[:done])
    while done < len(groups):
        turn = groups[done : done + processes]
        mine = turn[rank] if rank < len(turn) else None
        answers = answer_group(target, tokenizer, mine, settings, together) if mine else []
        of_all = [answers] if distributed is None else gathered(answers, distributed)
        for group, group_answers in zip(turn, of_all[: len(turn)], strict=True):
            answered += len(group_answers)
            if writer:
                for prompt, answer in zip(group.prompts, group_answers, strict=True):
                    writer.add(prompt + answer, [0] * len(prompt) + [1] * len(answer), prompt.task)
        done += len(turn)
        if writer:
            writer.commit(groups=done)
            progress(answered, total, writer.index.tokens)
    if writer:
        writer.finish(groups=done, max_tokens=settings.max_tokens, ends=sorted(tokenizer.eos_token_ids))
    barrier()  # no process reads the shards before they are finished


def answer_group(
    target: nn.Module, tokenizer: Any, group: Group, settings: AnswerSettings, together: bool = True
) -> list[list[int]]:
    """Sample an answer to each prompt of a group.

    An answer ends with the EOS token that the target sampled, unless ``max_tokens`` cut it off.

    Args:
        target: The target model.
        tokenizer: The target's tokenizer.
        group: The prompts and their temperature.
        settings: How to sample.
        together: Whether to answer the prompts in one batch.

    Returns:
        The token ids of each answer.

    Raises:
        NumericalError: The target computes NaN.
    """
    mx.random.seed(settings.seed * 1_000_003 + group.number)
    sample = make_sampler(temp=group.temperature, top_p=settings.top_p if settings.top_p < 1 else 0.0)
    failed: list[mx.array] = []

    def sampler(logits: mx.array) -> mx.array:
        logits = logits.astype(mx.float32)
        failed.append(mx.isnan(logits.max(-1)).any())
        mx.async_eval(failed[-1])  # else it would keep the logits in memory
        return sample(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    batches = [group.prompts] if together else [[prompt] for prompt in group.prompts]
    ends = set(tokenizer.eos_token_ids)
    found = [
        answer for prompts in batches for answer in sample_answers(target, prompts, ends, sampler, settings.max_tokens)
    ]
    if failed and mx.stack(failed).any().item():
        raise NumericalError(
            "the target computes NaN instead of probabilities; check its weights, or use another target"
        )
    return found


def batches_like_single(target: nn.Module, groups: list[Group]) -> bool:
    """Return whether the target computes the same logits for prompts in a batch as for each prompt alone.

    Some models fail this test for prompts of different lengths. Gemma 2's attention, for example, applies the mask of
    one prompt to another.

    Args:
        target: The target model.
        groups: The groups to answer. The trial uses the start of their longest prompt, and a quarter of that start.
    """
    if max(len(group.prompts) for group in groups) < 2:
        return True
    longest = max((prompt[:TRIED_TOKENS] for group in groups for prompt in group.prompts), key=len)
    pair = [longest[: max(1, len(longest) // 4)], longest]
    try:
        batch = first_logprobs(target, pair)
    except Exception:  # mlx-lm and MLX raise various exceptions for shapes that do not fit
        batch = None
    agrees = False
    if batch is not None:
        alone = mx.concatenate([first_logprobs(target, [prompt]) for prompt in pair])
        tolerance = TOLERANCE if batch.dtype == mx.float32 else TOLERANCE_16_BIT
        difference = mx.abs(batch - alone).max()
        agrees = bool((difference <= tolerance * mx.std(alone, axis=-1).max() + 1e-5).item())
    return broadcast(agrees)


def first_logprobs(target: nn.Module, prompts: list[list[int]]) -> mx.array:
    """Return the log-probabilities [2 × prompts, V] of the next token in a batch of prompts.

    The first row of a prompt follows the prompt. The second row follows the prompt and one more token, which is the
    first token of the first prompt.
    """
    step = BatchSteps(target, prompts)
    first = step(None)
    second = step(mx.full(len(prompts), prompts[0][0]))
    logits = mx.stack([first, second], axis=1).flatten(0, 1)
    return mx.maximum(logits - mx.logsumexp(logits, axis=-1, keepdims=True), LEAST_LOGPROB)


def answer_counts(shards: TokenShards) -> dict[str, int]:
    """Count the answers, the tokens, and the answers that are duplicate, empty or truncated at ``max_tokens``."""
    seen: set[bytes] = set()
    counts = {"answers": 0, "tokens": len(shards), "duplicates": 0, "empty": 0, "truncated": 0}
    limit, ends = shards.index.notes.get("max_tokens"), shards.index.notes.get("ends", [])
    for ids, mask in shards.documents():
        answer_length = int(mask.sum())
        digest = hashlib.sha256(ids.tobytes()).digest()
        counts["answers"] += 1
        counts["duplicates"] += digest in seen
        counts["empty"] += answer_length <= 1  # only EOS
        counts["truncated"] += answer_length == limit and ids[-1] not in ends
        seen.add(digest)
    return counts
