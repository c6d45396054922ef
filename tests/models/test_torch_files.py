"""PyTorch files are read without PyTorch, and what is not a tensor is refused and never run."""

import collections
import io
import json
import os
import pickle
import shutil
import types
import zipfile

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxspec.errors import ModelLoadError
from mlxspec.models import reading
from mlxspec.models.checks import stored_weights
from mlxspec.models.export import export
from mlxspec.models.loading import DEMO
from mlxspec.models.memory import weight_bytes
from mlxspec.models.torch_files import STORAGES, convert_to_safetensors, read_torch_file
from mlxspec.training.target import Target

HARMFUL = [
    ("os", "system", ("touch {marker}",)),
    ("builtins", "eval", ("open('{marker}', 'w')",)),
    ("builtins", "getattr", (dict, "fromkeys")),
    ("subprocess", "Popen", (["touch", "{marker}"],)),
    ("torch", "load", ("{marker}",)),
    ("torch._utils", "_rebuild_device_tensor_from_numpy", (1,)),
    ("numpy", "load", ("{marker}", None, True)),
    ("collections", "namedtuple", ("A", "b")),
]


class Named:
    """A call of a function by its module and name, as an object that pickle writes."""

    def __init__(self, module, name, arguments=None):
        self.module, self.name, self.arguments = module, name, arguments


class TorchPickler(pickle._Pickler):
    """Pickles ``Named`` as PyTorch pickles its classes and functions, without PyTorch."""

    def save(self, obj, *rest, **named):
        if not isinstance(obj, Named):
            super().save(obj, *rest, **named)
            return
        self.write(f"c{obj.module}\n{obj.name}\n".encode())
        if obj.arguments is not None:
            super().save(obj.arguments)
            self.write(b"R")

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, types.SimpleNamespace) else None


def tensor(key, kind, numel, size, stride, offset=0):
    storage = types.SimpleNamespace(pid=("storage", Named("torch", kind), key, "cpu", numel))
    return Named(
        "torch._utils", "_rebuild_tensor_v2", (storage, offset, size, stride, False, collections.OrderedDict())
    )


def write_file(path, table, storages=(), **options):
    pickled = io.BytesIO()
    TorchPickler(pickled, 2).dump(table)
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, numbers in dict(storages).items():
            archive.writestr(f"archive/data/{key}", np.ascontiguousarray(numbers).tobytes())
    return path


def write_model(source, out):
    """Copy a model folder with its weights as a PyTorch file of float32 tensors."""
    out.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
    table, storages = collections.OrderedDict(), {}
    weights = mx.load(str(source / "model.safetensors"))
    for key, (name, weight) in enumerate(sorted(weights.items())):
        array = np.array(weight.astype(mx.float32))
        table[name] = tensor(str(key), "FloatStorage", array.size, array.shape, tuple(s // 4 for s in array.strides))
        storages[str(key)] = array
    write_file(out / "pytorch_model.bin", table, storages)
    return out


@pytest.mark.parametrize("kind", STORAGES)
def test_every_dtype_and_stride_is_read(tmp_path, kind):
    values = np.arange(6, dtype="float32") % (2 if kind == "BoolStorage" else 6)
    in_16_bits = (values.view("uint32") >> 16).astype("uint16")
    numbers = in_16_bits if kind == "BFloat16Storage" else values.astype(STORAGES[kind])
    expected = {"DoubleStorage": mx.float32, "BoolStorage": mx.bool_}.get(kind) or getattr(mx, STORAGES[kind])
    transposed = tensor("0", kind, 6, (3, 2), (1, 3))
    last = Named("torch._utils", "_rebuild_parameter", (tensor("0", kind, 6, (2,), (1,), 4), True, None))
    read = read_torch_file(write_file(tmp_path / "x.bin", {"a": transposed, "b": last}, {"0": numbers}))
    assert read["a"].dtype == expected
    assert read["a"].astype(mx.float32).tolist() == values.reshape(2, 3).T.tolist()
    assert read["b"].astype(mx.float32).tolist() == values[4:].tolist()


@pytest.mark.parametrize(("module", "name", "arguments"), HARMFUL)
def test_a_harmful_pickle_is_refused_by_name_and_not_run(tmp_path, module, name, arguments):
    marker = tmp_path / "was run"
    filled = tuple(one.format(marker=marker) if isinstance(one, str) else one for one in arguments)
    path = write_file(tmp_path / "x.bin", {"a": Named(module, name, filled)})
    with pytest.raises(ModelLoadError, match=rf"names {module}\.{name}; expected tensors only"):
        read_torch_file(path)
    assert not marker.exists()


def test_a_pickle_of_python_itself_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path}/was run'",)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({"a": Harmful()}, protocol))
        with pytest.raises(ModelLoadError, match=r"names (posix|nt)\.system"):
            read_torch_file(tmp_path / "x.bin")
    assert not (tmp_path / "was run").exists()


def test_attributes_set_by_a_pickle_change_nothing_for_the_next_file(tmp_path):
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    harm = b"N}X\x07\x00\x00\x00__new__ccollections\nOrderedDict\ns\x86b."  # BUILD: rebuild.__new__ = OrderedDict
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + rebuild + harm)
    with pytest.raises(ModelLoadError, match="holds no dictionary"):  # so all of it was executed
        read_torch_file(tmp_path / "x.bin")
    good = write_file(tmp_path / "y.bin", {"a": tensor("0", "ByteStorage", 1, (1,), (1,))}, {"0": np.uint8([7])})
    assert read_torch_file(good)["a"].tolist() == [7]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([1, 2], "holds no dictionary"),
        ({"a": 1}, "entry a is not a tensor"),
        ({1: tensor("0", "ByteStorage", 4, (4,), (1,))}, "entry 1 is not a tensor"),
        ({"a": tensor("0", "ByteStorage", 4, (5,), (1,))}, "larger than its storage"),
        ({"a": tensor("0", "ByteStorage", 4, (4,), (1,), 1)}, "larger than its storage"),
        ({"a": tensor("0", "ByteStorage", 4, (10**12,), (0,))}, "larger than its storage"),
        ({"a": tensor("0", "ByteStorage", 4, (4,), (-1,), 3)}, "impossible shape"),
        ({"a": tensor("0", "ByteStorage", 4, (4,), (1, 1))}, "impossible shape"),
        ({"a": tensor("missing", "ByteStorage", 4, (4,), (1,))}, "data/missing"),
        ({"a": tensor("../data.pkl", "FloatStorage", 4, (4,), (1,))}, "cannot be read"),
    ],
)
def test_a_damaged_table_is_one_clear_line(tmp_path, table, message):
    path = write_file(tmp_path / "x.bin", table, {"0": np.uint8([1, 2, 3, 4])})
    with pytest.raises(ModelLoadError, match=message) as caught:
        read_torch_file(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_that_is_cut_at_any_place_or_old_is_refused(tmp_path):
    good = write_file(
        tmp_path / "x.bin", {"a": tensor("0", "ByteStorage", 4, (4,), (1,))}, {"0": np.uint8([1, 2, 3, 4])}
    ).read_bytes()
    for length in [*range(0, len(good), 7), len(good) - 1]:
        (tmp_path / "cut.bin").write_bytes(good[:length])
        with pytest.raises(ModelLoadError):
            read_torch_file(tmp_path / "cut.bin")
    (tmp_path / "old.bin").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ModelLoadError, match=r"not a complete file of PyTorch 1\.6"):
        read_torch_file(tmp_path / "old.bin")


