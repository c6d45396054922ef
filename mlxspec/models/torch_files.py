"""PyTorch's weight files (``pytorch_model.bin``), read without running anything that they name.

Such a file is a zip archive. It holds a pickle that describes the tensors, and one entry with the numbers of each
storage. A pickle may name any Python function to be called, so unpickling a file from a stranger can run anything. The
unpickler here knows only the names that a table of tensors needs, and replaces each of PyTorch's by a harmless object.
It refuses any other name.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxspec.errors import ModelLoadError, in_one_line

STORAGES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
}


class Storage(NamedTuple):
    """The numbers of one or several tensors, as the pickle describes them."""

    dtype: str
    key: str  # name of the entry that holds the numbers
    location: str
    numel: int


class TensorPlan(NamedTuple):
    """The arguments of PyTorch's ``_rebuild_tensor_v2``: a tensor as a view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]  # in elements
    requires_grad: bool = False
    hooks: Any = None
    metadata: Any = None


class TensorUnpickler(pickle.Unpickler):
    """An unpickler that knows only the names in a table of tensors.

    The functions in ``known`` belong to one unpickler, so a pickle that sets attributes on them changes nothing else.
    """

    def __init__(self, file: Any, path: Path):
        super().__init__(file)
        self.path = path
        self.known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): lambda *values: TensorPlan(*values),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
        }
        self.known |= {("torch", name): dtype for name, dtype in STORAGES.items()}

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a name. Raises ModelLoadError for a name that a table of tensors does not need."""
        if (module, name) not in self.known:
            raise ModelLoadError(
                f"{self.path} names {module}.{name}; expected tensors only, so nothing of it was run; use a model with "
                "safetensors files"
            )
        return self.known[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a tensor refers to."""
        kind, *values = pid
        storage = Storage(*values)
        if kind != "storage" or storage.dtype not in STORAGES.values() or not isinstance(storage.key, str):
            raise ModelLoadError(f"{self.path} refers to {str(pid)[:80]}; expected a storage; download the file again")
        return storage


def convert_to_safetensors(path: Path, out: Path) -> None:
    """Write the tensors of a PyTorch file to a safetensors file.

    Raises:
        ModelLoadError: The file cannot be read (``read_torch_file``), or the other one cannot be written.
    """
    tensors = read_torch_file(path)
    try:
        mx.save_safetensors(str(out), tensors)
    except (OSError, RuntimeError) as error:
        raise ModelLoadError(
            f"{path} cannot be converted in {out.parent} ({in_one_line(error)}); free space there, or set TMPDIR"
        ) from error


def read_torch_file(path: Path) -> dict[str, mx.array]:
    """Read the tensors of a file that ``torch.save`` wrote, without PyTorch.

    Args:
        path: A file with one dictionary of tensors, in the zip format of PyTorch 1.6 and later.

    Returns:
        The tensors by name. 64-bit floating-point numbers become 32-bit.

    Raises:
        ModelLoadError: The file is damaged, has another format, or names anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            [pickled] = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            folder = pickled.removesuffix("data.pkl")
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise ValueError("an entry is compressed, which PyTorch never does")
            if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
                raise ValueError("its numbers are not little-endian")
            with archive.open(pickled) as file:
                plans = TensorUnpickler(file, path).load()
            if not isinstance(plans, dict):
                raise ValueError("it holds no dictionary of tensors")
            return {name: _read_tensor(name, plan, archive, folder) for name, plan in plans.items()}
    except ModelLoadError:
        raise
    except zipfile.BadZipFile:
        raise ModelLoadError(
            f"{path} is not a complete file of PyTorch 1.6 or later; download it again, or convert it to safetensors"
        ) from None
    except Exception as error:  # a damaged pickle or archive raises anything
        raise ModelLoadError(
            f"{path} cannot be read as PyTorch weights: {in_one_line(error)}; download it again"
        ) from error


def _read_tensor(name: Any, plan: Any, archive: zipfile.ZipFile, folder: str) -> mx.array:
    if not isinstance(name, str) or not isinstance(plan, TensorPlan) or not isinstance(plan.storage, Storage):
        raise ValueError(f"its entry {str(name)[:80]} is not a tensor")
    dtype = plan.storage.dtype
    numbers = np.frombuffer(
        archive.read(f"{folder}data/{plan.storage.key}"), "uint16" if dtype == "bfloat16" else dtype
    )
    extents = [plan.offset, *plan.size, *plan.stride]
    if not all(isinstance(one, int) and one >= 0 for one in extents) or len(plan.size) != len(plan.stride):
        raise ValueError(f"{name} has an impossible shape")
    elements = math.prod(list(plan.size))
    last = plan.offset + sum((size - 1) * stride for size, stride in zip(plan.size, plan.stride, strict=True))
    if elements > numbers.size or (elements and last >= numbers.size):
        raise ValueError(f"{name} is larger than its storage of {numbers.size} numbers")
    strides = [stride * numbers.itemsize for stride in plan.stride]
    view = np.lib.stride_tricks.as_strided(numbers[plan.offset :], plan.size, strides)
    array = mx.array(np.ascontiguousarray(view, np.float32 if dtype == "float64" else None).reshape(plan.size))
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array
