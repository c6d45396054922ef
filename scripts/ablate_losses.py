"""Which loss makes the better drafter? The same start, the same steps and the same data, for several seeds.

    python scripts/ablate_losses.py --target STORIES260K_FOLDER --prompts TINYSTORIES.jsonl --work WORK_FOLDER

For each seed a drafter is pretrained on the target's own samples with next-token cross-entropy. From there it is
trained with each loss for the same number of steps. The target's k most likely tokens are kept on disk, so that it runs
once for all losses; one loss is also trained with other k. Each drafter is judged by its block efficiency at
temperature 0 and 1, on the first words of real stories. Every training is a stage in WORK_FOLDER; finished stages are
skipped. The result is a table in Markdown: means and standard deviations over the seeds. On Linux preload OpenBLAS (see
MEASUREMENTS.md).
"""

import json
import statistics
from pathlib import Path

import click
import mlx.core as mx

from mlxspec.evaluation.metrics import served_block_efficiency
from mlxspec.files import write_json
from mlxspec.models.drafter import Drafter
from mlxspec.training import stages
from mlxspec.training.batches import Batches
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import Batch, objective, weighted_sums
from mlxspec.training.prompts import read_prompts
from mlxspec.training.responses import AnswerSettings
from mlxspec.training.shards import TokenShards
from mlxspec.training.target import DrafterShape, Target
from mlxspec.training.teachers import OnlineTeacher
from mlxspec.training.trainer import TrainingSettings

LOSSES = {
    "ce": Loss("ce"),
    "kld": Loss("kld"),
    "rkl": Loss("rkl"),
    "jsd": Loss("jsd"),
    "tvd": Loss("tvd"),
    "nla": Loss("nla"),
    "lk-hybrid": Loss("lk-hybrid"),
    "tvd++, position, ε 0.1": Loss("tvd++", epsilon=0.1),
    "tvd++, position, ε 1e-5": Loss("tvd++", epsilon=1e-5),
    "tvd++, batch": Loss("tvd++", statistics="batch", epsilon=1e-5),
    "tvd++, 8 samples, position": Loss("tvd++", "8", epsilon=0.1),
    "tvd++, 8 samples, batch": Loss("tvd++", "8", "batch", epsilon=1e-5),
    "tvd++, vocabulary": Loss("tvd++", weighting="vocabulary", epsilon=1e-5),
}
TRUNCATIONS = {"tvd, online": 0, "tvd, k = 8": 8, "tvd, k = 32": 32}  # other k of the teacher than that of all losses
MEASURES = {"acceptance_rate": "α", "block_efficiency_at_0": "τ, T = 0", "block_efficiency_at_1": "τ, T = 1"}

# 52 368 parameters: one layer, embedding and output head tied.
SHAPE = DrafterShape(48, 128, 1, 4, None, True)


class Ablation:
    def __init__(self, target: Target, shards: TokenShards, prompts: list[list[int]], work: Path, settings: dict):
        self.target, self.shards, self.work, self.settings = target, shards, work, settings
        self.measure = served_block_efficiency(target.model, target.tokenizer, prompts, (0.0, 1.0), 3, 120)
        self.batches = Batches([shards], [1.0], settings["length"], 16, seed=12345)
        self.results = work / "results.json"
        self.found = json.loads(self.results.read_text()) if self.results.exists() else {}

    def start(self, seed: int, steps: int) -> Drafter:
        drafter = self.target.new_drafter(SHAPE, seed)
        return self.trained(f"pretrained-{seed}", drafter, Loss("ce"), seed, steps)

    def trained(self, name: str, drafter: Drafter, loss: Loss, seed: int, steps: int, top_k: int = 0) -> Drafter:
        settings = TrainingSettings(steps=steps, seed=seed, checkpoint_every=steps, **self.settings)
        return stages.train(self.target, drafter, [(self.shards, 1.0)], loss, settings, self.work / name, None, top_k)[
            0
        ]

    def acceptance_rate(self, drafter: Drafter, batches: int = 8) -> float:
        """Return α = Σ min(p, q) at temperature 1 on rows of the target's samples, against the target itself."""
        minimized, total = objective(Loss("tvd"), OnlineTeacher(self.target.model)), 0.0
        for number in range(batches):
            rows = self.batches(number)
            weights = mx.array(rows.mask[:, 1:] / rows.mask[:, 1:].sum(), mx.float32)
            documents = mx.array(rows.documents[:, :-1])
            batch = Batch(mx.array(rows.ids), documents, weights, (), mx.array(1.0), mx.random.key(0))
            total += weighted_sums(batch, minimized(drafter, batch)[1])[1].item()
        return total / batches

    def note(self, label: str, seed: int, drafter: Drafter) -> None:
        """Measure a drafter and keep the figures, unless they are known."""
        name = f"{label}/{seed}"
        if name not in self.found:
            self.found[name] = {"acceptance_rate": self.acceptance_rate(drafter), **self.measure(drafter)}
            write_json(self.results, self.found)
            click.echo(f"{name}: {self.found[name]}", err=True)

    def table(self) -> str:
        labels = list(dict.fromkeys(name.rsplit("/", 1)[0] for name in self.found))
        rows = ["| trained with | " + " | ".join(MEASURES.values()) + " |", "|---" * (len(MEASURES) + 1) + "|"]
        for label in labels:
            runs = [entry for name, entry in self.found.items() if name.rsplit("/", 1)[0] == label]
            cells = [spread([run[key] for run in runs]) for key in MEASURES]
            rows.append(f"| {label} | " + " | ".join(cells) + " |")
        return "\n".join(rows)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


@click.command()
@click.option("--target", required=True, help="Folder of the target.")
@click.option("--prompts", required=True, help="Stories, of which the first 20 words are prompts.")
@click.option("--answers", help="Answers that `mlxspec train distill` made; default: made here.")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--pretrain-steps", default=900, show_default=True)
@click.option("--steps", default=500, show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--length", default=128, show_default=True)
@click.option("--learning-rate", default=2e-3, show_default=True)
@click.option("--samples", default=10240, show_default=True, help="Texts of the target to learn from.")
@click.option("--teacher-top-k", default=128, show_default=True)
@click.option("--count", default=40, show_default=True, help="Prompts.")
@click.option("--only", multiple=True, help="Only losses whose label starts with this.")
def main(target, prompts, answers, work, seeds, pretrain_steps, steps, samples, count, only, teacher_top_k, **training):
    model = Target(target)
    if answers is None:
        sampling = AnswerSettings((1.0,), 1.0, samples, max_tokens=200, group=256)
        stages.distill(model, (), None, sampling, work / "answers")
        answers = work / "answers"
    asked, _ = read_prompts([prompts], model.tokenizer, None, words=20)
    ablation = Ablation(model, TokenShards(Path(answers) / "tokens"), asked[-count:], work, training)
    for seed in range(seeds):
        ablation.note("pretraining only", seed, ablation.start(seed, pretrain_steps))
        for label, loss in {**LOSSES, **dict.fromkeys(TRUNCATIONS, Loss("tvd"))}.items():
            if only and not label.startswith(only):
                continue
            folder = f"{label.replace(', ', '-').replace(' ', '-')}-{seed}"
            start = ablation.start(seed, pretrain_steps)
            top_k = TRUNCATIONS.get(label, teacher_top_k) if loss.needs_target else 0
            drafter = ablation.trained(folder, start, loss, seed, steps, top_k)
            ablation.note(label, seed, drafter)
    click.echo(ablation.table())


if __name__ == "__main__":
    main()
