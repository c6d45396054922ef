"""A block of speculative decoding as one graph: draft, verify, commit, with nothing read on the host.

``block_graph`` is the algorithm. ``CompiledBlock`` compiles it together with the models' weights, and
``CompiledBlocks`` has one for each choice.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxspec.decoding.cache import CachedModel
from mlxspec.decoding.draft_length import LOOKUP, MODEL, NOBODY, Choice
from mlxspec.decoding.drafting import NobodyProposer, Proposer, proposer_for
from mlxspec.decoding.sampling import Sampling, draw
from mlxspec.decoding.verification import RULES, Rule
from mlxspec.models.pair import ModelPair

State = dict[str, Any]  # recent, committed, target, drafter, key: what one block hands to the next


@dataclass(frozen=True)
class BlockParts:
    """What a block is made of; fixed for a decoder."""

    target: CachedModel
    proposer: Proposer
    verify: Rule
    sampling: Sampling
    draft_length: int


def block_graph(parts: BlockParts, state: State) -> tuple[mx.array, State]:
    """Draft, verify, commit; all lazy. -> result [γ+2] (γ+1 tokens and the accepted count), the next state.

    The target's cache covers ``committed − 1`` tokens, the drafter's ``committed − len(recent)``: what a rejected
    draft left behind them is rewound by nothing more than ``committed`` growing less.
    """
    recent, committed, draft_length = state["recent"], state["committed"], parts.draft_length
    key, subkey = mx.random.split(state["key"])
    uniforms = mx.random.uniform(shape=(2 * draft_length + 1,), key=subkey)

    drafted, q, drafter = parts.proposer.propose(state["drafter"], recent, committed, uniforms[:draft_length])
    rows = mx.concatenate([recent[-1:], drafted])  # [γ+1]
    logits, target = parts.target(rows, state["target"], committed - 1)
    p = parts.sampling.probs(logits)  # [γ+1, V]
    if draft_length:
        accepted, next_token = parts.verify(p, q, drafted, uniforms[draft_length:])
    else:  # what every rule comes to then, in a fraction of the operations: they show beside a small model's pass
        accepted, next_token = mx.array(0, mx.int32), draw(p[0], uniforms[0])

    padded = mx.concatenate([drafted, mx.zeros(1, mx.int32)])
    emitted = mx.where(mx.arange(draft_length + 1) < accepted, padded, next_token)  # [γ+1]
    last_two = recent.shape[0] + accepted - 1 + mx.arange(2)
    return mx.concatenate([emitted, accepted.reshape(1)]), {
        "recent": mx.concatenate([recent, emitted])[last_two],
        "committed": committed + accepted + 1,
        "target": target,
        "drafter": parts.proposer.record(drafter, committed, emitted),
        "key": key,
    }


class Weights:
    """The arrays of some models as they were when they were last noted.

    MLX puts tracers in their place while it traces a function that has them as inputs, and leaves them there if it is
    interrupted; and a cache is of no use once the weights are others.
    """

    def __init__(self, models: list[nn.Module]):
        self.models = models
        self._noted: list[tuple[nn.Module, str, mx.array]] = []

    def note(self) -> bool:
        """Note the weights as they are now; whether they are those noted before."""
        before, self._noted = self._noted, list(arrays(self.models))
        if len(before) != len(self._noted):
            return False
        return all(old[2] is new[2] for old, new in zip(before, self._noted, strict=True))

    def restore(self) -> None:
        for module, name, array in self._noted:
            module[name] = array

    @contextmanager
    def safe(self) -> Iterator[None]:
        """While functions over the weights are traced that are no blocks: nothing is lost if that is interrupted."""
        self.note()
        try:
            yield
        except BaseException:
            self.restore()
            raise
        self.note()


class CompiledBlock:
    """``block_graph``, compiled with the weights of ``models``, some of those of ``weights``, as inputs.

    As inputs, since a compiled function keeps arrays that it closes over as they were when it was traced, and a drafter
    trained further would go on drafting with its old weights.
    """

    def __init__(self, parts: BlockParts, models: list[nn.Module], weights: Weights):
        self._parts = parts
        self._models = models
        self._weights = weights
        self._compile()

    def _compile(self) -> None:
        parts, traces = self._parts, []

        # No bound method: it would make a cycle that keeps models and caches in memory.
        def graph(state: State) -> tuple[mx.array, State]:
            traces.append(True)
            return block_graph(parts, state)

        self._traces = traces
        self._graph = mx.compile(graph, inputs=[model.state for model in self._models])

    def __call__(self, state: State) -> tuple[mx.array, State]:
        try:
            result = self._graph(state)
        except BaseException:
            self._weights.restore()
            self._compile()
            raise
        if self._traces:
            # The weights are back in their places, but as new Python objects.
            self._traces.clear()
            self._weights.note()
        return result


class CompiledBlocks:
    """The blocks that a pair can be decoded with, one for each choice of drafter and length; traced when first called.

    Raises UnsupportedModelError for a model that cannot be rewound.
    """

    def __init__(self, pair: ModelPair, sampling: Sampling, verification: str, drafting: bool = True):
        self.pair = pair
        self.sampling = sampling  # never another one: it is compiled into the blocks
        self.verification = verification
        self.target = CachedModel(pair.target)
        self.proposers: dict[str, Proposer] = {NOBODY: NobodyProposer(self.target.vocab_size)}
        for drafter in (pair.drafter, pair.lookup) if drafting else ():
            if drafter is not None:
                name = MODEL if isinstance(drafter, nn.Module) else LOOKUP
                self.proposers[name] = proposer_for(drafter, sampling, self.target.vocab_size)
        self.weights = Weights([pair.target, *([pair.drafter] if MODEL in self.proposers else [])])
        self._made: dict[Choice, CompiledBlock] = {}

    @property
    def drafters(self) -> list[str]:
        """The names of those who draft something."""
        return [name for name in self.proposers if name != NOBODY]

    def __getitem__(self, choice: Choice) -> CompiledBlock:
        if choice not in self._made:
            proposer, rule = self.proposers[choice.proposer], RULES[self.verification]
            parts = BlockParts(self.target, proposer, rule, self.sampling, choice.length)
            models = self.weights.models if choice.proposer == MODEL else [self.pair.target]
            self._made[choice] = CompiledBlock(parts, models, self.weights)
        return self._made[choice]


def arrays(models: list[nn.Module]) -> Iterable[tuple[nn.Module, str, mx.array]]:
    for model in models:
        for _, module in model.named_modules():
            yield from ((module, name, value) for name, value in module.items() if isinstance(value, mx.array))
