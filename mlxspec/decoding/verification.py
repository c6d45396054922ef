"""Three exact rules that decide which drafted tokens are accepted and which token follows them.

Every rule is a pure function

    p         [γ+1, V]  the target's distribution after 0 … γ drafted tokens
    q         [γ, V]    the distributions that the drafted tokens were drawn from
    tokens    [γ]       the drafted tokens, int32
    uniforms  [γ+1]     independent draws from [0, 1)

    -> accepted (scalar int32, 0 … γ), next_token (scalar int32)

The emitted text is ``tokens[:accepted]``, then ``next_token``. It has the target's own distribution for every q.
γ = 0 and "all accepted" are not special cases: q is padded with a row of zeros, so the residual after the last drafted
token is p itself. A drafter that computes NaN is no special case either: a row of q that is not finite counts as a row
of zeros, as if the draft had ended before it.
"""

from collections.abc import Callable

import mlx.core as mx

from mlxspec.decoding.sampling import Sampling, draw

Rule = Callable[[mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]
Verify = Rule  # the same, but with the target's logits [γ+1, V] instead of p; next_token may be ``FAILED``

FAILED = -1  # in place of a token: the target computed no distribution that one could be drawn from


def token(p: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
    """Accept each token with probability min(1, p/q) until the first rejection, then draw from max(0, p − q).

    The module docstring describes the arguments and the result.

    Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2.
    """
    q = finite_rows(q)
    accepted = leading_count(uniforms[:-1] < probability_ratios(p, q, tokens))
    return accepted, draw(residual(p, q, accepted, weight=1), uniforms[-1])


def block(p: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
    """Verify the block as a whole. In expectation it accepts at least as many tokens as ``token``.

    At temperature 0 both rules are equal. The uniforms must be independent of each other, and the *largest* length
    whose check succeeds counts. With one uniform for the whole block, or with a stop at the first failed check, the
    rule would not be exact. The module docstring describes the arguments and the result.

    Source: Sun et al. 2024, arXiv 2403.10444, algorithm 2.
    """
    draft_length, q = tokens.shape[0], finite_rows(q)
    weight = block_weights(probability_ratios(p, q, tokens))  # [γ+1]
    mass = mx.maximum(weight[:, None] * p - padded(q), 0).sum(axis=-1)[1:]
    denominator = mass + 1 - weight[1:]
    # 0/0 counts as 1. The residual is empty only where P·p equals q, and then nothing has to be corrected.
    threshold = mx.where(denominator == 0, 1, mass / denominator)  # [γ]
    lengths = mx.where(uniforms[:-1] < threshold, mx.arange(1, draft_length + 1), 0)
    accepted = mx.max(mx.concatenate([mx.zeros(1, mx.int32), lengths]))
    return accepted, draw(residual(p, q, accepted, weight=weight[accepted]), uniforms[-1])


def match(p: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
    """Draw tokens from p, and accept drafted tokens while they are equal to them.

    This is mlx-lm's rule. It accepts a token with probability Σ p·q, where ``token`` accepts with Σ min(p, q). The
    module docstring describes the arguments and the result.
    """
    own = draw(p, uniforms)  # [γ+1]
    accepted = leading_count(own[:-1] == tokens)
    return accepted, own[accepted]


def greedy(logits: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
    """Accept drafted tokens while each is the target's most likely one. Every rule does this at temperature 0.

    The function does not compute probabilities [γ+1, V], which would take a noticeable share of a small model's pass.

    Args:
        logits: The target's logits [γ+1, V].
        tokens: The drafted tokens [γ] int32.

    Returns:
        The number of accepted tokens and the next token, as from a rule. The next token is ``FAILED`` if its logits
        contain NaN, or only −∞.
    """
    largest = mx.max(logits, axis=-1)  # NaN if one of them is
    own = mx.where(largest > -mx.inf, mx.argmax(logits, axis=-1).astype(mx.int32), FAILED)
    accepted = leading_count(own[:-1] == tokens)
    return accepted, own[accepted]


RULES: dict[str, Rule] = {"block": block, "token": token, "match": match}
DEFAULT_RULE = "block"


def verifier(name: str, sampling: Sampling, draft_length: int) -> Verify:
    """Return the function that verifies a block from the target's logits.

    It applies the rule, except at temperature 0 and at γ = 0. There all rules give the same result, which a shorter
    function computes.

    Rows of the target's logits may contain NaN or infinity. The rules then work on V + 1 symbols: such a row gives the
    last symbol, "failed", probability 1. No drafter proposes it. So a failed row ends the text at the same position as
    plain decoding, with the same probability. Failed rows that the text does not reach have no effect.

    Args:
        name: Key of ``RULES``.
        sampling: Turns the target's logits into p.
        draft_length: Draft length γ.

    Returns:
        A function of (logits [γ+1, V], q [γ, V], tokens [γ], uniforms [γ+1]). Its next_token is ``FAILED`` if it would
        have to be drawn from a row that is not a distribution.
    """
    rule = RULES[name]

    def verify_greedy(logits: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
        return greedy(logits, tokens)

    def draw_one(logits: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
        p = sampling.probs(logits[0])
        return mx.array(0, mx.int32), mx.where(mx.isnan(p[0]), FAILED, draw(p, uniforms[0]))

    def verify(logits: mx.array, q: mx.array, tokens: mx.array, uniforms: mx.array) -> tuple[mx.array, mx.array]:
        vocab_size = logits.shape[-1]
        q = mx.concatenate([q, mx.zeros((draft_length, 1))], axis=-1)
        accepted, next_token = rule(with_failed(sampling.probs(logits)), q, tokens, uniforms)
        return accepted, mx.where(next_token < vocab_size, next_token, FAILED)

    if sampling.temperature == 0:
        return verify_greedy
    return verify if draft_length else draw_one


def with_failed(p: mx.array) -> mx.array:
    """Append the symbol "failed". Its probability is 1 in rows of NaN: [n, V] -> [n, V+1].

    A softmax over logits that contain NaN or +∞, or only −∞, is NaN everywhere.
    """
    failed = mx.isnan(p[:, :1])
    return mx.concatenate([mx.where(failed, 0, p), failed.astype(p.dtype)], axis=-1)


def finite_rows(q: mx.array) -> mx.array:
    """Replace each row of q that contains NaN or infinity by zeros: [γ, V] -> [γ, V]."""
    return mx.where(mx.isfinite(q.sum(axis=-1, keepdims=True)), q, 0)


def probability_ratios(p: mx.array, q: mx.array, tokens: mx.array) -> mx.array:
    """Compute p(x)/q(x) of each drafted token x.

    Args:
        p: The target's distributions [γ+1, V].
        q: The distributions that the tokens were drawn from, [γ, V].
        tokens: The drafted tokens [γ] int32.

    Returns:
        The ratios [γ]. A ratio is 0 where q(x) is 0, which happens only for rows of q that were replaced by zeros.
    """
    at = tokens[:, None]
    p_drafted = mx.take_along_axis(p[:-1], at, axis=-1)[:, 0]
    q_drafted = mx.take_along_axis(q, at, axis=-1)[:, 0]
    return mx.where(q_drafted > 0, p_drafted / q_drafted, 0)


def block_weights(ratios: mx.array) -> mx.array:
    """Compute P_0 = 1, P_i = min(1, P_{i−1} · ratio_i): [γ] -> [γ+1]. γ is small and known, so the loop is unrolled."""
    weights = [mx.ones(())]
    for i in range(ratios.shape[0]):
        weights.append(mx.minimum(weights[-1] * ratios[i], 1))
    return mx.stack(weights)


def residual(p: mx.array, q: mx.array, accepted: mx.array, weight: mx.array | float) -> mx.array:
    """Compute the residual max(0, weight·p − q) after the accepted tokens. It is not normalized.

    Only rounding makes the residual 0 everywhere: p and q are equal up to the last bit, and the draw fell into that
    bit. The row of p is then returned.

    Args:
        p: The target's distributions [γ+1, V].
        q: The distributions that the drafted tokens were drawn from, [γ, V].
        accepted: Number of accepted tokens, scalar int32.
        weight: Factor of p: 1 for ``token``, P_accepted for ``block``.

    Returns:
        Nonnegative weights [V].
    """
    row = p[accepted]
    left = mx.maximum(weight * row - padded(q)[accepted], 0)
    return mx.where(left.sum() > 0, left, row)


def padded(q: mx.array) -> mx.array:
    """Append a row of zeros to q: [γ, V] -> [γ+1, V]. Nothing was drafted after the last drafted token."""
    return mx.concatenate([q, mx.zeros((1, q.shape[-1]))])


def leading_count(accept: mx.array) -> mx.array:
    """Count the leading true values: [γ] bool -> scalar int32."""
    return mx.cumprod(accept.astype(mx.int32)).sum()
