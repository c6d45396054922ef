import mlx.core as mx
import mlx.nn as nn
import pytest

import mlxspec
from mlxspec import ModelPair, PromptLookup, SpeculativeDecoder
from mlxspec.decoding.drafting import LookupProposer, fitted, proposer_for
from tests.conftest import decoded, random_llama


def proposed(text: list[int], count: int, ngram: int = 3) -> list[int]:
    lookup = LookupProposer(PromptLookup(ngram), vocab_size=100)
    state = lookup.start([], text, 0, lambda tokens: None, [])
    recent = mx.array(text[-2:], mx.int32)
    tokens, q, _ = lookup.propose(state, recent, mx.array(len(text)), mx.zeros(count))
    assert mx.argmax(q, axis=-1).tolist() == tokens.tolist()  # q is the one-hot of what is proposed
    return tokens.tolist()


def test_lookup_proposes_what_followed_the_last_occurrence():
    assert proposed([1, 2, 3, 4, 5, 1, 2, 3, 7, 8, 9, 1, 2, 3], 3) == [7, 8, 9]


def test_lookup_prefers_a_longer_match_to_a_later_one():
    assert proposed([1, 2, 3, 4, 5, 9, 3, 6, 6, 1, 2, 3], 2) == [4, 5]


def test_lookup_is_limited_to_its_ngram():
    assert proposed([1, 2, 3, 4, 5, 9, 3, 6, 6, 1, 2, 3], 2, ngram=1) == [6, 6]


def test_lookup_goes_on_with_a_repetition_that_reaches_the_end_of_the_text():
    assert proposed([5, 1, 2, 3, 1, 2, 3], 6) == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("text", [[4], [4, 5], [1, 2, 3, 4, 5]])
def test_lookup_without_a_match_still_proposes_tokens_of_the_text(text):
    assert set(proposed(text, 3)) <= set(text)


def test_lookup_never_matches_the_unused_room_behind_the_text():
    assert 0 not in proposed([7, 8, 9], 4)


class Copier(nn.Module):
    """Says the token that follows in a cycle of ten; it has a cache like any other model."""

    def __init__(self):
        super().__init__()
        self.inner = random_llama(vocab_size=40)
        self.layers, self.args = self.inner.layers, self.inner.args

    def __call__(self, tokens, cache=None):
        follows = mx.where(tokens % 10 == 9, tokens - 9, tokens + 1)
        return self.inner(tokens, cache) * 0 + 10 * (follows[..., None] == mx.arange(40))


def test_lookup_drafts_a_repetition_whole():
    decoder = SpeculativeDecoder(ModelPair(Copier(), PromptLookup()), None, 4)
    tokens = decoded(decoder, [*range(10, 20), 10], 200)
    assert tokens == [10 + (i + 1) % 10 for i in range(200)]
    assert decoder.stats.block_efficiency == 5


def test_fitted_cuts_padding_and_makes_missing_tokens_impossible():
    assert fitted(mx.array([1.0, 2, 3]), 2).tolist() == [1, 2]
    assert fitted(mx.array([1.0, 2]), 3).tolist() == [1, 2, -mx.inf]


def test_a_drafter_of_another_kind_is_named():
    with pytest.raises(mlxspec.InvalidRequestError, match="the drafter is a str"):
        proposer_for("lookup", mlxspec.Sampling(), 10)


def test_lookup_needs_at_least_one_token_to_match():
    with pytest.raises(mlxspec.InvalidRequestError, match="ngram is 0"):
        PromptLookup(0)
