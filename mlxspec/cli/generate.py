"""``mlxspec generate``: streams text to standard output and prints statistics to standard error."""

import json
import sys
from collections.abc import Iterable
from typing import Any

import click

from mlxspec import InvalidRequestError, MlxspecError, Segment
from mlxspec.cli.launched import one_speaker
from mlxspec.cli.options import (
    AnswerRecord,
    calibrate,
    decoder_from,
    decoder_options,
    prefill_bar,
    target_name,
)
from mlxspec.cli.statistics import detailed, summary
from mlxspec.decoding.requests import DEFAULT_MAX_TOKENS, answer_budget
from mlxspec.decoding.text import StopStrings
from mlxspec.models.sharding import launched_processes
from mlxspec.models.tokens import check_unicode, encode_prompt

INTERRUPTED = 130
BYTES_PER_TOKEN = 3  # of a prompt, for the check of memory that comes before the tokenizer is read


@click.command()
@click.argument("prompt", required=False)
@decoder_options
@click.option("--max-tokens", default=DEFAULT_MAX_TOKENS, show_default=True,
              help="Maximum length of the answer, in tokens. With -1, the context is the only limit.")  # fmt: skip
@click.option("--system", help="System prompt, for a model whose chat template accepts one.")
@click.option("--raw", is_flag=True,
              help="Continue the prompt without the chat template. Control tokens keep their meaning.")  # fmt: skip
@click.option("--stop", multiple=True, help="End the answer before this text. Can be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming text.")
@click.option("--stats", "details", is_flag=True, help="Print all statistics.")
@click.option("--show-drafted", is_flag=True, help="Show accepted drafted tokens in green.")
@one_speaker
def generate(prompt, max_tokens, system, raw, stop, as_json, details, show_drafted, **decoder_settings):
    """Answer PROMPT. Without PROMPT, or with "-", the prompt is read from standard input.

    Started by mlx.launch, the processes divide the target, and the first one prints.
    """
    if as_json and (details or show_drafted):
        other = "--stats" if details else "--show-drafted"
        raise InvalidRequestError(f"{other} has no effect with --json; leave one out")
    if raw and system is not None:
        raise InvalidRequestError("--raw leaves out the chat template, which --system needs; leave one out")
    check_max_tokens(max_tokens)
    StopStrings(stop)
    prompt = read_prompt(prompt)
    if not prompt:
        raise InvalidRequestError("the prompt is empty; give some text")
    check_unicode(prompt)
    encoded: list[int] = []

    def encode(tokenizer: Any, context: int | None) -> None:
        encoded[:] = encode_prompt(tokenizer, prompt, system, raw)
        answer_budget(encoded, max_tokens, context)

    tokens = len(prompt.encode(errors="replace")) // BYTES_PER_TOKEN + max_tokens if max_tokens >= 0 else None
    group = launched_processes()
    decoder = decoder_from(tokens, quiet=as_json, before_weights=encode, group=group, **decoder_settings)
    record = AnswerRecord(decoder, decoder_settings["record"])
    with prefill_bar(quiet=as_json) as progress:
        segments = decoder.stream(encoded, max_tokens, stop, progress=progress)
        calibrate(decoder, quiet=as_json)
        answer = Answer(segments, quiet=as_json, color=show_drafted)
    record.add()
    if as_json:
        click.echo(json.dumps({
            "text": answer.text,
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
            "stats": decoder.stats.to_dict(),
            "target": target_name(decoder_settings["target"]),
            "drafter": decoder.pair.drafter_name,
            "sampling": decoder.sampling.to_dict(),
        }))  # fmt: skip
    else:
        if answer.text:
            click.echo()
        click.echo(detailed(decoder) if details else summary(decoder), err=True)
    if answer.finish_reason == "interrupted":
        sys.exit(INTERRUPTED)


def check_max_tokens(max_tokens: int) -> None:
    """Raise InvalidRequestError for a limit that no answer can have."""
    if max_tokens < -1:
        raise InvalidRequestError(f"--max-tokens is {max_tokens}; use 0 or more, or -1 for as many as fit")


def read_prompt(prompt: str | None) -> str:
    """Return the prompt, from standard input where none is given."""
    if prompt is not None and prompt != "-":
        return prompt
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise InvalidRequestError('no prompt; give one, as in: mlxspec generate "Once upon a time"')
    if launched_processes() is not None:
        raise InvalidRequestError("mlx.launch passes no standard input on; give the prompt as an argument")
    try:
        # A shell ends what it pipes with a newline, which is not part of the prompt.
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(
            f"standard input is not valid UTF-8 (byte {error.start}); convert it, for example with iconv"
        ) from None


class Answer:
    """Collects a stream of segments and prints each as it comes. Ctrl-C ends the stream and keeps what has arrived.

    Args:
        segments: the stream.
        quiet: print nothing.
        color: print accepted drafted tokens in green.
    """

    def __init__(self, segments: Iterable[Segment], quiet: bool = False, color: bool = False):
        self.text, self.finish_reason = "", "interrupted"
        self.tokens: list[int] = []
        try:
            for segment in segments:
                self.text += segment.text
                self.tokens += segment.tokens
                if not quiet:
                    green = color and segment.drafted
                    click.echo(click.style(segment.text, fg="green") if green else segment.text, nl=False)
                self.finish_reason = segment.finish_reason or self.finish_reason
        except KeyboardInterrupt:
            pass
        except (MlxspecError, RuntimeError):
            if self.text and not quiet:
                click.echo()  # the error starts a line of its own
            raise
