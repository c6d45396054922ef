"""What a drafter is worth: block efficiency as served, by the real decoder, and the speed-up that it could give."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxspec.decoding.decoder import SpeculativeDecoder
from mlxspec.decoding.sampling import Sampling
from mlxspec.models.pair import ModelPair


def served_block_efficiency(
    target: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    draft_length: int,
    max_tokens: int,
    verification: str = "block",
) -> Callable[[nn.Module], dict[str, float]]:
    """A function that measures drafters: tokens for each pass of the target, over all prompts together.

    Its result has ``block_efficiency``, the mean over the temperatures, and ``block_efficiency_at_T`` for each.
    """
    decoders: dict[float, SpeculativeDecoder] = {}  # compiled once for a drafter that is trained further

    def measure(drafter: nn.Module) -> dict[str, float]:
        pair = ModelPair(target, drafter, tokenizer)
        found = {}
        for temperature in temperatures:
            if temperature not in decoders or decoders[temperature].pair.drafter is not drafter:
                decoders[temperature] = SpeculativeDecoder(pair, Sampling(temperature), draft_length, verification)
            decoder = decoders[temperature]
            tokens = passes = 0
            for seed, prompt in enumerate(prompts):
                for _ in decoder.blocks(prompt, max_tokens, seed=seed):
                    pass
                tokens += decoder.stats.accepted + decoder.stats.blocks
                passes += decoder.stats.blocks
            found[f"block_efficiency_at_{temperature:g}"] = tokens / passes
        return {"block_efficiency": sum(found.values()) / len(found), **found}

    return measure


def parameter_count(model: nn.Module) -> int:
    """Of the weights as they were before they were quantised."""
    count = 0
    for _, module in model.named_modules():
        for name, weight in module.items():
            if isinstance(weight, mx.array):
                packed = name == "weight" and hasattr(module, "bits")
                belongs = not (hasattr(module, "bits") and name in ("scales", "biases"))
                count += weight.size * 32 // module.bits if packed else weight.size * belongs
    return count


def step_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step of one row reads: all, but of an embedding that is no output head too only a row."""
    read = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    tied = not any(name.endswith("lm_head") for name, _ in model.named_modules())
    for name, module in model.named_modules():
        if name.endswith("embed_tokens") and not tied:
            read -= sum(weight.nbytes for _, weight in tree_flatten(module.parameters()))
    return read


def memory_bound_speedup(block_efficiency: float, cost_ratio: float, draft_length: float) -> float:
    """MBSU = τ / (c·γ + 1), the speed-up where a step costs what it reads. Source: Goel et al. 2024, as recalled."""
    return block_efficiency / (cost_ratio * draft_length + 1)
