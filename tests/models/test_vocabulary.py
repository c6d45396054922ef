"""A drafter with a smaller output vocabulary, and one that shares the target's input embedding."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mlxspec import InvalidRequestError, ModelLoadError, SpeculativeDecoder, load
from mlxspec.decoding.verification import RULES
from mlxspec.models.drafter import Drafter
from mlxspec.models.from_target import drafter_from_target
from mlxspec.models.loading import DEMO
from mlxspec.models.quantizing import dequantized
from mlxspec.models.reading import read_config
from mlxspec.models.vocabulary import most_frequent
from tests.conftest import decoded, plain_greedy, random_llama

TOKENS = np.arange(0, 2048, 3)


@pytest.fixture(scope="module")
def target():
    return dequantized(load().target)


@pytest.fixture
def folder(target, tmp_path):
    """A drafter with one of the demo target's layers, a third of its vocabulary, and its embedding."""
    out = tmp_path / "a drafter"
    shutil.copytree(DEMO / "target", out)
    for file in out.glob("model*"):
        file.unlink()
    drafter_from_target(target, read_config(DEMO / "target"), [0], TOKENS, share_embedding=True).save(out)
    return out


def test_the_most_frequent_tokens_are_kept_and_control_tokens_in_any_case():
    counts = np.array([5, 0, 9, 1, 7, 0])
    assert most_frequent(counts, 3).tolist() == [0, 2, 4]
    assert most_frequent(counts, 3, {5}).tolist() == [2, 4, 5]
    assert most_frequent(counts, 6).tolist() == list(range(6))
    for size in (0, 7):
        with pytest.raises(InvalidRequestError, match=f"vocabulary_size is {size}; use 1 to 6"):
            most_frequent(counts, size)


def test_logits_are_those_of_the_full_head_at_the_tokens_of_the_vocabulary_and_minus_infinity_elsewhere(target):
    config = read_config(DEMO / "target")
    full = drafter_from_target(target, config, [0, 1])
    small = drafter_from_target(target, config, [0, 1], TOKENS)
    text = mx.array([[5, 9, 300, 7]])
    expected = np.array(full(text))
    logits = np.array(small(text))
    assert np.allclose(logits[..., TOKENS], expected[..., TOKENS], atol=1e-4)
    assert np.isneginf(np.delete(logits, TOKENS, axis=-1)).all()


def test_all_layers_and_all_tokens_are_the_target_itself(target):
    copy = drafter_from_target(target, read_config(DEMO / "target"), range(len(target.layers)))
    text = mx.array([[5, 9, 300, 7]])
    assert mx.allclose(copy(text), target(text), atol=1e-4)


@pytest.mark.parametrize("layers", [[], [99], [0, -99]])
def test_a_layer_that_the_target_lacks_is_refused(target, layers):
    with pytest.raises(InvalidRequestError, match="layers are"):
        drafter_from_target(target, read_config(DEMO / "target"), layers)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_greedy_text_is_the_targets_with_every_rule(folder, target, rule):
    pair = load(DEMO / "target", folder)
    pair.tokenizer = None  # no token ends the text
    text = decoded(SpeculativeDecoder(pair, draft_length=3, verification=rule), [1, 5, 9], 60)
    assert text[:60] == plain_greedy(pair.target, [1, 5, 9], 60)


def test_a_shared_embedding_is_not_stored_and_needs_the_target(folder):
    assert "model.embed_tokens.weight" not in mx.load(str(folder / "model.safetensors"))
    with pytest.raises(ModelLoadError, match="load it together with the target"):
        Drafter.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d2t: d2t + 2048, "names token 4094, and the vocabulary has 2048 tokens"),
        (lambda d2t: d2t - 1, "names token -1, and the vocabulary has 2048 tokens"),
        (lambda d2t: -np.arange(len(d2t), dtype=np.int32), "names a token twice"),
        (lambda d2t: d2t[:-1], "do not fit config.json"),
        (None, "do not fit config.json"),
    ],
    ids=["beyond the vocabulary", "negative", "twice", "too short", "missing"],
)
def test_a_damaged_map_of_the_vocabulary_is_one_clear_line(folder, change, message):
    weights = mx.load(str(folder / "model.safetensors"))
    d2t = np.array(weights.pop("d2t"))
    if change:
        weights["d2t"] = mx.array(change(d2t))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(ModelLoadError, match=message) as caught:
        load(DEMO / "target", folder)
    assert "\n" not in str(caught.value)


def test_a_map_for_more_tokens_than_there_are_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "draft_vocab_size": 4096}))
    with pytest.raises((ModelLoadError, InvalidRequestError), match="draft_vocab_size is 4096; use at most"):
        load(DEMO / "target", folder)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_a_drafter_is_quantized_in_memory_but_for_the_embedding_that_it_shares(folder, bits):
    pair = load(DEMO / "target", folder, quantize="none", quantize_drafter=bits)
    drafter = pair.drafter
    assert drafter.lm_head.bits == drafter.layers[0].mlp.up_proj.bits == int(bits)
    pair.tokenizer = None
    text = decoded(SpeculativeDecoder(pair, draft_length=2), [1, 5, 9], 30)
    assert text[:30] == plain_greedy(pair.target, [1, 5, 9], 30)


def test_a_drafter_that_cannot_be_quantized_is_named_with_the_reason(folder):
    for drafter, reason in (
        (DEMO / "drafter", "quantized already|do not divide"),
        ("lookup", "needs a draft model"),
        ("none", "needs a draft model"),
    ):
        with pytest.raises(InvalidRequestError, match=reason):
            load(DEMO / "target", drafter, quantize_drafter="4")
    with pytest.raises(InvalidRequestError, match="use one of 4, 8"):
        load(DEMO / "target", folder, quantize_drafter="5")


def test_a_target_with_a_feature_that_a_drafter_lacks_is_refused_with_advice_that_fits():
    target = load().target
    config = {**read_config(DEMO / "target"), "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    with pytest.raises(InvalidRequestError, match=r"cannot be copied: .*rope_scaling.*; use a drafter with random"):
        drafter_from_target(target, config, [0])


@pytest.mark.parametrize("quantized", [True, False])
def test_nothing_done_to_a_drafter_changes_the_targets_embedding_that_it_shares(quantized):
    target = random_llama(vocab_size=64, hidden_size=64)
    drafter = drafter_from_target(target, vars(target.args), [0], share_embedding=True)
    if quantized:
        nn.quantize(target, group_size=64, bits=4, class_predicate=lambda _, module: isinstance(module, nn.Embedding))
    target.set_dtype(mx.bfloat16)
    embedding = target.model.embed_tokens
    embedding.unfreeze()
    before = dict(embedding)
    mx.eval(target.parameters(), drafter.layers, drafter.lm_head)
    memory = mx.get_active_memory()
    drafter.share(embedding)
    drafter.set_dtype(mx.float32)
    drafter.update(tree_map(mx.zeros_like, drafter.trainable_parameters()))
    mx.eval(drafter.model.embed_tokens.parameters())
    assert mx.get_active_memory() < memory  # its own table is gone, and the target's is not copied
    assert all(embedding[name] is array for name, array in before.items())
    assert embedding.trainable_parameters()
    assert not drafter.model.embed_tokens.trainable_parameters()
    assert target(mx.array([[1]])).dtype == mx.bfloat16
    assert (drafter.lm_head.weight.dtype, drafter(mx.array([[1]])).dtype) == (mx.float32, mx.float32)
    assert mx.array_equal(drafter.model.embed_tokens(mx.array([5])), embedding(mx.array([5])))
