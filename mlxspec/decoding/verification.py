"""Which drafted tokens stand, and what comes after them: three rules, all of them exact.

Every rule is a pure function

    p         [γ+1, V]  the target's distribution after 0 … γ drafted tokens
    q         [γ, V]    the distributions that the drafted tokens were drawn from
    tokens    [γ]       the drafted tokens, int32
    uniforms  [γ+1]     independent draws from [0, 1)

    -> accepted (scalar int32, 0 … γ), next_token (scalar int32)

and the emitted text, ``tokens[:accepted]`` and then ``next_token``, is distributed as the target's own whatever q is.
γ = 0 and "all accepted" are no special cases: q is padded with a row of zeros, so that the residual after the last
drafted token is p itself.
"""

from collections.abc import Callable

import mlx.core as mx

from mlxspec.decoding.sampling import Sampling, draw

Rule = Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]
Verify = Rule  # the same from logits [γ+1, V] in the place of p


def token(p: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
    """Accept each token with probability min(1, p/q) until the first rejection, then draw from max(0, p − q).

    Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2.
    """
    accepted = leading_count(uniforms[:-1] < probability_ratios(p, q, tokens))
    return accepted, draw(residual(p, q, accepted, weight=1), uniforms[-1])


def block(p: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
    """Verify the block as a whole; never accepts less than ``token`` in expectation, equal to it at temperature 0.

    The uniforms must be independent of each other, and the *largest* length whose check succeeds counts: one
    uniform shared by the block, or stopping at the first failed check, is not exact any more.
    Source: Sun et al. 2024, arXiv 2403.10444, algorithm 2.
    """
    draft_length = tokens.shape[0]
    weight = block_weights(probability_ratios(p, q, tokens))  # [γ+1]
    mass = mx.maximum(weight[:, None] * p - padded(q), 0).sum(axis=-1)[1:]
    denominator = mass + 1 - weight[1:]
    # 0/0 stands for 1: the residual is empty only where P·p equals q, and there is nothing left to correct.
    threshold = mx.where(denominator > 0, mass / mx.maximum(denominator, 1e-30), 1)  # [γ]
    lengths = mx.where(uniforms[:-1] < threshold, mx.arange(1, draft_length + 1), 0)
    accepted = mx.max(mx.concatenate([mx.zeros(1, mx.int32), lengths]))
    return accepted, draw(residual(p, q, accepted, weight=weight[accepted]), uniforms[-1])


def match(p: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
    """Draw the target's own tokens and accept while they are the drafted ones. mlx-lm's rule; accepts only Σ p·q."""
    own = draw(p, uniforms)  # [γ+1]
    accepted = leading_count(own[:-1] == tokens)
    return accepted, own[accepted]


def greedy(logits: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """What every rule comes to at temperature 0: accept while a token is the likeliest. logits [γ+1, V], tokens [γ].

    None of the arrays of the vocabulary's size is made, which show beside a small model's pass.
    """
    own = mx.argmax(logits, axis=-1).astype(mx.int32)
    accepted = leading_count(own[:-1] == tokens)
    return accepted, own[accepted]


RULES: dict[str, Rule] = {"block": block, "token": token, "match": match}


def verifier(name: str, sampling: Sampling, draft_length: int) -> Verify:
    """Return the function that verifies a block, from the target's logits on.

    It is the rule itself, but for two cases in which every rule comes to the same and most of its operations can be
    left out: temperature 0, and nothing drafted.

    Args:
        name: a key of ``RULES``.
        sampling: applied to the target's logits.
        draft_length: γ.
    """
    rule = RULES[name]

    def verify_greedy(logits: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
        return greedy(logits, tokens)

    def draw_one(logits: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
        return mx.array(0, mx.int32), draw(sampling.probs(logits)[0], uniforms[0])

    def verify(logits: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
        return rule(sampling.probs(logits), q, tokens, uniforms)

    if sampling.temperature == 0:
        return verify_greedy
    return verify if draft_length else draw_one


def probability_ratios(p: mx.array, q: mx.array, tokens: mx.array) -> mx.array:
    """p(x)/q(x) of each drafted token: [γ]. A drafted token has q > 0, since it was drawn from q."""
    at = tokens[:, None]
    p_drafted = mx.take_along_axis(p[:-1], at, axis=-1)[:, 0]
    q_drafted = mx.take_along_axis(q, at, axis=-1)[:, 0]
    return p_drafted / q_drafted


def block_weights(ratios: mx.array) -> mx.array:
    """P_0 = 1, P_i = min(1, P_{i−1} · ratio_i): [γ] -> [γ+1]. γ is small and known, so the loop is unrolled."""
    weights = [mx.ones(())]
    for i in range(ratios.shape[0]):
        weights.append(mx.minimum(weights[-1] * ratios[i], 1))
    return mx.stack(weights)


def residual(p: mx.array, q: mx.array, accepted: mx.array, weight: mx.array | float) -> mx.array:
    """max(0, weight·p − q) after the accepted tokens, not normalised: [V].

    Where rounding leaves nothing of it (p equals q but for the last bit, and the draw fell into that bit), p.
    """
    row = p[accepted]
    left = mx.maximum(weight * row - padded(q)[accepted], 0)
    return mx.where(left.sum() > 0, left, row)


def padded(q: mx.array) -> mx.array:
    """[γ, V] -> [γ+1, V]: nothing was drafted after the last drafted token."""
    return mx.concatenate([q, mx.zeros((1, q.shape[-1]))])


def leading_count(accept: mx.array) -> mx.array:
    """How many are true before the first false: [γ] bool -> scalar int32."""
    return mx.cumprod(accept.astype(mx.int32)).sum()
