"""Measure the block efficiency of a drafter on prompts, with the real decoder.

    python scripts/measure_block_efficiency.py TARGET DRAFTER PROMPTS.jsonl --count 100

Prints one JSON object for each temperature: tokens per pass of the target over all prompts.
"""

import json
import time

import click

import mlxspec
from mlxspec.evaluation.metrics import served_block_efficiency
from mlxspec.training.prompts import read_prompts


@click.command()
@click.argument("target")
@click.argument("drafter")
@click.argument("prompts", type=click.Path(exists=True))
@click.option("--count", default=100, show_default=True, help="Number of prompts, from the start of the file.")
@click.option("--max-tokens", default=128, show_default=True)
@click.option("--draft-length", default=3, show_default=True)
@click.option("--temperature", "temperatures", type=float, multiple=True, default=[0, 1], show_default=True)
@click.option("--quantize-drafter", help="4 or 8 bits.")
def main(target, drafter, prompts, count, max_tokens, draft_length, temperatures, quantize_drafter) -> None:
    pair = mlxspec.load(target, drafter, quantize_drafter=quantize_drafter)
    ids, _ = read_prompts([prompts], pair.tokenizer, None)
    for temperature in temperatures:
        start = time.perf_counter()
        measure = served_block_efficiency(
            pair.target, pair.tokenizer, ids[:count], [temperature], draft_length, max_tokens
        )
        found = {"temperature": temperature, "prompts": len(ids[:count]), **measure(pair.drafter)}
        click.echo(json.dumps({**found, "seconds": round(time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
