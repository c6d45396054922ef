"""The training loop: resumed runs are the same runs, and nothing that was saved is lost."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxspec import Drafter, DrafterConfig, InvalidRequestError
from mlxspec.errors import TrainingError, WriteError
from mlxspec.training import checkpoint
from mlxspec.training.batches import Batches
from mlxspec.training.losses import LOSSES, Loss
from mlxspec.training.objectives import objective
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.teachers import CachedTeacher, OnlineTeacher
from mlxspec.training.trainer import Trainer, TrainingSettings
from tests.conftest import random_llama

V = 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(folder, V, "tokens")
    random = np.random.default_rng(0)
    for _ in range(30):
        ids = np.cumsum(random.integers(1, 3, 40)) % V  # what comes next is one of two
        writer.add(ids, random.integers(0, 2, 40))
    writer.finish()
    return TokenShards(folder)


def new_drafter(tied=True) -> Drafter:
    mx.random.seed(0)
    return Drafter(DrafterConfig(V, 16, 32, 1, 2, tie_word_embeddings=tied))


def trained(
    shards: TokenShards, folder: Path, loss="ce", tied=True, scorer=None, report=None, top_k=0, **given
) -> Drafter:
    settings = TrainingSettings(
        **{"steps": 6, "batch": 4, "length": 16, "checkpoint_every": 2, "log_every": 1, **given}
    )
    loss = Loss(loss) if isinstance(loss, str) else loss
    target, teacher = random_llama(vocab_size=V, scale=3), None
    batches = Batches([shards], [1], settings.length, settings.batch, seed=0)
    if loss.needs_target:
        teacher = CachedTeacher(target, batches, V, top_k, 1.0, "random") if top_k else OnlineTeacher(target)
    drafter = new_drafter(tied)
    options = {"report": report} if report else {}
    Trainer(drafter, objective(loss, teacher), batches, settings, folder, scorer, teacher, **options).run()
    return drafter


def weights(drafter: Drafter) -> dict[str, np.ndarray]:
    return {name: np.array(weight) for name, weight in tree_flatten(drafter.parameters())}


def assert_identical(one: Drafter, other: Drafter) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("tied", [True, False])
def test_it_learns(shards, tmp_path, tied):
    trained(shards, tmp_path, steps=150, tied=tied, learning_rate=0.01, checkpoint_every=1000)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[0] > 3
    assert losses[-1] < 1.5


@pytest.mark.parametrize(
    "loss",
    [*LOSSES, Loss("tvd++", "8"), Loss("tvd++", "8", "batch"), Loss("tvd++", statistics="batch")],
    ids=lambda loss: loss if isinstance(loss, str) else f"{loss.name} {loss.estimator} {loss.statistics}",
)
def test_every_loss_trains_and_repeats_exactly(shards, tmp_path, loss):
    loss = Loss(loss) if isinstance(loss, str) else loss
    once, again = (trained(shards, tmp_path / name, loss, steps=3) for name in ("once", "again"))
    assert_identical(once, again)
    assert not np.array_equal(weights(once)["model.norm.weight"], weights(new_drafter())["model.norm.weight"])


def test_a_run_with_an_offline_teacher_that_is_resumed_ends_with_bit_identical_weights(shards, tmp_path):
    """Killed in the middle of filling: what a batch of the target was asked must not depend on what was known."""

    def run(name: str, **given) -> Drafter:
        own = TokenShards(shutil.copytree(shards.folder, tmp_path / f"{name} shards", dirs_exist_ok=True))
        return trained(own, tmp_path / name, "tvd++", top_k=4, steps=12, **given)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", report=interrupt_after(5))
    assert_identical(run("cut"), whole)


@pytest.mark.parametrize("loss", ["ce", "tvd++"])
@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_ends_with_bit_identical_weights(shards, tmp_path, loss, step):
    whole = trained(shards, tmp_path / "whole", loss)
    with pytest.raises(KeyboardInterrupt):
        trained(shards, tmp_path / "cut", loss, report=interrupt_after(step + 1))
    assert checkpoint.checkpoints(tmp_path / "cut")[-1].name == f"step-{step:08d}"
    assert_identical(trained(shards, tmp_path / "cut", loss), whole)
    untimed = [[{**line, "tokens_per_second": 0} for line in metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert untimed[0] == untimed[1]


def interrupt_after(last: int):
    def report(step, metrics):
        if step == last:
            raise KeyboardInterrupt

    return report


def test_parts_of_a_batch_add_up_to_the_batch(shards, tmp_path):
    one, two = (weights(trained(shards, tmp_path / str(n), accumulate=n, steps=3)) for n in (1, 4))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5)


def test_only_tokens_whose_mask_is_one_are_learned(shards, tmp_path):
    writer = ShardWriter(tmp_path / "masked", V, "tokens")
    for ids, mask in shards.documents():
        writer.add(ids, np.zeros_like(mask))
    writer.finish()
    trained(TokenShards(tmp_path / "masked"), tmp_path / "out", steps=2)
    assert [line["loss"] for line in metrics(tmp_path / "out")] == [0, 0]


def test_the_best_drafter_is_what_remains(shards, tmp_path):
    scores = {2: 1.5, 4: 2.5, 6: 2.0}
    seen = {}

    def evaluate(drafter):
        step = 2 * (len(seen) + 1)
        seen[step] = weights(drafter)
        return {"block_efficiency": scores[step]}

    kept = weights(trained(shards, tmp_path, scorer=evaluate, evaluate_every=2))
    assert all(np.array_equal(kept[name], seen[4][name]) for name in kept)
    assert not all(np.array_equal(kept[name], seen[6][name]) for name in kept)


def test_a_run_that_is_shortened_to_its_last_checkpoint_scores_it(shards, tmp_path):
    seen = []

    def scorer(drafter):
        seen.append(weights(drafter))
        return {"block_efficiency": 2.0}

    with pytest.raises(KeyboardInterrupt):
        trained(shards, tmp_path, steps=8, scorer=scorer, report=interrupt_after(5))
    assert not seen
    kept = weights(trained(shards, tmp_path, steps=4, scorer=scorer))
    (scored,) = seen
    assert all(np.array_equal(kept[name], scored[name]) for name in kept)
    assert [line["step"] for line in metrics(tmp_path) if "block_efficiency" in line] == [4]
    longer = weights(trained(shards, tmp_path, steps=8, scorer=lambda drafter: {"block_efficiency": 1.0}))
    assert all(np.array_equal(kept[name], longer[name]) for name in kept)  # the better one is not forgotten


def test_copies_of_checkpoints_and_best_drafters_stay_and_are_not_resumed_from(shards, tmp_path):
    def train(steps: int, best: float) -> Drafter:
        return trained(shards, tmp_path, scorer=lambda drafter: {"block_efficiency": best}, steps=steps)

    train(2, best=1.5)
    copies = [f"{name}-00000002{end}" for name in ("step", "best") for end in ("-mine", " copy", ".bak")]
    for copy in copies:
        shutil.copytree(tmp_path / copy[:13], tmp_path / copy)
    train(8, best=2.5)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "step-00000006", "step-00000008", "best-00000002", "best-00000008", *copies,
    }  # fmt: skip


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(shards, tmp_path):
    good = trained(shards, tmp_path, steps=4)
    shutil.copytree(tmp_path / "step-00000004", tmp_path / "before")
    with pytest.raises(TrainingError, match=r"step \d+: the loss is .* nan .*use a lower learning_rate"):
        trained(shards, tmp_path, steps=200, learning_rate=1e30, clip=1e30, checkpoint_every=1000)
    kept = mx.load(str(tmp_path / "step-00000004" / "model.safetensors"))
    assert all(np.array_equal(kept[name], weight) for name, weight in weights(good).items())


def test_a_checkpoint_of_weights_that_were_destroyed_is_not_kept_as_the_last_good_one(shards, tmp_path):
    wild = {"learning_rate": 1e30, "clip": 1e30, "warmup": 0, "checkpoint_every": 1}
    trained(shards, tmp_path, steps=4)
    with pytest.raises(TrainingError, match=r"the last good checkpoint is .*step-00000004; use a lower learning_rate"):
        trained(shards, tmp_path, steps=9, **wild)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000004"]


def test_weights_that_the_last_step_destroyed_are_not_written(shards, tmp_path):
    trained(shards, tmp_path, steps=4)
    with pytest.raises(TrainingError, match=r"step 5: the weights are not finite; .*step-00000004; use a lower"):
        trained(shards, tmp_path, steps=5, learning_rate=1e308, clip=1e30, warmup=0)
    assert checkpoint.checkpoints(tmp_path)[-1].name == "step-00000004"


def test_a_damaged_line_of_metrics_does_not_stop_a_resumed_run(shards, tmp_path):
    trained(shards, tmp_path, steps=2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("\0\0\0\n" + '{"step": 3, "lo')
    trained(shards, tmp_path, steps=4)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_full_disk_ends_in_one_line_and_leaves_the_checkpoint_before(shards, tmp_path, monkeypatch):
    trained(shards, tmp_path, steps=2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(WriteError, match=r"cannot write .*step-00000004 \(No space left.*free some space"):
        trained(shards, tmp_path, steps=6)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000002"]
    assert not list(tmp_path.glob(".writing*"))
    monkeypatch.undo()
    trained(shards, tmp_path, steps=6)


def test_a_damaged_checkpoint_is_named(shards, tmp_path):
    trained(shards, tmp_path, steps=4)
    file = tmp_path / "step-00000004" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(TrainingError, match=r"step-00000004 cannot be read .*delete it"):
        trained(shards, tmp_path, steps=6)


def test_bfloat16_arithmetic_keeps_float32_weights(shards, tmp_path):
    drafter = trained(shards, tmp_path, "tvd++", steps=2, precision="bfloat16")
    assert {weight.dtype for _, weight in tree_flatten(drafter.parameters())} == {mx.float32}
    exact = trained(shards, tmp_path / "exact", "tvd++", steps=2)
    for name, weight in weights(exact).items():
        np.testing.assert_allclose(weights(drafter)[name], weight, atol=5e-3)


def test_the_learning_rate_rises_then_falls_to_its_last_share():
    settings = TrainingSettings(steps=100, warmup=10, learning_rate=1.0, final_rate=0.1)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[10] == pytest.approx(1.0)
    assert rates[99] == pytest.approx(0.1)
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"steps": 0}, "steps is 0; use 1 or more"),
        ({"steps": 10**8}, r"steps is 100000000; use a number below 10\*\*8"),
        ({"seed": 2**64}, r"seed is 18446744073709551616; use a number in \[0, 2\*\*64\)"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"accumulate": 3}, "accumulate is 3; use a divisor of batch, 16"),
        ({"temperatures": ()}, "temperatures are"),
        ({"precision": "float8"}, "precision is 'float8'"),
    ],
)
def test_settings_out_of_range_are_refused(given, complaint):
    with pytest.raises(InvalidRequestError, match=complaint):
        TrainingSettings(**given)
