"""What a drafter is judged by."""

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlxspec import Drafter, DrafterConfig
from mlxspec.evaluation.metrics import memory_bound_speedup, parameter_count, step_bytes
from tests.conftest import random_llama


def test_parameters_are_those_before_quantization():
    model = random_llama(hidden_size=64, intermediate_size=128, vocab_size=100)
    plain = sum(weight.size for _, weight in tree_flatten(model.parameters()))
    assert parameter_count(model) == plain
    nn.quantize(model, group_size=32, bits=4)
    assert parameter_count(model) == plain


@pytest.mark.parametrize(("tied", "unread"), [(False, 100 * 64 * 4), (True, 0)])
def test_an_embedding_is_read_by_every_step_only_if_it_is_the_head_too(tied, unread):
    model = Drafter(DrafterConfig(100, 64, 128, 1, 2, tie_word_embeddings=tied))
    everything = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    assert step_bytes(model) == everything - unread


def test_mbsu_is_the_papers_formula():
    assert memory_bound_speedup(2.3, 0.0164, 3) == pytest.approx(2.3 / (0.0164 * 3 + 1))
