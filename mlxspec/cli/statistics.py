"""The statistics of an answer in words."""

import math
import os
import sys

import mlx.core as mx

from mlxspec import DecodingStats, SpeculativeDecoder
from mlxspec.blas import PACKAGE, SWITCH, blas_name, has_fast_blas
from mlxspec.decoding.acceptance import LONGEST, MENU
from mlxspec.decoding.drafting import MODEL, PLAIN, Choice
from mlxspec.decoding.policy import MARGIN, Automatic

DRAFTED_BY = {"model": "drafted by the model", "lookup": "drafted by prompt lookup", "none": "without a draft"}
SHORT_ANSWER = 8  # tokens, in which a draft saves little
SHORT = "because the answer is short"
OUTGROWN = "the text is longer than the drafter's context"


def summary(decoder: SpeculativeDecoder) -> str:
    """Return the line that follows every answer."""
    stats = decoder.stats
    if not stats.prompt_tokens:
        return "there is no answer yet"
    if stats.drafted:
        passes = f"{stats.block_efficiency:.2f} tokens per pass of the target"
        drafts = f"{passes}, {stats.acceptance_rate:.0%} of {stats.drafted} drafted tokens accepted"
    else:
        drafts = f"nothing drafted, {why_nothing_is_drafted(decoder)}"
    return f"{stats.tokens} tokens, {stats.tokens_per_second:.1f} tokens/s: {drafts}{advice(decoder)}"


def why_nothing_is_drafted(decoder: SpeculativeDecoder) -> str:
    """Return the reason for an answer without drafted tokens."""
    proposers, policy, prompt = decoder.compiled.drafters, decoder.policy, decoder.stats.prompt_tokens
    if not proposers or decoder.draft_length == 0:
        return "because drafting is off"
    if isinstance(policy, Automatic):
        return why_not_chosen(policy, prompt, decoder.stats.tokens)
    if not decoder.stats.tokens:
        return SHORT
    # A fixed draft length is left out only where it does not fit.
    length, context = policy.choose(math.inf).length, decoder.pair.drafter_context_length
    if proposers[0] == MODEL and context is not None and prompt + length > context:
        return f"because {OUTGROWN}"
    return f"because the target's context has no room for a draft of {length} tokens"


def why_not_chosen(policy: Automatic, prompt: int, tokens: int) -> str:
    """Return the reason why ``Automatic`` has not drafted in an answer.

    Args:
        policy: The policy after the answer.
        prompt: Length of the prompt, in tokens. Later on, the text may outgrow a drafter that was not used anyway.
        tokens: Length of the answer, in tokens.
    """
    able = [name for name in policy.yields if name != MODEL or prompt + LONGEST <= policy.reach]
    if not able:
        return f"because {OUTGROWN}"
    gains = {
        choice: policy.expected_tokens(choice) * policy.costs.block(PLAIN) / policy.costs.block(choice)
        for choice in (Choice(name, length) for name in able for length in MENU[1:])
    }
    best = max(gains, key=lambda choice: gains[choice])
    outgrown = "" if MODEL in able or MODEL not in policy.yields else f"{OUTGROWN}, and "
    if MARGIN * gains[best] > 1:
        return (
            SHORT
            if tokens < SHORT_ANSWER
            else f"because {outgrown}starting to draft would have cost more than it saved"
        )
    ratio = policy.costs.block(best) / policy.costs.block(PLAIN)
    by = " by prompt lookup" if outgrown else ""
    return (
        f"because {outgrown}a draft of length {best.length}{by} and its verification would take {ratio:.2f} times a "
        f"plain pass here, for {policy.expected_tokens(best):.2f} tokens{', too small a gain' * (gains[best] > 1)}"
    )


def advice(decoder: SpeculativeDecoder) -> str:
    """Return what would make drafting faster on Linux, "" if nothing is missing."""
    slow = sys.platform == "linux" and mx.default_device().type == mx.cpu and not has_fast_blas()
    if not slow or os.environ.get(SWITCH) == "off" or not decoder.compiled.drafters or decoder.draft_length == 0:
        return ""
    return f". For speed on this machine, install OpenBLAS (on Debian and Ubuntu: apt install {PACKAGE})"


def detailed(decoder: SpeculativeDecoder) -> str:
    """Return all statistics of an answer, several lines."""
    stats: DecodingStats = decoder.stats
    by_position = [f"{share:.2f}" for share in stats.acceptance_by_position]
    by = ", ".join(f"{count} {DRAFTED_BY[name]}" for name, count in stats.blocks_by.items())
    reused = f", {stats.prompt_tokens_reused} of them cached" if stats.prompt_tokens_reused else ""
    device = f"CPU, {blas_name()}" if mx.default_device().type == mx.cpu else "GPU"
    return "\n".join([
        summary(decoder),
        f"prompt           {stats.prompt_tokens} tokens in {stats.prompt_seconds:.2f} s{reused}",
        f"decoding         {stats.blocks} target passes in {stats.decode_seconds:.2f} s: {by or '-'}",
        f"drafted          {stats.drafted} tokens, {stats.draft_length:.1f} per pass; {stats.accepted} accepted",
        f"by position      {' '.join(by_position) or '-'} (share accepted of the 1st, 2nd, ... drafted token)",
        f"peak memory      {stats.peak_memory_bytes / 1e6:.0f} MB",
        f"device           {device}",
    ])  # fmt: skip
