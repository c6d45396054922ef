"""The documents in the folders of the package name only what exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlxspec

ROOT = Path(mlxspec.__file__).parent.parent
DOCUMENTS = {name: (ROOT / "mlxspec" / name / "README.md").read_text() for name in ("decoding", "training")}


def named(pattern: str, flags: int = 0) -> list[tuple[str, str]]:
    """(folder, name) of everything in the documents that matches."""
    return [
        (folder, name) for folder, text in DOCUMENTS.items() for name in sorted(set(re.findall(pattern, text, flags)))
    ]


@pytest.mark.parametrize(("folder", "path"), named(r"\b(?:mlxspec|scripts|tests)/[\w./-]*\w"))
def test_a_path_exists(folder, path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("folder", "module"), named(r"`(\w+\.py)`"))
def test_a_module_exists(folder, module):
    assert (ROOT / "mlxspec" / folder / module).exists()


@pytest.mark.parametrize(("folder", "name"), named(r"`([A-Za-z]\w*)`"))
def test_a_name_occurs_in_the_code(folder, name):
    code = "".join(path.read_text() for top in ("mlxspec", "tests") for path in (ROOT / top / folder).glob("*.py"))
    assert re.search(rf"\b{name}\b", code)


@pytest.mark.parametrize(("folder", "command"), named(r"^mlxspec .*$", re.MULTILINE))
def test_a_command_has_these_options(folder, command, mlxspec_command):
    verb, subverb, *_ = command.split()[1:]
    help = mlxspec_command(verb, subverb, "--help").out
    assert all(option in help for option in re.findall(r"--[\w-]+", command))


@pytest.mark.slow
def test_the_training_program_makes_a_drafter_and_gives_the_same_when_its_cell_is_run_again(tmp_path):
    [program] = re.findall(r"```python\n(.*?)```", DOCUMENTS["training"], re.DOTALL)
    folder = tmp_path / "a note book"
    folder.mkdir()
    as_a_user = {name: value for name, value in os.environ.items() if name != "MLXSPEC_OPENBLAS"}  # 12 times as fast
    twice = [sys.executable, "-c", "import sys; [exec(sys.argv[1], {}) for _ in range(2)]", program]
    result = subprocess.run(twice, cwd=folder, env=as_a_user, capture_output=True, text=True, check=True)
    first, again = result.stdout.splitlines()
    [efficiency] = re.findall(r"(\S+) tokens for each pass of the target", first)
    assert first == again
    assert 1.5 < float(efficiency) <= 3
    assert len(program.strip().splitlines()) <= 25


def test_the_route_of_a_block_is_at_most_eight_files():
    table = DOCUMENTS["decoding"].split("passes through eight files")[1].split("The other files")[0]
    assert len(re.findall(r"^\| `\w+\.py` \|", table, re.MULTILINE)) == 8


def test_the_whole_algorithm_is_one_function_of_at_most_one_screen():
    source = (ROOT / "mlxspec" / "decoding" / "block.py").read_text()
    function = source.split("def decode_block")[1]
    assert len(function.splitlines()) <= 50
    assert all(f"# {step}:" in function for step in ("Draft", "Verify", "Accept", "Commit"))
