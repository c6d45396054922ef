"""A fast BLAS for MLX's CPU back end on Linux.

MLX's wheel for Linux contains the reference BLAS. Its matrix products are 10 to 40 times slower than OpenBLAS's, and a
pass over several rows costs as much as several passes, so that speculative decoding cannot pay. The dynamic linker
takes the first definition of a symbol that it finds. If OpenBLAS is loaded before MLX, MLX uses OpenBLAS.
"""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

LIBRARY = "libopenblas.so.0"
PACKAGE = "libopenblas0-pthread"  # of Debian and Ubuntu
CORE = "OPENBLAS_CORETYPE"  # environment variable of OpenBLAS: the processor whose kernels it uses
SWITCH = "MLXSPEC_OPENBLAS"  # environment variable: "off" keeps the BLAS of MLX's wheel


def load_openblas() -> None:
    """Load OpenBLAS for MLX, if this is Linux, the library is installed and MLX is not imported yet."""
    if sys.platform == "linux" and "mlx.core" not in sys.modules and os.environ.get(SWITCH) != "off":
        # OpenBLAS 0.3.21 has slow float32 kernels for processors with AMX: 35 instead of 250 GFLOP/s
        chosen = CORE not in os.environ and has_amx()
        if chosen:
            os.environ[CORE] = "SkylakeX"
        with suppress(OSError):
            ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
        if chosen:
            del os.environ[CORE]  # OpenBLAS has read it, and other programs must not inherit it


def check_switch() -> None:
    """Raise InvalidRequestError if the environment variable ``SWITCH`` has an unknown value."""
    from mlxspec.errors import InvalidRequestError  # here, so that importing mlxspec stays fast

    if (value := os.environ.get(SWITCH)) not in (None, "", "off"):
        raise InvalidRequestError(f'{SWITCH} is {value!r}; use "off" for the BLAS of MLX\'s wheel, or unset it')


def has_amx() -> bool:
    """Return whether Linux reports a processor with AMX, such as Intel's Sapphire Rapids."""
    with suppress(OSError):
        return b"amx_tile" in Path("/proc/cpuinfo").read_bytes().split()
    return False


def blas_name() -> str:
    """Return the BLAS that MLX's CPU back end uses: "Accelerate", "OpenBLAS" with its version, or "reference BLAS"."""
    if sys.platform == "darwin":
        return "Accelerate"
    libraries = loaded_libraries()
    mlx = next((i for i, name in enumerate(libraries) if name.startswith("libmlx")), len(libraries))
    if any(name.startswith("libopenblas") for name in libraries[:mlx]):  # MLX does not use one that is loaded later
        with suppress(AttributeError):
            config = ctypes.CDLL(None).openblas_get_config  # found only if the library is in the global scope
            config.restype = ctypes.c_char_p
            return " ".join(config().decode().split()[:2])
    return "reference BLAS"


class Library(ctypes.Structure):
    """The first fields of the C library's ``dl_phdr_info``."""

    _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))


def loaded_libraries() -> list[str]:
    """Return the file names of this process's libraries, in the order in which they were loaded. Linux only."""
    names: list[str] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Library), ctypes.c_size_t, ctypes.c_void_p)
    def note(library: "ctypes._Pointer[Library]", size: int, data: int) -> int:
        names.append(os.path.basename(os.fsdecode(library.contents.name or b"")))
        return 0

    ctypes.CDLL(None).dl_iterate_phdr(note, None)
    return names


def has_fast_blas() -> bool:
    """Return whether a matrix product of several rows costs MLX's CPU back end less than as many of one row."""
    return blas_name() != "reference BLAS"
