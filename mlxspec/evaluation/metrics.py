"""What a drafter is worth: block efficiency as served, by the real decoder."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.nn as nn

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
