"""Compiled blocks. Each proposer and draft length has one graph, with the models' weights as inputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxspec.decoding.block import BlockParts, State, decode_block
from mlxspec.decoding.cache import CachedModel
from mlxspec.decoding.drafting import (
    LOOKUP,
    MODEL,
    NONE,
    Choice,
    EagleProposer,
    ModelProposer,
    NoProposer,
    Proposer,
    proposer_for,
)
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.verification import verifier
from mlxspec.models.eagle import Eagle, fitting_parts
from mlxspec.models.memory import device_limit
from mlxspec.models.pair import ModelPair
from mlxspec.models.sharding import broadcast

DecodeBlock = Callable[[State], tuple[mx.array, State]]  # as ``decode_block`` without its first argument


class Weights:
    """A snapshot of the weights of some models.

    It restores the weights after an interrupted trace. It also detects changed weights, which invalidate the KV cache.
    While MLX traces a function that has a model's arrays as inputs, it replaces them by tracers. If the trace is
    interrupted, the tracers stay in the model.

    Args:
        models: The models to watch. Call ``note`` to take the first snapshot.
    """

    def __init__(self, models: list[nn.Module]):
        self.models = models
        self._noted: list[tuple[nn.Module, str, mx.array]] = []
        self._changed = False

    def note(self) -> None:
        """Take a snapshot of the current weights."""
        self._noted = list(arrays(self.models))

    def changed(self) -> bool:
        """Return whether the weights have changed since the last call, and take a new snapshot."""
        self._compare()
        changed, self._changed = self._changed, False
        return changed

    def restore(self) -> None:
        """Put the weights of the snapshot back into the models."""
        for module, name, array in self._noted:
            module[name] = array

    @contextmanager
    def protected(self) -> Iterator[None]:
        """Restore the weights if the body of the ``with`` statement raises while it traces a function of them."""
        self._compare()
        try:
            yield
        except BaseException:
            self.restore()
            raise
        self.note()  # tracing puts the same arrays back as new Python objects

    def _compare(self) -> None:
        before = self._noted
        self.note()
        same = len(before) == len(self._noted) and all(
            old[2] is new[2] for old, new in zip(before, self._noted, strict=True)
        )
        self._changed = self._changed or not same


class CompiledGraph:
    """A function of arrays, compiled with the weights of ``models`` as inputs.

    A compiled function keeps the arrays in its closure as they were when it was traced. With the weights in the
    closure, a drafter that is trained further would still draft with its old weights. So the weights are inputs.

    Args:
        function: Maps arrays, and trees of arrays, to arrays.
        models: The modules that the function runs.
        weights: The weights of all models of the pair, restored if tracing is interrupted.
    """

    def __init__(self, function: Callable[..., Any], models: list[nn.Module], weights: Weights):
        self._function = function
        self._models = models
        self._weights = weights
        self._compile()

    def _compile(self) -> None:
        function, traces = self._function, list[bool]()

        # Not a bound method: that would make a cycle, which keeps models and caches in memory.
        def graph(*inputs: Any) -> Any:
            traces.append(True)
            return function(*inputs)

        self._traces = traces
        self._graph = mx.compile(graph, inputs=[model.state for model in self._models])

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph. The first call with given shapes traces it."""
        try:
            result = self._graph(*inputs)
        except BaseException:
            self._weights.restore()
            self._compile()
            raise
        if self._traces:
            # Tracing puts the same arrays back as new Python objects, which must not count as a change.
            self._traces.clear()
            self._weights.note()
        return result


class CompiledBlocks:
    """The compiled blocks of a pair: ``blocks[choice](state) -> (result, state)``.

    Each block is traced when it is first called, and again when the capacity of the caches has grown.

    Args:
        pair: Target and drafters.
        sampling: How tokens are drawn. It is compiled into the blocks and cannot change.
        verification: Name of the verification rule, a key of ``RULES``.
        drafting: Whether to use the pair's drafters. If False, the blocks decode without drafts.
        top_k: Number of the target's most likely tokens to keep with its cache, for each row of a block.

    Raises:
        UnsupportedModelError: A model cannot be rewound.
    """

    def __init__(self, pair: ModelPair, sampling: Sampling, verification: str, drafting: bool = True, top_k: int = 0):
        self.pair = pair
        self.sampling = sampling
        self.verification = verification
        head = pair.drafter if drafting and isinstance(pair.drafter, Eagle) else None
        parts = fitting_parts(head, pair.target) if head else None
        layers = head.layers_read(len(parts.body.layers)) if head and parts else None
        self.target = CachedModel(pair.target, layers, top_k)
        self.proposers: dict[str, Proposer] = {NONE: NoProposer(self.target.vocab_size)}
        for drafter in (pair.drafter, pair.lookup) if drafting else ():
            if drafter is not None:
                proposer = proposer_for(drafter, sampling, self.target.vocab_size, parts)
                self.proposers[MODEL if proposer.reads else LOOKUP] = proposer
        drafters = [p.model for p in self.proposers.values() if isinstance(p, ModelProposer | EagleProposer)]
        self.weights = Weights([pair.target, *drafters])
        self.memory = broadcast(device_limit(), pair.group)  # in bytes; it decides what is measured
        self._blocks: dict[Choice, DecodeBlock] = {}

    @property
    def drafters(self) -> list[str]:
        """Names of the proposers that can draft, without ``NONE``."""
        return [name for name in self.proposers if name != NONE]

    def __getitem__(self, choice: Choice) -> DecodeBlock:
        if choice not in self._blocks:
            self._blocks[choice] = self.block(self.proposers[choice.proposer], choice)
        return self._blocks[choice]

    def block(self, proposer: Proposer, choice: Choice) -> DecodeBlock:
        """Return a compiled block that uses a proposer, which need not be one of the pair's.

        Args:
            proposer: Drafts the tokens.
            choice: The proposer's name and the draft length γ.
        """
        verify = verifier(self.verification, self.sampling, choice.length)
        parts = BlockParts(self.target, proposer, verify, choice.length)
        models = self.weights.models if choice.proposer == MODEL else [self.pair.target]
        graph = CompiledGraph(lambda *state: decode_block(parts, State(*state)), models, self.weights)

        def block(state: State) -> tuple[mx.array, State]:
            result, following = graph(*state)
            return result, State(*following)  # MLX returns a plain tuple

        return block


def arrays(models: list[nn.Module]) -> Iterator[tuple[nn.Module, str, mx.array]]:
    """Yield every array of some models, as the module that holds it, its name there and the array."""
    for model in models:
        for _, module in model.named_modules():
            yield from ((module, name, value) for name, value in module.items() if isinstance(value, mx.array))
