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
        if has_amx():  # OpenBLAS 0.3.21 has slow float32 kernels for these processors: 35 instead of 250 GFLOP/s
            os.environ.setdefault(CORE, "SkylakeX")
        with suppress(OSError):
            ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)


def has_amx() -> bool:
    """Return whether Linux reports a processor with AMX, such as Intel's Sapphire Rapids."""
    with suppress(OSError):
        return b"amx_tile" in Path("/proc/cpuinfo").read_bytes().split()
    return False


def blas_name() -> str:
    """Return the BLAS that MLX's CPU back end uses: "Accelerate", "OpenBLAS" with its version, or "reference BLAS"."""
    if sys.platform == "darwin":
        return "Accelerate"
    with suppress(AttributeError):
        config = ctypes.CDLL(None).openblas_get_config  # found only if the library is in the global scope
        config.restype = ctypes.c_char_p
        return " ".join(config().decode().split()[:2])
    return "reference BLAS"


def has_fast_blas() -> bool:
    """Return whether a matrix product of several rows costs MLX's CPU back end less than as many of one row."""
    return blas_name() != "reference BLAS"
