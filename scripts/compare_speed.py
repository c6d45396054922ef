"""Tokens/s of mlx-lm plain, mlx-lm speculative and mlxspec on one pair, in one process, in interleaved rounds.

    python scripts/compare_speed.py --target STORIES260K_FOLDER --noise 0.2 --pad-layers 24 --temperature 1

A tiny model's cost is all overhead. So the target can be padded with layers whose output projections are zero: the same
text at a higher cost, and the same padded target for all engines. The drafter is a folder, or a noised copy of the
target before it was padded.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from mlx_lm.utils import dequantize_model, get_total_parameters, load_model

from mlxspec import ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.evaluation.engines import OURS, PEER, PLAIN
from mlxspec.evaluation.rounds import by_engine, interleaved, ratio, seconds, spread, tokens_per_second

OURS_PLAIN = "mlxspec, nothing drafted"
ROWS = (2, 3, 4, 5, 8)  # of the target passes whose time is compared with that of one row
Engine = Callable[[int], list[int]]  # number of the round -> the tokens that were decoded
Prompts = list[list[int]]


def read(folder: Path) -> nn.Module:
    """Return a model with plain weights, which padding and noise need."""
    model, _ = load_model(folder)
    model.set_dtype(mx.float32 if mx.default_device().type == mx.cpu else mx.float16)
    return dequantize_model(model)


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


def plain(target: nn.Module, temperature: float, tokens: int, prompts: Prompts) -> Engine:
    """Return mlx-lm's plain decoding."""
    sampler = make_sampler(temp=temperature)

    def run(seed: int) -> list[int]:
        mx.random.seed(seed)
        streams = (generate_step(mx.array(p), target, sampler=sampler, max_tokens=tokens) for p in prompts)
        return [int(token) for stream in streams for token, _ in stream]

    return run


def peer(
    target: nn.Module, drafter: nn.Module, temperature: float, tokens: int, length: int, prompts: Prompts
) -> Engine:
    """Return mlx-lm's speculative decoding with ``length`` drafted tokens."""
    options = {"num_draft_tokens": length, "sampler": make_sampler(temp=temperature), "max_tokens": tokens}

    def run(seed: int) -> list[int]:
        mx.random.seed(seed)
        streams = (speculative_generate_step(mx.array(p), target, drafter, **options) for p in prompts)
        return [int(token) for stream in streams for token, *_ in stream]

    return run


class Ours:
    """mlxspec's decoding, seeded by the number of the round."""

    def __init__(
        self,
        target: nn.Module,
        drafter: nn.Module | PromptLookup | None,
        temperature: float,
        tokens: int,
        length: int | str,
        prompts: Prompts,
    ):
        self.tokens, self.prompts = tokens, prompts
        self.decoder = SpeculativeDecoder(ModelPair(target, drafter), Sampling(temperature), length)
        self.decoder.calibrate()

    def __call__(self, number: int) -> list[int]:
        found = []
        for prompt in self.prompts:
            self.decoder.forget()  # mlx-lm reuses nothing of the last prompt either
            found += [
                token for block in self.decoder.blocks(prompt, self.tokens, seed=number) for token in block.tokens
            ]
        return found


def forward_pass(model: nn.Module, rows: int) -> Callable[[int], None]:
    """Return an engine that is one forward pass over ``rows`` tokens after 128 others."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, 128), mx.int32), cache=cache))

    def run(number: int) -> None:
        for layer in cache:
            layer.trim(layer.offset - 128)
        mx.eval(model(mx.zeros((1, rows), mx.int32), cache=cache))

    return run


def costs_of(target: nn.Module, drafter: nn.Module) -> dict[str, Any]:
    """Return the time of a target step, in seconds and in drafter steps, and of m rows relative to one."""
    passes = {("target", rows): forward_pass(target, rows) for rows in (1, *ROWS)}
    passes["drafter", 1] = forward_pass(drafter, 1)
    taken = by_engine(interleaved({which: seconds(run) for which, run in passes.items()}, rounds=20))
    step = spread(taken["target", 1]).median
    return {
        "seconds": step,
        "drafter_steps": step / spread(taken["drafter", 1]).median,
        "rows": {rows: spread(taken["target", rows]).median / step for rows in ROWS},
    }


@click.command()
@click.option("--target", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of a Llama.")
@click.option("--drafter", type=click.Path(exists=True, path_type=Path), help="Folder; default: a noised target.")
@click.option("--noise", "amount", default=0.2, show_default=True, help="Noise on the copy that drafts.")
@click.option("--pad-layers", default=0, show_default=True)
@click.option("--pad-width", default=8192, show_default=True)
@click.option("--draft-length", default=4, show_default=True)
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--tokens", default=200, show_default=True, help="Tokens that an engine decodes in a round.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(target, drafter, amount, pad_layers, pad_width, draft_length, temperature, tokens, rounds, json_file):
    target_model, drafter_model = read(target), read(drafter or target)
    if drafter is None:
        noise(drafter_model, amount)
    if pad_layers:
        pad(target_model, pad_layers, pad_width)
        click.echo(f"target padded with {pad_layers} layers that change no text: {get_total_parameters(target_model):,}"
                   f" parameters; drafter: {get_total_parameters(drafter_model):,}")  # fmt: skip

    costs = costs_of(target_model, drafter_model)
    click.echo(f"a target step takes {1000 * costs['seconds']:.2f} ms, {costs['drafter_steps']:.1f} drafter steps; "
               "m rows relative to one: "
               + ", ".join(f"{rows}: {cost:.2f}" for rows, cost in costs["rows"].items()))  # fmt: skip

    prompts = [[1]]
    ours = Ours(target_model, drafter_model, temperature, tokens, draft_length, prompts)
    engines = {
        PLAIN: plain(target_model, temperature, tokens, prompts),
        PEER: peer(target_model, drafter_model, temperature, tokens, draft_length, prompts),
        OURS: ours,
        OURS_PLAIN: Ours(target_model, drafter_model, temperature, tokens, 0, prompts),
    }
    if temperature == 0:
        texts = {tuple(engine(0)) for engine in engines.values()}
        click.echo("all four give the same text" if len(texts) == 1 else "the texts differ!")
    timed = {name: tokens_per_second(engine) for name, engine in engines.items()}
    rates = by_engine(interleaved(timed, rounds))
    for name, values in rates.items():
        found = spread(values)
        click.echo(f"{name:26s} {found.median:8.1f} tokens/s  ({found.least:.1f} to {found.most:.1f})")
    stats = ours.decoder.stats
    click.echo(
        f"block efficiency {stats.block_efficiency:.2f}, acceptance rate {stats.acceptance_rate:.2f}, last round"
    )
    ratios = {f"{over} / {under}": ratio(rates[over], rates[under])
              for over, under in ((OURS, PEER), (OURS, PLAIN), (OURS_PLAIN, PLAIN), (PEER, PLAIN))}  # fmt: skip
    for name, found in ratios.items():
        click.echo(f"{name:44s} {found}")
    if json_file:
        ratios = {name: found.to_dict() for name, found in ratios.items()}
        record = {"costs": costs, "rates": rates, "ratios": ratios, "stats": stats.to_dict()}
        json_file.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
