"""Finetune a drafter on an unbalanced mix of tasks, with and without worst-case training and retention.

    python scripts/robust_drafters.py TARGET DRAFTER ANSWERS PROMPTS OUT --absent translation --seeds 3

ANSWERS is a folder that `mlxspec train distill` wrote from prompts with tasks, such as those of one_night_prompts.py.
The first answers of each task are what the drafter has learned before. The others make the mix, without the absent
tasks. PROMPTS is a file of other prompts with tasks. The target answers the first of each task, once, and the block
efficiency of each drafter on these answers is computed as `chat_drafters.py tasks` does. OUT keeps what is finished, so
a command that is repeated continues.
"""

import mlxspec  # noqa: F401  first, so that MLX uses OpenBLAS

# isort: split

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from chat_drafters import expected_blocks

from mlxspec.files import read_json, write_json
from mlxspec.training import stages
from mlxspec.training.batched_answers import sample_answers
from mlxspec.training.drafter_folders import load_drafter
from mlxspec.training.losses import Loss
from mlxspec.training.prompts import read_prompts
from mlxspec.training.retention import NO_RETENTION, Retention
from mlxspec.training.robust import UNIFORM, Robust
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.target import Target
from mlxspec.training.trainer import TrainingSettings

TOP_K = 64
MIX = ["dolly:480", "stories:60", "gsm8k:30", "summarization:30"]


def write(documents: list, target: Target, folder: Path) -> TokenShards:
    """Write documents as shards, unless they are there."""
    if not (folder / "index.json").exists():
        with ShardWriter(folder, target.vocab_size, target.tokenizer_fingerprint) as writer:
            for (ids, mask), task in documents:
                writer.add(ids.tolist(), mask.tolist(), task)
            writer.finish()
    return TokenShards(folder)


class Answer(NamedTuple):
    """Token ids of a prompt and of the target's answer, and its probability of each token of the answer."""

    prompt: list[int]
    tokens: list[int]
    probs: list[float]


def answered(target: Target, prompts: list[list[int]], temperature: int, max_tokens: int, file: Path) -> list[Answer]:
    """Let the target answer prompts at temperature 0 or 1, and keep the answers in a file. If it exists, read it."""
    if not file.exists():
        mx.random.seed(0)
        sampler = mx.random.categorical if temperature else partial(mx.argmax, axis=-1)
        answers = sample_answers(target.model, prompts, set(target.tokenizer.eos_token_ids), sampler, max_tokens)
        pairs = zip(prompts, answers, strict=True)
        write_json(file, [Answer(prompt, one, probs_of(target.model, prompt, one).tolist()) for prompt, one in pairs])
    return [Answer(*fields) for fields in read_json(file)]


def logits_of(model: nn.Module, prompt: list[int], tokens: list[int]) -> mx.array:
    """Return a model's logits [N, V] at each token of an answer."""
    return model(mx.array([[*prompt, *tokens[:-1]]]))[0, len(prompt) - 1 :].astype(mx.float32)


def probs_of(model: nn.Module, prompt: list[int], tokens: list[int]) -> mx.array:
    """Return a model's probability of each token of an answer, [N]."""
    probs = mx.softmax(logits_of(model, prompt, tokens), -1)
    return mx.take_along_axis(probs, mx.array(tokens)[:, None], -1)[:, 0]


def block_efficiency(drafter: nn.Module, answers: list[Answer], temperature: int, draft_length: int) -> float:
    """Return the tokens of answers over the expected number of blocks, with the rule "token"."""
    blocks = 0.0
    for prompt, tokens, p in answers:
        if temperature:
            accepted = mx.minimum(1, probs_of(drafter, prompt, tokens) / mx.array(p))
        else:
            accepted = logits_of(drafter, prompt, tokens).argmax(-1) == mx.array(tokens)
        blocks += expected_blocks([accepted.tolist()] * draft_length)
    return sum(len(answer.tokens) for answer in answers) / blocks


