"""Does ``draft_length="auto"`` keep its promises? Each command prints one table, measured in interleaved rounds.

    python scripts/measure_auto.py --stories STORIES260K_FOLDER never-slower
    python scripts/measure_auto.py --stories STORIES260K_FOLDER nearly-best
    python scripts/measure_auto.py --stories STORIES260K_FOLDER peer
    python scripts/measure_auto.py --stories STORIES260K_FOLDER lookup
    python scripts/measure_auto.py --stories STORIES260K_FOLDER context
    python scripts/measure_auto.py --stories STORIES260K_FOLDER block

The pairs are made of the public stories260K model and of the demo pair. Targets are padded with layers that change no
text, drafters are noised or random copies. Two warm-up rounds are thrown away.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from compare_speed import Engine, Ours, noise, pad, peer, plain, read
from mlx_lm.generate import generate_step
from mlx_lm.models import llama

import mlxspec
from mlxspec import Drafter, DrafterConfig, ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding.acceptance import MENU
from mlxspec.evaluation.profile import PARTS, calibrated, profile
from mlxspec.evaluation.rounds import by_engine, interleaved, ratio, spread, tokens_per_second
from mlxspec.models.loading import DEMO
from mlxspec.training.batches import Batches
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import objective
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.trainer import Trainer, TrainingSettings

PROMPTS = [[1], [1, 403, 407, 261]]  # the stories model's: nothing, and "Once upon a"

rounds = click.option("--rounds", default=5, show_default=True)
tokens = click.option("--tokens", default=150, show_default=True, help="Tokens that an engine decodes per prompt.")


class Pairs:
    """The models that are measured, made when they are needed.

    Args:
        stories: folder of stories260K.
        width: of the MLPs of the padding.
    """

    def __init__(self, stories: Path, width: int = 8192):
        self.stories, self.width = stories, width

    @cache  # noqa: B019
    def target(self, kind: str, layers: int) -> nn.Module:
        """Return the stories model, or the demo's target, with padding."""
        model = read(self.stories if kind == "stories" else DEMO / "target")
        pad(model, layers, self.width)
        return model

    @cache  # noqa: B019
    def noised(self, amount: float, layers: int = 0) -> nn.Module:
        """Return a noised copy of the stories model, which may be padded to cost more."""
        model = read(self.stories)
        noise(model, amount)
        if layers:
            pad(model, layers, self.width)
        return model

    @cache  # noqa: B019
    def random(self) -> nn.Module:
        """Return a drafter as small as the stories model whose guesses are worthless."""
        args = replace(read(self.stories).args)
        mx.random.seed(3)
        model = llama.Model(args)
        mx.eval(model.parameters())
        return model

    @cache  # noqa: B019
    def demo_drafter(self) -> nn.Module:
        return read(DEMO / "drafter")


def demo_prompts() -> list[list[int]]:
    tokenizer = mlxspec.load().tokenizer
    return [tokenizer.encode(text) for text in ("Once upon a time", "One day, a little girl named Lily")]


def measure(engines: dict[str, Engine], rounds: int) -> dict[str, list[float]]:
    """Return the tokens/s of every engine in every counted round."""
    return by_engine(interleaved({name: tokens_per_second(run) for name, run in engines.items()}, rounds, warm_up=2))


def fastest(rates: dict[str, list[float]]) -> str:
    return max(rates, key=lambda name: spread(rates[name]).median)


def last_answer(engine: Ours) -> str:
    stats = engine.decoder.stats
    return f"τ {stats.block_efficiency:.2f}, γ {stats.draft_length:.1f}, {stats.blocks_by}"


@click.group()
@click.option("--stories", type=click.Path(exists=True, path_type=Path), required=True, help="stories260K's folder.")
@click.option("--pad-width", default=8192, show_default=True, help="Of the padding's MLPs.")
@click.pass_context
def main(context: click.Context, stories: Path, pad_width: int):
    context.obj = Pairs(stories, pad_width)


