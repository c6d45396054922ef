"""What training costs, compared with a baseline in interleaved rounds.

    python scripts/compare_training.py loss         # memory and time of a loss with its gradient, chunked and plain
    python scripts/compare_training.py throughput   # next-token training and mlx-lm's own trainer
    python scripts/compare_training.py distill      # a distillation step; the target's pass and a drafter's step
    python scripts/compare_training.py answers      # mlx-lm's batches; our decoder, one prompt after the other

The shapes are options; the defaults are those of the 115M drafter. On Linux preload OpenBLAS (see MEASUREMENTS.md).
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.models import llama
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.trainer import train as mlx_lm_train

from mlxspec import Drafter, DrafterConfig, ModelPair, Sampling, SpeculativeDecoder
from mlxspec.evaluation.rounds import by_engine, interleaved, ratio, seconds, spread
from mlxspec.models.loading import DEMO
from mlxspec.training.batches import Batches as Mixture
from mlxspec.training.chunked_loss import Positions, log_softmax, weighted_loss
from mlxspec.training.losses import LOSSES, Loss
from mlxspec.training.objectives import objective
from mlxspec.training.responses import AnswerSettings, Group, answer_group
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.target import Target
from mlxspec.training.teachers import OnlineTeacher
from mlxspec.training.trainer import Trainer, TrainingSettings

EPSILON = Loss.epsilon


def plain_divergence(name: str, p: mx.array, log_p: mx.array, q: mx.array, log_q: mx.array) -> mx.array:
    """The table of the losses, over whole arrays [N, V], for automatic differentiation."""
    alpha = mx.minimum(p, q).sum(-1)
    kld, tvd = (p * (log_p - log_q)).sum(-1), 1 - alpha
    if name == "tvd++":
        fixed = mx.stop_gradient(q)
        reward = (p > fixed).astype(mx.float32)
        mean = (fixed * reward).sum(-1, keepdims=True)
        return -(fixed * (reward - mean) / (mx.sqrt(mean * (1 - mean)) + EPSILON) * log_q).sum(-1)
    if name == "jsd":
        log_m = mx.logaddexp(log_p, log_q) - np.log(2)
        return (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
    share = mx.exp(-3 * mx.stop_gradient(alpha))
    return {
        "kld": lambda: kld,
        "rkl": lambda: (q * (log_q - log_p)).sum(-1),
        "tvd": lambda: tvd,
        "nla": lambda: -mx.log(alpha),
        "lk-hybrid": lambda: share * kld + (1 - share) * tvd,
    }[name]()


def loss_functions(name: str, vocabulary: int, hidden: int, positions: int) -> dict[str, Callable]:
    """Return, by engine, a function that evaluates value and gradients of the loss over random hidden states."""
    mx.random.seed(0)
    states, target_states = mx.random.normal((positions, hidden)), mx.random.normal((positions, hidden))
    heads = [mx.random.normal((vocabulary, hidden)) * 2 / hidden**0.5 for _ in range(2)]
    tokens, weights = mx.random.randint(0, vocabulary, (positions,)), mx.full(positions, 1 / positions)
    mx.eval(states, target_states, heads, tokens, weights)

    def chunked(states, head, target_states, target_head):
        def teacher_probs(parts, log_q):
            log_p, p = log_softmax(parts[0] @ target_head.T)
            return p, log_p

        given = Positions(tokens, weights, (target_states,), mx.array(1.0), mx.random.key(0))
        return weighted_loss(Loss(name), states, head, given, teacher_probs)[0]

    def plain(states, head, target_states, target_head):
        logits, target_logits = states @ head.T, target_states @ target_head.T
        log_q, log_p = (z - mx.logsumexp(z, axis=-1, keepdims=True) for z in (logits, target_logits))
        if name == "ce":
            return -(weights * mx.take_along_axis(log_q, tokens[:, None], axis=-1)[:, 0]).sum()
        return (weights * plain_divergence(name, mx.exp(log_p), log_p, mx.exp(log_q), log_q)).sum()

    def run(function: Callable) -> Callable:
        compiled = mx.compile(mx.value_and_grad(function, argnums=(0, 1)))
        return lambda number: mx.eval(compiled(states, heads[0], target_states, heads[1]))

    return {"chunked": run(chunked), "plain": run(plain)}


def show(taken: dict[str, list[float]]) -> None:
    """Print the seconds of every engine, in milliseconds."""
    for name, values in taken.items():
        found = spread([1000 * value for value in values])
        click.echo(f"  {name:28s} {found.median:9.1f} ms  ({found.least:.1f} to {found.most:.1f})")


def peak_bytes(run: Callable) -> int:
    """Return the most memory that a run allocates on top of what was there."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run(0)
    return mx.get_peak_memory() - before


