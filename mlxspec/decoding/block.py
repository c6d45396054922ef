"""A block of speculative decoding: draft, verify, accept, commit. One graph, in which the host reads nothing."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from mlxspec.decoding.cache import Buffers, CachedModel
from mlxspec.decoding.drafting import Proposer
from mlxspec.decoding.verification import Verify


class State(NamedTuple):
    """What one block hands to the next.

    The target's cache covers ``committed − 1`` tokens, the drafter's at least ``committed − len(recent)``. Entries of
    rejected tokens are masked, then overwritten. To rewind, count fewer tokens.
    """

    recent: mx.array  # the last two committed tokens, one while there is only one; int32
    committed: mx.array  # number of committed tokens, prompt included; scalar int32
    target: Buffers  # the target's KV cache
    drafter: Any  # the proposer's state
    key: mx.array  # of the random numbers


@dataclass(frozen=True)
class BlockParts:
    """What a block is made of; fixed when it is compiled."""

    target: CachedModel
    proposer: Proposer
    verify: Verify
    draft_length: int  # γ


def decode_block(parts: BlockParts, state: State) -> tuple[mx.array, State]:
    """Draft γ tokens, verify them in one pass of the target, accept some of them, commit those and one more.

    Every quantity that depends on chance is an array: the tokens, how many are accepted, the lengths of the caches.

    Returns:
        result: [γ+2] int32. Tokens [γ+1], of which the first accepted + 1 count, then the number accepted.
        state: for the next block.
    """
    gamma = parts.draft_length
    key, subkey = mx.random.split(state.key)
    uniforms = mx.random.uniform(shape=(2 * gamma + 1,), key=subkey)

    # Draft: the proposer draws γ tokens [γ] from its distributions q [γ, V].
    drafted, q, drafter = parts.proposer.propose(state.drafter, state.recent, state.committed, uniforms[:gamma])

    # Verify: one pass of the target over the last committed token and the draft.
    rows = mx.concatenate([state.recent[-1:], drafted])  # [γ+1]
    logits, target = parts.target(rows, state.target, state.committed - 1)  # [γ+1, V]

    # Accept: the leading tokens that stand, then the target's correction or, if all stand, its bonus token.
    accepted, next_token = parts.verify(logits, q, drafted, uniforms[gamma:])
    padded = mx.concatenate([drafted, mx.zeros(1, mx.int32)])
    emitted = mx.where(mx.arange(gamma + 1) < accepted, padded, next_token)  # [γ+1]

    # Commit: count what stands. Nothing has to be removed from the caches.
    last_two = state.recent.shape[0] + accepted - 1 + mx.arange(2)
    return mx.concatenate([emitted, accepted.reshape(1)]), State(
        recent=mx.concatenate([state.recent, emitted])[last_two],
        committed=state.committed + accepted + 1,
        target=target,
        drafter=parts.proposer.record(drafter, state.committed, emitted),
        key=key,
    )
