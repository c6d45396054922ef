"""The maintainers' document names only what exists."""

import re
from pathlib import Path

import pytest

import mlxspec

ROOT = Path(mlxspec.__file__).parent.parent
TRAINING = ROOT / "mlxspec" / "training"
TEXT = (TRAINING / "README.md").read_text()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:mlxspec|scripts|tests)/[\w./-]*\w", TEXT))))
def test_a_path_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("module", sorted(set(re.findall(r"`(\w+\.py)`", TEXT))))
def test_a_module_exists(module):
    assert (TRAINING / module).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Za-z]\w*)`", TEXT))))
def test_a_name_occurs_in_the_code(name):
    code = "".join(path.read_text() for path in [*TRAINING.glob("*.py"), *(ROOT / "tests" / "training").glob("*.py")])
    assert re.search(rf"\b{name}\b", code)


@pytest.mark.parametrize("command", re.findall(r"^mlxspec .*$", TEXT, re.MULTILINE))
def test_a_command_has_these_options(command, mlxspec_command):
    verb, subverb, *_ = command.split()[1:]
    help = mlxspec_command(verb, subverb, "--help").out
    assert all(option in help for option in re.findall(r"--[\w-]+", command))
