"""The co-natural gradient and the quadratic penalty, against formulas in float64."""

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxspec import Drafter, DrafterConfig, InvalidRequestError
from mlxspec.errors import TrainingError
from mlxspec.models.loading import DEMO
from mlxspec.training.batches import Batches
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import objective
from mlxspec.training.retention import CoNatural, Protection, Retention, diagonal_fisher, measured_fisher
from mlxspec.training.robust import Robust, new_weighting
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.trainer import Trainer, TrainingSettings

V, LENGTH = 13, 12
NATURAL = Retention("co-natural", damping=0.01)
PENALTY = Retention(penalty=50.0)
ROOT = Path(__file__).parent.parent.parent


def written(folder: Path, step: int = 1, count: int = 24) -> TokenShards:
    """Documents that count upward by ``step``."""
    random = np.random.default_rng(step)
    with ShardWriter(folder / "tokens", V, "tokens") as writer:
        for _ in range(count):
            length = random.integers(2, LENGTH)
            ids = (np.arange(length) * step + random.integers(0, V)) % V
            writer.add(ids, [0] + [1] * (length - 1))
        writer.finish()
    return TokenShards(folder / "tokens")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    return written(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> TokenShards:
    return written(tmp_path_factory.mktemp("others"), step=5)


def new_drafter() -> Drafter:
    mx.random.seed(0)
    return Drafter(DrafterConfig(V, 8, 8, 1, 2))


def flat(tree) -> dict[str, np.ndarray]:
    return {name: np.array(weight, np.float64) for name, weight in tree_flatten(tree)}


def same(one: Drafter, other: Drafter) -> bool:
    one, other = flat(one.parameters()), flat(other.parameters())
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def fisher_of(drafter: Drafter, shards: TokenShards, examples: int = 256) -> dict:
    batches = Batches([shards], [1.0], LENGTH, 1, 0, single=True)
    return diagonal_fisher(drafter, objective(Loss("ce")), batches, examples)


class Quadratic(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.weight = mx.array(np.array(start, np.float32))


# ----------------------------------------------------------------------- F


def test_the_fisher_information_is_the_mean_square_of_the_gradients_of_single_documents(shards):
    """Every derivative is a central difference of one document's log-likelihood, which MLX computes in float64."""
    drafter = new_drafter()
    found = flat(fisher_of(drafter, shards))
    drafter.set_dtype(mx.float64)
    texts = [mx.array(document.ids.astype(np.int32))[None] for document in shards.documents()]
    named = dict(tree_flatten(drafter.parameters()))
    random = np.random.default_rng(0)
    with mx.stream(mx.cpu):

        def likelihoods() -> np.ndarray:
            sums = []
            for text in texts:
                log_q = nn.log_softmax(drafter(text[:, :-1])[0], axis=-1)
                sums.append(mx.take_along_axis(log_q, text[0, 1:, None], axis=-1).sum())
            return np.array([value.item() for value in sums])

        tokens = sum(text.size - 1 for text in texts)
        for name, weight in named.items():
            values = np.array(weight, np.float64)
            for place in random.permutation(values.size)[:4]:
                sides = []
                for step in (1e-3, -1e-3):
                    moved = values.copy()
                    moved.flat[place] += step
                    drafter.load_weights([(name, mx.array(moved, mx.float64))], strict=False)
                    sides.append(likelihoods())
                drafter.load_weights([(name, mx.array(values, mx.float64))], strict=False)
                expected = (((sides[0] - sides[1]) / 2e-3) ** 2).sum() / tokens
                assert found[name].flat[place] == pytest.approx(expected, rel=2e-3, abs=1e-7), name


def test_the_fisher_information_is_measured_on_so_many_documents_and_leaves_the_weights_alone(shards):
    drafter, before = new_drafter(), flat(new_drafter().parameters())
    few, many = fisher_of(drafter, shards, 2), fisher_of(drafter, shards, 1000)
    assert not np.allclose(flat(few)["model.norm.weight"], flat(many)["model.norm.weight"], rtol=1e-3)
    assert all(np.array_equal(weight, before[name]) for name, weight in flat(drafter.parameters()).items())


# ----------------------------------------------------------------------- steps


def test_co_natural_steps_on_a_quadratic_are_those_of_the_formula():
    """L = ½ Σ h (θ − t)². With F = h, α near 0 and λ = 1, one step ends at the solution t."""
    random = np.random.default_rng(0)
    curvature, solution, start = random.uniform(0.5, 2, 6), random.normal(size=6), random.normal(size=6)
    for damping, rate in ((1e-9, 1.0), (0.3, 0.5)):
        model = Quadratic(start)
        optimizer = CoNatural(rate, {"weight": mx.array(curvature.astype(np.float32))}, damping)
        wanted = start.copy()
        for _ in range(3):
            gradient = np.array(model.weight, np.float64) * curvature - solution * curvature
            optimizer.update(model, {"weight": mx.array(gradient.astype(np.float32))})
            wanted = wanted - rate * curvature * (wanted - solution) / (curvature + damping)
            np.testing.assert_allclose(np.array(model.weight), wanted, atol=1e-5)
            if damping < 1e-6:
                np.testing.assert_allclose(wanted, solution, atol=1e-6)


def test_descent_with_the_penalty_ends_between_the_solution_and_the_first_weights():
    """The minimum of ½ h (θ − t)² + β/2 F (θ − θ0)² is (h t + β F θ0) / (h + β F)."""
    random = np.random.default_rng(0)
    curvature, solution, start, fisher = (random.uniform(0.5, 2, 6) for _ in range(4))
    weights, beta = {"weight": mx.array(start.astype(np.float32))}, 3.0
    first = {"weight": mx.array(start.astype(np.float32))}
    memory = Protection(Retention(penalty=beta), {"weight": mx.array(fisher.astype(np.float32))}, first)
    for _ in range(300):
        gradient = (np.array(weights["weight"]) - solution) * curvature
        gradients = memory.penalized({"weight": mx.array(gradient.astype(np.float32))}, weights)
        weights = {"weight": weights["weight"] - 0.1 * gradients["weight"]}
    wanted = (curvature * solution + beta * fisher * start) / (curvature + beta * fisher)
    np.testing.assert_allclose(np.array(weights["weight"]), wanted, atol=1e-5)


def trained(shards, folder, retention=None, others=None, report=None, robust=None, drafter=None, **given):
    """Train with cross-entropy on ``shards``, and remember ``others``."""
    settings = TrainingSettings(
        **{"steps": 6, "batch": 4, "length": LENGTH, "log_every": 1, "checkpoint_every": 2, "warmup": 0, **given}
    )
    drafter, batches = drafter or new_drafter(), Batches([shards], [1], LENGTH, 4, seed=0)
    memory = measured_fisher(None, drafter, others, retention, folder, LENGTH, 0) if retention else None
    options = {"report": report} if report else {}
    if robust:
        options["weighting"] = new_weighting(robust, batches, V, Loss("ce"))
    Trainer(drafter, objective(Loss("ce")), batches, settings, folder, memory=memory, **options).run()
    return drafter


def gradients_of(drafter, shards, step) -> dict[str, np.ndarray]:
    settings = TrainingSettings(batch=4, length=LENGTH)
    trainer = Trainer(drafter, objective(Loss("ce")), Batches([shards], [1], LENGTH, 4, seed=0), settings, Path())
    rows = trainer.batches(step)
    weights = (rows.mask[:, 1:] / rows.mask[:, 1:].sum()).astype("float32")
    arrays = (mx.array(rows.ids), mx.array(rows.documents[:, :-1]), mx.array(weights))
    return flat(trainer._gradients(*arrays, (), mx.array(1.0), mx.random.key(0))[1])


def test_the_steps_of_a_run_are_preconditioned_gradients(shards, others, tmp_path):
    fisher, before = flat(fisher_of(new_drafter(), others)), flat(new_drafter().parameters())
    given = {"steps": 1, "clip": 1e9, "learning_rate": 0.02, "weight_decay": 0.5}
    after = flat(trained(shards, tmp_path, NATURAL, others, **given).parameters())
    for name, gradient in gradients_of(new_drafter(), shards, 0).items():
        wanted = before[name] - 0.02 * gradient / (fisher[name] + 0.01)
        np.testing.assert_allclose(after[name], wanted, atol=2e-6)


def test_the_penalty_pulls_back_from_the_second_step_on(shards, others, tmp_path):
    """Its gradient β F (θ − θ0) is 0 at θ0. Afterwards it is part of the gradient that the optimizer gets."""
    retention = Retention("co-natural", 1.0, penalty=50.0)
    fisher, first = flat(fisher_of(new_drafter(), others)), flat(new_drafter().parameters())
    given = {"clip": 1e9, "learning_rate": 0.1, "final_rate": 1.0}
    one = trained(shards, tmp_path / "one", retention, others, steps=1, **given)
    plain = trained(shards, tmp_path / "plain", Retention("co-natural", 1.0), others, steps=1, **given)
    assert same(one, plain)
    two = flat(trained(shards, tmp_path / "two", retention, others, steps=2, **given).parameters())
    before = flat(one.parameters())
    for name, gradient in gradients_of(one, shards, 1).items():
        pulled = gradient + 50 * fisher[name] * (before[name] - first[name])
        np.testing.assert_allclose(two[name], before[name] - 0.1 * pulled / (fisher[name] + 1), atol=2e-6)


@pytest.mark.parametrize("retention", [NATURAL, PENALTY], ids=["co-natural", "penalty"])
@pytest.mark.parametrize("robust", [None, Robust("likelihood-ratio")], ids=["plain", "robust"])
@pytest.mark.parametrize("step", [1, 5])
def test_a_resumed_run_ends_with_bit_identical_weights(shards, others, tmp_path, retention, robust, step):
    def interrupt(done, metrics):
        if done == step:
            raise KeyboardInterrupt

    whole = trained(shards, tmp_path / "whole", retention, others, robust=robust)
    with pytest.raises(KeyboardInterrupt):
        trained(shards, tmp_path / "cut", retention, others, interrupt, robust)
    measured = [path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("fisher-*")]
    assert same(trained(shards, tmp_path / "cut", retention, others, robust=robust), whole)
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("fisher-*")] == measured
    assert len(measured) == 1
    assert not same(trained(shards, tmp_path / "plain", robust=robust), whole)


def test_a_damaged_file_is_named(shards, others, tmp_path):
    trained(shards, tmp_path, NATURAL, others)
    (path,) = tmp_path.glob("fisher-*")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(TrainingError, match=r"fisher-.* cannot be read .*; delete it to measure it again"):
        trained(shards, tmp_path, NATURAL, others, steps=8)


def walks(folder: Path, low: int, size: int, steps: list[int]) -> TokenShards:
    """Documents of some of the tokens, each one of two steps after the one before."""
    random = np.random.default_rng(low)
    with ShardWriter(folder / "tokens", V, "tokens") as writer:
        for _ in range(60):
            ids = low + (np.cumsum(random.choice(steps, 11)) + random.integers(0, size)) % size
            writer.add(ids, [0] + [1] * 10)
        writer.finish()
    return TokenShards(folder / "tokens")


def loss_on(drafter: Drafter, shards: TokenShards) -> float:
    texts = mx.array(np.stack([document.ids for document in shards.documents()]).astype(np.int32))
    log_q = nn.log_softmax(drafter(texts[:, :-1]), axis=-1)
    return -mx.take_along_axis(log_q, texts[:, 1:, None], axis=-1).mean().item()


def test_less_is_forgotten_where_as_much_is_learned(tmp_path):
    """A drafter that knows one language learns another. Each way stops once it knows that one equally well."""
    old, new = walks(tmp_path / "old", 0, 7, [1, 2]), walks(tmp_path / "new", 7, 6, [1, 3])
    start = trained(old, tmp_path / "before", steps=200, learning_rate=0.01, checkpoint_every=1000)
    known = loss_on(start, old)
    assert known < 0.7  # the entropy is 0.69
    start.save(tmp_path / "start")
    forgotten = {}
    for name, (retention, rate) in {
        "descent": (Retention("co-natural", 1e6), 0.1e6),  # (F + α)⁻¹ is almost the same for all weights
        "co-natural": (Retention("co-natural", 1e-3), 0.1e-3),
        "penalty": (Retention("co-natural", 1e6, penalty=100.0), 0.1e6),
    }.items():
        drafter = Drafter.load(tmp_path / "start", mx.float32)

        def stop(step, metrics, drafter=drafter):
            if loss_on(drafter, new) < 1.2:
                raise KeyboardInterrupt

        given = {"steps": 500, "learning_rate": rate, "final_rate": 1.0, "checkpoint_every": 1000}
        with pytest.raises(KeyboardInterrupt):
            trained(new, tmp_path / name, retention, old, stop, drafter=drafter, **given)
        forgotten[name] = loss_on(drafter, old) - known
    assert forgotten["co-natural"] < forgotten["descent"] / 5
    assert forgotten["penalty"] < forgotten["descent"] / 5


# ----------------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; use one of adamw, co-natural"),
        ({"damping": 0.0}, "damping is 0.0; use a positive number"),
        ({"penalty": -1.0}, "penalty is -1.0; use 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(given, complaint):
    with pytest.raises(InvalidRequestError, match=complaint):
        Retention(**given)


RECIPE = f"""
target = "{DEMO / "target"}"

[drafter]
DRAFTER

[distill]
prompts = ["prompts.jsonl"]
temperatures = [1.0]
max_tokens = 12
group = 16

[[finetune]]
loss = "kld"
steps = 4
batch = 8
length = 24
checkpoint_every = 2
learning_rate = 1e-5
optimizer = "co-natural"
penalty = 2
remember = ["old.txt"]
"""
LAYERS = "layers = [0, -1]\nvocabulary_size = 200\nshare_embedding = true"
HEAD = 'kind = "eagle"\nvocabulary_size = 200'


@pytest.fixture
def recipe(tmp_path) -> Path:
    lines = [{"prompt": f"Once upon a time a dog ran {number} times."} for number in range(16)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "old.txt").write_text("There was a cat. " * 40)
    (tmp_path / "small.toml").write_text(RECIPE.replace("DRAFTER", LAYERS))
    return tmp_path / "small.toml"


@pytest.mark.parametrize("kind", [LAYERS, HEAD], ids=["layers", "head"])
def test_a_recipe_remembers_text(recipe, mlxspec_command, kind):
    recipe.write_text(RECIPE.replace("DRAFTER", kind))
    first = mlxspec_command("train", "run", str(recipe))
    assert first.status == 0, first.err
    folder = recipe.with_suffix("") / "finetune"
    assert len(list(folder.glob("fisher-*.safetensors"))) == 1
    inputs = json.loads((folder / "stage.json").read_text())["inputs"]
    assert (inputs["optimizer"], inputs["penalty"]) == ("co-natural", 2)
    assert inputs["remember"] == TokenShards(folder / "remember" / "tokens").fingerprint
    start, end = (mx.load(str(path / "drafter" / "model.safetensors")) for path in (folder.parent / "start", folder))
    assert any(not mx.array_equal(start[name], weight).item() for name, weight in end.items())
    again = mlxspec_command("train", "run", str(recipe))
    assert (again.out, again.status) == (first.out, 0)


def test_pretraining_text_is_remembered_by_default(recipe, mlxspec_command):
    pretrain = '[pretrain]\ndata = ["old.txt"]\nsteps = 2\nbatch = 4\nlength = 24\n\n[[finetune]]'
    content = recipe.read_text().replace('remember = ["old.txt"]', "").replace("[[finetune]]", pretrain)
    recipe.write_text(content)
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 0, outcome.err
    folder = recipe.with_suffix("")
    inputs = json.loads((folder / "finetune" / "stage.json").read_text())["inputs"]
    assert inputs["remember"] == TokenShards(folder / "text" / "tokens").fingerprint


def test_a_dry_run_counts_the_memory_of_what_is_remembered(recipe, mlxspec_command):
    assert mlxspec_command("train", "run", str(recipe), "--dry-run").status == 0
    assert not recipe.with_suffix("").exists()
    count = 10**6
    assert Retention().extra_bytes(count) == 0
    assert Retention(penalty=1.0).extra_bytes(count) == 8 * count  # F and the first weights
    assert Retention("co-natural").extra_bytes(count) == -8 * count  # but no moments of Adam


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ('"co-natural"', '"sgd"', "finetune: optimizer is 'sgd'; use one of adamw, co-natural"),
        ("penalty = 2", "penalty = -2", "finetune: penalty is -2.0; use 0 or more"),
        ('remember = ["old.txt"]', "", "optimizer co-natural needs text that stands for what was learned before"),
        ("old.txt", "new.txt", "new.txt: no such file, folder or pattern"),
    ],
)
def test_a_bad_value_is_one_line_before_any_stage_begins(recipe, mlxspec_command, before, after, complaint):
    recipe.write_text(recipe.read_text().replace(before, after))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert complaint in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not recipe.with_suffix("").exists()


def two_processes(folder: str) -> None:
    """What each process of ``mlx.launch`` runs."""
    work = Path(folder)
    shards, others = (TokenShards(work / name / "tokens") for name in ("shards", "others"))
    drafter = trained(shards, work / "run", PENALTY, others)
    np.savez(work / f"{mx.distributed.init().rank()}.npz", **flat(drafter.parameters()))


@pytest.mark.slow
def test_two_processes_remember_what_one_does(tmp_path):
    shards, others = written(tmp_path / "shards"), written(tmp_path / "others", step=5)
    alone = flat(trained(shards, tmp_path / "alone", PENALTY, others).parameters())
    code = f"from tests.training.test_retention import *; two_processes({str(tmp_path)!r})"
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--"]
    outcome = subprocess.run(
        [*launch, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert outcome.returncode == 0, outcome.stderr
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    for name, weight in alone.items():
        np.testing.assert_allclose(first[name], weight, atol=1e-5)
