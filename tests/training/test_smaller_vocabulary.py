"""Training a drafter with a smaller output vocabulary and the target's embedding."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlxspec.models.from_target import drafter_from_target
from mlxspec.models.loading import DEMO
from mlxspec.models.quantizing import rounded
from mlxspec.models.reading import read_model
from mlxspec.models.vocabulary import places
from mlxspec.training.batches import Batches
from mlxspec.training.drafter_folders import load_drafter
from mlxspec.training.estimate import step_seconds
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import Batch, objective, weighted_sums
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.stages import train
from mlxspec.training.target import Target
from mlxspec.training.teachers import CachedTeacher, OnlineTeacher
from mlxspec.training.trainer import Trainer, TrainingSettings
from mlxspec.training.warm_start import WarmStart, warm_start
from tests.conftest import random_llama

V, TOKENS = 32, np.array([0, 2, 3, 7, 11, 12, 30, 31])


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def pair():
    target = random_llama(vocab_size=V, scale=4)
    config = {**vars(target.args)}
    return target, drafter_from_target(target, config, [1], TOKENS, share_embedding=True)


@pytest.mark.parametrize("name", ["tvd", "kld", "ce"])
def test_loss_and_acceptance_over_k_columns_are_those_of_the_formulas_in_float64(name):
    target, drafter = pair()
    ids = mx.array(np.random.default_rng(0).integers(0, V, (2, 7)))
    inputs, following = ids[:, :-1], np.array(ids[:, 1:])
    weights = mx.full(inputs.shape, 1 / inputs.size)
    batch = Batch(ids, mx.zeros(inputs.shape, mx.int32), weights, (), mx.array(1.0), mx.random.key(0))
    value, values = objective(Loss(name), OnlineTeacher(target) if name != "ce" else None)(drafter, batch)
    mean, alpha = weighted_sums(batch, values)
    assert abs(mean.item() - value.item()) < 1e-6

    p = softmax(np.array(target(inputs), np.float64))[..., TOKENS]  # sums to less than 1
    q = softmax(np.array(drafter(inputs), np.float64)[..., TOKENS])
    if name == "ce":
        known = np.isin(following, TOKENS)
        columns = np.searchsorted(TOKENS, following).clip(max=len(TOKENS) - 1)
        losses = np.where(known, -np.log(np.take_along_axis(q, columns[..., None], -1)[..., 0]), 0)
    else:
        losses = {"kld": (p * np.log(p / q)).sum(-1), "tvd": 1 - np.minimum(p, q).sum(-1)}[name]
        assert abs(alpha.item() - np.minimum(p, q).sum(-1).mean()) < 1e-5
    assert abs(value.item() - losses.mean()) < 1e-5


def test_tokens_are_found_in_the_smaller_vocabulary():
    found, known = places(mx.array([31, 0, 1, 11, 13]), mx.array(TOKENS), V)
    assert known.tolist() == [True, True, False, True, False]
    assert TOKENS[np.array(found)[np.array(known)]].tolist() == [31, 0, 11]


def test_a_resumed_run_ends_with_the_same_weights_and_leaves_map_and_embedding_alone(tmp_path):
    with ShardWriter(tmp_path / "shards", V, "tokens") as writer:
        for row in np.random.default_rng(0).integers(0, V, (20, 20)):
            writer.add(row, np.ones_like(row))
        writer.finish()
    shards = TokenShards(tmp_path / "shards")

    def train(folder, stop=None):
        target, drafter = pair()
        before = {name: np.array(weight) for name, weight in tree_flatten(drafter.parameters())}
        settings = TrainingSettings(steps=6, batch=4, length=16, checkpoint_every=2)
        batches = Batches([shards], [1], 16, 4, seed=0)

        def interrupt(step, metrics):
            if step == stop:
                raise KeyboardInterrupt

        Trainer(
            drafter, objective(Loss("tvd++"), OnlineTeacher(target)), batches, settings, folder, report=interrupt
        ).run()
        return before, {name: np.array(weight) for name, weight in tree_flatten(drafter.parameters())}

    before, whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "resumed", stop=5)
    _, resumed = train(tmp_path / "resumed")
    for name, weight in whole.items():
        assert (weight == resumed[name]).all()
        unchanged = (weight == before[name]).all()
        assert unchanged == (name in ("d2t", "model.embed_tokens.weight"))
    stored = mx.load(str(tmp_path / "whole" / "step-00000006" / "model.safetensors"))
    assert not {"d2t", "model.embed_tokens.weight"} & stored.keys()


def test_stored_probabilities_of_the_teacher_give_the_loss_of_a_float64_formula_over_k_columns(tmp_path):
    target, drafter = pair()
    with ShardWriter(tmp_path / "shards", V, "tokens") as writer:
        for row in np.random.default_rng(1).integers(0, V, (4, 9)):
            writer.add(row, np.ones_like(row))
        writer.finish()
    batches = Batches([TokenShards(tmp_path / "shards")], [1], 8, 2, seed=0)
    top = 12
    teacher = CachedTeacher(target, batches, V, top, 1.0, "f")
    ids = mx.array(batches(0).ids)
    inputs = ids[:, :-1]
    batch = Batch(
        ids,
        mx.array(batches(0).documents[:, :-1]),
        mx.full(inputs.shape, 1 / inputs.size),
        teacher.load_rows(batches.row_numbers(0)),
        mx.array(1.0),
        mx.random.key(0),
    )
    value, values = objective(Loss("kld"), teacher)(drafter, batch)
    mean, alpha = weighted_sums(batch, values)
    assert abs(mean.item() - value.item()) < 1e-6

    whole = softmax(np.array(target(inputs), np.float64)).reshape(-1, V)
    q = softmax(np.array(drafter(inputs), np.float64)[..., TOKENS]).reshape(-1, len(TOKENS))
    losses, rates = [], []
    for p, q_row in zip(whole, q, strict=True):
        stored = np.argsort(-p)[:top]
        known = [list(TOKENS).index(token) for token in stored if token in TOKENS]
        rest = np.ones(len(TOKENS), bool)
        rest[known] = False
        p_row = np.where(rest, q_row * (1 - p[stored].sum()) / q_row[rest].sum(), p[TOKENS])
        losses.append((p_row * np.log(p_row / q_row)).sum())
        rates.append(np.minimum(p_row, q_row).sum())
    assert value.item() == pytest.approx(np.mean(losses), abs=2e-3)  # stored in 16 bits
    assert alpha.item() == pytest.approx(np.mean(rates), abs=2e-3)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_fake_quantization_computes_with_rounded_weights_and_trains_the_exact_ones(tmp_path, bits):
    target = random_llama(vocab_size=V, hidden_size=64, intermediate_size=64, scale=4)
    with ShardWriter(tmp_path / "shards", V, "tokens") as writer:
        for row in np.random.default_rng(0).integers(0, V, (8, 17)):
            writer.add(row, np.ones_like(row))
        writer.finish()
    batches = Batches([TokenShards(tmp_path / "shards")], [1], 16, 4, seed=0)
    losses = {}
    for fake in (None, bits):
        drafter = drafter_from_target(target, vars(target.args), [1])
        if fake is None:  # the same arithmetic on weights that were rounded beforehand
            drafter.update(tree_map(lambda w: rounded(w, bits) if w.ndim == 2 else w, drafter.parameters()))
        before = {name: np.array(weight) for name, weight in tree_flatten(drafter.parameters())}
        settings = TrainingSettings(steps=1, batch=4, length=16, learning_rate=1e-4, fake_quantize=fake)
        seen = []
        Trainer(
            drafter, objective(Loss("kld"), OnlineTeacher(target)), batches, settings, tmp_path / str(fake),
            report=lambda step, metrics, seen=seen: seen.append(metrics),
        ).run()  # fmt: skip
        losses[fake] = seen[0]["loss"], seen[0]["gradient_norm"]
        changes = [np.abs(np.array(w) - before[name]).max() for name, w in tree_flatten(drafter.parameters())]
        assert max(changes) < 1e-3  # one small step from the exact weights, not from the rounded ones
    assert losses[bits] == pytest.approx(losses[None], rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_and_its_trial_steps_keep_the_precision_of_a_quantized_embedding_that_is_shared(tmp_path, precision):
    target = Target(str(DEMO / "target"))
    target.model = read_model(DEMO / "target", mx.bfloat16)  # quantized, as on a GPU
    start = WarmStart((0,), share_embedding=True)
    settings = TrainingSettings(steps=1, batch=2, length=16, precision=precision)
    drafter, _ = warm_start(target, start, None)
    drafter.save(tmp_path / "start")
    assert step_seconds(drafter, Loss("kld"), settings, target) > 0
    with ShardWriter(tmp_path / "shards", target.vocab_size, target.tokenizer_fingerprint) as writer:
        for row in np.random.default_rng(0).integers(0, target.vocab_size, (4, 17)):
            writer.add(row, np.ones_like(row))
        writer.finish()
    drafter = load_drafter(tmp_path / "start", target)
    train(target, drafter, [(TokenShards(tmp_path / "shards"), 1.0)], Loss("kld"), settings, tmp_path / "out")
    assert hasattr(drafter.shared_table, "bits")
    types = {weight.dtype for _, weight in tree_flatten(target.model.parameters())}
    assert types == {mx.uint32, mx.bfloat16}
    assert target.model(mx.array([[1]])).dtype == mx.bfloat16
