"""Documents that share a row are trained on as if each were alone."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlxspec import Drafter, DrafterConfig
from mlxspec.errors import TrainingError
from mlxspec.models.attention import attention_windows
from mlxspec.training.batches import Batches
from mlxspec.training.documents import document_masks, keeps_documents_apart
from mlxspec.training.losses import LOSSES, Loss
from mlxspec.training.objectives import Batch, objective
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.stages import train
from mlxspec.training.target import Target
from mlxspec.training.teachers import CachedTeacher, OnlineTeacher
from mlxspec.training.trainer import TrainingSettings
from tests.conftest import random_llama
from tests.models.test_families import FAMILIES, family

V, LENGTH = 64, 30


@pytest.fixture
def shards(tmp_path) -> TokenShards:
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "tokens", V, "tokens") as writer:
        for length in (9, 13, 7, 25, 4, 4, 4, 70):
            writer.add(rng.integers(0, V, length), np.ones(length, int))
        writer.finish()
    return TokenShards(tmp_path / "tokens")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
def test_a_document_in_a_row_gets_the_probabilities_that_it_gets_alone(name):
    model = family(name)
    lengths = (9, 17, 14)
    tokens = [mx.array([(7 * n + length) % V for n in range(length)]) for length in lengths]
    documents = mx.array([[number for number, length in enumerate(lengths) for _ in range(length)]])
    together = model(mx.concatenate(tokens)[None], cache=document_masks(attention_windows(model), documents))
    alone = mx.concatenate([model(one[None]) for one in tokens], axis=1)
    p, q = (mx.softmax(logits.astype(mx.float32), axis=-1) for logits in (together, alone))
    assert mx.abs(p - q).sum(-1).max().item() / 2 < 1e-5
    assert keeps_documents_apart(model)


def test_a_model_with_a_table_of_positions_does_not_keep_documents_apart():
    assert not keeps_documents_apart(family("gpt2"))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gemma2", "gemma3_text", "phi3", "smollm3"])
def test_rounding_in_16_bits_does_not_count_as_mixing_documents(name, dtype):
    model = family(name)
    model.set_dtype(dtype)
    assert keeps_documents_apart(model)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_the_trial_of_a_real_model_finds_that_it_keeps_documents_apart(stories_folder, dtype):
    model, _ = load_model(stories_folder)
    model.set_dtype(dtype)
    assert keeps_documents_apart(model)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_with_one_layer_that_makes_its_mask_itself_does_not_keep_documents_apart(layer, dtype):
    model = family("gemma3_text")  # its layers ask for masks of their own
    model.set_dtype(dtype)
    attention = model.layers[layer].self_attn
    model.layers[layer].self_attn = CausalAttention(attention)
    assert not keeps_documents_apart(model)


class CausalAttention(nn.Module):
    """Does not heed the mask that it is given."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention

    def __call__(self, x: mx.array, mask, cache) -> mx.array:
        return self.attention(x, "causal", cache)


def test_a_real_teacher_sees_no_difference_between_a_row_of_stories_and_each_alone(stories, stories_folder):
    rng = np.random.default_rng(0)
    tokens = [mx.array([1, *rng.integers(3, 512, length).tolist()]) for length in (50, 90, 30)]
    documents = mx.array([[number for number, one in enumerate(tokens) for _ in range(one.size)]])
    row = mx.concatenate(tokens)[None]
    together = mx.softmax(stories(row, cache=document_masks([None] * 5, documents)), axis=-1)
    alone = mx.softmax(mx.concatenate([stories(one[None]) for one in tokens], axis=1), axis=-1)
    mixed = mx.softmax(stories(row), axis=-1)
    assert mx.abs(together - alone).sum(-1).max().item() / 2 < 1e-5
    assert mx.abs(mixed - alone)[:, 51:].sum(-1).mean().item() / 2 > 0.05  # what it was when they saw each other