@click.command()
@click.argument("target_folder", metavar="TARGET")
@click.argument("drafter", metavar="DRAFTER", type=click.Path(path_type=Path))
@click.argument("answers", type=click.Path(path_type=Path))
@click.argument("prompts")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--mix", multiple=True, default=MIX, show_default=True)
@click.option("--absent", multiple=True, default=["translation"], show_default=True)
@click.option("--count", default=24, show_default=True, help="Prompts of each task to measure on.")
@click.option("--max-tokens", default=64, show_default=True, help="Length of the answers to measure on.")
@click.option("--draft-length", default=3, show_default=True)
@click.option("--earlier", default=30, show_default=True, help="Answers of each task that were learned before.")
@click.option("--steps", default=100, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--loss", default="tvd", show_default=True)
@click.option("--learning-rate", default=3e-4, show_default=True)
@click.option("--robust-rate", default=0.1, show_default=True)
@click.option("--ratio-rate", default=10.0, show_default=True)
@click.option("--robust-penalty", default=0.1, show_default=True)
@click.option("--damping", default=1e-5, show_default=True)
@click.option("--co-natural-rate", default=1e-5, show_default=True)
@click.option("--penalty", default=1e3, show_default=True)
@click.option("--first-seed", default=0, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--only", multiple=True, help="Methods to run. By default, all.")
def main(
    target_folder: str, drafter: Path, answers: Path, prompts: str, out: Path, mix: tuple[str, ...],
    absent: tuple[str, ...], count: int, max_tokens: int, draft_length: int, earlier: int, steps: int, batch: int,
    length: int, loss: str, learning_rate: float, robust_rate: float, ratio_rate: float, robust_penalty: float,
    damping: float, co_natural_rate: float, penalty: float, first_seed: int, seeds: int, only: tuple[str, ...],
) -> None:  # fmt: skip
    """Block efficiency on each task at T = 0 and 1, before and after each method."""
    target = Target(target_folder)
    shards = TokenShards(answers / "tokens")
    by_task: dict[str, list] = {}
    for document, task in zip(shards.documents(), (shards.tasks[n] for n in shards.document_tasks), strict=True):
        by_task.setdefault(task, []).append((document, task))
    counts = {task: int(number) for task, _, number in (part.partition(":") for part in mix)}
    tasks = [*counts, *absent]
    old = write([one for task in tasks for one in by_task[task][:earlier]], target, out / "earlier")
    chosen = [one for task, number in counts.items() for one in by_task[task][earlier:][:number]]
    order = np.random.default_rng(0).permutation(len(chosen))
    mixed = write([chosen[i] for i in order], target, out / "mix")
    read, _ = read_prompts([prompts], target.tokenizer, None)
    measured = {
        (temperature, task): answered(
            target,
            [[*prompt] for prompt in read if prompt.task == task][:count],
            temperature,
            max_tokens,
            out / f"{task} {temperature}.json",
        )
        for temperature in (0, 1)
        for task in tasks
    }

    def report(model: nn.Module, **line: object) -> None:
        for temperature in (0, 1):
            found = {
                task: round(block_efficiency(model, measured[temperature, task], temperature, draft_length), 3)
                for task in tasks
            }
            present = [found[task] for task in counts]
            summary = {"mean": round(float(np.mean(present)), 3), "worst": min(present)}
            click.echo(json.dumps({**line, "temperature": temperature, **found, **summary}))

    # Name -> sources, worst-case training, retention, learning rate.
    methods = {
        "plain": ([(mixed, 1.0)], UNIFORM, NO_RETENTION, learning_rate),
        "groups": ([(mixed, 1.0)], Robust("groups", robust_rate), NO_RETENTION, learning_rate),
        "ratios": ([(mixed, 1.0)], Robust("likelihood-ratio", ratio_rate, robust_penalty), NO_RETENTION, learning_rate),
        "9:1": ([(mixed, 0.9), (old, 0.1)], UNIFORM, NO_RETENTION, learning_rate),
        "penalty": ([(mixed, 1.0)], UNIFORM, Retention(penalty=penalty), learning_rate),
        "co-natural": ([(mixed, 1.0)], UNIFORM, Retention("co-natural", damping), co_natural_rate),
    }
    report(load_drafter(drafter, target), method="before")
    for seed in range(first_seed, first_seed + seeds):
        for name in only or methods:
            sources, robust, retention, rate = methods[name]
            settings = TrainingSettings(
                steps=steps, batch=batch, length=length, learning_rate=rate, warmup=10, final_rate=0.1, seed=seed,
                checkpoint_every=steps, log_every=steps,
            )  # fmt: skip
            trained, _ = stages.train(
                target, load_drafter(drafter, target), sources, Loss(loss), settings, out / f"{name} {seed}", None,
                TOP_K, robust=robust, retention=retention, text=old,
            )  # fmt: skip
            report(trained, method=name, seed=seed)


if __name__ == "__main__":
    main()