@main.command()
@rounds
@tokens
@click.pass_obj
def never_slower(pairs: Pairs, rounds: int, tokens: int):
    """auto over mlx-lm plain where speculation cannot win, or hardly."""
    stories, demo, prompts = pairs.target("stories", 24), mlxspec.load(), PROMPTS
    cases = {
        "a random drafter, T = 0": (stories, pairs.random(), 0.0, tokens, prompts),
        "a random drafter, T = 1": (stories, pairs.random(), 1.0, tokens, prompts),
        "a drafter as costly as the target": (stories, pairs.noised(0.07, 24), 0.0, tokens, prompts),
        "a 4-bit target, T = 0": (demo.target, demo.drafter, 0.0, tokens, prompts),
        "a 4-bit target, T = 1": (demo.target, demo.drafter, 1.0, tokens, prompts),
        "temperature 1.5": (stories, pairs.noised(0.07), 1.5, tokens, prompts),
        "temperature 1.5, demo pair": (pairs.target("demo", 4), pairs.demo_drafter(), 1.5, tokens, prompts),
        "8-token answers": (stories, pairs.noised(0.07), 0.0, 8, prompts * 8),
        "8-token answers, a random drafter": (stories, pairs.random(), 0.0, 8, prompts * 8),
        "8-token answers, long prompts": (stories, pairs.noised(0.07), 0.0, 8, [[n] * 400 for n in range(3, 7)]),
    }
    for name, (target, drafter, temperature, count, asked) in cases.items():
        auto = Ours(target, drafter, temperature, count, "auto", asked)
        rates = measure({"plain": plain(target, temperature, count, asked), "auto": auto}, rounds)
        click.echo(f"{name:38s} auto / plain {ratio(rates['auto'], rates['plain'])}   {last_answer(auto)}")


# Pairs on the stories model with 24 layers of padding whose best fixed draft length is small, middling and large: the
# noise in the drafter.
LADDER = {"often wrong": 0.2, "middling": 0.12, "nearly always right": 0.05}


@main.command()
@rounds
@tokens
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--only", type=click.Choice(list(LADDER)), multiple=True)
@click.pass_obj
def nearly_best(pairs: Pairs, rounds: int, tokens: int, temperature: float, only: tuple[str, ...]):
    """auto over the best fixed draft length, and the cost model's prediction for each length."""
    for name in only or LADDER:
        target, drafter = pairs.target("stories", 24), pairs.noised(LADDER[name])
        engines = {str(n): Ours(target, drafter, temperature, tokens, n, PROMPTS) for n in (*MENU, "auto")}
        rates = measure(engines, rounds)
        best = fastest({n: figures for n, figures in rates.items() if n != "auto"})
        click.echo(f"{name:32s} best γ {best}; auto / best {ratio(rates['auto'], rates[best])}   "
                   f"{last_answer(engines['auto'])}")  # fmt: skip
        click.echo("    tokens/s  " + " ".join(f"{n}: {spread(figures).median:.1f}" for n, figures in rates.items()))
        found = calibrated(ModelPair(target, drafter), PROMPTS, Sampling(temperature), rounds, tokens)
        entries = [(e["draft_length"], e["predicted"], e["measured"]) for e in found["lengths"]]
        worst = max(abs(p / m - 1) for _, p, m in entries)
        click.echo("    predicted/measured  " + " ".join(f"{n}: {p:.2f}/{m:.2f}" for n, p, m in entries)
                   + f"; at worst {worst:.0%} apart")  # fmt: skip


@main.command("peer")
@rounds
@tokens
@click.option("--layers", multiple=True, type=int, default=[24], show_default=True, help="Of the padding.")
@click.option("--target", "kinds", multiple=True, type=click.Choice(["stories", "demo"]), default=["stories", "demo"])
@click.option("--temperature", "temperatures", multiple=True, type=float, default=[0.0, 1.0], show_default=True)
@click.pass_obj
def against_the_peer(pairs: Pairs, rounds: int, tokens: int, layers, kinds, temperatures):
    """auto over mlx-lm speculative with the same pair at its best fixed draft length."""
    for kind in kinds:
        for count in layers:
            target = pairs.target(kind, count)
            drafter = pairs.noised(0.07) if kind == "stories" else pairs.demo_drafter()
            prompts = PROMPTS if kind == "stories" else demo_prompts()
            for temperature in temperatures:
                auto = Ours(target, drafter, temperature, tokens, "auto", prompts)
                peers = {f"peer {n}": peer(target, drafter, temperature, tokens, n, prompts) for n in MENU[1:]}
                rates = measure({"plain": plain(target, temperature, tokens, prompts), **peers, "auto": auto}, rounds)
                best = fastest({name: rates[name] for name in peers})
                click.echo(f"{kind} + {count} layers, T = {temperature:g}: auto / {best} "
                           f"{ratio(rates['auto'], rates[best])}, / plain {ratio(rates['auto'], rates['plain'])}, "
                           f"{best} / plain {ratio(rates[best], rates['plain'])}   {last_answer(auto)}")  # fmt: skip


def copier(work: Path, steps: int) -> nn.Module:
    """Return a model that copies its prompt: trained here, in a minute, on random tokens that repeat themselves."""
    vocab_size, length, rng = 64, 64, np.random.default_rng(0)
    with ShardWriter(work / "tokens", vocab_size, "random tokens") as writer:
        for _ in range(6000):
            period = rng.integers(8, 31)
            row = np.tile(rng.integers(0, vocab_size, period), 9)[: length + 1]
            writer.add(row, np.arange(length + 1) >= period)
        writer.finish()
    mx.random.seed(0)
    model = Drafter(DrafterConfig(vocab_size, 64, 128, 2, 4))
    settings = TrainingSettings(steps=steps, batch=48, length=length, learning_rate=3e-3, warmup=50)
    batches = Batches([TokenShards(work / "tokens")], [1], length, 48, seed=0)
    Trainer(model, objective(Loss("ce"), None, False), batches, settings, work / "out").run()
    return model


