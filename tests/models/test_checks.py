"""Model folders from strangers: mutated in 300 ways, asking for code, pointing elsewhere."""

import json
import os
import random
import shutil
import signal
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlxspec
from mlxspec import Drafter, DrafterConfig
from mlxspec.models.loading import DEMO

NONSENSE = [-1, 0, 1, 7, 10**6, 10**9, 10**18, 3.5, float("nan"), True, None, "x", "", [], [1, 2], {}, {"a": 1}]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def write_hf_folder(folder: Path) -> None:
    config = DrafterConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    mx.random.seed(0)
    Drafter(config).save(folder)
    for name in TOKENIZER:
        shutil.copyfile(DEMO / "target" / name, folder / name)


def write_old_folder(folder: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {"attention.wq": (64, 64), "attention.wk": (64, 64), "attention.wv": (64, 64), "attention.wo": (64, 64),
             "feed_forward.w1": (96, 64), "feed_forward.w2": (64, 96), "feed_forward.w3": (96, 64),
             "attention_norm": (64,), "ffn_norm": (64,)}  # fmt: skip
    arrays = {f"layers.{i}.{name}.weight": rng.normal(size=size) for i in (0, 1) for name, size in sizes.items()}
    arrays |= {"tok_embeddings.weight": rng.normal(size=(2048, 64)), "output.weight": rng.normal(size=(2048, 64)),
               "norm.weight": np.ones(64)}  # fmt: skip
    folder.mkdir(exist_ok=True)
    np.savez(folder / "weights.npz", **{name: array.astype(np.float16) for name, array in arrays.items()})
    config = {"dim": 64, "n_layers": 2, "n_heads": 2, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "config.json").write_text(json.dumps(config))
    for name in TOKENIZER:
        shutil.copyfile(DEMO / "target" / name, folder / name)


def any_file(folder, rng):
    return rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))


def truncate(folder, rng):
    file = any_file(folder, rng)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def flip_bytes(folder, rng):
    file = any_file(folder, rng)
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 5, 200])):
        content[rng.randrange(min(len(content), rng.choice([64, 4000, 10**9])))] = rng.randrange(256)
    file.write_bytes(content)


def delete(folder, rng):
    any_file(folder, rng).unlink()


def empty(folder, rng):
    any_file(folder, rng).write_bytes(b"")


def make_a_folder_of_it(folder, rng):
    file = any_file(folder, rng)
    file.unlink()
    file.mkdir()


def append(folder, rng):
    with any_file(folder, rng).open("ab") as file:
        file.write(rng.randbytes(rng.choice([1, 8, 5000])))


def config_nonsense(folder, rng):
    name = rng.choice(["config.json", "config.json", "tokenizer_config.json"])
    config = json.loads((folder / name).read_text())
    for _ in range(rng.choice([1, 1, 3])):
        key = rng.choice(
            [*config, "auto_map", "rope_scaling", "head_dim", "quantization", "layer_types", "sliding_window"]
        )
        if rng.random() < 0.15:
            config.pop(key, None)
        else:
            config[key] = rng.choice(NONSENSE)
    (folder / name).write_text(json.dumps(config))


def tokenizer_nonsense(folder, rng):
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    part = tokenizer if rng.random() < 0.5 else tokenizer["model"]
    part[rng.choice(sorted(part))] = rng.choice(NONSENSE)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def weight_nonsense(folder, rng):
    """A wrong type, shape or value, a missing or an extra key; in whichever layout the folder has."""
    file = next(path for path in folder.iterdir() if path.suffix in (".safetensors", ".npz"))
    weights = dict(mx.load(str(file)))
    name = rng.choice(sorted(weights))
    weight = weights[name]
    change = rng.choice(["int", "half", "double", "flat", "cut", "more", "nan", "inf", "missing", "extra"])
    if change == "missing":
        del weights[name]
    elif change == "extra":
        weights["model.layers.7.self_attn.q_proj.weight"] = weight
    else:
        weights[name] = {
            "int": lambda: weight.astype(mx.int32), "half": lambda: weight.astype(mx.bfloat16),
            "double": lambda: weight.astype(mx.uint32), "flat": lambda: weight.flatten(), "cut": lambda: weight[:-1],
            "more": lambda: weight[None], "nan": lambda: weight * mx.nan, "inf": lambda: weight * mx.inf,
        }[change]()  # fmt: skip
    mx.eval(weights)
    file.unlink()
    save = mx.save_safetensors if file.suffix == ".safetensors" else lambda path, arrays: mx.savez(path, **arrays)
    save(str(file), {key: value for key, value in weights.items() if file.suffix == ".safetensors" or
                     value.dtype != mx.bfloat16})  # fmt: skip


