import pytest
from mlx_lm.utils import load_tokenizer

import mlxspec
from mlxspec.models.loading import DEMO
from mlxspec.models.tokens import check_same_tokens, encode_prompt

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<me>{% endif %}"
)


class Vocabulary:
    """Just what check_same_tokens asks of a tokenizer."""

    def __init__(self, *tokens: str):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in enumerate(self.tokens)}


def test_tokenizers_may_differ_in_padding_only():
    check_same_tokens(Vocabulary("a", "b", "<pad>"), Vocabulary("a", "b"))
    with pytest.raises(mlxspec.MlxspecError, match="id 1 is 'b' in the target and 'c' in the drafter"):
        check_same_tokens(Vocabulary("a", "b", "x"), Vocabulary("a", "c", "y"))


@pytest.fixture
def tokenizer():
    return load_tokenizer(DEMO / "target")


@pytest.fixture
def chat_tokenizer():
    return load_tokenizer(DEMO / "target", {"chat_template": TEMPLATE})


def test_a_prompt_is_plain_text_with_bos_where_there_is_no_template(tokenizer):
    ids = encode_prompt(tokenizer, "Once upon")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "Once upon"


def test_a_prompt_that_brings_its_own_bos_gets_no_second(tokenizer):
    assert encode_prompt(tokenizer, "<s>Once") == encode_prompt(tokenizer, "Once")


def test_the_chat_template_is_the_default_and_raw_turns_it_off(chat_tokenizer):
    assert "<user>Hi<me>" in chat_tokenizer.decode(encode_prompt(chat_tokenizer, "Hi"))
    with_system = encode_prompt(chat_tokenizer, "Hi", system="Be brief.")
    assert "<system>Be brief.<user>Hi<me>" in chat_tokenizer.decode(with_system)
    assert "<user>" not in chat_tokenizer.decode(encode_prompt(chat_tokenizer, "Hi", raw=True))


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ("", {}, "prompt is empty"),
        ("\udcff", {}, "not valid UTF-8"),
        ("Hi", {"system": "Be brief."}, "has none; put the text into the prompt"),
        ("Hi", {"system": "Be brief.", "raw": True}, "--raw turns it off"),
    ],
)
def test_a_bad_prompt_is_named(tokenizer, prompt, options, words):
    with pytest.raises(mlxspec.InvalidRequestError, match=words):
        encode_prompt(tokenizer, prompt, **options)


def test_a_template_that_refuses_gives_its_reason(tokenizer):
    strict = load_tokenizer(DEMO / "target", {"chat_template": "{{ raise_exception('no system role') }}"})
    with pytest.raises(mlxspec.InvalidRequestError, match="no system role"):
        encode_prompt(strict, "Hi", system="Be brief.")
