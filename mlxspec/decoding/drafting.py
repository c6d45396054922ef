"""Proposers draft the next tokens: with a draft model or an EAGLE head, by prompt lookup, or not at all.

A proposer's state is a tree of arrays. The decoder stores it between blocks. Two invariants hold between blocks, where
``committed`` is the number of tokens that are final:

- ``recent`` holds the last two committed tokens, or one if there is only one.
- The draft model's state covers at least the ``committed − len(recent)`` tokens before them.

``recent`` holds two tokens because, after a fully accepted block, the draft model has not seen the last token that it
drafted. The next block feeds it that token together with the bonus token. So "all accepted" needs no special case.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxspec.decoding.cache import PREFILL_STEP, Buffers, CachedModel, KVCache, capacity_for, with_room
from mlxspec.decoding.sampling import Sampling, draw, one_hot
from mlxspec.errors import InvalidRequestError
from mlxspec.models.drafter import PromptLookup
from mlxspec.models.eagle import Eagle
from mlxspec.models.parts import Parts

MODEL, LOOKUP, NONE = "model", "lookup", "none"


class Choice(NamedTuple):
    """The proposer of a block and its draft length.

    Attributes:
        proposer: ``MODEL``, ``LOOKUP`` or ``NONE``.
        length: Draft length γ.
    """

    proposer: str
    length: int


PLAIN = Choice(NONE, 0)

Advanced = Callable[[int], None]  # called with the number of tokens of each chunk of a prompt that was read
Proposal = tuple[mx.array, mx.array, Any]  # tokens [γ] int32, their distributions q [γ, V] float32, state


class Proposer(Protocol):
    """Drafts tokens. ``propose`` and ``record`` run inside the block's graph. Only ``start`` may evaluate arrays.

    Attributes:
        reads: Whether ``start`` runs a model over the text.
    """

    reads: bool

    def start(self, kept: list[Any], tokens: list[int], covered: int, advanced: Advanced, target: Buffers) -> Any:
        """Return the state for a text.

        Args:
            kept: A list with a state that covers the first ``covered`` tokens, or an empty list. The state is removed
                from the list. If the caller still held it, MLX would copy its buffers instead of writing in place.
            tokens: Token ids of the text.
            covered: Number of tokens that the state in ``kept`` covers.
            advanced: Called after each chunk of the text with its number of tokens.
            target: The target's buffers. They cover all tokens but the last.
        """

    def with_room(self, state: Any, length: int) -> Any:
        """Return the state with room for a text of ``length`` tokens."""

    def propose(self, state: Any, recent: mx.array, committed: mx.array, uniforms: mx.array) -> Proposal:
        """Draft as many tokens as there are uniforms.

        Args:
            state: The proposer's state.
            recent: The last committed tokens, [1 or 2] int32.
            committed: Number of committed tokens, scalar int32.
            uniforms: Independent draws from [0, 1), [γ].

        Returns:
            The drafted tokens [γ] int32, the distributions q [γ, V] that they were drawn from, and the next state.
        """

    def record(self, state: Any, committed: mx.array, emitted: mx.array, accepted: mx.array, target: Buffers) -> Any:
        """Return the state after a block.

        Args:
            state: The state that ``propose`` returned.
            committed: Number of committed tokens before the block, scalar int32.
            emitted: Emitted tokens [γ+1] int32. The leading ``accepted`` + 1 are committed.
            accepted: Number of accepted tokens, scalar int32.
            target: The target's buffers after the block.
        """


class ModelProposer:
    """Drafts with a draft model. Its vocabulary may be padded differently from the target's.

    Args:
        model: The draft model.
        sampling: How tokens are drawn.
        vocab_size: Size of the target's vocabulary.
    """

    reads = True

    def __init__(self, model: nn.Module, sampling: Sampling, vocab_size: int):
        self.model = model
        self.run = CachedModel(model)
        self.sampling = sampling
        self.vocab_size = vocab_size

    def start(
        self, kept: list[Buffers], tokens: list[int], covered: int, advanced: Advanced, target: Buffers
    ) -> Buffers:
        """Run the draft model over the uncovered tokens, except the last two. ``propose`` reads those."""
        return self.run.prefill(self._known(mx.array(tokens[covered:-2], mx.int32)), kept, covered, advanced)

    def with_room(self, state: Buffers, length: int) -> Buffers:
        """Return the KV cache with room for ``length`` positions."""
        return with_room(state, length)

    def propose(self, state: Buffers, recent: mx.array, committed: mx.array, uniforms: mx.array) -> Proposal:
        """Draw γ tokens one after another from the draft model."""
        tokens, probs = [], []
        feed, length = recent, committed - recent.shape[0]
        for i in range(uniforms.shape[0]):
            logits, state = self.run(self._known(feed), state, length)
            token, q = drawn(fitted(logits[-1], self.vocab_size), self.sampling, uniforms[i])
            length = length + feed.shape[0]
            feed = token.reshape(1)
            tokens.append(feed)
            probs.append(q)
        return mx.concatenate(tokens), mx.stack(probs), state

    def record(
        self, state: Buffers, committed: mx.array, emitted: mx.array, accepted: mx.array, target: Buffers
    ) -> Buffers:
        """Return the state unchanged."""
        return state  # entries of rejected tokens are overwritten

    def _known(self, tokens: mx.array) -> mx.array:
        """Replace tokens that the draft model lacks by its last token. The target may have more tokens."""
        return mx.minimum(tokens, self.run.vocab_size - 1)


class EagleState(NamedTuple):
    """The state of an EAGLE head between blocks. It covers row t of the head for each committed token t + 1."""

    buffers: Buffers  # keys and values of the head's layer
    feature: mx.array  # [1, 1, D] what the layer returned for the last row. It gives the next token's distribution


class EagleProposer:
    """Drafts with an EAGLE head.

    The head reads the target's hidden states, which are kept next to the target's KV cache. So a head that was idle can
    read later what it missed. A block ends with one pass of the head over its tokens, each with the hidden state one
    position before it. The first token of the next draft is drawn from the result. A draft of γ tokens needs γ − 1
    passes more.

    Args:
        head: The head.
        sampling: How tokens are drawn.
        parts: The parts of the target. Its embedding and, for an EAGLE-1 head, its output head are used.
        vocab_size: Size of the target's vocabulary.
    """

    reads = True

    def __init__(self, head: Eagle, sampling: Sampling, parts: Parts, vocab_size: int):
        self.model = head
        self.sampling = sampling
        self.parts = parts
        self.vocab_size = vocab_size

    def start(
        self, kept: list[EagleState], tokens: list[int], covered: int, advanced: Advanced, target: Buffers
    ) -> EagleState:
        """Read the uncovered tokens and their hidden states, and at least the last row again for its feature."""
        args, start = self.model.args, max(0, min(covered - 1, len(tokens) - 2))
        dtype = self.model.layer.post_attention_layernorm.weight.dtype
        state = EagleState([], mx.zeros((1, 1, args.hidden_size), dtype))
        if kept:
            state = kept.pop()._replace(feature=state.feature)
        else:
            size = args.head_dim or args.hidden_size // args.num_attention_heads
            groups = args.num_key_value_heads or args.num_attention_heads
            empty = mx.zeros((1, groups, capacity_for(len(tokens)), size), dtype)
            state = state._replace(buffers=[(empty, mx.array(empty))])
        buffers, feature = with_room(state.buffers, len(tokens), exactly=True), state.feature
        del state
        for begin in range(start, len(tokens) - 1, PREFILL_STEP):
            end = min(begin + PREFILL_STEP, len(tokens) - 1)
            states = target[-1][0][0, :, begin:end]
            following = mx.array(tokens[begin + 1 : end + 1], mx.int32)
            features, buffers = self._run(following, self.model.features(states), buffers, mx.array(begin), end)
            feature = features[:, -1:]
            mx.eval(buffers, feature)
            advanced(end - begin)
        return EagleState(buffers, feature)

    def with_room(self, state: EagleState, length: int) -> EagleState:
        """Return the state with room for ``length`` tokens."""
        return state._replace(buffers=with_room(state.buffers, length))

    def propose(self, state: EagleState, recent: mx.array, committed: mx.array, uniforms: mx.array) -> Proposal:
        """Draw γ tokens one after another. The head's own outputs take the place of hidden states."""
        buffers, feature = state
        tokens: list[mx.array] = []
        probs: list[mx.array] = []
        for i in range(uniforms.shape[0]):
            if i > 0:
                feature, buffers = self._run(tokens[-1], feature, buffers, committed - 2 + i)
            logits = self.model.logits(feature, self.parts.head)[0, 0]
            token, q = drawn(fitted(logits, self.vocab_size), self.sampling, uniforms[i])
            tokens.append(token.reshape(1))
            probs.append(q)
        return mx.concatenate(tokens), mx.stack(probs), EagleState(buffers, feature)

    def record(
        self, state: EagleState, committed: mx.array, emitted: mx.array, accepted: mx.array, target: Buffers
    ) -> EagleState:
        """Read the emitted tokens, each with the hidden state before it. These rows replace those of the draft."""
        kept, rows = target[-1][0], emitted.shape[0]
        states = mx.slice(kept, (committed - 1).reshape(1), (2,), (1, 1, rows, kept.shape[-1]))[0]
        features, buffers = self._run(emitted, self.model.features(states), state.buffers, committed - 1)
        return EagleState(buffers, mx.take(features, accepted.reshape(1), axis=1))

    def _run(
        self, tokens: mx.array, features: mx.array, buffers: Buffers, length: mx.array, end: int | None = None
    ) -> tuple[mx.array, Buffers]:
        """Run the head over tokens [L] and the features before them [1, L, D]."""
        cache = KVCache(buffers[0], length, None, end)
        following = self.model(self.parts.embedding(tokens[None]), features, cache)
        return following, [cache.buffers]


