"""How good a drafter is: its block efficiency in the real decoder, and the speed-up that this could give."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from mlxspec.decoding.decoder import SpeculativeDecoder
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.verification import DEFAULT_RULE
from mlxspec.models.pair import ModelPair


def served_block_efficiency(
    target: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    draft_length: int,
    max_tokens: int,
    verification: str = DEFAULT_RULE,
) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function that measures a drafter with the real decoder.

    Args:
        target: the model that is drafted for.
        tokenizer: its tokenizer.
        prompts: token ids.
        temperatures: to measure at.
        draft_length: tokens drafted per block.
        max_tokens: of an answer.
        verification: the rule.

    Returns:
        A function of the drafter. Its result has ``block_efficiency_at_T`` for each temperature, in tokens per target
        pass over all prompts together, and ``block_efficiency``, their mean.
    """
    decoders: dict[float, SpeculativeDecoder] = {}  # kept, so that a drafter that is trained further compiles once

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
    """Return the number of parameters, of a quantized model as it was before."""
    count = 0
    for _, module in model.named_modules():
        for name, weight in module.items():
            if isinstance(weight, mx.array):
                packed = name == "weight" and hasattr(module, "bits")
                belongs = not (hasattr(module, "bits") and name in ("scales", "biases"))
                count += weight.size * 32 // module.bits if packed else weight.size * belongs
    return count


def step_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that a step over one row reads.

    That is all of them, except for an embedding that is not also the output head: only one row of it is read.
    """
    read = weight_bytes(model)
    tied = not any(name.endswith("lm_head") for name, _ in model.named_modules())
    for name, module in model.named_modules():
        if name.endswith("embed_tokens") and not tied:
            read -= weight_bytes(module)
    return read


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of all weights."""
    return tree_reduce(lambda total, weight: total + weight.nbytes, module.parameters(), 0)


def memory_bound_speedup(block_efficiency: float, cost_ratio: float, draft_length: float) -> float:
    """Return MBSU = τ / (c·γ + 1), the speed-up where a step costs what it reads.

    Args:
        block_efficiency: τ, tokens per target pass.
        cost_ratio: c, the cost of a drafter step over that of a target step.
        draft_length: γ, mean tokens drafted per block.

    Source: Goel et al. 2024, quoted from memory.
    """
    return block_efficiency / (cost_ratio * draft_length + 1)
