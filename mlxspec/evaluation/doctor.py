"""Checks of mlxspec on this machine: the text, the cost of rows and of attention, and the policy's choice.

The record is meant to be sent to others. It has no user name, host name or path.
"""

import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

import mlxspec
from mlxspec import ModelPair, Sampling, SpeculativeDecoder
from mlxspec.decoding.calibration import Timer
from mlxspec.decoding.compiled import CompiledBlocks
from mlxspec.decoding.drafting import PLAIN
from mlxspec.decoding.kernels import Attention, attention_kernel, attention_of, chip_of, has_experts, matmul_kernel
from mlxspec.decoding.policy import Automatic
from mlxspec.decoding.verification import DEFAULT_RULE
from mlxspec.errors import in_one_line
from mlxspec.evaluation.benchmark import machine
from mlxspec.evaluation.engines import mlx_lm_engine, mlxspec_engine
from mlxspec.evaluation.metrics import parameter_count, step_bytes
from mlxspec.evaluation.profile import answering, target_pass
from mlxspec.evaluation.rounds import by_engine, default_pause, interleaved, ratio, spread
from mlxspec.evaluation.tasks import read_tasks
from mlxspec.models.attention import model_type
from mlxspec.models.catalog import KNOWN_MODELS

Record = dict[str, Any]
Progress = Callable[[str, int, int], None]  # what is measured, runs done, number of all runs

FORMAT = 1
DEFAULT_ROUNDS = 3

DTYPES = {mx.float32: 64, mx.bfloat16: 24}  # precision -> tokens of an answer; the CPU back end is slow in 16 bits
DRAFT_LENGTHS = (0, 1, 4, 8, 16)  # on Metal, passes over 1, 2, 5, 9 and 17 rows run on different kernels
PROMPTS, MAX_TOKENS = 2, 64

ROWS = tuple(range(1, 18))
HIDDEN, INTERMEDIATE = 4096, 11008  # of Llama 2 7B
GROUP_SIZE, BITS = 64, 4
LAYERS, CPU_LAYERS = 8, 1  # of 25 MB each; on a GPU, more than a cache holds

ATTENTION_ROWS = (1, 4, 5, 8, 9)
POSITIONS = (256, 1024, 4096, 8192)
HEADS = {"Llama 2 7B": Attention(32, 32, 128, 128), "Llama 2 70B": Attention(64, 8, 128, 128)}


def new_record(pair: ModelPair, target: str | None, rounds: int) -> Record:
    """Return a record without measurements.

    Args:
        pair: The target and its drafters.
        target: Name of the target as the user gave it, None for the demo target. Only a public name is recorded.
        rounds: Number of rounds.
    """
    info = mx.device_info()
    return {
        "format": FORMAT,
        "machine": {
            **machine(),
            "macos": platform.mac_ver()[0] or None,
            "architecture": info.get("architecture"),
            "wired_limit_bytes": info.get("max_recommended_working_set_size"),
        },
        "target": described(pair, target),
        "rounds": rounds,
        "pause_seconds": default_pause(),
        "profiles": [],
        "complete": False,
    }


def described(pair: ModelPair, target: str | None) -> Record:
    """Return the public names of target and drafter, if they have one, and the sizes of the target."""
    kind, parameters = model_type(pair.target), parameter_count(pair.target)
    public = {"lookup", "demo", *(name for known in KNOWN_MODELS.values() for name in (known.name, known.hub_id))}
    size = f"{kind}, {parameters / 1e6:.0f} M parameters"
    drafter = pair.drafter_name.removesuffix("+lookup")
    return {
        "name": "demo" if target is None else target if target in public else size,
        "model_type": kind,
        "parameters": parameters,
        "step_bytes": step_bytes(pair.target),
        "drafter": pair.drafter_name if drafter in public else type(pair.drafter).__name__,
    }