class LookupProposer:
    """Drafts the tokens that followed the latest earlier occurrence of the text's longest repeated suffix.

    The suffix has at most ``ngram`` tokens. The state is the text itself, on the device. A draft must have γ tokens, so
    if nothing matches, the proposer repeats the last token. The target rejects wrong tokens.

    Args:
        lookup: Settings of prompt lookup.
        vocab_size: Size of the target's vocabulary.

    Source: Saxena, "Prompt Lookup Decoding" (2023).
    """

    reads = False

    def __init__(self, lookup: PromptLookup, vocab_size: int):
        self.lookup = lookup
        self.vocab_size = vocab_size

    def start(
        self, kept: list[mx.array], tokens: list[int], covered: int, advanced: Advanced, target: Buffers
    ) -> mx.array:
        """Copy the text to the device: [capacity] int32, padded with zeros."""
        history = mx.array(tokens, dtype=mx.int32)
        return mx.concatenate([history, mx.zeros(capacity_for(len(tokens)) - len(tokens), mx.int32)])

    def with_room(self, state: mx.array, length: int) -> mx.array:
        """Return the text with room for ``length`` tokens."""
        more = capacity_for(length) - state.shape[0]
        return mx.concatenate([state, mx.zeros(more, mx.int32)]) if more > 0 else state

    def propose(self, state: mx.array, recent: mx.array, committed: mx.array, uniforms: mx.array) -> Proposal:
        """Copy γ tokens from after the longest match. Each row of q is one-hot."""
        end = mx.arange(state.shape[0])  # where an earlier occurrence of the suffix would end
        matching = end < committed - 1
        matched = mx.zeros(state.shape, mx.int32)  # length of the suffix that matches there
        for back in range(self.lookup.ngram):
            wanted = state[mx.maximum(committed - 1 - back, 0)]
            found = mx.take(state, mx.maximum(end - back, 0)) == wanted
            matching = matching & found & (end >= back)
            matched = matched + matching
        longest = matched == mx.max(matched)
        best = mx.max(mx.where(longest & (matched > 0), end, -1))  # the last of the longest matches
        best = mx.where(best >= 0, best, committed - 2)
        # If the continuation reaches the end of the text, it repeats from the match.
        period = mx.maximum(committed - 1 - best, 1)
        tokens = state[best + 1 + mx.arange(uniforms.shape[0]) % period]
        return tokens, one_hot(tokens, self.vocab_size), state

    def record(
        self, state: mx.array, committed: mx.array, emitted: mx.array, accepted: mx.array, target: Buffers
    ) -> mx.array:
        """Write the emitted tokens after the committed ones."""
        return mx.slice_update(state, emitted, committed.reshape(1), axes=(0,))


