"""Who proposes the next tokens: a model, a look-up in the text so far, or nobody.

A drafter keeps its state (a tree of arrays) with the decoder, which passes it in and takes it back. Two facts hold
between blocks, with ``committed`` the number of tokens that are final:

- ``recent`` are the last two committed tokens (one, while there is only one);
- a drafter's state covers at least the ``committed − len(recent)`` tokens before them.

Two, because after a fully accepted block the drafter has not yet seen the last token that it drafted. Feeding it that
one and the next together makes "all accepted" an ordinary case.
"""

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlxspec.decoding.cache import CachedModel, capacity_for, with_room
from mlxspec.decoding.sampling import Sampling, draw, one_hot
from mlxspec.errors import InvalidRequestError
from mlxspec.models.drafter import PromptLookup

Proposal = tuple[mx.array, mx.array, Any]  # tokens [γ] int32, q [γ, V] float32, state


class Proposer(Protocol):
    """What the decoder asks of a drafter."""

    prefills: bool  # whether ``start`` runs over the prompt, and tells of it

    def start(self, kept: list[Any], tokens: list[int], reused: int, advanced: Callable[[int], None]) -> Any:
        """The state for a text. ``kept`` holds one that covers its first ``reused`` tokens, or nothing.

        A list, so that it can be taken out: buffers that a caller still holds would be copied instead of written to.
        """

    def with_room(self, state: Any, length: int) -> Any:
        """The state with room for ``length`` tokens."""

    def propose(self, state: Any, recent: mx.array, committed: mx.array, uniforms: mx.array) -> Proposal:
        """As many tokens as there are uniforms."""

    def record(self, state: Any, committed: mx.array, emitted: mx.array) -> Any:
        """Take notice of ``emitted`` [γ+1], of which only the leading, accepted part will be committed."""


class ModelProposer:
    """Drafts with a language model, whose vocabulary may be padded differently from the target's."""

    prefills = True

    def __init__(self, model: nn.Module, sampling: Sampling, vocab_size: int):
        self.run = CachedModel(model)
        self.sampling = sampling
        self.vocab_size = vocab_size

    def start(self, kept, tokens, reused, advanced):
        unread = self._known(mx.array(tokens[reused:-2], mx.int32))
        return self.run.prefill(unread, kept.pop() if kept else None, reused, advanced)

    def with_room(self, state, length):
        return with_room(state, length)

    def propose(self, state, recent, committed, uniforms):
        tokens, probs = [], []
        feed, length = recent, committed - recent.shape[0]
        for i in range(uniforms.shape[0]):
            token, q, _, state = self.step(state, feed, length, uniforms[i])
            feed, length = token, length + feed.shape[0]
            tokens.append(token)
            probs.append(q)
        return mx.concatenate(tokens), mx.stack(probs), state

    def step(
        self, state: Any, feed: mx.array, length: mx.array, uniform: mx.array
    ) -> tuple[mx.array, mx.array, mx.array, Any]:
        """``feed`` [L] behind ``length`` tokens -> the next token [1], its q [V], the confidence in it, state.

        The confidence is the probability of the likeliest token, by q or, where q is one-hot, by the model.
        """
        logits, state = self.run(self._known(feed), state, length)
        logits = fitted(logits[-1], self.vocab_size)
        q = self.sampling.probs(logits)
        if self.sampling.temperature == 0:
            return mx.argmax(logits, keepdims=True).astype(mx.int32), q, largest_probability(logits), state
        return draw(q, uniform).reshape(1), q, mx.max(q), state

    def record(self, state, committed, emitted):
        return state

    def _known(self, tokens: mx.array) -> mx.array:
        """A target with the larger vocabulary has tokens that the drafter has no embedding for: its last one, then."""
        return mx.minimum(tokens, self.run.vocab_size - 1)


