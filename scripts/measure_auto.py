"""Does ``draft_length="auto"`` keep its promises? Each command is one table, measured in one process, interleaved.

    python scripts/measure_auto.py never-slower --stories STORIES260K_FOLDER
    python scripts/measure_auto.py nearly-best --stories STORIES260K_FOLDER
    python scripts/measure_auto.py peer --stories STORIES260K_FOLDER
    python scripts/measure_auto.py lookup --stories STORIES260K_FOLDER
    python scripts/measure_auto.py context --stories STORIES260K_FOLDER
    python scripts/measure_auto.py block --stories STORIES260K_FOLDER

Pairs are made of the public stories260K model and of the demo pair: padded with layers that change no text, and drafted
for by noised or random copies. Every round runs every engine once, after rounds that are thrown away; ratios are taken
within a round and are medians over rounds.
"""

import statistics
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
from compare_speed import noise, pad
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import llama
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import dequantize_model, load_model

import mlxspec
from mlxspec import Drafter, DrafterConfig, ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.evaluation.speedup import calibrated, profile
from mlxspec.training.batches import Batches as Mixture
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import objective
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.trainer import Trainer, TrainingSettings

DEMO = Path(mlxspec.__file__).parent / "demo"
PROMPTS = [[1], [1, 403, 407, 261]]  # the stories model's: nothing, and "Once upon a"
PEER_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
Run = Callable[[int], int]  # the round's number -> tokens

rounds = click.option("--rounds", default=5, show_default=True)
tokens = click.option("--tokens", default=150, show_default=True, help="Tokens an engine decodes in a round.")


def read(folder: Path) -> nn.Module:
    model, _ = load_model(folder)
    model.set_dtype(mx.float32 if mx.default_device().type == mx.cpu else mx.float16)
    return dequantize_model(model)  # padding and noise need plain weights


class Pairs:
    """The pairs that are measured, made when they are asked for."""

    def __init__(self, stories: Path, width: int = 8192):
        self.stories, self.width = stories, width  # of the padding

    @cache  # noqa: B019
    def target(self, kind: str, layers: int) -> nn.Module:
        """The stories model, or the demo's, with padding."""
        model = read(self.stories if kind == "stories" else DEMO / "target")
        pad(model, layers, self.width)
        return model

    @cache  # noqa: B019
    def noised(self, amount: float, layers: int = 0) -> nn.Module:
        model = read(self.stories)
        noise(model, amount)
        if layers:
            pad(model, layers, self.width)
        return model

    @cache  # noqa: B019
    def random(self) -> nn.Module:
        """A drafter as small as the stories model that knows nothing."""
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


def plain(target: nn.Module, temperature: float, count: int, prompts: list[list[int]]) -> Run:
    sampler = make_sampler(temp=temperature)

    def run(seed: int) -> int:
        mx.random.seed(seed)
        stream = (generate_step(mx.array(p), target, sampler=sampler, max_tokens=count) for p in prompts)
        return sum(1 for steps in stream for _ in steps)

    return run


def peer(target, drafter, temperature: float, count: int, length: int, prompts: list[list[int]]) -> Run:
    sampler = make_sampler(temp=temperature)

    def run(seed: int) -> int:
        mx.random.seed(seed)
        streams = (
            speculative_generate_step(
                mx.array(p), target, drafter, num_draft_tokens=length, sampler=sampler, max_tokens=count
            )
            for p in prompts
        )
        return sum(1 for steps in streams for _ in steps)

    return run


def ours(target, drafter, temperature: float, count: int, length, prompts: list[list[int]], lookup=None) -> Run:
    decoder = SpeculativeDecoder(ModelPair(target, drafter, lookup=lookup), Sampling(temperature), length)

    def run(seed: int) -> int:
        count_of = 0
        for prompt in prompts:
            decoder.forget()  # mlx-lm reuses nothing of the last prompt either
            count_of += sum(len(block.tokens) for block in decoder.blocks(prompt, count, seed=seed))
        return count_of

    run.decoder = decoder
    return run