def checks(pair: ModelPair, record: Record, progress: Progress) -> Iterator[tuple[str, Record]]:
    """Make all checks, one after the other, and add the results to a record.

    A check that fails does not stop the others. Its result has one key, "failed", with the error.

    Args:
        pair: The target and its drafters.
        record: The record, as ``new_record`` returns it.
        progress: Called with what is measured, the runs done and the number of all runs.

    Yields:
        The name and the result of each check.
    """
    rounds = record["rounds"]
    steps: Mapping[str, Callable[[], Record]] = {
        "identity": lambda: identity(partial(progress, "greedy text")),
        "kernels": lambda: kernels(pair, record["machine"]["architecture"]),
        "rows": lambda: rows(pair, record["target"]["name"], rounds, partial(progress, "passes over 1 to 17 rows")),
        "attention": lambda: attention(pair, rounds, partial(progress, "attention")),
        "policy": lambda: policy(pair, rounds, partial(progress, "draft length")),
    }
    for name, step in steps.items():
        try:
            record[name] = step()
        except Exception as error:  # the first run on some Mac may raise anything
            record[name] = {"failed": without_paths(f"{type(error).__name__}: {in_one_line(error)}")}
        if name == "rows":
            record["profiles"] = profiles(record)
        record["complete"] = steps.keys() <= record.keys()
        yield name, record[name]


def without_paths(text: str) -> str:
    """Return a text with "…" in place of the paths of files, which may have the user's name in them."""
    return re.sub(r"(?:~|(?<![\w.:/]))(?:/[^\s'\"/]+){2,}/?", "…", text)


# ----------------------------------------------------------------------- text


def identity(progress: Callable[[int, int], None]) -> Record:
    """Compare speculative greedy text of the demo pair with the plain greedy text of mlx-lm.

    Args:
        progress: Called with the answers done and the number of all answers.

    Returns:
        For each precision: the number of answers, how many are the same text, the tokens compared, and the number of
        tokens before the first difference. In 16 bits, near-ties may differ (``mlxspec/decoding/README.md``).
    """
    found: Record = {}
    total = len(DTYPES) * (len(DRAFT_LENGTHS) + 1) * PROMPTS
    for number, (dtype, max_tokens) in enumerate(DTYPES.items()):
        pair = mlxspec.load(dtype=dtype, quantize="none")
        [task] = read_tasks(["stories"], pair.tokenizer, PROMPTS)
        engines = {"plain": mlx_lm_engine(pair, Sampling(), max_tokens)}
        for length in DRAFT_LENGTHS:
            engines[f"{length}"] = mlxspec_engine(SpeculativeDecoder(pair, Sampling(), length), max_tokens)
        before = number * len(engines) * PROMPTS
        runs = {(prompt, name): partial(engine, tokens) for prompt, tokens in enumerate(task.prompts)
                for name, engine in engines.items()}  # fmt: skip

        def advanced(done: int, of_dtype: int, before: int = before) -> None:
            progress(before + done, total)

        [answers] = interleaved(runs, 1, warm_up=0, progress=advanced)
        texts = {key: answer.ids for key, answer in answers.items()}
        same = [common(texts[prompt, "plain"], ids) for (prompt, name), ids in texts.items() if name != "plain"]
        found[str(dtype).removeprefix("mlx.core.")] = {
            "answers": len(same),
            "same": sum(first is None for first in same),
            "tokens": sum(len(ids) for (_, name), ids in texts.items() if name != "plain"),
            "first_difference": min((first for first in same if first is not None), default=None),
        }
    return found


def common(plain: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    """Return the number of tokens before two texts differ, or None if they are the same."""
    if plain == other:
        return None
    pairs = zip(plain, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain), len(other)))


# ----------------------------------------------------------------------- time


def awake(timer: Timer, wake: Timer) -> Callable[[int], float]:
    """Return an engine that wakes the GPU with another timer, and returns the seconds of ``timer``."""

    def run(number: int) -> float:
        wake()
        return timer()

    return run


def medians(timers: Mapping[Any, Timer], rounds: int, progress: Callable[[int, int], None]) -> dict[Any, float]:
    """Return the median seconds of each timer, over interleaved rounds with pauses. The first timer wakes the GPU."""
    wake = next(iter(timers.values()))
    engines = {name: awake(timer, wake) for name, timer in timers.items()}
    found = by_engine(interleaved(engines, rounds, warm_up=0, progress=progress, pause=default_pause()))
    return {name: spread(seconds).median for name, seconds in found.items()}


def activations() -> mx.Dtype:
    """Return the precision of activations: 16 bits on a GPU, float32 on the CPU, where 16 bits are slow."""
    return mx.float32 if mx.default_device().type == mx.cpu else mx.float16


