"""``mlxspec generate``: text to standard output as it comes, what it cost to standard error."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any

import click
from tqdm import tqdm

import mlxspec
from mlxspec import DecodingStats, InvalidRequestError, Sampling, Segment
from mlxspec.decoding.verification import RULES

LONG_PROMPT = 512  # tokens from which a progress bar is worth its flicker
INTERRUPTED = 130


def sampling_options(command: Callable) -> Callable:
    """The fields of ``Sampling`` as options: name, type, default and help are the dataclass's."""
    for field in reversed(fields(Sampling)):
        name, kind = f"--{field.name.replace('_', '-')}", float if field.type is float else int
        option = click.option(name, type=kind, default=field.default, show_default=True, help=field.metadata["help"])
        command = option(command)
    return command


class DraftLength(click.ParamType):
    name = "int|auto"

    def convert(self, value: Any, param: Any, ctx: Any) -> int | str:
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f'{value!r} is neither a number nor "auto"', param, ctx)


@click.command()
@click.argument("prompt", required=False)
@click.option("--target", help="Folder, hub id or short name of the model.  [default: the embedded demo model]")
@click.option("--drafter", help='The same for its drafter, or "lookup" or "none".  [default: the demo\'s own]')
@click.option("--quantize", help="4, 8, mxfp4 or nvfp4: quantise the target, once, and keep the copy; none: do not.")
@click.option("--max-tokens", default=256, show_default=True, help="-1: until the answer or the context ends.")
@sampling_options
@click.option(
    "--draft-length", type=DraftLength(), default="auto", show_default=True, help="Tokens drafted a block; 0: none."
)
@click.option("--verification", type=click.Choice(list(RULES)), default="block", show_default=True)
@click.option("--system", help="System prompt, where the model's chat template takes one.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without the chat template.")
@click.option("--stop", multiple=True, help="End the answer before this text; may be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@click.option("--stats", "details", is_flag=True, help="Print all statistics.")
@click.option("--show-drafted", is_flag=True, help="Show accepted drafted tokens in green.")
def generate(prompt, target, drafter, quantize, max_tokens, draft_length, verification, system, raw, stop, as_json,
             details, show_drafted, **sampling):  # fmt: skip
    """Answer PROMPT. Without one, or with "-", it is read from standard input."""
    prompt = read_prompt(prompt)
    sampling = Sampling(**sampling)
    pair = mlxspec.load(target, drafter, quantize=quantize)
    decoder = mlxspec.SpeculativeDecoder(pair, sampling, draft_length, verification)
    with tqdm(total=0, desc="prompt", unit="tok", disable=True if as_json else None, leave=False, delay=0.5) as bar:

        def progress(done: int, total: int) -> None:
            if total >= LONG_PROMPT:
                bar.total = total
                bar.update(done - bar.n)
                if done == total:
                    bar.close()

        segments = decoder.stream(prompt, max_tokens, stop, system, raw, progress)
        answer = Answer(segments, quiet=as_json, colour=show_drafted)
    if as_json:
        click.echo(json.dumps({
            "text": answer.text,
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
            "stats": decoder.stats.to_dict(),
            "target": target or "demo",
            "drafter": drafter or ("none" if target else "demo"),
            "sampling": sampling.to_dict(),
        }))  # fmt: skip
    else:
        click.echo()
        click.echo(detailed(decoder.stats) if details else summary(decoder.stats), err=True)
    if answer.finish_reason == "interrupted":
        sys.exit(INTERRUPTED)


def read_prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise InvalidRequestError('no prompt; give one, as in: mlxspec generate "Once upon a time"')
    try:
        # The newline that ends a line of a shell is not part of what was meant.
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"standard input is not valid UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from None


class Answer:
    """Everything that a stream of segments said, printed meanwhile; Ctrl-C ends it and keeps what there is."""

    def __init__(self, segments: Iterable[Segment], quiet: bool, colour: bool):
        self.text, self.tokens, self.finish_reason = "", [], "interrupted"
        try:
            for segment in segments:
                self.text += segment.text
                self.tokens += segment.tokens
                if not quiet:
                    green = {"fg": "green"} if colour and segment.drafted else {}
                    click.echo(click.style(segment.text, **green) if green else segment.text, nl=False)
                self.finish_reason = segment.finish_reason or self.finish_reason
        except KeyboardInterrupt:
            pass


def summary(stats: DecodingStats) -> str:
    return (
        f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s, "
        f"block efficiency {stats.block_efficiency:.2f}, acceptance rate {stats.acceptance_rate:.2f}"
    )


def detailed(stats: DecodingStats) -> str:
    by_position = [f"{count / stats.blocks:.2f}" for count in stats.accepted_at]
    return "\n".join([
        summary(stats),
        f"prompt           {stats.prompt_tokens} tokens in {stats.prompt_seconds:.2f} s",
        f"decoding         {stats.blocks} blocks in {stats.decode_seconds:.2f} s",
        f"drafted          {stats.drafted} tokens, {stats.draft_length:.1f} a block; {stats.accepted} accepted",
        f"by position      {' '.join(by_position) or '-'}",
        f"peak memory      {stats.peak_memory_bytes / 1e6:.0f} MB",
    ])  # fmt: skip
