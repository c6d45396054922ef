"""The tests. OpenBLAS is loaded here, since other modules import MLX before mlxspec."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # pytest runs one process on each core

import mlxspec  # noqa: F401
