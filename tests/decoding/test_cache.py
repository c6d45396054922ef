import mlx.core as mx
import pytest

from mlxspec.decoding.cache import CAPACITY_STEP, CachedModel, KVCache, capacity_for, with_room
from mlxspec.errors import UnsupportedModelError
from tests.conftest import random_llama


def filled(capacity: int) -> list:
    buffer = mx.arange(capacity, dtype=mx.float32).reshape(1, 1, capacity, 1)
    return [(buffer, buffer + 0.5)]


def test_a_row_sees_the_valid_positions_and_the_new_ones_up_to_its_own():
    mask = KVCache(filled(8)[0], mx.array(3), None).make_mask(2)
    assert mask.astype(mx.int32).tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]


@pytest.mark.parametrize("how", ["the model's argument", "the layer's own window"])
def test_a_sliding_window_hides_what_is_too_far_back(how):
    own, argument = (None, 2) if how == "the model's argument" else (2, None)
    mask = KVCache(filled(6)[0], mx.array(3), own).make_mask(2, window_size=argument)
    assert mask.astype(mx.int32).tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]


def test_update_writes_behind_the_length_and_nowhere_else():
    cache = KVCache(filled(6)[0], mx.array(2), None)
    keys, values = cache.update_and_fetch(mx.full((1, 1, 2, 1), -1.0), mx.full((1, 1, 2, 1), -2.0))
    assert keys.flatten().tolist() == [0, 1, -1, -1, 4, 5]
    assert values.flatten().tolist() == [0.5, 1.5, -2, -2, 4.5, 5.5]
    assert cache.offset.item() == 4


def test_where_the_end_is_known_attention_covers_no_more_and_the_buffers_stay_whole():
    cache = KVCache((mx.zeros((1, 1, 8, 2)), mx.zeros((1, 1, 8, 2))), mx.array(3), None, end=5)
    assert cache.make_mask(2) == "causal"
    assert cache.make_mask(2, return_array=True).tolist() == [[True] * 4 + [False], [True] * 5]
    assert cache.make_mask(2, window_size=2).tolist() == [[False] * 2 + [True] * 2 + [False], [False] * 3 + [True] * 2]
    keys, values = cache.update_and_fetch(mx.ones((1, 1, 2, 2)), mx.ones((1, 1, 2, 2)))
    assert keys.shape == values.shape == (1, 1, 5, 2)
    assert cache.keys.shape == cache.values.shape == (1, 1, 8, 2)
    assert cache.keys[0, 0, :, 0].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_room_grows_in_steps_and_keeps_every_position():
    buffers = with_room(filled(CAPACITY_STEP), CAPACITY_STEP + 1)
    assert buffers[0][0].shape == (1, 1, 2 * CAPACITY_STEP, 1)
    assert buffers[0][0].flatten()[:CAPACITY_STEP].tolist() == list(range(CAPACITY_STEP))
    assert with_room(buffers, 5) is buffers
    assert with_room(buffers, 5, exactly=True)[0][0].shape == (1, 1, CAPACITY_STEP, 1)


@pytest.mark.parametrize(("length", "capacity"), [(0, 256), (1, 256), (256, 256), (257, 512)])
def test_capacity_is_the_next_multiple_of_the_step(length, capacity):
    assert capacity_for(length) == capacity


def test_prefill_in_chunks_gives_the_keys_of_one_pass():
    model = CachedModel(random_llama(vocab_size=50))
    tokens = [n % 50 for n in range(1200)]
    whole, _ = model(mx.array(tokens), model.empty(1200), mx.array(0))
    told = []
    buffers = model.prefill(mx.array(tokens[:-1]), [model.empty(0)], 0, told.append)
    last, _ = model(mx.array(tokens[-1:]), buffers, mx.array(1199))
    assert told == [512, 512, 175]
    assert mx.allclose(last[0], whole[-1], atol=1e-4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [mx.nan, mx.inf, -mx.inf], ids=str)
def test_a_value_that_is_not_finite_reaches_the_rows_that_attend_to_it_and_no_others(bad, dtype):
    cache = KVCache((mx.zeros((1, 1, 8, 2), dtype), mx.zeros((1, 1, 8, 2), dtype)), mx.array(3), None)
    mask = cache.make_mask(3)
    values = mx.ones((1, 1, 3, 2), dtype)
    values[0, 0, 1, 0] = bad
    keys, values = cache.update_and_fetch(mx.ones((1, 1, 3, 2), dtype), values)
    queries = mx.ones((1, 1, 3, 2), dtype)
    rows = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)[0, 0]
    assert mx.isfinite(rows[0]).all()
    assert not mx.isfinite(rows[1:]).any()


def test_a_bug_of_our_own_is_not_reported_as_a_model_that_cannot_be_rewound(monkeypatch):
    monkeypatch.setattr("mlxspec.decoding.cache.KVCache", None)
    with pytest.raises(TypeError, match="not callable"):
        CachedModel(random_llama())


def test_a_model_that_leaves_a_layers_cache_unused_is_refused(monkeypatch):
    model = random_llama()
    monkeypatch.setattr(type(model.model.layers[1].self_attn), "__call__", lambda self, x, mask=None, cache=None: x)
    with pytest.raises(UnsupportedModelError, match="does not use its cache"):
        CachedModel(model)
