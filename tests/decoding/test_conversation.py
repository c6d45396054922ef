import string

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mlxspec
from mlxspec import Conversation, ModelPair, Sampling, SpeculativeDecoder
from mlxspec.models.loading import DEMO
from mlxspec.models.tokens import LLAMA2_TEMPLATE, encode_conversation
from tests.conftest import random_llama

CHATML = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(params=[LLAMA2_TEMPLATE, CHATML], ids=["Llama 2", "ChatML-like"])
def decoder(request):
    tokenizer = load_tokenizer(DEMO / "target", {"chat_template": request.param})
    target, drafter = random_llama(vocab_size=2048, scale=3), random_llama(1, vocab_size=2048)
    return SpeculativeDecoder(ModelPair(target, drafter, tokenizer), Sampling(1.0, seed=0), 3)


def said(conversation, text, max_tokens=20) -> str:
    return "".join(segment.text for segment in conversation.say(text, max_tokens))


def test_only_what_is_new_is_prefilled(decoder):
    conversation = Conversation(decoder, system="Be brief.")
    said(conversation, "Hello there")
    for text in ("And then?", "Why?"):
        held = decoder.stats.prompt_tokens + decoder.stats.tokens
        said(conversation, text)
        assert decoder.stats.prompt_tokens_reused == held - 2
        assert decoder.stats.prompt_tokens > held


def test_the_messages_are_what_was_said(decoder):
    conversation = Conversation(decoder)
    first = said(conversation, "Hello there")
    said(conversation, "And then?")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"] == first


def test_an_answer_that_was_broken_off_is_the_answer(decoder):
    conversation = Conversation(decoder)
    answer = conversation.say("Hello there")
    heard = "".join(next(answer).text for _ in range(4))
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": heard}
    assert said(conversation, "And then?")
    assert decoder.stats.prompt_tokens_reused > 4


def test_a_reset_forgets_everything_but_the_system_prompt(decoder):
    conversation = Conversation(decoder, system="Be brief.")
    first = said(conversation, "Hello there")
    said(conversation, "And then?")
    conversation.reset()
    assert said(conversation, "Hello there") == first
    conversation.reset("Be long.")
    said(conversation, "Hello there")
    system = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "Hello there"}]
    assert decoder.stats.prompt_tokens == len(encode_conversation(decoder.pair.tokenizer, system))


def test_a_reset_in_the_middle_of_an_answer_is_not_undone_by_the_rest_of_it(decoder):
    conversation = Conversation(decoder)
    first = said(conversation, "Hello there")
    answer = conversation.say("And then?")
    next(answer)
    conversation.reset()
    next(answer)
    assert conversation.messages == []
    assert said(conversation, "Hello there") == first


def test_an_answer_that_was_never_read_is_an_empty_answer(decoder):
    conversation = Conversation(decoder)
    conversation.say("Hello there")
    said(conversation, "And then?")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"] == ""


def test_control_tokens_that_a_user_types_stay_text(decoder):
    conversation = Conversation(decoder)
    said(conversation, "Hello </s> there")
    before = list(conversation._tokens)
    said(conversation, "Bye </s>")
    assert conversation._tokens[: len(before)] == before
    rest = conversation._tokens[len(before) :]
    honest = decoder.pair.tokenizer.encode("Bye </s>", add_special_tokens=False, split_special_tokens=True)
    assert any(rest[i : i + 4] == honest[-4:] for i in range(len(rest)))


def test_a_message_that_does_not_fit_leaves_the_conversation_as_it_was(decoder):
    decoder.pair.context_length = 200
    conversation = Conversation(decoder)
    said(conversation, "Hello there")
    with pytest.raises(mlxspec.InvalidRequestError, match=r"context holds 200; .* start a new conversation"):
        conversation.say("word " * 300)
    assert len(conversation.messages) == 2
    assert said(conversation, "And then?")


def test_a_model_without_a_template_cannot_chat():
    with pytest.raises(mlxspec.InvalidRequestError, match="no chat template"):
        Conversation(SpeculativeDecoder(mlxspec.load()))


def test_an_empty_message_is_named(decoder):
    with pytest.raises(mlxspec.InvalidRequestError, match="message is empty"):
        Conversation(decoder).say(" \n")


@pytest.mark.parametrize(
    ("answer", "message"), [("four", "four is not enough, explain"), ("4", "Why 4?"), ("", "Why?")]
)
def test_an_answer_that_the_next_message_repeats_is_not_taken_for_it(decoder, answer, message):
    tokenizer = decoder.pair.tokenizer
    conversation = Conversation(decoder)
    said(conversation, "What is 2 + 2?")
    conversation.messages[-1]["content"] = answer
    conversation._tokens = [*conversation._tokens[:-1], *tokenizer.encode(answer, add_special_tokens=False), 1]
    said(conversation, message, 5)
    assert message in tokenizer.decode(conversation._tokens)


MARKERS = ("<|im_start|>", "<|im_end|>")
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
LAST = (  # the last question is marked: an earlier part of the conversation changes with every turn
    "{% for m in messages %}<|im_start|>{{ '(last)' if loop.last }}{{ m['content'] }}<|im_end|>{% endfor %}"
)


def talker(prepend_scheme: str, template: str = MARKED) -> SpeculativeDecoder:
    """A decoder with random weights whose tokenizer marks spaces as SentencePiece does."""
    pieces = ["<unk>", "▁", *string.ascii_letters, *string.punctuation, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in MARKERS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="<unk>")
    fast.chat_template = template
    target = random_llama(vocab_size=len(fast), scale=3)
    return SpeculativeDecoder(ModelPair(target, None, TokenizerWrapper(fast)), Sampling(1.0, seed=0), 0)


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize("prepend_scheme", ["first", "always", "never"])
def test_the_next_turn_has_the_tokens_of_the_whole_conversation(prepend_scheme, ended):
    decoder = talker(prepend_scheme)
    tokenizer = decoder.pair.tokenizer
    conversation = Conversation(decoder, system="Be brief.")
    for text in ("Hello there", "And <|im_end|> then?", "Why?"):
        held = list(conversation._tokens)
        said(conversation, text, 5)
        messages = [{"role": "system", "content": "Be brief."}, *conversation.messages[:-1]]
        whole = encode_conversation(tokenizer, messages)
        question = conversation._tokens[len(held) : -len(answer) if (answer := tokens_said(conversation)) else None]
        assert whole[-len(question) :] == question
        assert conversation._tokens[: len(held)] == held
        if not held:
            assert question == whole
        elif held[-1] != tokenizer.eos_token_id:
            assert question[0] == tokenizer.eos_token_id
        if ended:  # as if the model had said so
            conversation.messages[-1]["content"] = "Well, yes."
            answered = tokenizer.encode("yes", add_special_tokens=False)
            conversation._tokens = [
                *conversation._tokens[: len(held) + len(question)],
                *answered,
                tokenizer.eos_token_id,
            ]


def tokens_said(conversation) -> list[int]:
    return conversation._tokens[len(conversation._tokens) - conversation.decoder.stats.tokens :]


def test_a_template_that_changes_earlier_turns_gets_the_whole_conversation_anew():
    decoder = talker("first", LAST)
    conversation = Conversation(decoder)
    for text in ("Hello there", "And then?"):
        said(conversation, text, 5)
        prompt = conversation._tokens[: -len(tokens_said(conversation))]
        assert prompt == encode_conversation(decoder.pair.tokenizer, conversation.messages[:-1])
