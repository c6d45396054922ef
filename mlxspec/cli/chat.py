"""``mlxspec chat``: a conversation in the terminal. Both caches are kept between turns."""

import contextlib
import json
import sys
from pathlib import Path

import click

from mlxspec import Conversation, InvalidRequestError
from mlxspec.cli.generate import Answer
from mlxspec.cli.options import calibrate, decoder_from, decoder_options, detailed, prefill_bar
from mlxspec.files import write_atomically

HELP = """\
/reset         start a new conversation
/system TEXT   start a new conversation with this system prompt
/stats         show the statistics of the last answer
/save FILE     write the conversation as JSON, {"messages": [...]}
/exit          leave (or press Ctrl-D); Ctrl-C stops an answer"""


@click.command()
@decoder_options
@click.option("--max-tokens", default=-1, show_default=True, help="Longest answer; -1: no limit but the context.")
@click.option("--system", help="System prompt.")
def chat(max_tokens, system, **decoder_settings):
    """Talk to a chat model. Type /help for the commands."""
    conversation = Conversation(decoder_from(max_tokens, **decoder_settings), system)
    calibrate(conversation.decoder)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  importing it gives input() the arrow keys
    click.echo("/help for help", err=True)
    while (line := read_line()) is not None:
        try:
            if line.startswith("/"):
                if not run(line, conversation):
                    return
            elif line:
                with prefill_bar(quiet=False) as progress:
                    Answer(conversation.say(line, max_tokens, progress))
                click.echo()
        except InvalidRequestError as error:
            click.secho(f"error: {error}", fg="red", err=True)


def read_line() -> str | None:
    """Return the next line, stripped; None at the end of the input. Ctrl-C discards the line only."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except UnicodeDecodeError:
            raise InvalidRequestError("standard input is not valid UTF-8; convert it first") from None
        except KeyboardInterrupt:
            click.echo("\n(type /exit or press Ctrl-D to leave)", err=True)


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
        click.echo(detailed(conversation.decoder.stats), err=True)
    elif command == "/save" and argument:
        save(conversation, Path(argument).expanduser())
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
