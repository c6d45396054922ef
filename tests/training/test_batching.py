"""The target's answers do not depend on what else is in the batch, or else the batch is not used."""

import importlib

import mlx.core as mx
import pytest

from mlxspec.training.responses import AnswerSettings, Group, answer_group, batches_like_single
from tests.conftest import random_llama

PROMPTS = [[1, 2, 3], list(range(4, 24)), [5, 6], [7]]


def gemma2(kv_heads: int):
    module = importlib.import_module("mlx_lm.models.gemma2")
    mx.random.seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4}
    shape |= {"head_dim": 8, "rms_norm_eps": 1e-5, "vocab_size": 64, "num_key_value_heads": kv_heads}
    model = module.Model(module.ModelArgs(model_type="gemma2", query_pre_attn_scalar=8.0, **shape))
    mx.eval(model.parameters())
    return model


class Tokens:
    """What mlx-lm's batch_generate asks of a tokenizer. No token ends an answer."""

    eos_token_ids = ()
    eos_token_id = None

    def decode(self, ids):
        return ""

    def convert_ids_to_tokens(self, ids):
        return None


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("count", [2, 4])
def test_gemma_2_is_answered_one_prompt_at_a_time_with_the_answers_of_single_prompts(kv_heads, count):
    model, settings = gemma2(kv_heads), AnswerSettings((0.0,), max_tokens=8)
    group = Group(0, PROMPTS[:count], 0.0)
    assert not batches_like_single(model, [group])
    alone = [answer_group(model, Tokens(), Group(0, [prompt], 0.0), settings)[0] for prompt in group.prompts]
    assert answer_group(model, Tokens(), group, settings, together=False) == alone


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", ["llama", "gemma 2 without groups"])
def test_a_healthy_family_is_answered_in_batches(name, dtype):
    model = random_llama(vocab_size=64, scale=3) if name == "llama" else gemma2(4)
    model.set_dtype(dtype)
    for prompts in (PROMPTS, PROMPTS[:2], [[1], [1]], [[1]]):
        assert batches_like_single(model, [Group(0, prompts, 0.0)])


def test_answers_of_a_batch_whose_rows_end_one_after_the_other_are_those_of_single_prompts():
    model = random_llama(vocab_size=64, scale=3)
    prompts = [[i, *range(2, 2 + i)] for i in range(1, 13)]
    settings = AnswerSettings((0.0,), max_tokens=24)
    tokenizer = Tokens()
    every = answer_group(model, tokenizer, Group(0, prompts, 0.0), settings)
    tokenizer.eos_token_ids = {answer[place] for place, answer in enumerate(every)}
    alone = [answer_group(model, tokenizer, Group(0, [prompt], 0.0), settings)[0] for prompt in prompts]
    assert len({len(answer) for answer in alone}) > 3
    assert answer_group(model, tokenizer, Group(0, prompts, 0.0), settings) == alone
