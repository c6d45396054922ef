"""Run folders that were damaged in 150 ways are resumed, plotted or exported, or named in one line. Nothing is lost."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.training.test_recipe import RECIPE

CASES, BATCHES = 150, 3
JSON = [
    "[]", "{}", "null", "1", '"x"', '{"step": null}', '{"complete": true}', '{"complete": false, "inputs": null}',
    '{"step": 2, "best": 3}', '{"step": 4, "best": {"step": "x", "block_efficiency": "y"}, "evaluation": 3}',
    '{"complete": true, "inputs": {}, "result": null}', "[[[1]]]", '{"step": 1e400}', "[" * 2000, '{"step": -1}',
    '{"step": 4, "best": {"step": 3, "block_efficiency": 2}}', '{"format": 99}', '{"format": 1, "shards": "x"}',
]  # fmt: skip
TOML = ["", "steps = 0", "[pretrain]", "target = 3", "steps = 1e9", "batch = -1", "unheard_of = 1", 'loss = "hope"',
        "[[finetune]]", "[evaluation]\ncount = 0", "x" * 3000, "temperatures = []", "= 1"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, request) -> Path:
    """A folder with data, a recipe, and its finished run."""
    folder = tmp_path_factory.mktemp("a whole run")
    lines = [{"text": f"Once upon a time there was a dog with {count} hats."} for count in range(24)]
    (folder / "stories.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = RECIPE.replace("steps = 6", "steps = 4\nevaluate_every = 2")
    recipe = recipe.replace("temperatures = [0, 1]", "temperatures = [1]")
    (folder / "small.toml").write_text(recipe)
    return folder


def damage(folder: Path, rng: random.Random) -> Path:
    """Damage one file of a folder, and make some stages unfinished. Returns the file."""
    for record in folder.rglob("stage.json"):
        if rng.random() < 0.4:
            record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False}))
    file = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".png"])
    content = file.read_bytes()
    kind = rng.choice(["cut", "flip", "empty", "delete", "text", "folder", "twice", "link", "unreadable"])
    if kind == "cut":
        file.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "flip":
        flipped = bytearray(content)
        for _ in range(rng.choice([1, 5, 50]) if content else 0):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        file.write_bytes(flipped)
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "delete":
        file.unlink()
    elif kind == "text" and file.suffix == ".toml":
        lines = content.decode().splitlines()
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(TOML))
        file.write_text("\n".join(lines))
    elif kind == "text":
        file.write_text(rng.choice(JSON))
    elif kind == "folder":
        file.unlink()
        file.mkdir()
    elif kind == "twice":
        file.write_bytes(content * 2)
    elif kind == "link":
        file.unlink()
        file.symlink_to(folder / "nowhere")
    else:
        file.chmod(0)
    return file


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_a_damaged_run_is_continued_or_named_in_one_line(whole, mlxspec_command, tmp_path, batch):
    if not (whole / "small").exists():
        assert mlxspec_command("train", "run", str(whole / "small.toml")).status == 0
    failures, refused = [], 0
    previous = signal.signal(signal.SIGALRM, signal.default_int_handler)
    for number in range(batch, CASES, BATCHES):
        rng, folder = random.Random(number), tmp_path / f"case {number}"
        shutil.copytree(whole, folder)
        damaged = damage(folder, rng)
        kept = [path for path in folder.rglob("*") if path.parent == folder or path.parent.name == "drafter"]
        kept = [path for path in kept if path.exists() and path.is_file()]
        run = folder / "small"
        command = rng.choice([
            ["train", "run", str(folder / "small.toml")],
            ["train", "run", str(folder / "small.toml")],
            ["train", "plot", str(run)],
            ["export", str(run / "pretrain" / "drafter"), str(folder / "out")],
        ])  # fmt: skip
        signal.alarm(60)  # a hang
        try:
            outcome = mlxspec_command(*command)
        except BaseException as error:
            failures.append((number, damaged.relative_to(folder), command[1], repr(error)))
            continue
        finally:
            signal.alarm(0)
        last = outcome.err.splitlines()[-1:] or [""]
        if outcome.status not in (0, 2) or "Traceback" in outcome.err:
            failures.append((number, damaged.relative_to(folder), command[1], outcome))
        elif outcome.status == 2 and not last[0].startswith("error: "):
            failures.append((number, damaged.relative_to(folder), command[1], outcome.err))
        if lost := [path.relative_to(folder) for path in kept if not path.exists()]:
            failures.append((number, damaged.relative_to(folder), command[1], f"lost {lost}"))
        refused += outcome.status == 2
        shutil.rmtree(folder)
    signal.signal(signal.SIGALRM, previous)
    assert not failures, "\n".join(map(str, failures))
    assert 0 < refused < CASES // BATCHES
