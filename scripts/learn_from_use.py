"""Record answers on one topic, adapt the drafter to them, and measure it on other prompts.

    python scripts/learn_from_use.py TARGET DRAFTER TOPIC.jsonl GENERAL GENERAL.jsonl OUT

The first prompts of TOPIC.jsonl are answered and recorded as `generate --record` does. Then the drafter is adapted as
`train adapt` does. GENERAL is a folder that `mlxspec train distill` wrote. The block efficiency is measured on the
later prompts of TOPIC.jsonl and on GENERAL.jsonl, as robust_drafters.py does. OUT keeps what is finished, so a command
that is repeated continues.
"""

import mlxspec

# isort: split

import json
import time
from pathlib import Path

import click
from robust_drafters import answered, block_efficiency

from mlxspec import Sampling, SpeculativeDecoder
from mlxspec.training.adapting import AdaptSettings, adapt
from mlxspec.training.drafter_folders import load_drafter
from mlxspec.training.prompts import read_prompts
from mlxspec.training.recording import RECORDED_TOP_K, Recording
from mlxspec.training.shards import TokenShards
from mlxspec.training.target import Target


@click.command()
@click.argument("target_folder", metavar="TARGET")
@click.argument("drafter")
@click.argument("topic")
@click.argument("general", type=click.Path(path_type=Path))
@click.argument("general_prompts")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--answers", default=200, show_default=True, help="Answers to record.")
@click.option("--answer-tokens", default=128, show_default=True, help="Length of the recorded answers.")
@click.option("--count", default=50, show_default=True, help="Prompts to measure on.")
@click.option("--max-tokens", default=64, show_default=True, help="Length of the answers to measure on.")
@click.option("--draft-length", default=3, show_default=True)
@click.option("--steps", default=AdaptSettings.steps, show_default=True)
@click.option("--batch", default=AdaptSettings.batch, show_default=True)
@click.option("--length", default=AdaptSettings.length, show_default=True)
@click.option("--loss", default=AdaptSettings.loss, show_default=True)
@click.option("--learning-rate", default=AdaptSettings.learning_rate, show_default=True)
@click.option("--damping", default=AdaptSettings.damping, show_default=True)
def main(
    target_folder: str, drafter: str, topic: str, general: Path, general_prompts: str, out: Path, answers: int,
    answer_tokens: int, count: int, max_tokens: int, draft_length: int, steps: int, batch: int, length: int, loss: str,
    learning_rate: float, damping: float,
) -> None:  # fmt: skip
    """Block efficiency at T = 0 and 1, before and after, and the time that recording and adapting took."""
    target = Target(target_folder)
    prompts, _ = read_prompts([topic], target.tokenizer, None)
    others, _ = read_prompts([general_prompts], target.tokenizer, None)
    recording = Recording(out / "recorded", target.model)
    start = time.perf_counter()
    decoder = SpeculativeDecoder(
        mlxspec.load(target_folder, drafter), Sampling(1.0), draft_length, keep_top_k=RECORDED_TOP_K
    )
    for number in range(len(recording.files()), answers):
        list(decoder.blocks(prompts[number], answer_tokens, seed=number))
        recording.add(*decoder.kept_probs())
    recorded_seconds = time.perf_counter() - start
    measured = {
        (name, temperature): answered(
            target,
            [[*prompt] for prompt in chosen[:count]],
            temperature,
            max_tokens,
            out / f"{name} {temperature}.json",
        )
        for name, chosen in (("topic", prompts[answers:]), ("general", others))
        for temperature in (0, 1)
    }

    def report(when: str, model: object, **figures: object) -> None:
        found = {
            f"{name}, T = {temperature}": round(block_efficiency(model, part, temperature, draft_length), 3)
            for (name, temperature), part in measured.items()
        }
        click.echo(json.dumps({"drafter": when, **found, **figures}))

    old = load_drafter(drafter, target)
    report("before", old, recording_seconds=round(recorded_seconds))
    settings = AdaptSettings(steps, batch, length, loss, learning_rate, damping)
    start = time.perf_counter()
    result = adapt(target, old, recording, TokenShards(general / "tokens"), settings, out / "adapted")
    seconds = round(time.perf_counter() - start)
    rates = {"recorded": result.recorded, "general": result.general}
    report(
        "after",
        load_drafter(out / "adapted" / "training" / "drafter", target),
        adapting_seconds=seconds,
        kept=result.kept,
        acceptance_rates=rates,
    )


if __name__ == "__main__":
    main()