@click.group()
def main() -> None:
    """Measure what training costs."""


@main.command()
@click.option("--name", "names", multiple=True, type=click.Choice(list(LOSSES)), default=["tvd++"])
@click.option("--vocabulary", default=32000, show_default=True)
@click.option("--hidden", default=1024, show_default=True)
@click.option("--positions", default=2048, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def loss(names, vocabulary, hidden, positions, rounds):
    """Memory and time of a loss with its gradient."""
    for name in names:
        runs = loss_functions(name, vocabulary, hidden, positions)
        peaks = {engine: peak_bytes(run) for engine, run in runs.items()}
        taken = by_engine(interleaved({engine: seconds(run) for engine, run in runs.items()}, rounds))
        memory = peaks["chunked"] / peaks["plain"]
        click.echo(
            f"{name}, {positions} positions, hidden {hidden}, vocabulary {vocabulary}: memory ratio {memory:.3f} "
            f"({peaks['chunked'] / 1e6:.0f} MB chunked, {peaks['plain'] / 1e6:.0f} MB plain), "
            f"time ratio {ratio(taken['chunked'], taken['plain'])}"
        )
        show(taken)


SHAPE = (
    click.option("--vocabulary", default=32000, show_default=True),
    click.option("--hidden", default=1024, show_default=True),
    click.option("--intermediate", default=2816, show_default=True),
    click.option("--layers", default=4, show_default=True),
    click.option("--heads", default=8, show_default=True),
    click.option("--batch", default=2, show_default=True),
    click.option("--length", default=256, show_default=True),
    click.option("--steps", default=5, show_default=True, help="Timed steps that an engine takes in a round."),
    click.option("--rounds", default=5, show_default=True),
)


def shape_options(command: Callable) -> Callable:
    """Add the options of the commands that train a drafter."""
    for option in reversed(SHAPE):
        command = option(command)
    return command


def new_drafter(vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int) -> Drafter:
    mx.random.seed(0)
    return Drafter(DrafterConfig(vocabulary, hidden, intermediate, layers, heads))


def random_rows(vocabulary: int, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (rows, length + 1))


class StepTimes:
    """Times the steps of a trainer, each with all that it needs, by its reports. The first few are left out."""

    LEFT_OUT = 2

    def __init__(self):
        self.moments: list[float] = []

    def __call__(self, *_) -> None:
        self.moments.append(time.perf_counter())

    on_train_loss_report = __call__  # mlx-lm's callback

    @property
    def seconds(self) -> float:
        return statistics.median(np.diff(self.moments[self.LEFT_OUT - 1 :]))


def our_trainer(drafter: Drafter, rows: np.ndarray, batch: int, steps: int, loss: Loss, teacher=None) -> Callable:
    def run(number: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            with ShardWriter(Path(folder) / "tokens", drafter.config.vocab_size, "random") as writer:
                for row in rows:
                    writer.add(row, np.ones_like(row))
                writer.finish()
            length = rows.shape[1] - 1
            settings = TrainingSettings(steps=steps + StepTimes.LEFT_OUT, batch=batch, length=length,
                                        checkpoint_every=10**9, log_every=1)  # fmt: skip
            batches = Mixture([TokenShards(Path(folder) / "tokens")], [1], length, batch, 0)
            times = StepTimes()
            Trainer(drafter, objective(loss, teacher), batches, settings, Path(folder), None, teacher, times).run()
            return times.seconds

    return run


def their_trainer(drafter: Drafter, rows: np.ndarray, batch: int, steps: int) -> Callable:
    dataset = [(row.tolist(), 0) for row in rows]

    def run(number: int) -> float:
        times = StepTimes()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            args = TrainingArgs(
                batch_size=batch,
                iters=steps + StepTimes.LEFT_OUT,
                steps_per_report=1,
                max_seq_length=rows.shape[1],
                adapter_file=str(Path(folder) / "weights.safetensors"),
            )
            mlx_lm_train(drafter, optim.AdamW(1e-4), dataset, args=args, training_callback=times)
        return times.seconds

    return run


@main.command()
@shape_options
def throughput(vocabulary, hidden, intermediate, layers, heads, batch, length, steps, rounds):
    """Next-token training, compared with mlx-lm's trainer."""
    drafter = new_drafter(vocabulary, hidden, intermediate, layers, heads)
    rows = random_rows(vocabulary, 4 * batch, length)
    runs = {
        "mlxspec": our_trainer(drafter, rows, batch, steps, Loss("ce")),
        "mlx-lm": their_trainer(drafter, rows, batch, steps),
    }
    taken = by_engine(interleaved(runs, rounds))
    click.echo(f"{drafter.num_parameters:,} parameters, {batch} x {length} positions per step: tokens/s of mlxspec "
               f"over mlx-lm {ratio(taken['mlx-lm'], taken['mlxspec'])}")  # fmt: skip
    show(taken)


@main.command()
@shape_options
@click.option("--name", "name", type=click.Choice([name for name in LOSSES if name != "ce"]), default="tvd++")
@click.option("--target-hidden", default=1024, show_default=True)
@click.option("--target-layers", default=16, show_default=True)
def distill(vocabulary, hidden, intermediate, layers, heads, batch, length, steps, rounds, name, target_hidden,
            target_layers):  # fmt: skip
    """A distillation step, compared with its parts alone: the target's pass and a next-token step of the drafter."""
    drafter = new_drafter(vocabulary, hidden, intermediate, layers, heads)
    target = llama.Model(llama.ModelArgs(
        "llama", target_hidden, target_layers, 11 * target_hidden // 4, heads, 1e-5, vocabulary,
        tie_word_embeddings=False))  # fmt: skip
    mx.eval(target.parameters())
    rows = random_rows(vocabulary, 4 * batch, length)
    inputs = mx.array(rows[:batch, :-1])
    forward: Callable[[mx.array], mx.array] = mx.compile(target.__call__)

    def target_pass(number: int) -> float:
        times = StepTimes()
        for _ in range(steps + StepTimes.LEFT_OUT):
            mx.eval(forward(inputs))
            times()
        return times.seconds

    runs = {
        "distillation": our_trainer(drafter, rows, batch, steps, Loss(name), OnlineTeacher(target)),
        "target": target_pass,
        "drafter": our_trainer(drafter, rows, batch, steps, Loss("ce")),
    }
    taken = by_engine(interleaved(runs, rounds))
    parts = [target + drafter for target, drafter in zip(taken["target"], taken["drafter"], strict=True)]
    count = sum(weight.size for _, weight in nn.utils.tree_flatten(target.parameters()))
    click.echo(f"{name}: drafter of {drafter.num_parameters:,}, target of {count:,} parameters, {batch} x {length} "
               f"positions: a step costs {ratio(taken['distillation'], parts)} of the target's pass and the drafter's "
               "step together")  # fmt: skip
    show(taken)


@main.command()
@click.option("--target", default=str(DEMO / "target"), show_default=True, help="Folder.")
@click.option("--drafter", default=str(DEMO / "drafter"), show_default=True, help="Folder.")
@click.option("--group", "sizes", multiple=True, default=[1, 16, 64, 256], show_default=True, help="Prompts at once.")
@click.option("--tokens", default=64, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def answers(target, drafter, sizes, tokens, rounds):
    """Answers at temperature 1: mlx-lm in batches, compared with our decoder, one prompt after the other."""
    known = Target(target)
    decoder = SpeculativeDecoder(
        ModelPair(known.model, Drafter.load(drafter, mx.float32), known.tokenizer), Sampling(temperature=1.0)
    )

    decoder.calibrate()

    def batched(size: int) -> Callable[[int], float]:
        settings = AnswerSettings((1.0,), 1.0, size, tokens, size)
        work = Group(0, [[known.tokenizer.bos_token_id]] * size, 1.0)

        def run(number: int) -> float:
            start = time.perf_counter()
            made = sum(map(len, answer_group(known.model, known.tokenizer, work, settings)))
            return (time.perf_counter() - start) / made

        return run

    def one_by_one(number: int) -> float:
        start, made = time.perf_counter(), 0
        for seed in range(8):
            made += sum(
                len(block.tokens) for block in decoder.blocks([known.tokenizer.bos_token_id], tokens, seed=seed)
            )
        return (time.perf_counter() - start) / made

    runs = {f"mlx-lm, {size} at once": batched(size) for size in sizes} | {"our decoder": one_by_one}
    taken = by_engine(interleaved(runs, rounds))
    click.echo("time per token:")
    show(taken)
    for name in list(runs)[:-1]:
        click.echo(f"  our decoder / {name}: {ratio(taken['our decoder'], taken[name])} of its time")


if __name__ == "__main__":
    main()
