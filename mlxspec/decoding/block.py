"""A block of speculative decoding as one graph: draft, verify, commit, with nothing read on the host.

``block_graph`` is the algorithm. ``CompiledGraph`` compiles it together with the models' weights, and
``CompiledBlocks`` has one for each choice. ``StepwiseBlock`` is the same in steps, between which the host decides
whether the draft goes on.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxspec.decoding.cache import CachedModel
from mlxspec.decoding.choice import LENGTHS, LOOKUP, MODEL, NOBODY, STEPWISE, Choice
from mlxspec.decoding.drafting import NobodyProposer, Proposer, proposer_for
from mlxspec.decoding.sampling import Sampling, draw
from mlxspec.decoding.stepwise import Draft
from mlxspec.decoding.verification import RULES, Rule, greedy
from mlxspec.models.pair import ModelPair

State = dict[str, Any]  # recent, committed, target, drafter, key, maybe opened: what one block hands to the next


@dataclass(frozen=True)
class BlockParts:
    """What a block is made of; fixed for a decoder."""

    target: CachedModel
    proposer: Proposer
    verify: Rule
    sampling: Sampling
    draft_length: int


def block_graph(parts: BlockParts, state: State) -> tuple[mx.array, State]:
    """Draft, verify, commit; all lazy. -> result [γ+2] (γ+1 tokens and the accepted count), the next state."""
    draft_length = parts.draft_length
    key, subkey = mx.random.split(state["key"])
    uniforms = mx.random.uniform(shape=(2 * draft_length + 1,), key=subkey)
    drafted, q, drafter = parts.proposer.propose(
        state["drafter"], state["recent"], state["committed"], uniforms[:draft_length]
    )
    return verified(parts, {**state, "drafter": drafter, "key": key}, drafted, q, uniforms[draft_length:])


def verified(
    parts: BlockParts, state: State, drafted: mx.array, q: mx.array, uniforms: mx.array
) -> tuple[mx.array, State]:
    """Verify ``drafted`` [γ], drawn from q [γ, V], and commit what stands; uniforms [γ+1]. -> as ``block_graph``

    The target's cache covers ``committed − 1`` tokens, the drafter's ``committed − len(recent)``: what a rejected
    draft left behind them is rewound by nothing more than ``committed`` growing less.
    """
    recent, committed, draft_length = state["recent"], state["committed"], drafted.shape[0]
    rows = mx.concatenate([recent[-1:], drafted])  # [γ+1]
    logits, target = parts.target(rows, state["target"], committed - 1)
    if parts.sampling.temperature == 0:
        accepted, next_token = greedy(logits, drafted)
    elif draft_length:
        accepted, next_token = parts.verify(parts.sampling.probs(logits), q, drafted, uniforms)
    else:  # what every rule comes to then, in a fraction of the operations
        accepted, next_token = mx.array(0, mx.int32), draw(parts.sampling.probs(logits)[0], uniforms[0])

    padded = mx.concatenate([drafted, mx.zeros(1, mx.int32)])
    emitted = mx.where(mx.arange(draft_length + 1) < accepted, padded, next_token)  # [γ+1]
    last_two = recent.shape[0] + accepted - 1 + mx.arange(2)
    return mx.concatenate([emitted, accepted.reshape(1)]), {
        "recent": mx.concatenate([recent, emitted])[last_two],
        "committed": committed + accepted + 1,
        "target": target,
        "drafter": parts.proposer.record(state["drafter"], committed, emitted),
        "key": state["key"],
    }


def step_graph(parts: BlockParts, cursor: State) -> tuple[mx.array, mx.array, mx.array, State]:
    """One token of a draft. -> the token [1], its distribution q [1, V], how sure the drafter is of it [1], a cursor.

    A cursor is what one pass of the drafter hands to the next: the tokens to ``feed``, the ``length`` before them, the
    state of the ``drafter`` and a ``key``.
    """
    key, subkey = mx.random.split(cursor["key"])
    feed, length = cursor["feed"], cursor["length"]
    uniform = mx.random.uniform(key=subkey)
    token, q, confidence, drafter = parts.proposer.step(cursor["drafter"], feed, length, uniform)
    q = mx.zeros(0) if parts.sampling.temperature == 0 else q[None]  # at 0 nobody looks at it
    following = {"feed": token, "length": length + feed.shape[0], "drafter": drafter, "key": key}
    return token, q, confidence[None], following


def check_graph(parts: BlockParts, state: State, drafted: mx.array, q: mx.array) -> tuple[mx.array, State]:
    """Verify a draft that was made in steps. -> as ``block_graph``"""
    key, subkey = mx.random.split(state["key"])
    uniforms = mx.random.uniform(shape=(drafted.shape[0] + 1,), key=subkey)
    return verified(parts, {**state, "key": key}, drafted, q, uniforms)


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


class CompiledGraph:
    """A function of arrays, compiled with the weights of ``models``, some of those of ``weights``, as inputs.

    As inputs, since a compiled function keeps arrays that it closes over as they were when it was traced, and a drafter
    trained further would go on drafting with its old weights.
    """

    def __init__(self, function: Callable, models: list[nn.Module], weights: Weights):
        self._function = function
        self._models = models
        self._weights = weights
        self._compile()

    def _compile(self) -> None:
        function, traces = self._function, []

        # No bound method: it would make a cycle that keeps models and caches in memory.
        def graph(*inputs: Any) -> Any:
            traces.append(True)
            return function(*inputs)

        self._traces = traces
        self._graph = mx.compile(graph, inputs=[model.state for model in self._models])

    def __call__(self, *inputs: Any) -> Any:
        try:
            result = self._graph(*inputs)
        except BaseException:
            self._weights.restore()
            self._compile()
            raise
        if self._traces:
            # The weights are back in their places, but as new Python objects.
            self._traces.clear()
            self._weights.note()
        return result


class StepwiseBlock:
    """A block whose draft is made for as long as the ``Draft`` wants more; the host reads how sure the drafter is.

    What is verified may depend on how sure the drafter was of a token, not on the token: see ``stepwise.py``.
    """

    def __init__(self, parts: BlockParts, target: nn.Module, drafter: nn.Module, weights: Weights):
        self._step = CompiledGraph(partial(step_graph, parts), [drafter], weights)
        self._check = CompiledGraph(partial(check_graph, parts), [target], weights)

    def __call__(self, state: State, draft: Draft, opening: int = 0, missing: float = 0) -> tuple[mx.array, State]:
        """-> as ``block_graph``. Empties ``state``: a buffer that somebody else still held would be copied.

        The next draft is opened with ``opening`` tokens, so that the device has work while the host reads this result;
        with fewer if the answer, of which so many tokens are ``missing`` before this block, may not take as many.
        """
        drafted, q = self.draft(state, draft)
        # Without the drafter's buffers: a check under way would hold them.
        result, following = self._check({**state, "drafter": None}, drafted, q)
        drafter = state["drafter"]
        state.clear()
        mx.async_eval(result, following)
        following["drafter"] = drafter
        del drafter
        room = missing - (draft.length + 1) - 1  # the last token is the target's own
        if count := max((length for length in LENGTHS if length <= min(opening, room)), default=0):
            part, cursor = self._steps(count, cursor_of(following))
            following |= {"drafter": cursor["drafter"], "key": cursor["key"], "opened": part}
        return result, following

    def draft(self, state: State, draft: Draft) -> tuple[mx.array, mx.array]:
        """-> the tokens that are to be verified [γ], their distributions [γ, V]; ``state`` becomes that after it."""
        cursor, part = cursor_of(state), state.pop("opened", None)
        tokens, probs = [], []
        while count := draft.wanted:
            if part is None:
                part, cursor = self._steps(count, cursor)
                mx.async_eval(part, cursor)
            drafted, q, confidences = part
            if kept := draft.take(confidences.tolist()):
                tokens.append(drafted[:kept])
                probs.append(q[:kept])
            part = None
        state |= {"drafter": cursor["drafter"], "key": cursor["key"]}
        drafted = mx.concatenate(tokens) if tokens else mx.zeros(0, mx.int32)
        return drafted, mx.concatenate(probs) if probs else mx.zeros(0)

    def _steps(self, count: int, cursor: State) -> tuple[list[mx.array], State]:
        """Steps of which nothing is read. -> tokens [count], their q [count, V], confidences [count]; the next cursor.

        All of one graph, called so often: one for each count would have to be traced.
        """
        steps = []
        for _ in range(count):
            *step, cursor = self._step(cursor)
            steps.append(step)
        return [mx.concatenate(parts) for parts in zip(*steps, strict=True)], cursor


def cursor_of(state: State) -> State:
    """Where the drafter goes on from; takes its state out of ``state``."""
    if "opened" in state:
        drafted = state["opened"][0]
        feed, length = drafted[-1:], state["committed"] + drafted.shape[0] - 1
    else:
        feed, length = state["recent"], state["committed"] - state["recent"].shape[0]
    return {"feed": feed, "length": length, "drafter": state.pop("drafter"), "key": state["key"]}


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
        self._made: dict[Choice, CompiledGraph] = {}

    @property
    def drafters(self) -> list[str]:
        """The names of those who draft something."""
        return [name for name in self.proposers if name != NOBODY]

    def __getitem__(self, choice: Choice) -> CompiledGraph:
        if choice not in self._made:
            models = self.weights.models if choice.proposer == MODEL else [self.pair.target]
            graph = partial(block_graph, self._parts(choice))
            self._made[choice] = CompiledGraph(graph, models, self.weights)
        return self._made[choice]

    @cached_property
    def stepwise(self) -> StepwiseBlock:
        """The block that the model drafts for step by step."""
        return StepwiseBlock(self._parts(STEPWISE), self.pair.target, self.pair.drafter, self.weights)

    def _parts(self, choice: Choice) -> BlockParts:
        proposer, rule = self.proposers[choice.proposer], RULES[self.verification]
        return BlockParts(self.target, proposer, rule, self.sampling, choice.length)


def arrays(models: list[nn.Module]) -> Iterable[tuple[nn.Module, str, mx.array]]:
    for model in models:
        for _, module in model.named_modules():
            yield from ((module, name, value) for name, value in module.items() if isinstance(value, mx.array))
