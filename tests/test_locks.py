"""Two processes never write to one folder, and a process that was killed holds nothing."""

import re
import subprocess
import sys

import pytest

from mlxspec.errors import InvalidRequestError
from mlxspec.files import locked
from mlxspec.models.loading import DEMO

HOLD = "import sys, time; from pathlib import Path; from mlxspec.files import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def test_a_killed_process_holds_a_folder_no_longer(tmp_path):
    folder = tmp_path / "a run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(InvalidRequestError, match=rf"a run is in use by process {holder.pid}; wait until"),
        locked(folder),
    ):
        pass
    holder.kill()
    holder.communicate()
    with locked(folder):
        assert (folder / ".lock").exists()
    assert list(folder.iterdir()) == []


RECIPE = f'target = "{DEMO / "target"}"\n[drafter]\nhidden_size = 16\n[pretrain]\ndata = ["text.txt"]\n'


@pytest.mark.parametrize(
    "command",
    [
        ["train", "run", "{home}/recipe.toml", "--out", "{out}"],
        ["train", "pretrain", "--target", "{target}", "--data", "{home}/text.txt", "--out", "{out}"],
        ["train", "distill", "--target", "{target}", "--samples", "2", "--out", "{out}"],
        ["train", "finetune", "--target", "{target}", "--drafter", "{home}/drafter", "--answers", "{home}/answers",
         "--out", "{out}"],
        ["export", "{target}", "{out}"],
    ],
    ids=lambda command: " ".join(command[:2]),
)  # fmt: skip
def test_every_command_that_writes_a_folder_refuses_one_that_is_in_use(mlxspec_command, tmp_path, command):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "text.txt").write_text("Once upon a time there was a cat. " * 50)
    target, out = DEMO / "target", tmp_path / "out"
    if "finetune" in command:
        common = ["--target", str(target)]
        assert mlxspec_command("train", "distill", *common, "--samples=2", "--max-tokens=4",
                               "--out", str(tmp_path / "answers")).status == 0  # fmt: skip
        assert mlxspec_command("export", str(DEMO / "drafter"), str(tmp_path / "drafter")).status == 0
    file = tmp_path / ".out.lock" if "export" in command else None
    with locked(out, file):
        outcome = mlxspec_command(*(part.format(home=tmp_path, out=out, target=target) for part in command))
    assert outcome.status == 2
    assert re.fullmatch(rf"error: {out} is in use by process \d+; .*", outcome.err.strip().splitlines()[-1])
    assert not out.exists()