def test_rows_number_their_documents_and_nothing_predicts_the_first_token_of_one(shards):
    rows = shards.rows(LENGTH, range(shards.count_rows(LENGTH)))
    assert rows.documents[0].tolist() == [0] * 9 + [1] * 13 + [2] * 7 + [-1] * 2
    assert rows.mask[0].tolist() == [1] * 9 + [0] + [1] * 12 + [0] + [1] * 6 + [0] * 2
    assert set(rows.documents[-1].tolist()) <= {0, -1}  # a piece of the long one
    single = shards.rows(LENGTH, range(shards.count_rows(LENGTH, single=True)), single=True)
    assert {tuple({*row} - {-1}) for row in single.documents.tolist()} == {(0,)}
    learned = [int(found.mask[:, 1:].sum()) for found in (rows, single)]
    assert learned[0] == learned[1] == sum((9, 13, 7, 25, 4, 4, 4, 70)) - 8


def new_drafter() -> Drafter:
    mx.random.seed(0)
    return Drafter(DrafterConfig(V, 16, 32, 2, 2))


def loss_and_gradients(drafter: Drafter, rows, loss: Loss, teacher) -> tuple[float, list]:
    weights = mx.array(rows.mask[:, 1:] / rows.mask[:, 1:].sum(), mx.float32)
    batch = Batch(mx.array(rows.ids), mx.array(rows.documents[:, :-1]), weights, (), mx.array(1.0), mx.random.key(0))
    function = objective(loss, teacher)
    (value, _), gradients = nn.value_and_grad(drafter, lambda: function(drafter, batch))()
    return value.item(), tree_flatten(gradients)


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_of_packed_rows_are_those_of_rows_with_one_document(shards, name):
    loss = Loss(name)
    teacher = OnlineTeacher(random_llama(vocab_size=V, scale=3)) if loss.needs_target else None
    packed = loss_and_gradients(new_drafter(), shards.rows(LENGTH, range(shards.count_rows(LENGTH))), loss, teacher)
    count = shards.count_rows(LENGTH, single=True)
    single = loss_and_gradients(new_drafter(), shards.rows(LENGTH, range(count), single=True), loss, teacher)
    assert packed[0] == pytest.approx(single[0], rel=1e-4)
    for (where, one), (_, other) in zip(packed[1], single[1], strict=True):
        assert mx.allclose(one, other, atol=1e-5), where


def test_a_cached_teacher_stores_what_the_documents_get_alone(shards):
    target = random_llama(vocab_size=V, scale=3)
    batches = Batches([shards], [1.0], LENGTH, 2, 0)
    ids, logprobs = CachedTeacher(target, batches, V, V - 1, 1.0, "f").load_rows([(0, 0)])
    tokens = mx.array(shards.rows(LENGTH, [0]).ids[:, 9:22])  # the second document
    expected = mx.log(mx.softmax(target(tokens), axis=-1))
    found = logprobs[0, 9:22]
    assert mx.allclose(found, mx.take_along_axis(expected[0], ids[0, 9:22], axis=-1), atol=1e-2)


def test_a_run_from_before_documents_were_kept_apart_is_refused(tmp_path, stories_folder):
    target = Target(str(stories_folder))
    with ShardWriter(tmp_path / "tokens", target.vocab_size, target.tokenizer_fingerprint) as writer:
        writer.add(range(40), [1] * 40)
        writer.finish()

    def run():
        mx.random.seed(0)
        drafter, sources = Drafter(DrafterConfig(512, 16, 32, 1, 2)), [(TokenShards(tmp_path / "tokens"), 1.0)]
        return train(target, drafter, sources, Loss("ce"), TrainingSettings(1, 2, 16), tmp_path / "run")

    run()
    record = tmp_path / "run" / "stage.json"
    content = json.loads(record.read_text())
    del content["inputs"]["rows"]
    record.write_text(json.dumps(content))
    with pytest.raises(TrainingError, match="was created with rows = None, but this run has rows = documents apart"):
        run()


def test_a_stage_tries_only_once_whether_a_target_keeps_documents_apart(shards, monkeypatch):
    tried = []
    monkeypatch.setattr("mlxspec.training.teachers.keeps_documents_apart", lambda model: tried.append(model) or True)
    target = random_llama(vocab_size=V)
    OnlineTeacher(target, apart=True)
    CachedTeacher(target, Batches([shards], [1.0], LENGTH, 2, 0), V, 5, 1.0, "f", apart=True)
    assert not tried
    assert OnlineTeacher(target).apart
    assert len(tried) == 1
