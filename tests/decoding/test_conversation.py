import pytest
from mlx_lm.utils import load_tokenizer

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
    with pytest.raises(mlxspec.InvalidRequestError, match="context holds 200"):
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
