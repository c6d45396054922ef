"""Estimates of the memory that models need, computed before anything is loaded.

A model that does not fit would make the operating system swap, so it is refused.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxspec.blas import has_fast_blas
from mlxspec.errors import ModelLoadError
from mlxspec.files import load_arrays
from mlxspec.models.checks import SAFETENSORS, check_folder, check_safetensors, stored_weights
from mlxspec.models.config import declared_context

FLOAT_SHARE = 0.25  # of the memory, for a quantized model that is held in float32
CONTROL_GROUP = Path("/sys/fs/cgroup/memory.max")  # the limit of a container on Linux, in bytes, or "max"
DEFAULT_CONTEXT = 4096  # tokens to count caches for if the caller gives no number


def check_memory(
    models: list[tuple[Path, dict[str, Any]]],
    context: int | None,
    dtype: mx.Dtype | None,
    widen: bool,
    processes: int = 1,
) -> None:
    """Refuse models whose weights and caches do not fit into the device's memory.

    Args:
        models: The folder and the config of each model.
        context: Number of tokens to count caches for, at most the context that each model declares. None for 4096.
        dtype: Precision of the weights in memory. None for the device's default.
        widen: Whether quantized weights become float32 where that is faster.
        processes: Number of processes over which the first model is divided.

    Raises:
        ModelLoadError: The models do not fit, or a folder is refused (``check_folder``).
    """
    for folder, _ in models:
        check_folder(folder)  # before a file is opened
    parts = [processes, *(1 for _ in models[1:])]
    weights = sum(weight_bytes(*model, dtype, widen, part) for model, part in zip(models, parts, strict=True))
    tokens = context or DEFAULT_CONTEXT
    tokens = min(tokens, declared_context(models[0][1]) or tokens)  # no text is longer than that
    caches = sum(cache_bytes_per_token(config, dtype) * min(tokens, declared_context(config) or tokens) // part
                 for (_, config), part in zip(models, parts, strict=True))  # fmt: skip
    caches += sum(state_bytes_per_token(config, dtype) * tokens for _, config in models[1:])
    limit = device_limit()
    if weights + caches > limit:
        names = " and ".join(folder.name for folder, _ in models)
        raise ModelLoadError(
            f"{names} need {gigabytes(weights)} for weights and {gigabytes(caches)} for {tokens} tokens, and this "
            f"device has {gigabytes(limit)}; quantize the target, use a smaller model, or ask for "
            "fewer tokens"
        )


def weight_bytes(
    folder: Path, config: dict[str, Any], dtype: mx.Dtype | None, widen: bool = False, processes: int = 1
) -> int:
    """Return the memory of a model's weights, from the types and shapes in the headers of its files.

    Args:
        folder: The model's folder.
        config: The content of config.json.
        dtype: Precision of the weights in memory. None for the device's default.
        widen: Whether quantized weights become float32 where that is faster.
        processes: Number of processes over which the layers are divided.

    Returns:
        The size in bytes, in each process. Without headers, as in PyTorch's files, it is estimated from the size of the
        files, for a whole model.
    """
    number, files = bytes_per_number(dtype), stored_weights(folder)
    arrays: dict[str, mx.array] = {}
    try:
        for file in files:
            if file.match(SAFETENSORS):
                check_safetensors(file)
            arrays |= load_arrays(file)  # lazily, so that only headers are read
    except Exception:  # PyTorch's files, and a damaged file, which makes any error here and is refused when it is read
        stored_in_16_bits = "16" in str(config.get("torch_dtype") or config.get("dtype") or "float16")
        return sum(file.stat().st_size for file in files) * (2 if stored_in_16_bits and number == 4 else 1)
    sizes = {
        name: array.size * number if mx.issubdtype(array.dtype, mx.floating) else array.nbytes
        for name, array in arrays.items()
    }
    layers = [name.removesuffix(".scales") for name in arrays if name.endswith(".scales")]
    if widen and number == 4 and fits_widened(widened := widened_bytes(arrays, layers, config.get("quantization"))):
        packed = {f"{layer}.{part}" for layer in layers for part in ("weight", "scales", "biases")}
        whole = widened + sum(size for name, size in sizes.items() if name not in packed)
    else:
        whole = sum(sizes.values())
    layers_share = sum(size for name, size in sizes.items() if "layers." in name) / max(1, sum(sizes.values()))
    return round(whole * (1 - layers_share * (1 - 1 / processes)))


def widened_bytes(arrays: dict[str, mx.array], layers: list[str], quantization: Any) -> int:
    """Return the bytes of quantized layers in float32, or 0 if the config does not describe their quantization.

    Args:
        arrays: The stored arrays by name.
        layers: Names of the quantized layers.
        quantization: ``quantization`` of config.json. A layer may have an entry of its own.
    """
    try:
        own = {layer: quantization.get(layer) for layer in layers}
        bits = {layer: (one if isinstance(one, dict) else quantization)["bits"] for layer, one in own.items()}
        return sum(4 * arrays[f"{layer}.weight"].size * 32 // bits[layer] for layer in layers)
    except (AttributeError, KeyError, TypeError, ZeroDivisionError):
        return 0


def cache_bytes_per_token(config: dict[str, Any], dtype: mx.Dtype | None) -> int:
    """Return the bytes of the keys and values of one position in all layers, or 0 if the config lacks a size."""
    try:
        layers = config.get("num_hidden_layers") or config["n_layers"]
        heads = config.get("num_attention_heads") or config["n_heads"]
        kv_heads = config.get("num_key_value_heads") or config.get("n_kv_heads") or heads
        head_dim = config.get("head_dim") or (config.get("hidden_size") or config["dim"]) // heads
        return int(2 * layers * kv_heads * head_dim * bytes_per_number(dtype))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return 0


def state_bytes_per_token(config: dict[str, Any], dtype: mx.Dtype | None) -> int:
    """Return the bytes of the target's hidden states that one position needs, if this is the config of an EAGLE head.

    A head has one layer and reads up to three states of its own width. Any other drafter with one layer is counted too.
    """
    size = config.get("hidden_size")
    return 3 * size * bytes_per_number(dtype) if config.get("num_hidden_layers") == 1 and isinstance(size, int) else 0


def bytes_per_number(dtype: mx.Dtype | None) -> int:
    """Return the bytes of one number of this type. None stands for the type that ``load`` uses on this device."""
    if dtype is not None:
        return dtype.size
    return 4 if mx.default_device().type == mx.cpu else 2


def device_limit() -> int:
    """Return the memory that arrays may use, in bytes: Metal's recommended working set, or else the device's memory."""
    info = mx.device_info()
    known = info.get("max_recommended_working_set_size") or info.get("total_memory") or info.get("memory_size")
    limit = int(known or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if mx.default_device().type == mx.cpu:
        with suppress(OSError, ValueError):
            return min(limit, int(CONTROL_GROUP.read_text()))
    return limit


def fits_widened(size: int) -> bool:
    """Return whether quantized weights that take ``size`` bytes in float32 should be held in float32.

    MLX's CPU back end has no fast product with quantized weights: a pass over 5 rows costs as much as 5 passes. With a
    fast BLAS, float32 is faster over one row too. The float32 weights may take a quarter of the device's memory.
    """
    return mx.default_device().type == mx.cpu and has_fast_blas() and 0 < size <= FLOAT_SHARE * device_limit()


def gigabytes(count: int) -> str:
    """Format a number of bytes, such as "1.5 GB"."""
    return f"{count / 1e9:.1f} GB"