class NoProposer:
    """Drafts nothing, so the block is plain decoding.

    Args:
        vocab_size: Size of the target's vocabulary.
    """

    reads = False

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def start(self, kept: list[Any], tokens: list[int], covered: int, advanced: Advanced, target: Buffers) -> None:
        """Return None. There is no state."""

    def with_room(self, state: None, length: int) -> None:
        """Return None. There is no state."""

    def propose(self, state: None, recent: mx.array, committed: mx.array, uniforms: mx.array) -> Proposal:
        """Return an empty draft: tokens [0], q [0, V]."""
        return mx.zeros(0, mx.int32), mx.zeros((0, self.vocab_size)), None

    def record(self, state: None, committed: mx.array, emitted: mx.array, accepted: mx.array, target: Buffers) -> None:
        """Return None. There is no state."""


class IdleStates:
    """The states of the proposers that are not drafting, and how many tokens of the text each state covers.

    ``take`` removes a state and ``put_back`` returns it. While a block runs, only the block holds its buffers, so MLX
    can write them in place.

    Args:
        proposers: The proposers by name.
    """

    def __init__(self, proposers: dict[str, Proposer]):
        self.proposers = proposers
        self._states: dict[str, tuple[list[Any], int]] = {}  # the state, and the number of tokens that it covers

    def unread(self, name: str, length: int) -> int:
        """Return how many tokens of a text a proposer has to read before it can draft.

        Args:
            name: Name of the proposer.
            length: Length of the text, in tokens.
        """
        return max(0, length - 2 - self._states.get(name, ([], 0))[1])

    def take(self, name: str, tokens: list[int], target: Buffers, advanced: Advanced = lambda tokens: None) -> Any:
        """Remove and return a proposer's state. First, the proposer reads the tokens that the state does not cover.

        Args:
            name: Name of the proposer.
            tokens: Token ids of the text.
            target: The target's buffers. They cover all tokens but the last.
            advanced: Called after each chunk of the text with its number of tokens.

        Returns:
            The state for the text.
        """
        kept, covered = self._states.pop(name, ([], 0))
        return self.proposers[name].start(kept, tokens, covered, advanced, target)

    def put_back(self, name: str, state: Any, covered: int) -> None:
        """Store a state. None is not stored.

        Args:
            name: Name of the proposer.
            state: The proposer's state.
            covered: Number of leading tokens of the text that the state covers.
        """
        if state is not None:
            self._states[name] = [state], covered

    def truncate(self, length: int) -> None:
        """Limit the states to the first ``length`` tokens, because the text changes after them. 0 frees all states."""
        for name, (kept, covered) in list(self._states.items()):
            if length <= 0:
                del self._states[name]
            else:
                self._states[name] = kept, min(covered, length)


