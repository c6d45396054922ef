"""Tokens/s of mlx-lm plain, mlx-lm speculative and mlxspec on one pair, in one process, interleaved.

    python scripts/compare_speed.py --target STORIES260K_FOLDER --noise 0.2 --pad-layers 24 --temperature 1

A tiny model's cost is all overhead, so the target can be padded with layers whose output projections are zero: the same
text at a higher cost, and the same padded target for all. What is drafted with is a folder, or a noised copy of the
target before it was padded. Every round runs every engine once, after a round that is thrown away; ratios are taken
within a round, and medians over rounds.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import dequantize_model, get_total_parameters, load_model

import mlxspec

PLAIN, PEER, OURS, OURS_PLAIN = "mlx-lm plain", "mlx-lm speculative", "mlxspec", "mlxspec, nothing drafted"


def pad(target: nn.Module, layers: int, width: int) -> None:
    """Append ``layers`` that add nothing to the residual stream, with an MLP of ``width``."""
    args = replace(target.args, intermediate_size=width)
    for _ in range(layers):
        layer = llama.TransformerBlock(args)
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
        layer.mlp.down_proj.weight = mx.zeros_like(layer.mlp.down_proj.weight)
        target.model.layers.append(layer)
    mx.eval(target.parameters())


def noise(model: nn.Module, amount: float) -> None:
    """Add noise to every weight, as large as ``amount`` times the spread of the weights of its matrix."""
    mx.random.seed(7)
    model.update(tree_map(lambda w: w + amount * mx.std(w) * mx.random.normal(w.shape), model.parameters()))
    mx.eval(model.parameters())


def step_seconds(model: nn.Module, rows: int, repeats: int = 20) -> float:
    """Median time of one forward pass over ``rows`` tokens behind 128 others."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, 128), mx.int32), cache=cache))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(model(mx.zeros((1, rows), mx.int32), cache=cache))
        times.append(time.perf_counter() - start)
        for layer in cache:
            layer.trim(rows)
    return statistics.median(times)


def engines(target, drafter, temperature: float, draft_length: int, tokens: int) -> dict[str, Callable]:
    """Name -> a function of the round's number that decodes and returns the tokens."""
    sampler, prompt = make_sampler(temp=temperature), mx.array([1])

    def plain(seed: int) -> list[int]:
        mx.random.seed(seed)
        return [int(token) for token, _ in generate_step(prompt, target, sampler=sampler, max_tokens=tokens)]

    def peer(seed: int) -> list[int]:
        mx.random.seed(seed)
        stream = speculative_generate_step(
            prompt, target, drafter, num_draft_tokens=draft_length, sampler=sampler, max_tokens=tokens
        )
        return [int(token) for token, *_ in stream]

    def ours(draft_length: int) -> Callable:
        decoder = mlxspec.SpeculativeDecoder(
            mlxspec.ModelPair(target, drafter), mlxspec.Sampling(temperature), draft_length
        )

        def decode(seed: int) -> list[int]:
            return [token for block in decoder.blocks(prompt.tolist(), tokens, seed=seed) for token in block.tokens]

        decode.decoder = decoder
        return decode

    return {PLAIN: plain, PEER: peer, OURS: ours(draft_length), OURS_PLAIN: ours(0)}


def measure(runs: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Tokens/s of every engine in every round; the first round is a warm-up and not counted."""
    rates = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            count = len(run(number))
            if number:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def ratio(rates: dict[str, list[float]], over: str, under: str) -> float:
    return statistics.median(a / b for a, b in zip(rates[over], rates[under], strict=True))


@click.command()
@click.option("--target", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of a Llama.")
@click.option("--drafter", type=click.Path(exists=True, path_type=Path), help="Folder; default: a noised target.")
@click.option("--noise", "amount", default=0.2, show_default=True, help="Noise on the copy that drafts.")
@click.option("--pad-layers", default=0, show_default=True)
@click.option("--pad-width", default=8192, show_default=True)
@click.option("--draft-length", default=4, show_default=True)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--tokens", default=200, show_default=True, help="Tokens an engine decodes in a round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(target, drafter, amount, pad_layers, pad_width, draft_length, temperature, tokens, rounds, json_file):
    def read(folder: Path) -> nn.Module:
        model, _ = load_model(folder)
        model.set_dtype(mx.float32 if mx.default_device().type == mx.cpu else mx.float16)
        return dequantize_model(model)  # padding and noise need plain weights

    target_model, drafter_model = read(target), read(drafter or target)
    if drafter is None:
        noise(drafter_model, amount)
    if pad_layers:
        pad(target_model, pad_layers, pad_width)
        click.echo(f"target padded with {pad_layers} layers that change no text: {get_total_parameters(target_model):,}"
                   f" parameters; drafter: {get_total_parameters(drafter_model):,}")  # fmt: skip

    one = step_seconds(target_model, 1)
    costs = {rows: step_seconds(target_model, rows) / one for rows in (2, 3, 4, 5, 8)}
    cost_ratio = one / step_seconds(drafter_model, 1)
    click.echo(f"a target step is {1000 * one:.2f} ms, {cost_ratio:.1f} drafter steps; m rows cost "
               + ", ".join(f"{rows}: {cost:.2f}" for rows, cost in costs.items()))  # fmt: skip

    runs = engines(target_model, drafter_model, temperature, draft_length, tokens)
    if temperature == 0:
        texts = {name: tuple(run(0)) for name, run in runs.items()}
        click.echo("all four give the same text" if len(set(texts.values())) == 1 else "the texts differ!")
    rates = measure(runs, rounds)
    for name, values in rates.items():
        click.echo(f"{name:26s} {statistics.median(values):8.1f} tokens/s  ({min(values):.1f} to {max(values):.1f})")
    stats = runs[OURS].decoder.stats
    click.echo(
        f"block efficiency {stats.block_efficiency:.2f}, acceptance rate {stats.acceptance_rate:.2f}, last round"
    )
    ratios = {f"{over} / {under}": ratio(rates, over, under)
              for over, under in ((OURS, PEER), (OURS, PLAIN), (OURS_PLAIN, PLAIN), (PEER, PLAIN))}  # fmt: skip
    for name, value in ratios.items():
        click.echo(f"{name:44s} {value:.2f}")
    if json_file:
        record = {"costs": costs, "cost_ratio": cost_ratio, "rates": rates, "ratios": ratios, "stats": stats.to_dict()}
        json_file.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
