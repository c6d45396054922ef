"""Options that several verbs share, and the decoder that they describe."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import click
from tqdm import tqdm

import mlxspec
from mlxspec import DecodingStats, InvalidRequestError, ModelPair, Sampling, SpeculativeDecoder
from mlxspec.decoding.decoder import DEFAULT_DRAFT_LENGTH, Progress, check_options
from mlxspec.decoding.verification import DEFAULT_RULE, RULES
from mlxspec.models.quantizing import QUANTIZATIONS

DRAFTED_BY = {"model": "drafted by the model", "lookup": "drafted by prompt lookup", "none": "without a draft"}
LONG_PROMPT = 512  # tokens from which a progress bar is shown
MEASURING = "measuring what a block costs on this machine"


class DraftLength(click.ParamType):
    name = "int|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f'{value!r} is neither a number nor "auto"', param, ctx)


TARGET = click.option(
    "--target", help="Target model: a folder, hub id or short name.  [default: the built-in demo target]"
)
DRAFTER = click.option(
    "--drafter",
    help="Draft model: a folder, hub id or short name; or `lookup` (prompt lookup), `none`, or `auto` (the recommended "
    "drafter for this target, or prompt lookup where there is none). Append `+lookup` to try prompt lookup as well.  "
    "[default: auto; the demo's drafter for the demo target]",
)
QUANTIZE = click.option(
    "--quantize", help="Quantize the target once to 4, 8, mxfp4 or nvfp4 and keep the copy; none: do not quantize."
)
DRAFT_LENGTH = click.option(
    "--draft-length",
    type=DraftLength(),
    default=DEFAULT_DRAFT_LENGTH,
    show_default=True,
    help="Tokens drafted per block; 0 to decode without drafts; auto to choose the fastest length while decoding.",
)
VERIFICATION = click.option(
    "--verification",
    type=click.Choice(list(RULES)),
    default=DEFAULT_RULE,
    show_default=True,
    help="Rule that accepts drafted tokens. With each of them the answer has the target's own distribution; block "
    "accepts most.",
)
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


CONTEXT = click.option(
    "--context",
    type=click.IntRange(2),
    help="Maximum number of positions of the target.  [default: what its config declares]",
)


def decoder_options(command: Callable) -> Callable:
    """Add the options of ``decoder_from`` to a command."""
    for option in reversed([TARGET, DRAFTER, QUANTIZE, CONTEXT, DRAFT_LENGTH, VERIFICATION, *SAMPLING_OPTIONS]):
        command = option(command)
    return command


def decoder_from(
    tokens: int | None,
    target: str | None,
    drafter: str | None,
    quantize: str | None,
    context: int | None,
    draft_length: int | str,
    verification: str,
    quiet: bool = False,
    before_weights: Callable[[Any, int | None], None] = lambda tokenizer, context_length: None,
    **sampling: Any,
) -> SpeculativeDecoder:
    """Return the decoder that the options describe. Options that need no model are checked before one is loaded.

    Args:
        tokens: Tokens of prompt and answer, for the check whether the models fit into memory. None if not known.
        target: As given on the command line, like the next five.
        drafter: Draft model.
        quantize: How to quantize the target.
        context: Maximum number of positions.
        draft_length: Tokens drafted per block, or "auto".
        verification: The rule.
        quiet: Do not say which drafter was chosen.
        before_weights: As for ``mlxspec.load``.
        sampling: The fields of ``Sampling``.
    """
    drawn = Sampling(**sampling)
    check_options(draft_length, verification)
    check_pair(target, drafter, quantize)
    if drafter == "none" and draft_length not in ("auto", 0):
        raise InvalidRequestError(f"--draft-length {draft_length} needs a drafter; leave out --drafter none")
    pair = mlxspec.load(
        target, drafter, quantize=quantize, context=tokens, context_length=context, before_weights=before_weights
    )
    decoder = SpeculativeDecoder(pair, drawn, draft_length, verification)
    if target and drafter is None and not quiet:
        say_drafter(pair)
    return decoder


def check_pair(target: str | None, drafter: str | None, quantize: str | None) -> None:
    """Raise InvalidRequestError for options that contradict each other."""
    if quantize not in (None, "none", *QUANTIZATIONS):
        raise InvalidRequestError(f"--quantize is {quantize}; use one of {', '.join(QUANTIZATIONS)}, none")
    if quantize not in (None, "none") and target is None:
        raise InvalidRequestError("--quantize needs a --target; the demo target is quantized already")
    if drafter == "":
        raise InvalidRequestError("--drafter is empty; name a draft model, lookup, none or auto")
    if target == "":
        raise InvalidRequestError("--target is empty; name a model, or leave it out for the demo")


def say_drafter(pair: ModelPair) -> None:
    """Say on standard error which drafter was chosen, and why it is not the recommended one."""
    note = f" ({pair.drafter_note})" if pair.drafter_note else ""
    name = (
        "prompt lookup" if pair.drafter_name == "lookup" else pair.drafter_name.replace("+lookup", " or prompt lookup")
    )
    click.echo(f"drafting with {name}{note}", err=True)


def calibrate(decoder: SpeculativeDecoder, quiet: bool = False, anew: bool = False) -> None:
    """Measure what blocks cost, if the decoder needs that, with a bar on a terminal and one line elsewhere.

    Args:
        decoder: is ready to decode afterwards.
        quiet: show nothing.
        anew: measure even if the costs are known.
    """
    if decoder.calibrated and not anew:
        return
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not terminal and not quiet:
        click.echo(MEASURING, err=True)
    with tqdm(total=0, desc=MEASURING, disable=quiet or not terminal, leave=False, delay=0.1) as bar:
        decoder.calibrate(lambda done, total: advance(bar, done, total), anew)


def advance(bar: tqdm, done: int, total: int) -> None:
    """Set a progress bar."""
    bar.total = total
    bar.update(done - bar.n)


def target_name(target: str | None) -> str:
    """Return the name of a target for users."""
    return target or "demo"


@contextmanager
def prefill_bar(quiet: bool) -> Iterator[Progress]:
    """A progress bar for long prompts, on standard error if that is a terminal. It is made when it is needed."""
    bars: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if total >= LONG_PROMPT:
            if not bars:
                bars.append(tqdm(desc="prompt", unit="tok", disable=quiet or None, leave=False, delay=0.5))
            advance(bars[0], done, total)
            if done == total:
                bars.pop().close()

    try:
        yield progress
    finally:
        for bar in bars:
            bar.close()


def summary(stats: DecodingStats) -> str:
    """Return the line that follows every answer."""
    return (
        f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"block efficiency {stats.block_efficiency:.2f}, acceptance rate {stats.acceptance_rate:.2f}"
    )


def detailed(stats: DecodingStats) -> str:
    """Return all statistics of an answer, several lines."""
    by_position = [f"{share:.2f}" for share in stats.acceptance_by_position]
    by = ", ".join(f"{count} {DRAFTED_BY[name]}" for name, count in stats.blocks_by.items())
    reused = f", {stats.prompt_tokens_reused} of them cached" if stats.prompt_tokens_reused else ""
    return "\n".join([
        summary(stats),
        f"prompt           {stats.prompt_tokens} tokens in {stats.prompt_seconds:.2f} s{reused}",
        f"decoding         {stats.blocks} blocks in {stats.decode_seconds:.2f} s: {by or '-'}",
        f"drafted          {stats.drafted} tokens, {stats.draft_length:.1f} per block; {stats.accepted} accepted",
        f"by position      {' '.join(by_position) or '-'}",
        f"peak memory      {stats.peak_memory_bytes / 1e6:.0f} MB",
    ])  # fmt: skip