def rows(pair: ModelPair, target: str, rounds: int, progress: Callable[[int, int], None]) -> Record:
    """Measure passes over 1 to 17 rows: of a stack of 4-bit layers as in Llama 2 7B, and of the target.

    Args:
        pair: The target and its drafters.
        target: Name of the target.
        rounds: Number of rounds.
        progress: Called with the runs done and the number of all runs.

    Returns:
        For each model, the seconds of a pass by the number of rows.
    """
    stack = linear_stack()
    compiled = CompiledBlocks(pair, Sampling(), DEFAULT_RULE)
    names = {"stack": f"4-bit matmul {HIDDEN}x{INTERMEDIATE}", "target": f"{target}, whole model"}
    timers: dict[tuple[str, int], Timer] = {}
    for count in ROWS:
        timers["stack", count] = Timer(stack, partial(mx.ones, (count, HIDDEN), activations()))
    for count in ROWS:
        timers["target", count] = Timer(*target_pass(compiled, count))
    with compiled.weights.protected():
        found = medians(timers, rounds, progress)
    return {
        which: {"name": name, "seconds": {str(count): found[which, count] for count in ROWS}}
        for which, name in names.items()
    }


def linear_stack() -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    """Return a step that multiplies rows [N, 4096] by a stack of 4-bit matrices of random weights."""
    dtype = activations()
    layers = []
    for layer in range(CPU_LAYERS if mx.default_device().type == mx.cpu else LAYERS):
        inputs, outputs = (HIDDEN, INTERMEDIATE) if layer % 2 == 0 else (INTERMEDIATE, HIDDEN)
        weights = mx.random.randint(0, 2**31 - 1, (outputs, inputs * BITS // 32), mx.uint32)
        scales = mx.full((outputs, inputs // GROUP_SIZE), 0.2 * inputs**-0.5, dtype)
        layers.append((weights, scales, -7.5 * scales))
    mx.eval(layers)

    def step(x: mx.array) -> tuple[mx.array, mx.array]:
        result = x
        for weights, scales, biases in layers:
            result = mx.quantized_matmul(result, weights, scales, biases, True, GROUP_SIZE, BITS)
        return result, result[:, :HIDDEN]  # the next step waits for this one, as in decoding

    return step


def attention(pair: ModelPair, rounds: int, progress: Callable[[int, int], None]) -> Record:
    """Measure attention over 256 to 8192 positions, with a mask as in a block.

    Args:
        pair: The pair whose target's heads are measured too.
        rounds: Number of rounds.
        progress: Called with the runs done and the number of all runs.

    Returns:
        For each kind of heads, the seconds of attention in one layer by positions and rows.
    """
    own = heads_of(pair)
    shapes = {**HEADS, **({"target": own} if own and own.fused else {})}
    timers = {
        (name, positions, count): attention_timer(heads, keys, values, positions, count)
        for name, heads in shapes.items()
        for keys, values in [cache_of(heads)]
        for positions in POSITIONS
        for count in ATTENTION_ROWS
    }
    found = medians(timers, rounds, progress)
    return {
        name: {
            "heads": heads._asdict(),
            "seconds": {
                str(positions): {
                    str(count): found[name, positions, count] * positions / POSITIONS[-1] for count in ATTENTION_ROWS
                }
                for positions in POSITIONS
            },
        }
        for name, heads in shapes.items()
    }


def heads_of(pair: ModelPair) -> Attention | None:
    """Return the heads of the target, or None if its config does not say."""
    with suppress(AttributeError, KeyError, TypeError):
        return attention_of(vars(pair.target.args))
    return None


def cache_of(heads: Attention) -> list[mx.array]:
    """Return keys and values [1, H, 8192, D]."""
    buffers = [mx.full((1, heads.kv_heads, POSITIONS[-1], heads.head_dim), 0.1, activations()) for _ in range(2)]
    mx.eval(buffers)
    return buffers


def attention_timer(heads: Attention, keys: mx.array, values: mx.array, positions: int, count: int) -> Timer:
    """Return a timer of attention in as many layers as have 8192 positions together.

    So the keys and values take the same memory for each number of positions.

    Args:
        heads: The heads of each layer.
        keys: Keys of all layers [1, H, 8192, D].
        values: Values of all layers [1, H, 8192, D].
        positions: Positions of each layer.
        count: Rows of the pass.
    """
    mask = mx.arange(positions)[None] <= positions - count + mx.arange(count)[:, None]

    def step(queries: mx.array) -> tuple[mx.array, mx.array]:
        result = queries
        for start in range(0, POSITIONS[-1], positions):
            layer = slice(start, start + positions)
            result = mx.fast.scaled_dot_product_attention(
                result, keys[:, :, layer], values[:, :, layer], scale=heads.head_dim**-0.5, mask=mask
            )
        return result, result

    return Timer(step, partial(mx.full, (1, heads.heads, count, heads.head_dim), 0.1, activations()))


# ----------------------------------------------------------------------- choices


def policy(pair: ModelPair, rounds: int, progress: Callable[[int, int], None]) -> Record:
    """Let the policy choose, and compare its speed with that of plain decoding, at temperature 0.

    Args:
        pair: The target and its drafters.
        rounds: Number of interleaved rounds that count.
        progress: Called with the runs done and the number of all runs.

    Returns:
        The cost table, the choice after all answers, and its speed relative to plain decoding: predicted from costs and
        acceptance, and measured. The policy may have chosen other lengths in between.
    """
    auto, plain = SpeculativeDecoder(pair), SpeculativeDecoder(pair, draft_length=0)
    auto.calibrate(again=True)
    chooser = auto.policy
    assert isinstance(chooser, Automatic)
    room = min((context for context in (pair.context_length, pair.drafter_context_length) if context), default=2**31)
    [task] = read_tasks(["stories"], pair.tokenizer, PROMPTS, room - MAX_TOKENS)
    engines = {name: answering(decoder, task.prompts, MAX_TOKENS) for name, decoder in
               {"plain": plain, "auto": auto}.items()}  # fmt: skip
    answers = by_engine(interleaved(engines, rounds, progress=progress))
    speeds = {name: [stats.tokens_per_second for stats in found] for name, found in answers.items()}
    rates, costs = chooser.rates(), chooser.costs
    choice = max(rates, key=lambda one: rates[one])
    return {
        "costs": {**asdict(costs), "rows": {str(count): seconds for count, seconds in costs.rows.items()}},
        "drafter": choice.proposer,
        "draft_length": choice.length,
        "predicted": chooser.expected_tokens(choice) * costs.block(PLAIN) / costs.block(choice),
        "measured": ratio(speeds["auto"], speeds["plain"]).to_dict(),
        "mean_draft_length": sum(answers["auto"][1:], answers["auto"][0]).draft_length,
        "tokens_per_second": {name: spread(values).median for name, values in speeds.items()},
    }


def kernels(pair: ModelPair, architecture: object) -> Record:
    """Return the Metal kernels that a pass of the target runs on, by the number of rows. Empty without a Metal GPU.

    Args:
        pair: The target and its drafters.
        architecture: MLX's name of the GPU.
    """
    chip, heads = chip_of(architecture), heads_of(pair)
    if chip is None:
        return {}
    found: Record = {"attention": {}, "matmul": {}}
    linear = [layer for layer in pair.target.modules() if isinstance(layer, nn.QuantizedLinear)]
    largest = max(linear, key=lambda layer: layer.weight.size, default=None)
    for count in ROWS:
        if heads:
            found["attention"][str(count)] = attention_kernel(heads, count, chip=chip)._asdict()
        if largest is not None:
            outputs, inputs = largest.weight.shape[0], largest.scales.shape[1] * largest.group_size
            expert = has_experts(vars(pair.target.args))
            kernel = matmul_kernel(count, inputs, outputs, chip, largest.mode, largest.bits, expert)
            found["matmul"][str(count)] = kernel._asdict()
    return found


def profiles(record: Record) -> list[Record]:
    """Return the costs of rows as ``tests/decoding/mac_profiles.json`` has them, for ``scripts/simulate_macs.py``."""
    versions = record["machine"]
    return [
        {
            "name": f"{versions['chip']}, {found['name']}",
            "rows_ms": {count: 1000 * seconds for count, seconds in found["seconds"].items()},
            "source": f"mlxspec doctor {versions['mlxspec']}, MLX {versions['mlx']}",
        }
        for found in record["rows"].values()
        if isinstance(found, dict)
    ]
