"""What a drafter gains if the documents that share a row do not attend to each other, in training.

    python scripts/measure_packing.py TARGET --steps 400

TARGET is a folder. The target writes texts from BOS. Small drafters are trained on rows that hold several of them, by
cross entropy and by distillation: with the documents apart, and with one mask over the whole row. On Linux preload
OpenBLAS (see MEASUREMENTS.md).
"""

import statistics
import tempfile
from pathlib import Path

import click
import mlx.core as mx
import numpy as np

from mlxspec import Drafter, DrafterConfig
from mlxspec.evaluation.metrics import served_block_efficiency
from mlxspec.training.batches import Batches
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import Batch, objective, weighted_sums
from mlxspec.training.responses import AnswerSettings, bos_groups, write_answers
from mlxspec.training.shards import Rows, TokenShards
from mlxspec.training.target import Target
from mlxspec.training.teachers import OnlineTeacher
from mlxspec.training.trainer import Trainer, TrainingSettings


class MixedBatches(Batches):
    """Batches whose rows count as one document each."""

    def read(self, row_numbers: list[tuple[int, int]]) -> Rows:
        """Return rows with one number for all of their documents."""
        rows = super().read(row_numbers)
        return rows._replace(documents=np.minimum(rows.documents, 0))


def acceptance_rate(drafter: Drafter, teacher: OnlineTeacher, shards: TokenShards, length: int) -> float:
    """Return α = Σ min(p, q) at temperature 1, on rows with one document each."""
    rows = shards.rows(length, range(64), single=True)
    weights = mx.array(rows.mask[:, 1:] / rows.mask[:, 1:].sum(), mx.float32)
    batch = Batch(mx.array(rows.ids), mx.array(rows.documents[:, :-1]), weights, (), mx.array(1.0), mx.random.key(0))
    return weighted_sums(batch, objective(Loss("tvd"), teacher)(drafter, batch)[1])[1].item()


@click.command()
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--steps", default=400, show_default=True)
@click.option("--texts", default=2048, show_default=True, help="Texts of the target to train on.")
@click.option("--length", default=512, show_default=True, help="Positions in a row.")
@click.option("--batch", default=8, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--losses", default="ce,kld", show_default=True)
def main(target: Path, steps: int, texts: int, length: int, batch: int, seeds: int, losses: str) -> None:
    """Train and score the drafters, and print means over the seeds."""
    named = Target(str(target))
    model, tokenizer = named.model, named.tokenizer
    bos = tokenizer.bos_token_id
    score = served_block_efficiency(model, tokenizer, [[bos]] * 16, (0.0, 1.0), 3, 120)
    with tempfile.TemporaryDirectory() as work:
        answers = AnswerSettings(samples=texts, temperatures=(1.0,), top_p=1.0, max_tokens=200, group=256, seed=1)
        folders = {}
        for name, settings in (("training", answers), ("held out", AnswerSettings(
                samples=256, temperatures=(1.0,), top_p=1.0, max_tokens=200, group=256, seed=2))):  # fmt: skip
            folder = Path(work) / name
            write_answers(model, tokenizer, named.vocab_size, named.tokenizer_fingerprint, bos_groups(bos, settings),
                          settings, folder)  # fmt: skip
            folders[name] = TokenShards(folder)
        teacher = OnlineTeacher(model)
        for loss in map(Loss, losses.split(",")):
            found: dict[str, list[dict[str, float]]] = {}
            for seed in range(seeds):
                for kind, batches_of in (("apart", Batches), ("mixed", MixedBatches)):
                    batches = batches_of([folders["training"]], [1.0], length, batch, seed)
                    mx.random.seed(seed)
                    drafter = Drafter(DrafterConfig(named.vocab_size, 32, 96, 3, 2, tie_word_embeddings=True))
                    settings = TrainingSettings(steps=steps, batch=batch, length=length, learning_rate=6e-3, seed=seed,
                                                checkpoint_every=steps)  # fmt: skip
                    run = Path(work) / f"{loss.name}-{kind}-{seed}"
                    goal = objective(loss, teacher if loss.needs_target else None)
                    Trainer(drafter, goal, batches, settings, run).run()
                    figures = score(drafter)
                    figures["acceptance rate"] = acceptance_rate(drafter, teacher, folders["held out"], 200)
                    found.setdefault(kind, []).append(figures)
                    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                    click.echo(f"{loss.name} {kind} seed {seed}: {shown}")
            for name in found["apart"][0]:
                apart, mixed = ([figures[name] for figures in found[kind]] for kind in ("apart", "mixed"))
                ratios = [a / b for a, b in zip(apart, mixed, strict=True)]
                means = f"apart {statistics.mean(apart):.4g}, mixed {statistics.mean(mixed):.4g}"
                spread = f"{statistics.mean(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
                click.echo(f"{loss.name} {name}: {means}, ratio {spread}")


if __name__ == "__main__":
    main()
