"""``mlxspec generate``: text to standard output as it comes, what it cost to standard error."""

import json
import sys
from collections.abc import Iterable

import click

from mlxspec import InvalidRequestError, Segment
from mlxspec.cli.options import (
    decoder_from,
    decoder_options,
    detailed,
    drafter_name,
    prefill_bar,
    summary,
    target_name,
)

INTERRUPTED = 130


@click.command()
@click.argument("prompt", required=False)
@decoder_options
@click.option("--max-tokens", default=256, show_default=True, help="-1: until the answer or the context ends.")
@click.option("--system", help="System prompt, where the model's chat template takes one.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, without the chat template.")
@click.option("--stop", multiple=True, help="End the answer before this text; may be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
@click.option("--stats", "details", is_flag=True, help="Print all statistics.")
@click.option("--show-drafted", is_flag=True, help="Show accepted drafted tokens in green.")
def generate(prompt, max_tokens, system, raw, stop, as_json, details, show_drafted, **decoder_settings):
    """Answer PROMPT. Without one, or with "-", it is read from standard input."""
    prompt = read_prompt(prompt)
    decoder = decoder_from(max_tokens, **decoder_settings)
    with prefill_bar(quiet=as_json) as progress:
        segments = decoder.stream(prompt, max_tokens, stop, system, raw, progress)
        answer = Answer(segments, quiet=as_json, colour=show_drafted)
    if as_json:
        target, drafter = decoder_settings["target"], decoder_settings["drafter"]
        click.echo(json.dumps({
            "text": answer.text,
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
            "stats": decoder.stats.to_dict(),
            "target": target_name(target),
            "drafter": drafter_name(target, drafter),
            "sampling": decoder.sampling.to_dict(),
        }))  # fmt: skip
    else:
        click.echo()
        click.echo(detailed(decoder.stats) if details else summary(decoder.stats), err=True)
    if answer.finish_reason == "interrupted":
        sys.exit(INTERRUPTED)


def read_prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
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

    def __init__(self, segments: Iterable[Segment], quiet: bool = False, colour: bool = False):
        self.text, self.tokens, self.finish_reason = "", [], "interrupted"
        try:
            for segment in segments:
                self.text += segment.text
                self.tokens += segment.tokens
                if not quiet:
                    green = colour and segment.drafted
                    click.echo(click.style(segment.text, fg="green") if green else segment.text, nl=False)
                self.finish_reason = segment.finish_reason or self.finish_reason
        except KeyboardInterrupt:
            pass
