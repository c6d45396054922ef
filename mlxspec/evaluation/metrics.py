"""Metrics of a drafter: its block efficiency in the real decoder, and the speed-up that this allows."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_reduce

from mlxspec.decoding.decoder import SpeculativeDecoder
from mlxspec.decoding.requests import check_options
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.verification import DEFAULT_RULE
from mlxspec.models.pair import ModelPair
from mlxspec.models.sharding import Group
from mlxspec.training.batches import MOST_TASKS
from mlxspec.training.prompts import Prompt


def served_block_efficiency(
    target: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    draft_length: int,
    max_tokens: int,
    verification: str = DEFAULT_RULE,
    group: Group | None = None,
) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function that measures a drafter's block efficiency with the real decoder.

    Args:
        target: The target.
        tokenizer: The target's tokenizer.
        prompts: Token ids of each prompt. A ``Prompt`` has a task too.
        temperatures: Temperatures to measure at.
        draft_length: Draft length γ.
        max_tokens: Maximum length of an answer, in tokens.
        verification: The verification rule.
        group: Processes over which the target is divided. All of them must measure at the same time.

    Returns:
        A function of the drafter. Its result has ``block_efficiency_at_T`` for each temperature T, in tokens per target
        pass over all prompts, and ``block_efficiency``, the mean over the temperatures. If the prompts have several
        tasks, there is also ``block_efficiency/task`` for each task and ``worst_block_efficiency``, the lowest of them.

    Raises:
        InvalidRequestError: The draft length or the rule is not one of the decoder's.
    """
    check_options(draft_length, verification)
    tasks = [prompt.task if isinstance(prompt, Prompt) else None for prompt in prompts]
    decoders: dict[float, SpeculativeDecoder] = {}  # kept, so that a drafter compiles only once while it is trained

    def measure(drafter: nn.Module) -> dict[str, float]:
        pair = ModelPair(target, drafter, tokenizer, group=group)
        found = {}
        by_task: dict[str | None, list[float]] = {task: [] for task in tasks}
        for temperature in temperatures:
            if temperature not in decoders or decoders[temperature].pair.drafter is not drafter:
                decoders[temperature] = SpeculativeDecoder(pair, Sampling(temperature), draft_length, verification)
            decoder = decoders[temperature]
            counts = []  # tokens and passes of each prompt
            for seed, prompt in enumerate(prompts):
                for _ in decoder.blocks(prompt, max_tokens, seed=seed):
                    pass
                counts.append((decoder.stats.accepted + decoder.stats.blocks, decoder.stats.blocks))
            found[f"block_efficiency_at_{temperature:g}"] = ratio_of_sums(counts)
            for task, values in by_task.items():
                values.append(ratio_of_sums([c for c, other in zip(counts, tasks, strict=True) if other == task]))
        measured = {"block_efficiency": sum(found.values()) / len(found), **found}
        if 1 < len(by_task) <= MOST_TASKS:
            means = {f"block_efficiency/{task}": sum(values) / len(values) for task, values in by_task.items()}
            measured |= {"worst_block_efficiency": min(means.values()), **means}
        return measured

    return measure


def ratio_of_sums(counts: Sequence[tuple[int, int]]) -> float:
    """Return Σ a / Σ b over pairs (a, b)."""
    first, second = (sum(values) for values in zip(*counts, strict=True))
    return first / second


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters. A quantized weight counts as many as before quantization."""
    count = 0
    for _, module in model.named_modules():
        for name, weight in module.items():
            if isinstance(weight, mx.array):
                packed = name == "weight" and hasattr(module, "bits")
                belongs = not (hasattr(module, "bits") and name in ("scales", "biases"))
                count += weight.size * 32 // module.bits if packed else weight.size * belongs
    return count


def step_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that a step over one token reads.

    These are all weights, except for an embedding that is not also the output head. Only one row of it is read.
    """
    read = weight_bytes(model)
    tied = not any(name.endswith("lm_head") for name, _ in model.named_modules())
    for name, module in model.named_modules():
        if name.endswith("embed_tokens") and not tied:
            read -= weight_bytes(module)
    return read


def weight_bytes(module: nn.Module) -> int:
    """Return the size of all weights in bytes."""
    return tree_reduce(lambda total, weight: total + weight.nbytes, module.parameters(), 0)


def memory_bound_speedup(block_efficiency: float, cost_ratio: float, draft_length: float) -> float:
    """Return the memory-bound speed-up MBSU = τ / (c·γ + 1).

    It assumes that the time of a step is proportional to the bytes it reads.

    Args:
        block_efficiency: Block efficiency τ, in tokens per target pass.
        cost_ratio: Cost c of a drafter step relative to a target step.
        draft_length: Mean draft length γ, in tokens per block.

    Returns:
        The speed-up over plain decoding.

    Source: Goel et al. 2024, quoted from memory.
    """
    return block_efficiency / (cost_ratio * draft_length + 1)