@main.command()
@rounds
@tokens
@click.option("--steps", default=600, show_default=True, help="For the model that is taught to copy.")
@click.pass_obj
def lookup(pairs: Pairs, rounds: int, tokens: int, steps: int):
    """Prompt lookup where the answer copies the prompt, and what it costs where nothing ever matches."""
    with tempfile.TemporaryDirectory() as work:
        model = copier(Path(work), steps)
    rng, lengths = np.random.default_rng(1), range(14, 22)
    texts = [rng.integers(0, 64, n).tolist() for n in lengths]
    for length in (0, 4, "auto"):
        decoder, emitted, passes, copied = SpeculativeDecoder(ModelPair(model, PromptLookup()), None, length), 0, 0, 0
        for text in texts:
            answer = [token for block in decoder.blocks(text + text[:2], 40) for token in block.tokens]
            copied += sum(a == b for a, b in zip(answer, (text * 4)[2:], strict=False))
            emitted += decoder.stats.accepted + decoder.stats.blocks
            passes += decoder.stats.blocks
        click.echo(f"copying, draft length {length}: block efficiency {emitted / passes:.2f}; "
                   f"{copied / (40 * len(texts)):.0%} of the answers is the prompt's text")  # fmt: skip
    target, prompts = pairs.target("stories", 24), [[1]]
    for name, temperature, count in (("a greedy text that repeats itself", 0.0, 400), ("temperature 1.5", 1.5, tokens)):
        auto = Ours(target, PromptLookup(), temperature, count, "auto", prompts)
        rates = measure({"none": Ours(target, None, temperature, count, 0, prompts), "auto": auto}, rounds)
        click.echo(f"{name}, auto / no drafter {ratio(rates['auto'], rates['none'])}   {last_answer(auto)}")


@main.command()
@rounds
@click.option("--long", "longer", default=4000, show_default=True, help="Tokens of the long prompt.")
@click.pass_obj
def context(pairs: Pairs, rounds: int, longer: int):
    """Tokens/s after a long prompt over tokens/s after 200 tokens, for mlxspec and mlx-lm plain."""
    target, drafter = pairs.target("stories", 24), pairs.noised(0.07)
    prompts = {n: [1] + [(7 * i) % 500 + 3 for i in range(n - 1)] for n in (200, longer)}

    # Only what comes after the prompt is timed, so that it does not matter what is reused of it.
    def mlx_lm(prompt: list[int]) -> float:
        stream = generate_step(mx.array(prompt), target, max_tokens=60)
        next(stream)
        start = time.perf_counter()
        return sum(1 for _ in stream) / (time.perf_counter() - start)

    def mlxspec_at(length: int | str) -> Callable[[list[int]], float]:
        decoder = SpeculativeDecoder(ModelPair(target, drafter, context_length=8192), None, length)

        def run(prompt: list[int]) -> float:
            for _ in decoder.blocks(prompt, 60):
                pass
            return decoder.stats.tokens_per_second

        return run

    engines = {"mlx-lm plain": mlx_lm, "auto": mlxspec_at("auto"), "γ = 4": mlxspec_at(4), "γ = 0": mlxspec_at(0)}
    runs = {(name, n): lambda number, run=run, prompt=prompt: run(prompt)
            for name, run in engines.items() for n, prompt in prompts.items()}  # fmt: skip
    rates = by_engine(interleaved(runs, rounds))
    for name in engines:
        click.echo(f"{name:14s} at {longer} over at 200: {ratio(rates[name, longer], rates[name, 200])}")


@main.command()
@rounds
@click.pass_obj
def block(pairs: Pairs, rounds: int):
    """The time of a block by its parts, on the padded pairs."""
    for name, target, drafter in (
        ("stories + 24 layers", pairs.target("stories", 24), pairs.noised(0.07)),
        ("demo + 6 layers", pairs.target("demo", 6), pairs.demo_drafter()),
    ):
        for temperature in (0.0, 1.0):
            found = profile(ModelPair(target, drafter), Sampling(temperature), 4, rounds=rounds)
            parts = ", ".join(f"{part} {1000 * found[part]:.2f}" for part in PARTS)
            click.echo(f"{name}, T = {temperature:g}: {1000 * found['block']:.2f} ms: {parts}; besides the draft and "
                       f"the target's pass {found['overhead']:.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
