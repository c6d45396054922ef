"""The speed of decoding with `--record` relative to decoding without it.

    python scripts/measure_recording.py SMOLLM2_FOLDER --rounds 7

Each answer is also written to a temporary folder, as `generate --record` does.
"""

import mlxspec

# isort: split

import tempfile
from pathlib import Path

import click

from mlxspec import Sampling, SpeculativeDecoder
from mlxspec.evaluation.rounds import by_engine, interleaved, ratio, tokens_per_second
from mlxspec.training.recording import RECORDED_TOP_K, Recording


@click.command()
@click.argument("target")
@click.option("--drafter", default="none", show_default=True)
@click.option("--draft-length", default=0, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--rounds", default=7, show_default=True)
def main(target: str, drafter: str, draft_length: int, tokens: int, rounds: int) -> None:
    """Print the ratio, the median over rounds."""
    pair = mlxspec.load(target, drafter)
    decoders = {k: SpeculativeDecoder(pair, Sampling(1.0), draft_length, keep_top_k=k) for k in (0, RECORDED_TOP_K)}
    prompt = list(range(10, 26))
    with tempfile.TemporaryDirectory() as folder:
        recording = Recording(Path(folder) / "answers", pair.target)

        def answer(seed: int, k: int) -> list[int]:
            found = [token for block in decoders[k].blocks(prompt, tokens, seed=seed) for token in block.tokens]
            if k:
                recording.add(*decoders[k].kept_probs())
            return found

        engines = {k: tokens_per_second(lambda seed, k=k: answer(seed, k)) for k in decoders}
        rates = by_engine(interleaved(engines, rounds))
    click.echo(f"with / without recording: {ratio(rates[RECORDED_TOP_K], rates[0])}")


if __name__ == "__main__":
    main()