def test_a_compressed_file_is_refused(tmp_path):
    table = {"a": tensor("0", "ByteStorage", 4, (4,), (1,))}
    path = write_file(tmp_path / "x.bin", table, {"0": np.uint8([1, 2, 3, 4])}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelLoadError, match="compressed"):
        read_torch_file(path)


def test_a_drafter_with_a_pytorch_file_has_the_same_weights(tmp_path):
    exported = tmp_path / "exported"
    export(DEMO / "drafter", exported)
    old = write_model(exported, tmp_path / "with a space")
    ours, theirs = (dict(tree_flatten(reading.read_model(folder).parameters())) for folder in (old, exported))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_copy_that_cannot_be_written_names_the_folder_and_the_remedy(tmp_path):
    path = write_file(tmp_path / "x.bin", {"a": tensor("0", "ByteStorage", 1, (1,), (1,))}, {"0": np.uint8([7])})
    with pytest.raises(ModelLoadError, match=r"cannot be converted in .*missing \(.*free space there, or set TMPDIR"):
        convert_to_safetensors(path, tmp_path / "missing" / "x.safetensors")


def test_several_pytorch_files_are_read_by_their_index(tmp_path):
    exported = tmp_path / "exported"
    export(DEMO / "drafter", exported)
    old = write_model(exported, tmp_path / "old")
    names = list(mx.load(str(exported / "model.safetensors")))
    os.rename(old / "pytorch_model.bin", old / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")}
    (old / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert len(tree_flatten(reading.read_model(old).parameters())) == len(names)
    (old / "pytorch_model-00001-of-00001.bin").unlink()
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin\.index\.json names pytorch_model-00001"):
        reading.read_model(old)


def test_the_hub_is_asked_for_pytorch_files_only_if_there_are_no_others(tmp_path, monkeypatch):
    asked = []
    for folder, file in (("new", "model.safetensors"), ("old", "config.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).touch()

    def snapshot_download(name, allow_patterns):
        asked.append((name, "pytorch_model*.bin" in allow_patterns))
        return str(tmp_path / name.split("/")[1])

    monkeypatch.setattr(reading.huggingface_hub, "snapshot_download", snapshot_download)
    reading.model_folder("owner/new")
    reading.model_folder("owner/old")
    assert asked == [("owner/new", False), ("owner/old", False), ("owner/old", True)]


def test_memory_and_fingerprint_follow_a_pytorch_file(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 100)
    assert stored_weights(tmp_path) == [tmp_path / "pytorch_model.bin"]
    assert weight_bytes(tmp_path, {"torch_dtype": "float32"}, mx.float32) == 100
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    before = Target(str(tmp_path)).fingerprint
    (tmp_path / "pytorch_model.bin").write_bytes(b"y" * 100)
    assert Target(str(tmp_path)).fingerprint != before
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10)
    assert weight_bytes(tmp_path, {"torch_dtype": "float32"}, mx.float32) == 10


@pytest.mark.torch
def test_files_of_torch_save_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    table = {"a": base, "view": base[1:, ::2], "t": base.T, "h": base.half(), "b": base.bfloat16(),
             "p": torch.nn.Parameter(base), "n": torch.tensor(3), "empty": torch.zeros(0, 2)}  # fmt: skip
    torch.save(collections.OrderedDict(table), tmp_path / "x.bin")
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "y.bin")
    read = read_torch_file(tmp_path / "x.bin")
    for name, value in table.items():
        assert read[name].astype(mx.float32).tolist() == value.detach().float().tolist(), name
    assert set(read_torch_file(tmp_path / "y.bin")) == {"weight", "bias"}