def measure(runs: dict[str, Run], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Tokens/s of every engine in every counted round."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(-warm_up, rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            count = run(number + warm_up)
            if number >= 0:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def ratio(rates: dict[str, list[float]], over: str, under: str) -> str:
    ratios = [a / b for a, b in zip(rates[over], rates[under], strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def settled(run: Run) -> str:
    stats = run.decoder.stats
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
    prompts = PROMPTS
    stories = pairs.target("stories", 24)
    demo = mlxspec.load()
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
        auto = ours(target, drafter, temperature, count, "auto", asked)
        rates = measure({"plain": plain(target, temperature, count, asked), "auto": auto}, rounds)
        click.echo(f"{name:38s} auto / plain {ratio(rates, 'auto', 'plain')}   {settled(auto)}")


# Pairs on the stories model with 24 layers of padding, whose best fixed draft length is small, middling and large: the
# noise in the drafter, and its own layers of padding.
LADDER = {"often wrong": (0.2, 0), "middling": (0.12, 0), "nearly always right": (0.05, 0)}


@main.command()
@rounds
@tokens
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--only", type=click.Choice(list(LADDER)), multiple=True)
@click.pass_obj
def nearly_best(pairs: Pairs, rounds: int, tokens: int, temperature: float, only: tuple[str, ...]):
    """auto over the best fixed draft length; and the cost model's prediction for each, at the same time."""
    for name in only or LADDER:
        target, drafter = pairs.target("stories", 24), pairs.noised(*LADDER[name])
        runs = {str(n): ours(target, drafter, temperature, tokens, n, PROMPTS) for n in (*range(9), 12, 16, "auto")}
        rates = measure(runs, rounds)
        best = max((n for n in rates if n != "auto"), key=lambda n: statistics.median(rates[n]))
        medians = " ".join(f"{n}: {statistics.median(values):.1f}" for n, values in rates.items())
        click.echo(f"{name:32s} best γ {best}; auto / best {ratio(rates, 'auto', best)}   {settled(runs['auto'])}")
        click.echo(f"    tokens/s  {medians}")
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
    """auto over mlx-lm speculative with the same pair and its best fixed draft length."""
    for kind in kinds:
        for count in layers:
            target = pairs.target(kind, count)
            drafter = pairs.noised(0.07) if kind == "stories" else pairs.demo_drafter()
            prompts = PROMPTS if kind == "stories" else demo_prompts()
            for temperature in temperatures:
                auto = ours(target, drafter, temperature, tokens, "auto", prompts)
                runs = {f"peer {n}": peer(target, drafter, temperature, tokens, n, prompts) for n in PEER_LENGTHS}
                rates = measure({"plain": plain(target, temperature, tokens, prompts), **runs, "auto": auto}, rounds)
                best = max(runs, key=lambda n: statistics.median(rates[n]))
                click.echo(f"{kind} + {count} layers, T = {temperature:g}: auto / {best} {ratio(rates, 'auto', best)}, "
                           f"/ plain {ratio(rates, 'auto', 'plain')}, {best} / plain {ratio(rates, best, 'plain')}   "
                           f"{settled(auto)}")  # fmt: skip


def copier(work: Path, steps: int) -> nn.Module:
    """A model that was taught to go on copying: trained here, in a minute, on random tokens that repeat themselves."""
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
    batches = Mixture([TokenShards(work / "tokens")], [1], length, 48, seed=0)
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
    target = pairs.target("stories", 24)
    found = ours(target, None, 0.0, 400, "auto", [[1]], PromptLookup())
    rates = measure({"plain": ours(target, None, 0.0, 400, 0, [[1]]), "auto": found}, rounds)
    click.echo(f"a greedy text that repeats itself, auto / nobody {ratio(rates, 'auto', 'plain')}   {settled(found)}")
    never = ours(target, None, 1.5, tokens, "auto", [[1]], PromptLookup())
    rates = measure({"plain": ours(target, None, 1.5, tokens, 0, [[1]]), "auto": never}, rounds)
    click.echo(f"text at temperature 1.5, auto / nobody {ratio(rates, 'auto', 'plain')}   {settled(never)}")


@main.command()
@rounds
@click.option("--long", "longer", default=4000, show_default=True, help="Tokens of the long prompt.")
@click.pass_obj
def context(pairs: Pairs, rounds: int, longer: int):
    """Tokens/s behind a long prompt over tokens/s behind 200 tokens, ours and mlx-lm plain's."""
    target, drafter = pairs.target("stories", 24), pairs.noised(0.07)

    def decode_rate(run: Callable[[list[int]], tuple[int, float]], length: int) -> float:
        prompt = [1] + [(7 * n) % 500 + 3 for n in range(length - 1)]
        count, seconds = run(prompt)
        return count / seconds

    def mlx_lm(prompt: list[int]) -> tuple[int, float]:
        stream = generate_step(mx.array(prompt), target, max_tokens=60)
        next(stream)
        start = time.perf_counter()
        return sum(1 for _ in stream), time.perf_counter() - start

    def decoder_run(length) -> Callable:
        decoder = SpeculativeDecoder(ModelPair(target, drafter, context_length=8192), None, length)

        def run(prompt: list[int]) -> tuple[int, float]:
            for _ in decoder.blocks(prompt, 60):
                pass
            return decoder.stats.tokens, decoder.stats.decode_seconds

        return run

    # Only what comes after the prompt is timed, so that nothing depends on what is reused of it.
    runs = {"mlx-lm plain": mlx_lm, "auto": decoder_run("auto"), "γ = 4": decoder_run(4), "γ = 0": decoder_run(0)}
    falls: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            short, long = decode_rate(run, 200), decode_rate(run, longer)
            if number:
                falls[name].append(long / short)
    for name, values in falls.items():
        click.echo(f"{name:14s} at {longer} over at 200: {statistics.median(values):.2f} "
                   f"({min(values):.2f}-{max(values):.2f})")  # fmt: skip


@main.command()
@rounds
@click.pass_obj
def block(pairs: Pairs, rounds: int):
    """Where the time of a block goes, on the padded pairs."""
    for name, target, drafter in (
        ("stories + 24 layers", pairs.target("stories", 24), pairs.noised(0.07)),
        ("demo + 6 layers", pairs.target("demo", 6), pairs.demo_drafter()),
    ):
        for temperature in (0.0, 1.0):
            found = profile(ModelPair(target, drafter), Sampling(temperature), 4, rounds=rounds)
            parts = ", ".join(f"{part} {1000 * found[part]:.2f}"
                              for part in ("drafting", "verification", "acceptance", "host"))  # fmt: skip
            click.echo(f"{name}, T = {temperature:g}: {1000 * found['block']:.2f} ms: {parts}; outside the models "
                       f"{found['outside_the_models']:.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
