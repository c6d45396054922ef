"""The Metal kernels that a block runs on: for attention, and for products with quantized weights.

MLX chooses a kernel by the shapes, when it evaluates a graph. The functions here repeat its conditions. They explain
why one row more can make the cost of a pass jump up or down. Nothing here is measured. ``README.md`` names the source.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

MLX_VERSION = "0.32.4"  # the version whose conditions these are

VECTOR, TWO_PASSES, FULL, UNFUSED = "vector", "vector, 2 passes", "full", "unfused"
QMV, QMV_WIDE, QMV_QUAD, QMM = "qmv", "qmv_wide", "qmv_quad", "qmm"

VECTOR_ROWS = 8  # most rows of the vector kernel
VECTOR_GROUP = 32  # and at most so many pairs of a row and a query head of one KV head
# (query head size, value head size). A vector kernel for (192, 192) exists, but MLX prefers the unfused path.
VECTOR_HEADS = {(64, 64), (96, 96), (96, 64), (128, 128), (192, 128), (256, 256)}
FULL_HEADS = {(64, 64), (72, 72), (80, 80), (96, 96), (96, 64), (128, 128)}
LARGE_CHIPS = "sd"  # Max and Ultra: 2 passes at fewer positions
ULTRA = "d"
WIDE_ROWS = 5  # rows for which ``qmv_wide`` reads the weights once
OWN_ATTENTION = {"gemma2"}  # mlx-lm's code for these types computes attention itself, without MLX's fused function
MOE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")


class Kernel(NamedTuple):
    """A kernel and the condition that led to it."""

    name: str
    reason: str


class Chip(NamedTuple):
    """A GPU, as MLX distinguishes them.

    Attributes:
        generation: 13 for M1, 14 for M2, 15 for M3, 16 for M4, 17 for M5.
        size: "p" for a phone, "g" for the base chip and Pro, "s" for Max, "d" for Ultra.
    """

    generation: int
    size: str


class Attention(NamedTuple):
    """The heads of a model, as far as the kernel depends on them.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of heads of keys and values.
        head_dim: Size of a query head and of a key head.
        value_dim: Size of a value head.
        fused: Whether the model calls ``mx.fast.scaled_dot_product_attention``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    fused: bool = True


def chip_of(architecture: object) -> Chip | None:
    """Return the chip that ``mx.device_info()["architecture"]`` names, such as "applegpu_g15s". None if it names none.

    As in MLX, the last three characters are the generation and the size.
    """
    name = str(architecture)
    return Chip(int(name[-3:-1]), name[-1]) if name.startswith("applegpu") and name[-3:-1].isdigit() else None


def has_tf32(chip: Chip | None) -> bool:
    """Return whether matrix kernels round float32 to TF32 on recent macOS: ``is_nax_available``, ``enable_tf32``."""
    return chip is not None and chip.generation >= (18 if chip.size == "p" else 17)


def attention_of(config: Mapping[str, Any]) -> Attention:
    """Return the heads of a model from its config, with the keys of config.json.

    Raises:
        KeyError: The config does not say how many heads the model has.
    """
    heads = config.get("num_attention_heads") or config["n_head"]
    size = config.get("head_dim") or (config.get("hidden_size") or config["n_embd"]) // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return Attention(heads, kv_heads, size, config.get("v_head_dim") or size, config["model_type"] not in OWN_ATTENTION)


def has_experts(config: Mapping[str, Any]) -> bool:
    """Return whether the feed-forward layers of a model are mixtures of experts."""
    return any(config.get(key) for key in MOE_KEYS)


def attention_kernel(attention: Attention, rows: int, positions: int = 256, chip: Chip | None = None) -> Kernel:
    """Return the kernel of the attention of a decoding block. Its mask is a boolean array.

    Args:
        attention: The heads of the model.
        rows: Rows of the pass: draft length + 1.
        positions: Capacity of the cache, which is at least ``rows``.
        chip: The GPU. None for one that is neither Max nor Ultra.

    Returns:
        The kernel: ``VECTOR``, ``TWO_PASSES``, ``FULL`` or ``UNFUSED``.
    """
    heads, kv_heads, *sizes, fused = attention
    group = heads // kv_heads
    size = f"head size {sizes[0]}" if sizes[0] == sizes[1] else f"head sizes {sizes[0]} and {sizes[1]}"
    if not fused:
        return Kernel(UNFUSED, "the model computes attention itself")
    if rows > VECTOR_ROWS:
        if tuple(sizes) in FULL_HEADS:
            return Kernel(FULL, f"more than {VECTOR_ROWS} rows")
        return Kernel(UNFUSED, f"{size} at more than {VECTOR_ROWS} rows")
    if tuple(sizes) not in VECTOR_HEADS:
        return Kernel(UNFUSED, size)
    if rows * group > VECTOR_GROUP:
        return Kernel(UNFUSED, f"{rows} rows × {group} query heads for each KV head is more than {VECTOR_GROUP}")
    if (chip and chip.size in LARGE_CHIPS and positions >= 1024) or (group > 1 and positions >= 4096):
        return Kernel(TWO_PASSES, f"{positions} positions")
    return Kernel(VECTOR, f"at most {VECTOR_ROWS} rows, and {rows} × {group} is at most {VECTOR_GROUP}")


def matmul_kernel(
    rows: int, inputs: int, outputs: int, chip: Chip, mode: str = "affine", bits: int = 4, expert: bool = False
) -> Kernel:
    """Return the kernel of the product of ``rows`` rows with a quantized weight matrix.

    Args:
        rows: Rows of the pass.
        inputs: Size of a row.
        outputs: Size of a row of the product.
        chip: The GPU.
        mode: Quantization mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        bits: Bits of a weight.
        expert: Whether the matrix belongs to an expert of a mixture of experts.

    Returns:
        The kernel: ``QMV``, ``QMV_WIDE``, ``QMV_QUAD`` or ``QMM``.
    """
    if expert:
        return Kernel(QMV, "each row chooses its own experts, so the weights are read for each row")
    limit = matrix_limit(inputs, outputs, chip)
    if rows >= limit:
        return Kernel(QMM, f"{limit} rows or more: the weights are read once for up to 32 rows")
    if inputs in (64, 128) and bits & (bits - 1) == 0:
        return Kernel(QMV_QUAD, f"rows of size {inputs}: the weights are read for each row")
    if rows == 1:
        return Kernel(QMV, "one row")
    if mode == "affine" and chip.generation < 15:
        return Kernel(QMV, "affine weights before M3: the weights are read for each row")
    reads = math.ceil(rows / WIDE_ROWS)
    return Kernel(QMV_WIDE, f"the weights are read {'once' if reads == 1 else f'{reads} times'}")


def matrix_limit(inputs: int, outputs: int, chip: Chip) -> int:
    """Return the smallest number of rows for which a product with quantized weights runs on the matrix kernel.

    Args:
        inputs: Size of a row.
        outputs: Size of a row of the product.
        chip: The GPU.
    """
    generation, size = chip
    largest = max(inputs, outputs)
    if generation >= 17 and size != ULTRA:
        limits = (33, 25, 13)
    elif generation >= 15 and size != ULTRA:
        limits = (13, 15, 13)
    elif size == ULTRA:
        limits = (32, 18, 12)
    elif generation >= 13:
        limits = (14, 10, 6)
    else:
        limits = (18, 12, 10)
    return limits[0 if largest <= 2048 else 1 if largest <= 4096 else 2]
