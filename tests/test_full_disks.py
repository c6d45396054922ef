"""A full disk ends every command that writes in one line, and leaves no part of a file."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlxspec.models.loading import DEMO

MLXSPEC = str(Path(sys.executable).with_name("mlxspec"))
RECIPE = f"""
target = "{DEMO / "target"}"
[drafter]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
[pretrain]
data = ["text.jsonl"]
steps = 2
batch = 2
length = 16
[distill]
samples = 4
max_tokens = 6
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1.2 MB."""
    folder = tmp_path / "a small disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def assert_one_line(outcome: subprocess.CompletedProcess) -> None:
    assert outcome.returncode == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.splitlines()[-1].startswith("error: cannot write ")
    assert "free some space" in outcome.stderr.splitlines()[-1]


def call(*command: str, room: int | None = None, **options) -> subprocess.CompletedProcess:
    def limit():
        if room is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    return subprocess.run([MLXSPEC, *command], capture_output=True, text=True, preexec_fn=limit, **options)


def test_export_to_a_full_disk_leaves_nothing(small_disk):
    (small_disk / "kept").write_bytes(b"1" * 700_000)
    assert_one_line(call("export", str(DEMO / "drafter"), str(small_disk / "x" / "drafter")))
    assert [path.name for path in small_disk.iterdir()] == ["kept"]


def test_a_run_on_a_full_disk_can_be_resumed_when_there_is_room(small_disk):
    (small_disk / "text.jsonl").write_text(json.dumps({"text": "Once upon a time there was a cat. " * 9}))
    (small_disk / "small.toml").write_text(RECIPE)
    (small_disk / "filler").write_bytes(b"1" * 900_000)
    assert_one_line(call("train", "run", str(small_disk / "small.toml")))
    assert not list(small_disk.rglob(".writing-*"))
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=9000k", small_disk], check=True)
    resumed = call("train", "run", str(small_disk / "small.toml"))
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.parametrize("room", [500, 5_000, 400_000])
def test_export_over_a_limit_leaves_nothing(tmp_path, room):
    """A limit on the size of a file, where mounting is not allowed. The limits end config.json, card or weights."""
    assert_one_line(call("export", str(DEMO / "drafter"), str(tmp_path / "new" / "drafter"), room=room))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def finished(tmp_path):
    """The metrics of a run, and a benchmark."""
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": step, "loss": 1.0, "gradient_norm": 1.0} for step in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_picture_that_does_not_fit_is_not_left_in_part(finished):
    before = sorted(finished.iterdir())
    assert_one_line(call("train", "plot", str(finished), room=3000))
    assert sorted(finished.iterdir()) == before
    (finished / "curves.png").write_bytes(b"the old one")
    assert_one_line(call("train", "plot", str(finished), room=3000))
    assert (finished / "curves.png").read_bytes() == b"the old one"


def test_a_conversation_that_cannot_be_saved_keeps_the_file_before_it(tmp_path):
    saved = tmp_path / "chat.json"
    saved.write_text("before")
    model = shutil.copytree(DEMO / "target", tmp_path / "a model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    typed = f"Once upon a time\n/save {saved}\n"
    outcome = call("chat", "--target", str(model), "--max-tokens", "4", input=typed, room=20)
    assert "cannot write" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert saved.read_text() == "before"


def test_a_device_is_written_to_and_not_replaced(finished):
    assert call("train", "plot", str(finished), "--out", "/dev/full").returncode == 2
    assert Path("/dev/full").is_char_device()
