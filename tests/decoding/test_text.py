import json
import random

import pytest
from mlx_lm.utils import load_tokenizer

import mlxspec
from mlxspec.decoding.text import StopStrings, StreamingText, overlap
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
