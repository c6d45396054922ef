"""What README.md and CONTRIBUTING.md say is run here or by .ci/run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlxspec.models.catalog import KNOWN_MODELS
from mlxspec.models.loading import DEMO

ROOT = Path(__file__).parent.parent
README, CONTRIBUTING, CI = (ROOT / name for name in ("README.md", "CONTRIBUTING.md", ".ci/run"))


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[str]:
    lines = "\n".join(code_blocks(path, "bash")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines]


def run_by_ci(command: str) -> bool:
    return command == ".ci/run" or f'"{command}"' in CI.read_text().replace('\\"', '"')


def test_the_two_commands_of_the_readme_are_run_by_ci():
    install, test = code_blocks(README, "bash")[:2]
    assert run_by_ci(install.strip())
    assert run_by_ci(test.strip())


TRAINING = [
    command for command in commands(README) if command.startswith("mlxspec train ") and "recipes" not in command
]
MEASURING = [command for command in commands(README) if command.startswith(("mlxspec bench", "mlxspec report"))]
SLOW = ["mlxspec doctor"]  # its own test is in tests/cli/test_doctor.py


@pytest.mark.parametrize(
    "command",
    [one for one in commands(README) if " mlxspec " in f" {one}" and one not in (*TRAINING, *MEASURING, *SLOW)],
)
def test_a_command_of_the_readme_works(command, tmp_path):
    if run_by_ci(command):
        pytest.skip("run by .ci/run")
    needs_the_hub = any(name in command for name in KNOWN_MODELS)
    installed = shlex.quote(str(Path(sys.executable).with_name("mlxspec")))
    command = command.replace("mlxspec ", f"{installed} ", 1)
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=offline, input=""
    )
    assert "Traceback" not in result.stderr
    if needs_the_hub:  # as far as the hub's empty cache, then
        assert result.returncode == 2
        assert "not in the hub's local cache" in result.stderr
    else:
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()


@pytest.mark.slow
def test_the_training_commands_of_the_readme_work_one_after_the_other(tmp_path, mlxspec_command, monkeypatch):
    """On the demo target instead of a large one, and small."""
    monkeypatch.chdir(tmp_path)
    lines = "".join(
        json.dumps({"text": f"One day, {n} dogs went to the park to play with a ball."}) + "\n" for n in range(22)
    )
    for name in ("text/stories.jsonl", "prompts.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(lines)
    (recipe,) = code_blocks(README, "toml")
    small = {"llama2-7b-chat": str(DEMO / "target"), " = 8192": " = 128", " = 1000": " = 2", " = 500": " = 2"}
    small |= {"[distill]": "[distill]\nmax_tokens = 8", "[[finetune]]": "[[finetune]]\nlength = 32\nbatch = 2"}
    for value, small_value in small.items():
        assert value in recipe
        recipe = recipe.replace(value, small_value)
    Path("recipe.toml").write_text(f"{recipe}[evaluation]\ncount = 2\nmax_tokens = 8\n")
    sizes = {
        "pretrain": "--steps 2 --length 32 --batch 2 --hidden-size 32 --num-hidden-layers 1 --intermediate-size 64",
        "distill": "--max-tokens 8",
        "finetune": "--steps 2 --length 32 --batch 2",
    }
    sizes["adapt"] = "--steps 2 --length 32 --batch 2"
    names = ["run", "run", "plot", "pretrain", "distill", "finetune", "recorded", "adapt"]
    assert [command.split()[2] for command in TRAINING] == names
    record = ["--drafter", "none", "--max-tokens", "8", "--record", "use"]
    for number in range(10):  # as the README's own command would, without a model of 7B
        assert mlxspec_command("generate", f"Dog {number}", "--target", str(DEMO / "target"), *record).status == 0
    for command in TRAINING:
        arguments = [word.replace("llama2-7b-chat", str(DEMO / "target")) for word in command.split()[1:]]
        outcome = mlxspec_command(*arguments, *sizes.get(arguments[1], "").split())
        assert outcome.status == 0, outcome.err


def test_the_measuring_commands_of_the_readme_work_one_after_the_other(tmp_path, mlxspec_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"bench": ["--prompts", "1", "--rounds", "1", "--max-tokens", "12"]}
    assert [command.split()[1] for command in MEASURING] == ["bench", "report", "bench"]
    for command in MEASURING:
        verb, *arguments = command.replace("before.json", "bench.json").split()[1:]
        outcome = mlxspec_command(verb, *arguments, *([] if "--compare" in arguments else small.get(verb, [])))
        assert outcome.status == 0, outcome.err
        assert outcome.out.strip()


@pytest.mark.parametrize("program", code_blocks(README, "python"))
def test_a_program_of_the_readme_works(program, tmp_path):
    result = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "tokens for each pass of the target" in result.stdout


# What a maintainer runs by hand: measurements and training, whose small versions are in test_scripts.py.
BY_HAND = ("export LD_PRELOAD", "python scripts/", "mlxspec train run stories260k")


@pytest.mark.parametrize("command", commands(CONTRIBUTING))
def test_a_command_of_contributing_is_run_by_ci_or_by_a_test_of_the_scripts(command):
    assert run_by_ci(command) or command.startswith(BY_HAND)
    if command.startswith("python scripts/"):
        assert (ROOT / command.split()[1]).exists()


def test_every_path_that_the_documents_name_exists():
    for path in (README, CONTRIBUTING):
        for name in re.findall(r"`((?:mlxspec|scripts|tests)/[\w/.-]*)", path.read_text()):
            assert (ROOT / name).exists(), f"{path.name} names {name}"
