"""The estimated memory of a step is close to what MLX reports."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxspec import Drafter, DrafterConfig
from mlxspec.errors import TrainingError
from mlxspec.models import memory
from mlxspec.models.loading import DEMO
from mlxspec.training import step_memory
from mlxspec.training.batched_answers import BatchSteps
from mlxspec.training.batches import Batches
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import Batch, objective
from mlxspec.training.prompts import Prompt
from mlxspec.training.responses import AnswerSettings, Group
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.step_memory import check_answers_fit, check_fits, training_bytes
from mlxspec.training.target import Target
from mlxspec.training.teachers import OnlineTeacher
from mlxspec.training.trainer import Trainer, TrainingSettings
from tests.conftest import random_llama

V = 1024
LARGE = DrafterConfig(V, 128, 352, 4, 4)


def test_recomputed_layers_give_the_same_gradients_in_less_memory():
    mx.random.seed(0)
    drafter = Drafter(LARGE)
    ids, weights = mx.random.randint(0, V, (8, 129)), mx.full((8, 128), 1 / 1024)
    batch = Batch(ids, mx.zeros((8, 128), mx.int32), weights, (), mx.array(1.0), mx.random.key(0))
    mx.eval(drafter.parameters(), batch)
    gradients, peaks = [], []
    for recompute in (False, True):
        minimized, trained = objective(Loss("ce"), recompute=recompute), drafter.trainable_parameters()

        def loss(weights, minimized=minimized):
            drafter.update(weights)
            return minimized(drafter, batch)[0]

        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = dict(tree_flatten(mx.grad(loss)(trained)))
        drafter.update(trained)
        mx.eval(found)
        gradients.append({name: np.array(gradient) for name, gradient in found.items()})
        peaks.append(mx.get_peak_memory() - before)
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], gradient, atol=1e-6)
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.parametrize(
    ("loss", "given"),
    [("ce", {}), ("tvd++", {}), ("ce", {"recompute": True}), ("ce", {"accumulate": 4})],
    ids=["next token", "distillation", "recomputed", "in parts"],
)
def test_the_estimate_is_within_a_factor_of_two_of_what_a_step_takes(tmp_path, loss, given):
    with ShardWriter(tmp_path / "tokens", V, "tokens") as writer:
        for row in np.random.default_rng(0).integers(0, V, (8, 257)):
            writer.add(row, np.ones_like(row))
        writer.finish()
    settings = TrainingSettings(steps=2, batch=8, length=256, **given)
    target = random_llama(vocab_size=V, hidden_size=128, intermediate_size=352, num_hidden_layers=4)
    target_bytes = sum(weight.nbytes for _, weight in tree_flatten(target.parameters()))
    teacher = OnlineTeacher(target) if loss != "ce" else None
    of_target = (target_bytes, vars(target.args)) if teacher else ()
    drafter = Drafter(LARGE)
    batches = Batches([TokenShards(tmp_path / "tokens")], [1], 256, 8, seed=0)
    trainer = Trainer(drafter, objective(Loss(loss), teacher, settings.recompute), batches, settings, tmp_path / "out")
    mx.eval(drafter.parameters())
    gc.collect()  # what earlier tests left would be counted before and be gone after
    mx.clear_cache()
    before = mx.get_active_memory() - (target_bytes if teacher else 0)
    mx.reset_peak_memory()
    trainer.run()
    taken = mx.get_peak_memory() - before
    estimated = training_bytes(LARGE, settings, 1, *of_target)
    assert taken / 2 < estimated < 2 * taken, (taken, estimated)


def test_a_batch_that_cannot_fit_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(step_memory, "device_limit", lambda: 10**9)
    check_fits(10**9)
    with pytest.raises(TrainingError, match=r"about 2\.0 GB and this device has 1\.0 GB; use a larger accumulate"):
        check_fits(2 * 10**9)


@pytest.mark.parametrize(("longest", "max_tokens"), [(5, 3), (252, 5), (252, 6)])
def test_the_memory_of_a_group_is_that_of_the_target_and_the_caches_of_its_last_token(longest, max_tokens):
    target, prompts = Target(str(DEMO / "target")), [Prompt([1, 2, 3]), Prompt(range(longest))]
    steps = BatchSteps(target.model, prompts)
    logits = steps(None)
    for _ in range(max_tokens - 1):
        logits = steps(mx.argmax(logits, axis=-1))
    mx.eval(logits)
    caches = sum(layer.nbytes for layer in steps.cache)
    groups, settings = [Group(0, prompts[:1], 1.0), Group(1, prompts, 1.0)], AnswerSettings(max_tokens=max_tokens)
    assert check_answers_fit(target, groups, settings, True) == target.weight_bytes + caches
    assert check_answers_fit(target, groups, settings, False) == target.weight_bytes + caches // 2


def test_answers_whose_caches_do_not_fit_are_refused_and_a_smaller_group_is_answered(
    monkeypatch, tmp_path, mlxspec_command
):
    """The weights take 15 MB, and the caches 2 MB for each answer of a group."""
    (tmp_path / "memory.max").write_text("60000000")
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path / "memory.max")
    wrong = "a group of answers needs about 0.6 GB and this device has 0.1 GB; use a smaller group or max_tokens"
    given = f'target = "{DEMO / "target"}"\n[distill]\nsamples = 256\nmax_tokens = 4\n'
    (tmp_path / "small.toml").write_text(f"{given}group = 256\n")
    for options in ((), ("--dry-run",)):
        refused = mlxspec_command("train", "run", str(tmp_path / "small.toml"), *options)
        assert (refused.status, refused.err.splitlines()[-1]) == (2, f"error: {wrong}")
    (tmp_path / "small.toml").write_text(f"{given}group = 16\n")
    assert "0.0 GB of memory" in mlxspec_command("train", "run", str(tmp_path / "small.toml"), "--dry-run").out
    assert mlxspec_command("train", "run", str(tmp_path / "small.toml")).status == 0