def proposer_for(
    drafter: nn.Module | PromptLookup, sampling: Sampling, vocab_size: int, parts: Parts | None = None
) -> Proposer:
    """Return the proposer for a drafter.

    Args:
        drafter: A draft model, an EAGLE head, or the settings of prompt lookup.
        sampling: How the draft model's tokens are drawn.
        vocab_size: Size of the target's vocabulary.
        parts: The parts of the target, for an EAGLE head.

    Raises:
        InvalidRequestError: ``drafter`` is something else.
    """
    if isinstance(drafter, PromptLookup):
        return LookupProposer(drafter, vocab_size)
    if isinstance(drafter, Eagle):
        assert parts
        return EagleProposer(drafter, sampling, parts, vocab_size)
    if isinstance(drafter, nn.Module):
        return ModelProposer(drafter, sampling, vocab_size)
    raise InvalidRequestError(
        f"the drafter is a {type(drafter).__name__}; use an mlx.nn.Module, mlxspec.PromptLookup or None"
    )


def drawn(logits: mx.array, sampling: Sampling, uniform: mx.array) -> tuple[mx.array, mx.array]:
    """Draw a token. Returns it, scalar int32, and the distribution q [V] that it was drawn from.

    Args:
        logits: The drafter's logits [V].
        sampling: How tokens are drawn.
        uniform: A draw from [0, 1).
    """
    q = sampling.probs(logits)
    return mx.argmax(logits).astype(mx.int32) if sampling.temperature == 0 else draw(q, uniform), q


def fitted(logits: mx.array, vocab_size: int) -> mx.array:
    """Fit logits [V'] of the draft model to the target's vocabulary: [vocab_size].

    Logits beyond the target's vocabulary are cut off. Tokens that the draft model lacks get probability 0.
    """
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[:vocab_size]
    return mx.concatenate([logits, mx.full(missing, -mx.inf, logits.dtype)])
