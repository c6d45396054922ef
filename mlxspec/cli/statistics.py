"""The statistics of an answer in words."""

import os
import sys

import mlx.core as mx

from mlxspec import DecodingStats, SpeculativeDecoder
from mlxspec.blas import PACKAGE, SWITCH, blas_name, has_fast_blas
from mlxspec.decoding.drafting import PLAIN
from mlxspec.decoding.policy import Automatic

DRAFTED_BY = {"model": "drafted by the model", "lookup": "drafted by prompt lookup", "none": "without a draft"}
SHORT_ANSWER = 8  # tokens, in which a draft saves little


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
    proposers, policy, stats = decoder.compiled.drafters, decoder.policy, decoder.stats
    if not proposers or decoder.draft_length == 0:
        return "because drafting is off"
    if stats.tokens < SHORT_ANSWER:
        return "because the answer is short"
    if not isinstance(policy, Automatic):
        return "because the text is longer than the drafter's context"
    drafting = {choice: rate for choice, rate in policy.rates().items() if choice != PLAIN}
    if not drafting:
        return "because the text is longer than the drafter's context"
    best = max(drafting, key=lambda choice: drafting[choice])
    ratio = policy.costs.block(best) / policy.costs.block(PLAIN)
    return (
        f"because a draft of length {best.length} and its verification would take {ratio:.1f} times a plain pass here, "
        f"for {policy.expected_tokens(best):.1f} tokens"
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
