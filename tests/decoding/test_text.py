import json
import random

import pytest
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import mlxspec
from mlxspec.decoding.text import REPLACEMENT, AnswerText, StopStrings, StreamingText, overlap
from mlxspec.models.loading import DEMO
from tests.conftest import shared

TEXTS = [
    "Once upon a time",
    "naïve café, 北京, 🦙🦙 and 👩‍👩‍👧",
    "  two  spaces\n\n\ttab",
    "é" * 40,
    "\u202b עברית",
    "",
]


@pytest.fixture(params=["demo", "stories260K"])
def tokenizer(request):
    return load_tokenizer(DEMO / "target" if request.param == "demo" else shared("models/stories260K"))


def streamed(tokenizer, tokens: list[int]) -> list[str]:
    text = StreamingText(tokenizer)
    return [*(text.add(token) for token in tokens), text.finish()]


def assert_streams(tokenizer, tokens):
    pieces = streamed(tokenizer, tokens)
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    return pieces


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_none_ends_inside_a_character(tokenizer, text):
    pieces = assert_streams(tokenizer, tokenizer.encode(text, add_special_tokens=False))
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces[:-1])


def test_pieces_of_random_tokens_add_up(tokenizer):
    rng = random.Random(0)
    tokens = [i for i in range(len(tokenizer)) if not tokenizer.convert_ids_to_tokens(i).startswith("<0x")]
    for _ in range(300):
        assert_streams(tokenizer, rng.choices(tokens, k=rng.randrange(1, 40)))


def test_pieces_of_real_stories_add_up(tokenizer):
    for line in shared("text/tinystories_500.jsonl").read_text().splitlines():
        assert_streams(tokenizer, tokenizer.encode(json.loads(line)["text"], add_special_tokens=False)[:80])


def cut(stops, pieces):
    stream = StopStrings(stops)
    shown = []
    for piece in pieces:
        shown.append(stream.add(piece))
        if stream.found:
            break
    else:
        shown.append(stream.finish())
    return "".join(shown), stream.found


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        (["END"], "the END of it", ("the ", True)),
        (["END"], "the EN", ("the EN", False)),
        (["END"], "the EEND", ("the E", True)),
        (["\n\n"], "a\nb\n\nc", ("a\nb", True)),
        (["bc", "abcd"], "xabcd", ("xa", True)),
        (["aab"], "aaab", ("a", True)),
        ([], "all of it", ("all of it", False)),
        (["🦙"], "a 🦙", ("a ", True)),
    ],
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut_up(stops, text, expected, size):
    assert cut(stops, [text[i : i + size] for i in range(0, len(text), size)]) == expected


def test_a_part_of_a_stop_string_is_held_back_until_it_is_decided():
    stream = StopStrings(["END"])
    assert [stream.add(piece) for piece in ("a", "E", "N", "X")] == ["a", "", "", "ENX"]


def test_overlap_is_the_longest_beginning_that_ends_the_text():
    assert [overlap(text, "abab") for text in ("", "a", "xab", "xaba", "xabx")] == [0, 1, 2, 3, 0]


def test_an_empty_stop_string_is_named():
    with pytest.raises(mlxspec.InvalidRequestError, match="stop string is empty"):
        StopStrings(["x", ""])


def answered(tokenizer, tokens, stops=(), eos=()):
    """What is shown of an answer, and the number of tokens it takes."""
    text, shown = AnswerText(tokenizer, set(eos), stops), ""
    for count, token in enumerate(tokens, 1):  # noqa: B007
        shown += text.add(token)
        if text.ended:
            break
    return shown + text.finish(), count


@pytest.mark.parametrize(
    ("stop", "shown", "count"),
    [
        ("<|im_start|>", "a b", 3),
        ("im_st", "a b", 3),
        (" b<|im", "a", 3),
        ("<|im_start|> c", "a b", 4),
        ("<|im_start|>x", "a b c d", 6),
        ("<|im_end|>", "a b c", 5),
        ("c d", "a b ", 6),  # as the text is shown: without the special token between them
    ],
)
def test_a_stop_string_may_be_a_special_token_or_contain_one(stop, shown, count):
    tokenizer = load_tokenizer(shared("models/SmolLM2-135M-Instruct-4bit"))
    tokens = tokenizer.encode("a b<|im_start|> c<|im_end|> d", add_special_tokens=False)
    assert answered(tokenizer, tokens, [stop]) == (shown, count)
    assert answered(tokenizer, tokens) == ("a b c d", 6)
    assert answered(tokenizer, tokens, [stop], [tokenizer.eos_token_id])[1] <= 5


@pytest.mark.parametrize("name", ["stories260K", "SmolLM2-135M-Instruct-4bit"])
def test_bytes_that_are_no_characters_are_shown_after_four_tokens(name):
    tokenizer = load_tokenizer(shared(f"models/{name}"))
    half = next(i for i in range(len(tokenizer)) if tokenizer.decode([i]) == REPLACEMENT)
    text = StreamingText(tokenizer)
    window, held = 0, ""
    for _ in range(1000):
        held += text.add(half)
        window = max(window, len(text._window))
    assert len(held) == 1000
    assert window <= 8  # the cost of a token does not grow
    assert text.add(tokenizer.encode("x", add_special_tokens=False)[-1]).endswith("x")


def test_characters_that_begin_and_end_inside_tokens_are_shown_when_they_are_complete():
    llama = "🦙".encode()
    tokenizer, tokens = bytes_to_tokens([b"a", llama[:3], *[llama[3:] + llama[:3]] * 50, llama[3:]])
    shown = streamed(tokenizer, tokens)
    assert "".join(shown) == "a" + "🦙" * 51
    assert shown[2:-1] == ["🦙"] * 51


def bytes_to_tokens(texts):
    """A byte-level tokenizer with a token for each of these, and the tokens."""
    alphabet = bytes_to_unicode()
    pieces = ["".join(alphabet[byte] for byte in text) for text in texts]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer), [vocabulary[piece] for piece in pieces]
