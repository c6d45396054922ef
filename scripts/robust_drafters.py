"""Finetune a drafter on an unbalanced mix of tasks, with and without worst-case training and retention.

    python scripts/robust_drafters.py TARGET DRAFTER ANSWERS OUT --absent translation --seeds 3

ANSWERS is a folder that `mlxspec train distill` wrote from prompts with tasks, such as those of one_night_prompts.py.
The last answers of each task are held out. The first answers of each task are what the drafter has learned before. The
others make the mix, without the absent tasks. OUT keeps what is finished, so a command that is repeated continues.
"""

import mlxspec  # noqa: F401  first, so that MLX uses OpenBLAS

# isort: split

import json
from pathlib import Path

import click
import numpy as np

from mlxspec.training import stages
from mlxspec.training.adapting import AdaptSettings, acceptance_rate, new_teacher
from mlxspec.training.drafter_folders import load_drafter
from mlxspec.training.losses import Loss
from mlxspec.training.retention import NO_RETENTION, Retention
from mlxspec.training.robust import UNIFORM, Robust
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.target import Target
from mlxspec.training.trainer import TrainingSettings

TOP_K = 64
MIX = ["dolly:480", "stories:60", "gsm8k:30", "summarization:30"]


def write(documents: list, target: Target, task: str | None, folder: Path) -> TokenShards:
    """Write documents as shards, unless they are there."""
    if not (folder / "index.json").exists():
        with ShardWriter(folder, target.vocab_size, target.tokenizer_fingerprint) as writer:
            for (ids, mask), name in documents:
                writer.add(ids.tolist(), mask.tolist(), task or name)
            writer.finish()
    return TokenShards(folder)


@click.command()
@click.argument("target_folder", metavar="TARGET")
@click.argument("drafter", metavar="DRAFTER", type=click.Path(path_type=Path))
@click.argument("answers", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--mix", multiple=True, default=MIX, show_default=True)
@click.option("--absent", multiple=True, default=["translation"], show_default=True)
@click.option("--held-out", default=16, show_default=True, help="Answers of each task to measure on.")
@click.option("--earlier", default=30, show_default=True, help="Answers of each task that were learned before.")
@click.option("--steps", default=100, show_default=True)
@click.option("--batch", default=4, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--loss", default="tvd", show_default=True)
@click.option("--learning-rate", default=3e-4, show_default=True)
@click.option("--robust-rate", default=0.2, show_default=True)
@click.option("--robust-penalty", default=0.1, show_default=True)
@click.option("--damping", default=1e-5, show_default=True)
@click.option("--co-natural-rate", default=1e-5, show_default=True)
@click.option("--penalty", default=1e3, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--only", multiple=True, help="Methods to run. By default, all.")
def main(
    target_folder: str, drafter: Path, answers: Path, out: Path, mix: tuple[str, ...], absent: tuple[str, ...],
    held_out: int, earlier: int, steps: int, batch: int, length: int, loss: str, learning_rate: float,
    robust_rate: float, robust_penalty: float, damping: float, co_natural_rate: float, penalty: float, seeds: int,
    only: tuple[str, ...],
) -> None:  # fmt: skip
    """Acceptance rate on held-out answers of each task, before and after each method."""
    target = Target(target_folder)
    shards = TokenShards(answers / "tokens")
    by_task: dict[str, list] = {}
    for document, task in zip(shards.documents(), (shards.tasks[n] for n in shards.document_tasks), strict=True):
        by_task.setdefault(task, []).append((document, task))
    counts = {task: int(count) for task, _, count in (part.partition(":") for part in mix)}
    measured = {
        task: write(by_task[task][-held_out:], target, task, out / f"held-out {task}") for task in [*counts, *absent]
    }
    old = write([one for task in measured for one in by_task[task][:earlier]], target, None, out / "earlier")
    chosen = [one for task, count in counts.items() for one in by_task[task][earlier:-held_out][:count]]
    order = np.random.default_rng(0).permutation(len(chosen))
    mixed = write([chosen[i] for i in order], target, None, out / "mix")

    def rates(model) -> dict[str, float]:
        settings = AdaptSettings(length=length, batch=batch)
        teachers = {task: new_teacher(target, model, part, settings, False, TOP_K) for task, part in measured.items()}
        return {task: round(acceptance_rate(model, teacher), 4) for task, teacher in teachers.items()}

    # Name -> sources, worst-case training, retention, learning rate.
    methods = {
        "plain": ([(mixed, 1.0)], UNIFORM, NO_RETENTION, learning_rate),
        "groups": ([(mixed, 1.0)], Robust("groups", robust_rate), NO_RETENTION, learning_rate),
        "ratios": ([(mixed, 1.0)], Robust("likelihood-ratio", None, robust_penalty), NO_RETENTION, learning_rate),
        "9:1": ([(mixed, 0.9), (old, 0.1)], UNIFORM, NO_RETENTION, learning_rate),
        "penalty": ([(mixed, 1.0)], UNIFORM, Retention(penalty=penalty), learning_rate),
        "co-natural": ([(mixed, 1.0)], UNIFORM, Retention("co-natural", damping), co_natural_rate),
    }
    print(json.dumps({"method": "before", **rates(load_drafter(drafter, target))}), flush=True)
    for seed in range(seeds):
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
            found = rates(trained)
            present = [found[task] for task in counts]
            summary = {"mean": round(float(np.mean(present)), 4), "worst": min(present)}
            print(json.dumps({"method": name, "seed": seed, **found, **summary}), flush=True)


if __name__ == "__main__":
    main()
