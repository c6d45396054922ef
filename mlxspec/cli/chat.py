"""``mlxspec chat``: a conversation in the terminal. Both caches are kept between turns."""

import contextlib
import json
import os
import sys
from pathlib import Path

import click

from mlxspec import Conversation, InvalidRequestError, MlxspecError
from mlxspec.cli.generate import Answer, check_max_tokens
from mlxspec.cli.options import AnswerRecord, calibrate, decoder_from, decoder_options, prefill_bar
from mlxspec.cli.statistics import detailed
from mlxspec.files import write_atomically
from mlxspec.models.sharding import launched_processes

HELP = """\
/reset         start a new conversation
/system TEXT   start a new conversation with this system prompt
/stats         show the statistics of the last answer
/save FILE     write the conversation as JSON, {"messages": [...]}
/exit          leave (or press Ctrl-D); Ctrl-C stops an answer

A message of several lines: paste it, or begin and end it with three double quotes, or end each line but the last
with a backslash."""
QUOTES = '"' * 3


@click.command()
@decoder_options
@click.option("--max-tokens", default=-1, show_default=True,
              help="Maximum length of an answer, in tokens. With -1, the context is the only limit.")  # fmt: skip
@click.option("--system", help="System prompt.")
def chat(max_tokens, system, **decoder_settings):
    """Talk to a chat model. Type /help for the commands."""
    check_max_tokens(max_tokens)
    if launched_processes() is not None:
        raise InvalidRequestError("chat runs in one process; under mlx.launch, use generate")
    conversation = Conversation(decoder_from(max_tokens if max_tokens > 0 else None, **decoder_settings), system)
    record = AnswerRecord(conversation.decoder, decoder_settings["record"])
    calibrate(conversation.decoder)
    with contextlib.suppress(ImportError):
        import readline  # importing it gives input() the arrow keys

        readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one message
    click.echo("/help for help", err=True)
    while (message := read_message()) is not None:
        try:
            if message.startswith("/") and "\n" not in message:
                if not run(message, conversation):
                    return
            elif message:
                with prefill_bar(quiet=False) as progress:
                    Answer(conversation.say(message, max_tokens, progress))
                click.echo()
                record.add()
        except MlxspecError as error:
            click.secho(f"error: {error}", fg="red", err=True)


def read_message() -> str | None:
    """Return the next message, stripped; None at the end of the input. Ctrl-C discards the message only."""
    while True:
        try:
            return complete_message(read_line("> "))
        except EOFError:
            return None
        except UnicodeDecodeError:
            raise InvalidRequestError("standard input is not valid UTF-8; convert it first") from None
        except KeyboardInterrupt:
            click.echo("\n(type /exit or press Ctrl-D to leave)", err=True)


def complete_message(first: str) -> str:
    """Read the lines that belong to the same message as ``first``. The end of the input ends it."""
    lines = [first]
    with contextlib.suppress(EOFError):
        if first.startswith(QUOTES):
            while not (lines[-1].endswith(QUOTES) and (len(lines) > 1 or len(first) >= 2 * len(QUOTES))):
                lines.append(read_line("... "))
            return "\n".join(lines).removeprefix(QUOTES).removesuffix(QUOTES).strip()
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(read_line("... "))
    return "\n".join(lines).removeprefix(QUOTES).strip()


def read_line(prompt: str) -> str:
    """Return a line of standard input, stripped of white space at its end. Raises EOFError."""
    return input(prompt if sys.stdin.isatty() else "").rstrip()


def run(line: str, conversation: Conversation) -> bool:
    """Run a command that begins with "/". Return False if the chat ends."""
    command, _, argument = line.partition(" ")
    argument = argument.strip()
    if command in ("/exit", "/quit"):
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/system" and argument:
        conversation.reset(argument)
    elif command == "/stats":
        click.echo(detailed(conversation.decoder), err=True)
    elif command == "/save" and argument:
        save(conversation, Path(os.path.expanduser(argument)))
    else:
        click.echo(HELP, err=True)
    return True


def save(conversation: Conversation, file: Path) -> None:
    """Write the messages as JSON."""
    system = [{"role": "system", "content": conversation.system}] if conversation.system is not None else []
    if not file.parent.is_dir():
        raise InvalidRequestError(f"cannot write {file}: there is no folder {file.parent}; choose another file")
    write_atomically(file, json.dumps({"messages": [*system, *conversation.messages]}, ensure_ascii=False) + "\n")
    click.echo(f"saved {len(conversation.messages)} messages to {file}", err=True)
