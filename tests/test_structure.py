"""The rules of the code base that a test can check."""

import ast
import re
from pathlib import Path

import pytest

import mlxspec

PACKAGE = Path(mlxspec.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# A layer may import the layers on its right. errors.py, settings.py and files.py are below all layers.
LAYERS = {
    "cli": {"cli", "evaluation", "decoding", "training", "models"},
    "evaluation": {"evaluation", "decoding", "training", "models"},
    "decoding": {"decoding", "models"},
    "training": {"training", "models"},
    "models": {"models"},
}
ONLY_IN_CLI = {"click", "tqdm"}
# Only these modules use the hub and mlx-lm's loader.
READERS_OF_MODELS = {"reading.py", "config.py", "quantizing.py", "checks.py", "export.py", "tasks.py"}


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


@pytest.mark.parametrize("path", sorted((PACKAGE / "training").rglob("*.py")), ids=lambda path: path.name)
def test_training_does_not_import_the_decoder(path):
    """The trainer is given a function that scores a drafter. So a change of the decoder cannot break training."""
    assert not {name for name in imports(path) if name.startswith("mlxspec.decoding")}


def test_the_public_names_are_listed_and_exist():
    assert mlxspec.__all__ == sorted(mlxspec.__all__)
    assert all(hasattr(mlxspec, name) for name in mlxspec.__all__)
