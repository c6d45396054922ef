"""Options that several verbs share, and the decoder that they describe."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import click
from tqdm import tqdm

import mlxspec
from mlxspec import DecodingStats, Sampling, SpeculativeDecoder
from mlxspec.decoding.calibration import are_known
from mlxspec.decoding.decoder import Progress
from mlxspec.decoding.verification import RULES

WHO = {"model": "drafted by the model", "lookup": "by prompt lookup", "none": "without a draft"}
LONG_PROMPT = 512  # tokens from which a progress bar is worth its flicker


class DraftLength(click.ParamType):
    name = "int|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f'{value!r} is neither a number nor "auto"', param, ctx)


MODEL_OPTIONS = [
    click.option("--target", help="Folder, hub id or short name of the model.  [default: the embedded demo model]"),
    click.option(
        "--drafter",
        help='The same for its drafter, or "lookup" or "none". NAME+lookup: whichever is faster for the text at hand; '
        "auto: that, with the drafter that belongs to the target.  [default: the demo's own]",
    ),
    click.option(
        "--quantize", help="4, 8, mxfp4 or nvfp4: quantise the target, once, and keep the copy; none: do not."
    ),
    click.option(
        "--draft-length",
        type=DraftLength(),
        default="auto",
        show_default=True,
        help="Tokens drafted a block; 0: none; auto: what is fastest by measured cost and acceptance.",
    ),
    click.option("--verification", type=click.Choice(list(RULES)), default="block", show_default=True),
]
# The fields of ``Sampling``: name, type, default and help are the dataclass's.
SAMPLING_OPTIONS = [
    click.option(
        f"--{field.name.replace('_', '-')}",
        type=float if field.type is float else int,
        default=field.default,
        show_default=True,
        help=field.metadata["help"],
    )
    for field in fields(Sampling)
]


def decoder_options(command: Callable) -> Callable:
    for option in reversed([*MODEL_OPTIONS, *SAMPLING_OPTIONS]):
        command = option(command)
    return command


def decoder_from(max_tokens, target, drafter, quantize, draft_length, verification, **sampling) -> SpeculativeDecoder:
    """What the options of ``decoder_options`` ask for; the cheap ones are checked before anything is loaded."""
    sampling = Sampling(**sampling)
    pair = mlxspec.load(target, drafter, quantize=quantize, context=max_tokens if max_tokens > 0 else None)
    decoder = SpeculativeDecoder(pair, sampling, draft_length, verification)
    to_measure = draft_length == "auto" and decoder.compiled.drafters and not are_known(decoder.compiled)
    if to_measure and sys.stderr.isatty():
        click.echo("measuring, once, what blocks of this pair cost on this machine ...", err=True)
    return decoder


def target_name(target: str | None) -> str:
    return target or "demo"


def drafter_name(target: str | None, drafter: str | None) -> str:
    return drafter or ("none" if target else "demo")


@contextmanager
def prefill_bar(quiet: bool) -> Iterator[Progress]:
    """A progress bar for long prompts, on standard error if that is a terminal."""
    with tqdm(total=0, desc="prompt", unit="tok", disable=True if quiet else None, leave=False, delay=0.5) as bar:

        def progress(done: int, total: int) -> None:
            if total >= LONG_PROMPT:
                bar.total = total
                bar.update(done - bar.n)
                if done == total:
                    bar.close()

        yield progress


def summary(stats: DecodingStats) -> str:
    return (
        f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"block efficiency {stats.block_efficiency:.2f}, acceptance rate {stats.acceptance_rate:.2f}"
    )


def detailed(stats: DecodingStats) -> str:
    by_position = [f"{share:.2f}" for share in stats.acceptance_by_position]
    by = ", ".join(f"{count} {WHO[name]}" for name, count in stats.blocks_by.items())
    reused = f", {stats.prompt_tokens_reused} of them known already" if stats.prompt_tokens_reused else ""
    return "\n".join([
        summary(stats),
        f"prompt           {stats.prompt_tokens} tokens in {stats.prompt_seconds:.2f} s{reused}",
        f"decoding         {stats.blocks} blocks in {stats.decode_seconds:.2f} s: {by or '-'}",
        f"drafted          {stats.drafted} tokens, {stats.draft_length:.1f} a block; {stats.accepted} accepted",
        f"by position      {' '.join(by_position) or '-'}",
        f"peak memory      {stats.peak_memory_bytes / 1e6:.0f} MB",
    ])  # fmt: skip
