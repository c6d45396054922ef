import io
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from mlxspec.cli import main


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def mlxspec_command(monkeypatch, capsys):
    """Run the command in this process, as the console script does; importing MLX anew each time is slow."""

    def run(*args: str, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mlxspec", *args])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


@pytest.fixture
def mlxspec_process(tmp_path):
    """Start the installed command as a process of its own, in an empty folder with a space in its name."""
    folder = tmp_path / "a folder"
    folder.mkdir()

    def start(*args: str, **options) -> subprocess.Popen:
        script = Path(sys.executable).with_name("mlxspec")
        return subprocess.Popen(
            [script, *args], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

    return start