class LookupProposer:
    """Drafts what followed the longest suffix of the text, of at most ``ngram`` tokens, when it last occurred.

    The state is the text itself, on the device. Where nothing matches, the last token is proposed again: a draft
    has to be of fixed length, and any draft is exact.
    """

    prefills = False

    def __init__(self, lookup: PromptLookup, vocab_size: int):
        self.lookup = lookup
        self.vocab_size = vocab_size

    def start(self, kept, tokens, reused, advanced):
        history = mx.array(tokens, dtype=mx.int32)
        return mx.concatenate([history, mx.zeros(capacity_for(len(tokens)) - len(tokens), mx.int32)])

    def with_room(self, state, length):
        more = capacity_for(length) - state.shape[0]
        return mx.concatenate([state, mx.zeros(more, mx.int32)]) if more > 0 else state

    def propose(self, state, recent, committed, uniforms):
        end = mx.arange(state.shape[0])  # where an earlier occurrence of the suffix would end
        matching = end < committed - 1
        matched = mx.zeros(state.shape, mx.int32)  # the length of the suffix that is found there
        for back in range(self.lookup.ngram):
            wanted = state[mx.maximum(committed - 1 - back, 0)]
            found = mx.take(state, mx.maximum(end - back, 0)) == wanted
            matching = matching & found & (end >= back)
            matched = matched + matching
        best = mx.argmax(matched * state.shape[0] + end * (matched > 0))
        best = mx.where(matched[best] > 0, best, committed - 2)
        # What follows may run into the end of the text; it then goes round from the match, as a repetition would.
        period = mx.maximum(committed - 1 - best, 1)
        tokens = state[best + 1 + mx.arange(uniforms.shape[0]) % period]
        return tokens, one_hot(tokens, self.vocab_size), state

    def record(self, state, committed, emitted):
        return mx.slice_update(state, emitted, committed.reshape(1), axes=(0,))


class NobodyProposer:
    """Drafts nothing: plain decoding through the same loop."""

    prefills = False

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def start(self, kept, tokens, reused, advanced):
        return None

    def with_room(self, state, length):
        return None

    def propose(self, state, recent, committed, uniforms):
        return mx.zeros(0, mx.int32), mx.zeros((0, self.vocab_size)), None

    def record(self, state, committed, emitted):
        return None


class Drafters:
    """The proposers that a decoder has, by name; their states, and how much of the text each has seen.

    A state leaves with ``ready`` and comes back with ``put_back``, so that nobody but the block that writes into its
    buffers holds them.
    """

    def __init__(self, proposers: dict[str, Proposer]):
        self.proposers = proposers
        self._states: dict[str, tuple[list[Any], int]] = {}  # the state, and the tokens of the text that it covers

    def behind(self, name: str, length: int) -> int:
        """Tokens of a text of ``length`` that a proposer would have to read before it drafts."""
        return max(0, length - 2 - self._states.get(name, ([], 0))[1])

    def ready(self, name: str, tokens: list[int], advanced: Callable[[int], None] = lambda tokens: None) -> Any:
        """The state for ``tokens``, of which it reads what it has not seen; ``advanced`` is told of each chunk."""
        kept, covered = self._states.pop(name, ([], 0))
        return self.proposers[name].start(kept, tokens, covered, advanced)

    def put_back(self, name: str, state: Any, covered: int) -> None:
        """Keep a state that covers the first ``covered`` tokens of the text."""
        if state is not None:
            self._states[name] = [state], covered

    def forget_beyond(self, length: int) -> None:
        """The text goes on differently behind ``length`` tokens; 0 frees everything."""
        for name, (kept, covered) in list(self._states.items()):
            if length <= 0:
                del self._states[name]
            else:
                self._states[name] = kept, min(covered, length)


def proposer_for(drafter: nn.Module | PromptLookup, sampling: Sampling, vocab_size: int) -> Proposer:
    if isinstance(drafter, PromptLookup):
        return LookupProposer(drafter, vocab_size)
    if isinstance(drafter, nn.Module):
        return ModelProposer(drafter, sampling, vocab_size)
    raise InvalidRequestError(
        f"the drafter is a {type(drafter).__name__}; use an mlx.nn.Module, mlxspec.PromptLookup or None"
    )


def largest_probability(logits: mx.array) -> mx.array:
    """logits [V] -> of the likeliest token, float32."""
    return mx.exp(mx.max(logits).astype(mx.float32) - mx.logsumexp(logits.astype(mx.float32)))


def fitted(logits: mx.array, vocab_size: int) -> mx.array:
    """logits [V'] -> [vocab_size]: padding that only the drafter has is cut, padding that it lacks is impossible."""
    missing = vocab_size - logits.shape[-1]
    if missing <= 0:
        return logits[:vocab_size]
    return mx.concatenate([logits, mx.full(missing, -mx.inf, logits.dtype)])
