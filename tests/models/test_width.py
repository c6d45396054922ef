"""A narrower copy of a model keeps the parts that matter: where the others do nothing, its logits are the same."""

import mlx.core as mx
import numpy as np
import pytest

from mlxspec.errors import InvalidRequestError
from mlxspec.models.from_target import drafter_from_target
from mlxspec.models.width import choose_width
from tests.conftest import random_llama

V = 32
SHAPE = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 8, "num_key_value_heads": 4}
DOCUMENTS = [np.arange(9) % V, np.arange(5) * 3 % V]
TOKENS = mx.array([[1, 7, 30, 2, 2, 9]])


def model_with_idle_parts(channels=(), groups=(), neurons=()):
    """Parts that never have an activation other than 0."""
    model = random_llama(vocab_size=V, scale=3, **SHAPE, rms_norm_eps=1e-12)
    kept = np.ones(32)
    kept[list(channels)] = 0
    keep = mx.array(kept)
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * keep
    for layer in model.layers:
        layer.self_attn.o_proj.weight = layer.self_attn.o_proj.weight * keep[:, None]
        layer.mlp.down_proj.weight = layer.mlp.down_proj.weight * keep[:, None]
        values = np.array(layer.self_attn.v_proj.weight).reshape(4, 4, 32)
        values[list(groups)] = 0
        layer.self_attn.v_proj.weight = mx.array(values.reshape(16, 32))
        gate = np.array(layer.mlp.gate_proj.weight)
        gate[list(neurons)] = 0
        layer.mlp.gate_proj.weight = mx.array(gate)
    mx.eval(model.parameters())
    return model


def narrower(model, layers, hidden_size=None, intermediate_size=None):
    width = choose_width(model, layers, hidden_size, intermediate_size, DOCUMENTS)
    return width, drafter_from_target(model, vars(model.args), layers, width=width)


def test_neurons_that_are_never_active_are_dropped_and_the_logits_stay():
    idle = (0, 3, 4, 11, 12, 20, 22, 23)
    model = model_with_idle_parts(neurons=idle)
    width, drafter = narrower(model, [0, 1], intermediate_size=16)
    assert all(not set(idle) & set(kept.tolist()) for kept in width.neurons)
    assert drafter.config.intermediate_size == 16
    assert mx.allclose(drafter(TOKENS), model(TOKENS), atol=1e-4)


def test_channels_and_heads_that_are_never_active_are_dropped_and_the_logits_stay():
    channels, groups = tuple(range(0, 32, 2)), (0, 3)
    model = model_with_idle_parts(channels, groups)
    width, drafter = narrower(model, [0, -1], hidden_size=16)
    assert width.channels.tolist() == list(range(1, 32, 2))
    assert [kept.tolist() for kept in width.groups] == [[1, 2], [1, 2]]
    config = drafter.config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (16, 4, 2)
    assert config.head_dim == 4
    for norm in (drafter.model.norm, *(getattr(layer, f"{place}_layernorm") for layer in drafter.layers
                                       for place in ("input", "post_attention"))):  # fmt: skip
        norm.weight = norm.weight * 2**0.5  # the mean of squares is over half as many channels
    assert mx.allclose(drafter(TOKENS), model(TOKENS), atol=1e-4)


def test_the_model_is_left_as_it_was_also_by_a_calibration_that_fails():
    model = random_llama(vocab_size=V, **SHAPE)
    before, logits = str(model), model(TOKENS)
    choose_width(model, [0], 16, 8, DOCUMENTS)
    with pytest.raises(ValueError, match="Invalid type"):
        choose_width(model, [0], 16, 8, [["int"]])
    assert str(model) == before
    assert mx.array_equal(model(TOKENS), logits)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((12, None), "hidden_size is 12; use one of 8, 16, 24, 32, so that whole heads are kept"),
        ((64, None), "hidden_size is 64"),
        ((None, 25), "intermediate_size is 25; use 1 to 24"),
        ((None, -1), "intermediate_size is -1"),
    ],
)
def test_sizes_that_cannot_be_kept_are_named(sizes, message):
    with pytest.raises(InvalidRequestError, match=message):
        choose_width(random_llama(vocab_size=V, **SHAPE), [0], *sizes, DOCUMENTS)
