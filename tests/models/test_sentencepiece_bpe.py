"""The tokenizer built from a bare tokenizer.model against SentencePiece itself."""

import json
import random

import pytest
import sentencepiece

import mlxspec
from mlxspec.models.sentencepiece_bpe import fast_tokenizer
from tests.conftest import shared

FRAGMENTS = [
    *("a", "b", "the", " ", "  ", "\n", "\n\n", "\t", "\r", "\u00a0", "\u200b", "'", '"', "1", "23", "x=", "{", "}"),
    *("é", "e\u0301", "北京", "한국어", "🦙", "👩‍👩‍👧", "ﬁ", "½", "ß", "İ", "…", "“", "ा"),
    *("</s>", "<s>", "<unk>", "[INST]", "<0x0A>", "▁"),
]


@pytest.fixture(params=["llama2-tokenizer/tokenizer.model", "models/stories260K/tokenizer.model"])
def both(request):
    file = shared(request.param)
    return sentencepiece.SentencePieceProcessor(model_file=str(file)), fast_tokenizer(file)


def encoded(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def assert_same(both, texts):
    theirs, ours = both
    for text in texts:
        tokens = theirs.encode(text)
        assert encoded(ours, text) == tokens, repr(text)
        assert ours.decode(tokens) == theirs.decode(tokens), repr(text)


def test_it_encodes_and_decodes_thousands_of_odd_strings_as_sentencepiece_does(both):
    rng = random.Random(0)
    assert_same(both, ("".join(rng.choices(FRAGMENTS, k=rng.randrange(14))) for _ in range(4000)))


def test_it_encodes_and_decodes_any_unicode_as_sentencepiece_does(both):
    rng = random.Random(1)
    ranges = [(1, 0x80), (0x80, 0x3000), (0x3000, 0xD7FF), (0xE000, 0x1FFFF)]
    assert_same(
        both,
        ("".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 12))) for _ in range(2000)),
    )


def test_it_encodes_and_decodes_real_text_as_sentencepiece_does(both):
    stories = [json.loads(line)["text"] for line in shared("text/tinystories_500.jsonl").read_text().splitlines()]
    prompts = shared("prompts/spec_bench.jsonl").read_text().splitlines()
    tale = shared("tales/alice-in-wonderland.txt").read_text()
    assert_same(both, [*stories, *prompts, tale])


def test_bos_comes_first_and_the_leading_space_rule_holds(both):
    theirs, ours = both
    assert ours.encode("Once upon") == [theirs.bos_id(), *theirs.encode("Once upon")]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_id(), theirs.eos_id())


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(range(256)) * 40])
def test_a_file_that_is_no_model_is_named(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(mlxspec.MlxspecError, match=r"tokenizer\.model is not a SentencePiece model"):
        fast_tokenizer(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("size", [10, 1000, 400_000])
def test_a_torn_file_is_named(tmp_path, size):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(shared("llama2-tokenizer/tokenizer.model").read_bytes()[:size])
    with pytest.raises(mlxspec.MlxspecError, match="not a SentencePiece model"):
        fast_tokenizer(file)


def test_a_unigram_model_is_refused(tmp_path):
    text = tmp_path / "text"
    text.write_text("\n".join(["once upon a time", "there was a llama"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "unigram"), vocab_size=20, model_type="unigram", minloglevel=2
    )
    with pytest.raises(mlxspec.MlxspecError, match="not a BPE model"):
        fast_tokenizer(tmp_path / "unigram.model")
