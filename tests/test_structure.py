"""The house rules that code can check."""

import ast
import re
from pathlib import Path

import pytest

import mlxspec

PACKAGE = Path(mlxspec.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# Left may use right, never the reverse; decoding and training do not know each other.
LAYERS = {
    "cli": {"cli", "evaluation", "decoding", "training", "models"},
    "evaluation": {"evaluation", "decoding", "training", "models"},
    "decoding": {"decoding", "models"},
    "training": {"training", "models"},
    "models": {"models"},
}
ONLY_IN_CLI = {"click", "tqdm"}
READERS_OF_MODELS = {
    "loading.py",
    "quantizing.py",
    "safety.py",
    "sharing.py",
    "tasks.py",
}  # only these touch the hub and mlx-lm's loader


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_layer_may(path):
    layer = path.relative_to(PACKAGE).parts[0]
    names = imports(path)
    if layer in LAYERS:
        used = {name.split(".")[1] for name in names if name.startswith("mlxspec.")}
        assert used & LAYERS.keys() <= LAYERS[layer]
    if layer != "cli":
        assert not {name.split(".")[0] for name in names} & ONLY_IN_CLI
        assert not re.search(r"\bprint\(", path.read_text())
    if path.name not in READERS_OF_MODELS:
        assert not {name for name in names if name.startswith(("huggingface_hub", "mlx_lm.utils"))}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_stays_short(path):
    assert len(path.read_text().splitlines()) <= 300


def test_the_public_names_are_listed_and_exist():
    assert mlxspec.__all__ == sorted(mlxspec.__all__)
    assert all(hasattr(mlxspec, name) for name in mlxspec.__all__)
