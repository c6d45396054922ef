"""Models to test with: a real public one where it is at hand, and tiny random ones everywhere."""

import io
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import generate_step
from mlx_lm.models import llama
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.utils import load_model

import mlxspec
from mlxspec.cli import main
from mlxspec.decoding import calibration

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def shared(path: str) -> Path:
    """A file of the data that lies beside the project; the test skips where there is none."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs {path}, which lies beside the project and not in it")
    return SHARED / path


def random_llama(seed: int = 0, vocab_size: int = 8, scale: float = 1.0, **config) -> llama.Model:
    """A tiny llama of mlx-lm's with random weights; ``scale`` above 1 makes its distributions peaked."""
    shape = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
        "tie_word_embeddings": False,
        "max_position_embeddings": 16384,
    }
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict({**shape, **config}))
    model.lm_head.weight = model.lm_head.weight * scale
    mx.eval(model.parameters())
    return model


class WindowedLlama(llama.Model):
    """Every layer attends to the last ``window`` positions only, itself included."""

    window = 2

    def make_cache(self):
        return [RotatingKVCache(max_size=self.window) for _ in self.layers]


def noised(model: nn.Module, path: Path, amount: float) -> nn.Module:
    """A copy of a stored model with noise on every weight, as large as ``amount`` times the weights' own spread."""
    copy, _ = load_model(path)
    mx.random.seed(7)
    copy.update(tree_map(lambda w: w + amount * mx.std(w) * mx.random.normal(w.shape), model.parameters()))
    mx.eval(copy.parameters())
    return copy


def plain_greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """mlx-lm's own plain greedy text: the oracle at temperature 0."""
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=count)]


def decoded(decoder: mlxspec.SpeculativeDecoder, prompt: list[int], count: int) -> list[int]:
    return [token for block in decoder.blocks(prompt, count) for token in block.tokens]


@pytest.fixture(scope="session")
def stories_folder() -> Path:
    return shared("models/stories260K")


@pytest.fixture(scope="session")
def stories(stories_folder) -> nn.Module:
    model, _ = load_model(stories_folder)
    return model


@pytest.fixture(scope="session")
def stories_greedy(stories) -> list[int]:
    return plain_greedy(stories, [1], 500)


@pytest.fixture(scope="session")
def stories_drafters(stories, stories_folder) -> dict:
    return {
        "itself": stories,
        "a noised copy": noised(stories, stories_folder, 0.1),
        "a random one": random_llama(vocab_size=512),
        "prompt lookup": mlxspec.PromptLookup(),
        "none": None,
    }


@pytest.fixture(scope="session", autouse=True)
def costs_of_its_own(tmp_path_factory):
    """What blocks cost is measured here, as on a new machine, and not left in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "cache_folder", lambda: folder)
        yield


class Outcome(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def mlxspec_command(monkeypatch, capsys):
    """Run the command in this process, as the console script does; importing MLX again each time is slow."""

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


def heed_interrupts() -> None:
    """A process that a script started in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def mlxspec_process(tmp_path):
    """Start the installed command as a process of its own, in an empty folder with a space in its name."""
    folder = tmp_path / "a folder"
    folder.mkdir()

    def start(*args: str, **options) -> subprocess.Popen:
        script = Path(sys.executable).with_name("mlxspec")
        return subprocess.Popen(
            [script, *args],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_interrupts,
            **options,
        )

    return start
