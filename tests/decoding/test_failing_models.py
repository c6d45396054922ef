"""Models that compute NaN or infinity after some texts, as float16 models do where a number overflows."""

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlxspec
from mlxspec import ModelPair, Sampling, SpeculativeDecoder
from mlxspec.decoding.verification import RULES
from mlxspec.errors import NumericalError
from tests.conftest import decoded, plain_greedy, random_llama
from tests.decoding.test_decoder import assert_emits_the_targets_distribution

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
VOCAB = 40


def collected(stream, words: str) -> list:
    """What a stream yields before it fails."""
    found: list = []

    def read() -> None:
        for item in stream:
            found.append(item)

    with pytest.raises(NumericalError, match=words):
        read()
    return found


class Changed(nn.Module):
    """A model whose logits are those of ``body``, changed."""

    @property
    def layers(self):
        return self.body.layers

    @property
    def args(self):
        return self.body.args


class OneToken(Changed):
    """A drafter that is sure of one token, whatever the text."""

    def __init__(self, token: int):
        super().__init__()
        self.body = random_llama(2, vocab_size=VOCAB)
        self.bias = 100.0 * (mx.arange(VOCAB) == token)

    def __call__(self, tokens, cache=None):
        return self.body(tokens, cache) + self.bias


def overflowing(dtype: mx.Dtype, token: int, where: str):
    """A target whose rows overflow in some place from the given token on."""
    target = random_llama(3, vocab_size=VOCAB, scale=4)
    target.set_dtype(dtype)
    embedding = target.model.embed_tokens.weight
    huge = mx.array(mx.finfo(dtype).max, dtype)
    chosen = (mx.arange(VOCAB) == token)[:, None]
    if where == "embedding":
        target.model.embed_tokens.weight = mx.where(chosen, mx.inf, embedding).astype(dtype)
    else:  # the token alone has a component that this layer's keys or values multiply until they overflow
        marked = mx.concatenate([mx.where(chosen, 8, 0), embedding[:, 1:]], axis=1)
        target.model.embed_tokens.weight = marked.astype(dtype)
        projection = getattr(target.model.layers[0].self_attn, where)
        rest = projection.weight[:, 1:]
        projection.weight = mx.concatenate([mx.full((rest.shape[0], 1), huge, dtype), rest], axis=1)
    mx.eval(target.parameters())
    return target


@pytest.mark.parametrize("where", ["embedding", "k_proj", "v_proj"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_drafted_token_that_overflows_in_the_target_leaves_the_text_of_plain_decoding(dtype, where):
    prompt = [1, 2, 3]
    token = next(t for t in range(4, VOCAB) if t not in plain_greedy(overflowing(dtype, t, where), prompt, 60))
    target = overflowing(dtype, token, where)
    assert mx.isnan(target(mx.array([[1, token]]))[0, 1]).any()
    expected = plain_greedy(target, prompt, 60)
    assert len(set(expected)) > 3
    for draft_length in (1, 4):
        decoder = SpeculativeDecoder(ModelPair(target, OneToken(token)), None, draft_length)
        assert decoded(decoder, prompt, 60) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sampled_token_that_overflows_when_it_is_drafted_does_not_spoil_the_rows_before_it(dtype):
    token = 7
    target = overflowing(dtype, token, "embedding")
    target.lm_head.weight = mx.where((mx.arange(VOCAB) == token)[:, None], 0, target.lm_head.weight)
    decoder = SpeculativeDecoder(ModelPair(target, OneToken(token)), Sampling(1.0, top_k=1, seed=0), 3)
    assert decoded(decoder, [1, 2, 3], 60) == plain_greedy(target, [1, 2, 3], 60)


@pytest.mark.parametrize("draft_length", [0, 3, "auto"])
@pytest.mark.parametrize("sampling", [Sampling(0.0), Sampling(1.0, top_k=1, seed=0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_that_computes_nan_stops_with_an_error_after_the_tokens_before_it(dtype, sampling, draft_length):
    sound = random_llama(3, vocab_size=VOCAB, scale=4)
    sound.set_dtype(dtype)
    prompt = [1, 2, 3]
    text = plain_greedy(sound, prompt, 40)
    fatal = next(t for t in reversed(text[:30]) if t not in prompt)
    expected = text[: text.index(fatal) + 1]
    target = random_llama(3, vocab_size=VOCAB, scale=4)
    target.set_dtype(dtype)
    weight = target.model.embed_tokens.weight
    target.model.embed_tokens.weight = mx.where((mx.arange(VOCAB) == fatal)[:, None], mx.nan, weight).astype(dtype)
    decoder = SpeculativeDecoder(ModelPair(target, sound), sampling, draft_length)
    found = collected(decoder.blocks(prompt, 100), f"after {len(prompt) + len(expected)} tokens")
    assert [token for block in found for token in block.tokens] == expected
    assert decoder.stats.tokens == len(expected)
    assert decoded(decoder, prompt, len(expected)) == expected  # the decoder remains usable


def test_text_that_was_decoded_before_the_target_failed_is_shown(stories_folder):
    pair = mlxspec.load(stories_folder, "none")
    answer = mlxspec.generate(pair, [1], 100)
    fatal = next(token for token in reversed(answer.tokens[:90]) if answer.tokens.count(token) == 1)
    kept = answer.tokens[: answer.tokens.index(fatal) + 1]
    weight = pair.target.model.embed_tokens.weight
    pair.target.lm_head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)  # the head is tied
    pair.target.lm_head.weight = mx.array(weight)
    pair.target.args.tie_word_embeddings = False
    pair.target.model.embed_tokens.weight = mx.where((mx.arange(weight.shape[0]) == fatal)[:, None], mx.nan, weight)
    segments = collected(SpeculativeDecoder(pair).stream([1], 100), "computes NaN")
    assert "".join(segment.text for segment in segments) == pair.tokenizer.decode(kept)


class FailingDrafter(Changed):
    """A drafter whose logits overflow after some tokens, although all of its weights are finite."""

    def __init__(self, vocab_size: int, dtype: mx.Dtype, failing: tuple[int, ...]):
        super().__init__()
        self.body = random_llama(4, vocab_size=vocab_size, scale=2)
        self.body.set_dtype(dtype)
        self.factor = mx.array([mx.finfo(dtype).max if t in failing else 1 for t in range(vocab_size)], dtype)

    def __call__(self, tokens, cache=None):
        return self.body(tokens, cache) * self.factor[tokens][..., None] * self.factor[tokens][..., None]


@pytest.mark.parametrize("dtype", [mx.float16, pytest.param(mx.float32, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_emitted_distribution_is_the_targets_where_the_drafters_logits_overflow(rule, dtype):
    drafter = FailingDrafter(5, dtype, failing=(1, 3))
    assert not mx.isfinite(drafter(mx.array([[3]]))).all()
    assert_emits_the_targets_distribution(rule, Sampling(1.0, seed=1), drafter, 3, 1000)
