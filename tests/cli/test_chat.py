import json
import os
import pty
import select
import shutil
import sys
import time
from pathlib import Path

import pytest

from mlxspec.models.loading import DEMO
from tests.conftest import heed_interrupts
from tests.decoding.test_conversation import CHATML


@pytest.fixture
def chat_model(tmp_path):
    """The demo target with a chat template: it answers every message with a story, but it does answer."""
    folder = tmp_path / "chat model"
    shutil.copytree(DEMO / "target", folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": CHATML}))
    return str(folder)


def typed(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def test_a_conversation_is_answered_turn_by_turn_and_saved(mlxspec_command, chat_model, tmp_path):
    saved = tmp_path / "a file.json"
    outcome = mlxspec_command(
        "chat", "--target", chat_model, "--max-tokens", "12", "--system", "Tell stories.",
        stdin=typed("Once upon a time", "/stats", "And then?", "/stats", f"/save {saved}", "/exit", "never read"),
    )  # fmt: skip
    assert outcome.status == 0
    assert "of them cached" in outcome.err
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert outcome.out == "".join(message["content"] + "\n" for message in messages if message["role"] == "assistant")


def test_commands_reset_and_explain(mlxspec_command, chat_model):
    lines = typed("Once upon a time", "/reset", "Once upon a time", "/system Be kind.", "/unknown")
    outcome = mlxspec_command("chat", "--target", chat_model, "--max-tokens", "12", stdin=lines)
    answer = outcome.out[: len(outcome.out) // 2]
    assert answer.strip()
    assert outcome.out == 2 * answer
    assert "/save FILE" in outcome.err


def test_a_line_that_cannot_be_answered_does_not_end_the_chat(mlxspec_command, chat_model):
    lines = typed("word " * 2000, "/save /no/such/folder/file", "/save ~nosuchuser/a", "Once upon a time")
    outcome = mlxspec_command("chat", "--target", chat_model, "--max-tokens", "12", stdin=lines)
    assert outcome.status == 0
    assert outcome.err.count("error: ") == 3
    assert outcome.out.strip()


def test_a_model_without_a_template_is_refused(mlxspec_command):
    outcome = mlxspec_command("chat", stdin=typed("Hello"))
    assert outcome.status == 2
    assert "no chat template" in outcome.err


def read_until(terminal: int, wanted: str, seconds: float = 20) -> str:
    seen, end = "", time.monotonic() + seconds
    while wanted not in seen:
        assert time.monotonic() < end, seen
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 1000).decode(errors="replace")
    return seen


def test_ctrl_c_stops_the_answer_and_not_the_chat(chat_model):
    command = [str(Path(sys.executable).with_name("mlxspec")), "chat", "--target", chat_model, "--temperature", "3"]
    child, terminal = pty.fork()
    if child == 0:
        heed_interrupts()
        os.execv(command[0], command)
    try:
        read_until(terminal, "> ")
        os.write(terminal, b"Once upon a time\n")
        read_until(terminal, "time\r\n")
        time.sleep(1.5)  # the answer has begun, and at this temperature it does not end soon
        for key, answer in (
            (b"\x03", "> "),
            (b"\x1b[A", "Once upon a time"),  # arrow up: the last message is back on the line
            (b"\x03", "> "),
        ):
            os.write(terminal, key)
            read_until(terminal, answer)
            time.sleep(0.5)  # what is typed while the line editor sets up the terminal is lost
        os.write(terminal, b"/exit\n")
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        os.close(terminal)