def header_nonsense(folder, rng):
    file = folder / "model.safetensors"
    if not file.exists():
        return truncate(folder, rng)
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change = rng.choice(["length", "offsets", "shape", "dtype", "entry"])
    if change == "length":
        file.write_bytes(struct.pack("<Q", rng.choice([0, 1, 2**31, 2**62, 2**64 - 1, length + 1])) + content[8:])
        return None
    name = rng.choice(sorted(header))
    if change == "entry":
        header[name] = rng.choice(NONSENSE)
    elif name != "__metadata__":
        header[name][{"offsets": "data_offsets"}.get(change, change)] = rng.choice(
            [[0, 2**62], [-4, 4], [5, 1], [10**9, 10**9], [], "x", None, [2**40], "F4", "F64"]
        )
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return None


MUTATIONS = [truncate, flip_bytes, delete, empty, make_a_folder_of_it, append, config_nonsense, config_nonsense,
             tokenizer_nonsense, weight_nonsense, weight_nonsense, header_nonsense]  # fmt: skip


class TooLongError(Exception):
    pass


def assert_loads_or_says_why(seed, tmp_path, mlxspec_command):
    rng = random.Random(seed)
    folder = tmp_path / f"model {seed}"
    rng.choice([write_hf_folder, write_hf_folder, write_old_folder])(folder)
    mutation = rng.choice(MUTATIONS)
    mutation(folder, rng)

    def too_long(*_):
        raise TooLongError

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(30)
    mx.reset_peak_memory()
    try:
        outcome = mlxspec_command("generate", "Once upon", "--target", str(folder), "--max-tokens", "3")
    finally:
        signal.alarm(0)
    what = f"seed {seed}, {mutation.__name__}: {outcome}"
    assert outcome.status in (0, 2), what
    if outcome.status == 2:
        *notes, error = outcome.err.splitlines()
        assert error.startswith("error: "), what
        assert all(note.startswith(("drafting with", "measuring")) for note in notes), what
        assert len(error) < 600, what
    assert mx.get_peak_memory() < 500e6, what
    shutil.rmtree(folder)


@pytest.mark.parametrize("batch", range(4))
def test_a_mutated_folder_loads_or_ends_in_one_line(tmp_path, mlxspec_command, batch):
    for seed in range(15 * batch, 15 * batch + 15):
        assert_loads_or_says_why(seed, tmp_path, mlxspec_command)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(4, 20))
def test_300_mutated_folders_load_or_end_in_one_line(tmp_path, mlxspec_command, batch):
    for seed in range(15 * batch, 15 * batch + 15):
        assert_loads_or_says_why(seed, tmp_path, mlxspec_command)


@pytest.fixture
def folder(tmp_path):
    write_hf_folder(tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


CODE = "import pathlib; pathlib.Path({!r}).touch()"


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_file": "own.py"}),
        ("config.json", {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}),
    ],
)
def test_a_folder_that_asks_for_its_own_code_is_refused_and_the_code_not_run(folder, tmp_path, file, changes):
    (folder / "own.py").write_text(CODE.format(str(tmp_path / "it ran")))
    edit(folder / file, **changes)
    with pytest.raises(mlxspec.MlxspecError, match="asks for code of its own"):
        mlxspec.load(folder)
    assert not (tmp_path / "it ran").exists()


def test_code_that_merely_lies_there_is_not_run(folder, tmp_path):
    for name in ("__init__.py", "modeling_llama.py", "tokenization_llama.py", "conftest.py"):
        (folder / name).write_text(CODE.format(str(tmp_path / "it ran")))
    mlxspec.load(folder)
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, name):
    shutil.move(folder / name, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / name)
    with pytest.raises(mlxspec.MlxspecError, match=f"{name} is a link to a file outside"):
        mlxspec.load(folder)


def test_links_of_the_hubs_cache_are_followed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    shutil.move(folder / "model.safetensors", tmp_path / "blob")
    os.symlink(tmp_path / "blob", folder / "model.safetensors")
    mlxspec.load(folder)


def test_a_tokenizer_setting_that_points_out_of_the_folder_is_refused(folder):
    edit(folder / "tokenizer_config.json", vocab_file="/etc/passwd")
    with pytest.raises(mlxspec.MlxspecError, match="vocab_file points out of the folder"):
        mlxspec.load(folder)


def test_a_pickle_in_an_npz_is_not_unpickled(tmp_path):
    class Payload:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it ran",))

    folder = tmp_path / "old"
    write_old_folder(folder)
    np.savez(folder / "weights.npz", **{"norm.weight": np.array([Payload()], dtype=object)})
    with pytest.raises(mlxspec.MlxspecError):
        mlxspec.load(folder)
    assert not (tmp_path / "it ran").exists()
