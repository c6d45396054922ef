"""A block of speculative decoding: draft, verify, accept, commit. It is one graph, and the host reads nothing."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlxspec.decoding.cache import Buffers, CachedModel
from mlxspec.decoding.drafting import Proposer
from mlxspec.decoding.verification import Verify


class State(NamedTuple):
    """The arrays that one block passes to the next.

    The target's cache covers ``committed − 1`` tokens, the drafter's at least ``committed − len(recent)``. To rewind a
    cache, the block counts fewer tokens. Entries of rejected tokens are masked, then overwritten.
    """

    recent: mx.array  # the last two committed tokens, or the only one: [1 or 2] int32
    committed: mx.array  # number of committed tokens, prompt included; scalar int32
    target: Buffers  # the target's KV cache
    drafter: Any  # the proposer's state
    key: mx.array  # key of the random number generator


@dataclass(frozen=True)
class BlockParts:
    """The models, the rule and the draft length of a block. They are fixed when the block is compiled."""

    target: CachedModel
    proposer: Proposer
    verify: Verify
    draft_length: int  # γ


def decode_block(parts: BlockParts, state: State) -> tuple[mx.array, State]:
    """Draft γ tokens, verify them in one forward pass of the target, and commit the accepted tokens and one more.

    The tokens, the number of accepted tokens and the lengths of the caches depend on chance, so all of them are arrays.

    Args:
        parts: The models, the rule and the draft length γ.
        state: The state after the previous block.

    Returns:
        The result [γ+2] int32, and the state for the next block. The first γ + 1 entries of the result are tokens, of
        which the leading accepted + 1 are valid. The last entry is the number of accepted tokens.

    Source: Leviathan et al. 2023, algorithm 1.
    """
    gamma = parts.draft_length
    key, subkey = mx.random.split(state.key)
    uniforms = mx.random.uniform(shape=(2 * gamma + 1,), key=subkey)

    # Draft: the proposer draws γ tokens [γ] from its distributions q [γ, V].
    drafted, q, drafter = parts.proposer.propose(state.drafter, state.recent, state.committed, uniforms[:gamma])

    # Verify: one pass of the target over the last committed token and the draft.
    rows = mx.concatenate([state.recent[-1:], drafted])  # [γ+1]
    logits, target = parts.target(rows, state.target, state.committed - 1)  # [γ+1, V]

    # Accept: the leading accepted tokens, then a token from the residual or, if all are accepted, the bonus token.
    accepted, next_token = parts.verify(logits, q, drafted, uniforms[gamma:])
    padded = mx.concatenate([drafted, mx.zeros(1, mx.int32)])
    emitted = mx.where(mx.arange(gamma + 1) < accepted, padded, next_token)  # [γ+1]

    # Commit: advance the count. Entries of rejected tokens stay in the caches, where they are masked.
    last_two = state.recent.shape[0] + accepted - 1 + mx.arange(2)
    return mx.concatenate([emitted, accepted.reshape(1)]), State(
        recent=mx.concatenate([state.recent, emitted])[last_two],
        committed=state.committed + accepted + 1,
        target=target,
        drafter=parts.proposer.record(drafter, state.committed, emitted, accepted, target),
        key=key,
    )
