"""What tracing blocks costs a model over a long answer, and so how fast the capacity of the caches should grow.

    python scripts/measure_tracing.py --model SMOLLM2_FOLDER
    python scripts/measure_tracing.py --model SMOLLM2_FOLDER --tokens 2000 --lengths 6

A block is traced once for each draft length and each capacity of the caches. This traces a block of every length of the
menu at every capacity that an answer reaches, with prompt lookup as the drafter, and decodes such an answer without a
draft. Nothing is evaluated while tracing.
"""

import statistics
import time
from pathlib import Path

import click
import mlx.core as mx
from mlx_lm.utils import dequantize_model

import mlxspec
from mlxspec import ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding.acceptance import MENU
from mlxspec.decoding.cache import capacity_for
from mlxspec.decoding.calibration import block_state
from mlxspec.decoding.compiled import CompiledBlocks
from mlxspec.decoding.drafting import LOOKUP, Choice


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of a model.")
@click.option("--tokens", default=2000, show_default=True, help="Length of the answer.")
@click.option("--lengths", default=6, show_default=True, help="Draft lengths that are in use at each capacity.")
def main(model: Path, tokens: int, lengths: int) -> None:
    """Print the time of a trace, and its share of an answer."""
    pair = mlxspec.load(model, "lookup")
    if mx.default_device().type == mx.cpu:  # there a quantized pass over m rows costs m passes
        dequantized = dequantize_model(pair.target)
        dequantized.set_dtype(mx.float32)
        pair = ModelPair(dequantized, PromptLookup())
    mx.eval(pair.target.parameters())

    plain = SpeculativeDecoder(ModelPair(pair.target, context_length=2**31), Sampling(1.0))
    for _ in plain.blocks([1] * 8, tokens):
        pass
    capacities = sorted({capacity_for(length) for length in range(8, tokens + 8)})
    compiled = CompiledBlocks(pair, Sampling(1.0), "block")
    traces = []
    for length in MENU[1:]:
        for capacity in capacities:
            state = block_state(compiled, compiled.proposers[LOOKUP], capacity)
            start = time.perf_counter()
            compiled[Choice(LOOKUP, length)](state)
            traces.append(time.perf_counter() - start)
    trace = statistics.median(traces)
    one = plain.stats.decode_seconds / plain.stats.blocks
    click.echo(
        f"{len(pair.target.layers)} layers: a trace takes {1000 * trace:.1f} ms, a plain block {1000 * one:.1f} ms"
    )
    spent = trace * lengths * len(capacities)
    for efficiency in (1, 2, 4):
        share = spent / (spent + plain.stats.decode_seconds / efficiency)
        click.echo(f"{lengths} lengths at {len(capacities)} capacities: {spent:.2f} s, {share:.1%} of an answer of "
                   f"{tokens} tokens that is decoded {efficiency} times as fast as plain")  # fmt: skip


if __name__ == "__main__":
    main()
