"""Tasks and worst-case training, against formulas in float64 NumPy."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxspec import Drafter, DrafterConfig, InvalidRequestError
from mlxspec.errors import TrainingError
from mlxspec.models.eagle import EAGLE3
from mlxspec.models.loading import DEMO
from mlxspec.training import checkpoint
from mlxspec.training.batches import Batches, StepDocuments
from mlxspec.training.losses import LOSSES, Loss
from mlxspec.training.objectives import objective, objective_for
from mlxspec.training.robust import GroupWeights, LikelihoodRatios, Robust, new_weighting
from mlxspec.training.shards import Rows, ShardWriter, TokenShards
from mlxspec.training.teachers import CachedTeacher, OnlineTeacher
from mlxspec.training.trainer import Trainer, TrainingSettings
from tests.conftest import random_llama
from tests.models.test_eagle import SMALLER, VOCAB, random_head
from tests.models.test_eagle import target as eagle_target

V, LENGTH, BATCH = 32, 48, 4
TASKS = ("sums", "songs", "lists")
GROUPS = Robust("groups", rate=0.5)
RATIOS = Robust("likelihood-ratio", rate=0.5, kl_penalty=0.2)
ROOT = Path(__file__).parent.parent.parent


def written(folder: Path, tasks=TASKS, vocab_size=V) -> TokenShards:
    """Documents of several tasks, each with tokens of its own."""
    random = np.random.default_rng(0)
    with ShardWriter(folder / "tokens", vocab_size, "tokens") as writer:
        for number in range(60):
            length = random.integers(4, 20)
            ids = random.integers(0, 10, length) + 10 * (number % 3)
            writer.add(ids, [0, *random.integers(0, 2, length - 2), 1], tasks[number % len(tasks)])
        writer.finish()
    return TokenShards(folder / "tokens")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> TokenShards:
    return written(tmp_path_factory.mktemp("shards"))


def new_drafter() -> Drafter:
    mx.random.seed(0)
    return Drafter(DrafterConfig(V, 16, 32, 1, 2))


def batches_of(shards: TokenShards) -> Batches:
    return Batches([shards], [1], LENGTH, BATCH, seed=0)


def trained(shards, folder, loss="kld", robust=None, top_k=0, report=None, **given):
    """Train, and return the drafter and the weights of worst-case training."""
    settings = TrainingSettings(**{"steps": 4, "batch": BATCH, "length": LENGTH, "log_every": 1, **given})
    loss, batches = Loss(loss), batches_of(shards)
    target, teacher = random_llama(vocab_size=V, scale=3), None
    if loss.needs_target:
        teacher = CachedTeacher(target, batches, V, top_k, 1.0, "random") if top_k else OnlineTeacher(target)
    drafter = new_drafter()
    weighting = new_weighting(robust, batches, V, loss) if robust else None
    options = {"report": report} if report else {}
    goal = objective(loss, teacher)
    Trainer(drafter, goal, batches, settings, folder, None, teacher, weighting=weighting, **options).run()
    return drafter, weighting


def weights(drafter) -> dict[str, np.ndarray]:
    return {name: np.array(weight) for name, weight in tree_flatten(drafter.parameters())}


def same(one, other) -> bool:
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


# ----------------------------------------------------------------------- tasks


def values_by_task(drafter, shards, step=0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """KLD and acceptance rate of each learned token of a step by task. Each document is run alone, in float64."""
    target, batches, found = random_llama(vocab_size=V, scale=3), batches_of(shards), {}
    rows = batches(step)
    for ids, mask, documents, tasks in zip(*rows, strict=True):
        for number in range(documents.max() + 1):
            where = np.flatnonzero(documents == number)
            text = mx.array(ids[where][None, :-1])
            p, q = (softmax(np.array(model(text)[0], np.float64)) for model in (target, drafter))
            learned = mask[where][1:] == 1
            new = ((p * np.log(p / q)).sum(-1)[learned], np.minimum(p, q).sum(-1)[learned])
            old = found.get(batches.tasks[tasks[where[0]]], (np.zeros(0), np.zeros(0)))
            found[batches.tasks[tasks[where[0]]]] = tuple(map(np.concatenate, zip(old, new, strict=True)))
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_metric_is_reported_for_each_task_with_the_worst_beside_the_mean(shards, tmp_path, accumulate):
    trained(shards, tmp_path, steps=1, accumulate=accumulate)
    (line,), wanted = metrics(tmp_path), values_by_task(new_drafter(), shards)
    assert set(wanted) == set(TASKS)
    for place, (name, worst) in enumerate((("loss", max), ("acceptance_rate", min))):
        means = {task: values[place].mean() for task, values in wanted.items()}
        assert {task: line[f"{name}/{task}"] for task in TASKS} == pytest.approx(means, abs=1e-5)
        assert line[f"worst_{name}"] == pytest.approx(worst(means.values()), abs=1e-5)
        everything = np.concatenate([values[place] for values in wanted.values()])
        assert line[name] == pytest.approx(everything.mean(), abs=1e-5)


def test_a_task_without_tokens_in_a_step_is_not_reported(tmp_path):
    shards = written(tmp_path, [f"task {number}" for number in range(30)])
    trained(shards, tmp_path / "run", steps=1)
    (line,) = metrics(tmp_path / "run")
    assert 1 < sum(name.startswith("loss/") for name in line) < 30


@pytest.mark.parametrize("tasks", [("sums",), [f"task {number}" for number in range(65)]])
def test_one_task_and_very_many_are_not_reported(tmp_path, tasks):
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "tokens", V, "tokens") as writer:
        for number in range(70):
            writer.add(random.integers(0, V, 8), [1] * 8, tasks[number % len(tasks)])
        writer.finish()
    trained(TokenShards(tmp_path / "tokens"), tmp_path / "run", steps=1)
    (line,) = metrics(tmp_path / "run")
    assert set(line) == {"step", "loss", "acceptance_rate", "learning_rate", "gradient_norm", "tokens_per_second"}


@pytest.mark.parametrize("loss", ["ce", "tvd++"])
def test_tasks_change_no_bit_of_the_weights(shards, tmp_path, loss):
    plain = written(tmp_path, (None,))
    one, _ = trained(plain, tmp_path / "one", loss)
    other, _ = trained(shards, tmp_path / "other", loss)
    assert same(one, other)


def test_an_eagle_head_reports_each_draft_step_for_each_task(tmp_path):
    shards = written(tmp_path, vocab_size=VOCAB)
    model = eagle_target()
    head = random_head(model, EAGLE3, tokens=SMALLER)
    teacher, loss = OnlineTeacher(model, True, head.layers_read(6)), Loss("kld")
    settings = TrainingSettings(steps=2, batch=BATCH, length=LENGTH, log_every=1)
    Trainer(
        head, objective_for(head, loss, teacher), batches_of(shards), settings, tmp_path / "run", None, teacher,
        weighting=new_weighting(GROUPS, batches_of(shards), VOCAB, loss),
    ).run()  # fmt: skip
    for line in metrics(tmp_path / "run"):
        shares = batches_of(shards)
        documents = StepDocuments(shares(line["step"] - 1))
        counts = documents.task_sums(documents.shares, 3)
        for name in ("loss", "acceptance_rate", "acceptance_rate_2", "acceptance_rate_3"):
            by_task = [line[f"{name}/{task}"] for task in TASKS]
            assert line[name] == pytest.approx((counts * by_task).sum(), abs=1e-6)
            assert line[f"worst_{name}"] == (max if name == "loss" else min)(by_task)


# ----------------------------------------------------------------------- group DRO


def step_documents(shards: TokenShards, step: int) -> StepDocuments:
    return StepDocuments(batches_of(shards)(step))


def test_the_weights_of_tasks_after_several_steps_are_those_of_the_formula(shards):
    """w_g ∝ w_g · exp(η · loss_g), and the loss Σ w_g · loss_g · tokens of g / mean tokens of g."""
    learned = [0, 0, 0]
    for (_, mask), task in zip(shards.documents(), shards.document_tasks, strict=True):
        learned[task] += mask.sum()
    means = np.array(learned) * BATCH / shards.count_rows(LENGTH)
    weighting, wanted = GroupWeights(GROUPS, TASKS, batches_of(shards).task_tokens()), np.full(3, 1 / 3)
    random = np.random.default_rng(0)
    for step in range(5):
        documents = step_documents(shards, step)
        values = random.uniform(0, 3, documents.weights.shape)
        rows, learned = documents.rows, documents.weights > 0
        tasks = rows.tasks[:, 1:]
        losses = np.array([values[learned & (tasks == task)].mean() for task in range(3)])
        counts = np.array([(learned & (tasks == task)).sum() for task in range(3)])
        factors = weighting.factors(documents)[documents.places]
        assert (documents.weights * factors * values).sum() == pytest.approx(wanted @ (losses * counts / means))
        weighting.update(documents, documents.sums(values[None]))
        wanted = wanted * np.exp(0.5 * losses)
        wanted /= wanted.sum()
        np.testing.assert_allclose(weighting.weights, wanted, rtol=1e-5)


def test_the_tokens_of_a_task_in_a_step_are_those_of_the_mix(shards, tmp_path):
    others = written(tmp_path, ("songs", "letters"))
    batches = Batches([shards, others], [3, 1], LENGTH, BATCH, seed=0)
    assert batches.tasks == [*TASKS, "letters"]
    seen = np.zeros(4)
    for step in range(400):
        documents = StepDocuments(batches(step))
        seen += documents.task_sums(documents.shares, 4) * documents.learned
    np.testing.assert_allclose(batches.task_tokens(), seen / 400, rtol=0.02)


def step_of(*tasks: int) -> StepDocuments:
    """A step of one document of two learned tokens for each task."""
    rows = [([1, 2, 3], [0, 1, 1], [number] * 3, [task] * 3) for number, task in enumerate(tasks)]
    return StepDocuments(Rows(*map(np.array, zip(*rows, strict=True))))


def test_a_task_without_tokens_in_a_step_counts_with_its_last_loss_or_with_the_mean():
    weighting = GroupWeights(GROUPS, TASKS, np.full(3, 2.0))
    weighting.update(step_of(1), np.array([[2.0]]))
    np.testing.assert_allclose(weighting.weights, np.full(3, 1 / 3), rtol=1e-6)
    weighting.update(step_of(0, 1), np.array([[1.0], [0.5]]))  # sums: losses 2 and 1
    weighting.update(step_of(0), np.array([[3.0]]))
    logs = 0.5 * np.array([2 + 3, 1 + 1, 1.5 + 2])
    np.testing.assert_allclose(weighting.weights, np.exp(logs) / np.exp(logs).sum(), rtol=1e-6)


def test_a_rare_task_with_the_same_loss_has_the_same_weight_in_the_end_and_in_the_objective():
    """Task 1 has two tokens in one of eight steps, and task 0 has two in each."""
    weighting, objective = GroupWeights(GROUPS, TASKS[:2], np.array([2, 2 / 8])), np.zeros(2)
    for step in range(80):
        documents = step_of(0, 1) if step % 8 == 0 else step_of(0)
        objective += documents.task_sums(documents.shares * weighting.factors(documents), 2) / 80
        weighting.update(documents, documents.shares[:, None] * 2)
    np.testing.assert_allclose(weighting.weights, [0.5, 0.5], rtol=1e-5)
    np.testing.assert_allclose(objective, [0.5, 0.5], rtol=1e-5)


def test_the_loss_of_a_task_is_its_rejection_rate_with_tvd_pp_whose_value_means_nothing(shards, tmp_path):
    _, weighting = trained(shards, tmp_path, "tvd++", GROUPS, steps=1)
    (line,) = metrics(tmp_path)
    wanted = np.exp(0.5 * (1 - np.array([line[f"acceptance_rate/{task}"] for task in TASKS])))
    np.testing.assert_allclose(weighting.weights, wanted / wanted.sum(), rtol=1e-5)


@pytest.mark.parametrize("robust", [GROUPS, RATIOS], ids=["groups", "ratios"])
def test_a_step_descends_along_the_reweighted_gradient(shards, tmp_path, robust):
    """The second step of a run is a step on the objective with the weights that the first one left."""
    robust = replace(robust, rate=5.0)
    _, weighting = trained(shards, tmp_path / "one", robust=robust, steps=1, clip=1e9)
    documents = step_documents(shards, 1)
    counted = documents.weights * weighting.factors(documents)[documents.places]
    loss, teacher = Loss("kld"), OnlineTeacher(random_llama(vocab_size=V, scale=3))
    drafter, _ = trained(shards, tmp_path / "one again", robust=robust, steps=1, clip=1e9)

    def norm(weights: np.ndarray) -> float:
        rows = documents.rows
        batch = [
            mx.array(rows.ids), mx.array(rows.documents[:, :-1]), mx.array(weights.astype("float32")),
            teacher.load_rows([]), mx.array(1.0), mx.random.key(0),
        ]  # fmt: skip
        settings = TrainingSettings(batch=BATCH, length=LENGTH)
        trainer = Trainer(drafter, objective(loss, teacher), batches_of(shards), settings, tmp_path / "unused")
        _, gradients = trainer._gradients(*batch)
        return np.sqrt(sum((np.array(g, float) ** 2).sum() for _, g in tree_flatten(gradients)))

    trained(shards, tmp_path / "two", robust=robust, steps=2, clip=1e9)
    found = metrics(tmp_path / "two")[1]["gradient_norm"]
    # The schedule of a run of two steps begins with the same rate, so both took the same first step.
    assert found == pytest.approx(norm(counted), rel=1e-4)
    assert found != pytest.approx(norm(documents.weights), rel=1e-3)


# ----------------------------------------------------------------------- likelihood ratios


def features(documents: StepDocuments) -> np.ndarray:
    """Frequencies of the tokens of each document, scaled to norm 1, without its first token [D, V]."""
    found = np.zeros((len(documents.shares), V))
    rows = documents.rows
    for row in range(len(rows.ids)):
        for place in range(1, rows.ids.shape[1]):
            if rows.documents[row, place] == rows.documents[row, place - 1]:
                found[documents.places[row, place - 1], rows.ids[row, place]] += 1
    return found / np.maximum(np.sqrt((found**2).sum(-1, keepdims=True)), 1e-9)


def ratios_of(scores, shares):
    return np.exp(scores) / (shares * np.exp(scores)).sum()


def adversary_objective(scores, shares, losses, penalty):
    """Σ share · r · loss − τ Σ share · r · log r."""
    ratios = ratios_of(scores, shares)
    return (shares * ratios * losses).sum() - penalty * (shares * ratios * np.log(ratios)).sum()


def test_ratios_are_normalized_in_the_step_and_the_softmax_times_the_number_of_equal_documents(shards):
    weighting = LikelihoodRatios(RATIOS, V)
    weighting.state = np.random.default_rng(0).normal(size=V).astype(np.float32)
    documents = step_documents(shards, 0)
    ratios = weighting.factors(documents)
    assert (documents.shares * ratios).sum() == pytest.approx(1)
    np.testing.assert_allclose(ratios, ratios_of(features(documents) @ weighting.state, documents.shares), rtol=1e-5)
    rows = documents.rows
    alike = Rows(
        rows.ids, np.ones_like(rows.mask), np.zeros_like(rows.documents), rows.tasks
    )  # a document for each row
    documents = StepDocuments(alike)
    scores = features(documents) @ weighting.state
    np.testing.assert_allclose(weighting.factors(documents), BATCH * softmax(scores), rtol=1e-5)


@pytest.mark.parametrize("penalty", [1e-6, 0.5, 100.0])
def test_the_adversary_ascends_the_gradient_of_its_penalized_objective(shards, penalty):
    settings = Robust("likelihood-ratio", rate=1e-3, kl_penalty=penalty)
    weighting = LikelihoodRatios(settings, V)
    weighting.state = before = np.random.default_rng(0).normal(size=V).astype(np.float32)
    documents = step_documents(shards, 0)
    losses = np.random.default_rng(1).uniform(0, 3, len(documents.shares))
    known = features(documents)

    def value(parameters):
        return adversary_objective(known @ parameters, documents.shares, losses, penalty)

    gradient = np.zeros(V)
    for token in range(V):
        step = np.zeros(V)
        step[token] = 1e-5
        gradient[token] = (value(before + step) - value(before - step)) / 2e-5
    weighting.update(documents, (documents.shares * losses)[:, None])
    np.testing.assert_allclose((weighting.state - before) / 1e-3, gradient, rtol=1e-2, atol=2e-4 * max(1, penalty))
    small = before + (weighting.state - before) * min(1, 1 / penalty)
    assert value(small.astype(float)) > value(before.astype(float))


def test_documents_with_a_higher_loss_get_higher_ratios_and_the_penalty_limits_them(shards):
    largest = []
    for penalty in (0.01, 0.3, 1e3):
        weighting = LikelihoodRatios(Robust("likelihood-ratio", 1e-3 if penalty > 1 else 0.5, penalty), V)
        for step in range(60):
            documents = step_documents(shards, step)
            losses = np.where(documents.tasks == 1, 2.0, 1.0)
            weighting.update(documents, (documents.shares * losses)[:, None])
        documents = step_documents(shards, 60)
        ratios, known = weighting.factors(documents), documents.shares > 0
        assert ratios[known & (documents.tasks == 1)].min() >= ratios[known & (documents.tasks != 1)].max() - 1e-6
        largest.append(ratios.max())
        shown = weighting.update(documents, np.zeros((len(ratios), 1)))
        probs = documents.shares[known] * ratios[known]
        assert shown["ratio_kl"] == pytest.approx((probs * np.log(ratios[known])).sum(), abs=1e-9)
    assert largest[0] > largest[1] > largest[2]
    assert largest[2] == pytest.approx(1, abs=0.01)


# ----------------------------------------------------------------------- runs


def interrupt_after(last: int):
    def report(step, metrics):
        if step == last:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("robust", [GROUPS, RATIOS], ids=["groups", "ratios"])
@pytest.mark.parametrize(("loss", "top_k"), [("ce", 0), ("tvd++", 0), ("kld", 6)])
def test_a_resumed_run_ends_with_the_same_weights_and_the_same_state(shards, tmp_path, robust, loss, top_k):
    own = TokenShards(shutil.copytree(shards.folder, tmp_path / "answers" / "tokens"))
    given = {"steps": 6, "checkpoint_every": 2, "robust": robust, "top_k": top_k}
    whole, state = trained(own, tmp_path / "whole", loss, **given)
    with pytest.raises(KeyboardInterrupt):
        trained(own, tmp_path / "cut", loss, report=interrupt_after(5), **given)
    again, found = trained(own, tmp_path / "cut", loss, **given)
    assert same(whole, again)
    assert np.array_equal(state.state, found.state)
    untimed = [[{**line, "tokens_per_second": 0} for line in metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert untimed[0] == untimed[1]
    plain, _ = trained(own, tmp_path / "plain", loss, steps=6, top_k=top_k)
    assert not same(whole, plain)


def test_a_checkpoint_without_the_state_is_damaged(shards, tmp_path):
    trained(shards, tmp_path, robust=GROUPS, checkpoint_every=2)
    (checkpoint.checkpoints(tmp_path)[-1] / "robust.safetensors").unlink()
    with pytest.raises(TrainingError, match=r"step-00000004 cannot be read"):
        trained(shards, tmp_path, robust=GROUPS, steps=6)


@pytest.mark.parametrize("robust", [GROUPS, RATIOS], ids=["groups", "ratios"])
@pytest.mark.parametrize("loss", LOSSES)
def test_parts_of_a_batch_add_up_to_the_batch_with_every_loss(shards, tmp_path, robust, loss):
    one, state = trained(shards, tmp_path / "1", loss, robust, steps=2)
    two, found = trained(shards, tmp_path / "2", loss, robust, steps=2, accumulate=2)
    np.testing.assert_allclose(found.state, state.state, atol=1e-5)
    for name, weight in weights(one).items():
        np.testing.assert_allclose(weights(two)[name], weight, atol=2e-5)


def test_group_weights_help_the_worst_task(tmp_path):
    """Three of four documents count upward, and the others, which are harder, jump by one of two distances."""
    random = np.random.default_rng(0)
    with ShardWriter(tmp_path / "tokens", V, "tokens") as writer:
        for number in range(200):
            rare = number % 8 == 0
            steps = random.choice([5, 11], 11) if rare else np.ones(11, int)
            ids = (np.cumsum(steps) + random.integers(0, V)) % V
            writer.add(ids, [0] + [1] * 10, "rare" if rare else "frequent")
        writer.finish()
    shards, worst = TokenShards(tmp_path / "tokens"), {}
    for name, robust in {"plain": None, "groups": Robust("groups", 0.1)}.items():
        given = {"steps": 60, "learning_rate": 0.01, "warmup": 5, "final_rate": 1.0}
        trained(shards, tmp_path / name, "ce", robust, **given)
        worst[name] = np.mean([line["loss/rare"] for line in metrics(tmp_path / name)[-10:] if "loss/rare" in line])
    assert worst["groups"] < worst["plain"] - 0.1


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"method": "worst"}, "robust is 'worst'; use one of groups, likelihood-ratio, or leave it out"),
        ({"method": "groups", "rate": 0.0}, "robust_rate is 0.0; use a positive number"),
        ({"method": "likelihood-ratio", "kl_penalty": -1.0}, "robust_penalty is -1.0; use a positive number"),
        ({"rate": float("nan")}, "robust_rate is nan"),
    ],
)
def test_settings_out_of_range_are_refused(given, complaint):
    with pytest.raises(InvalidRequestError, match=complaint):
        Robust(**given)


def two_processes(folder: str, method: str) -> None:
    """What each process of ``mlx.launch`` runs."""
    rank = mx.distributed.init().rank()
    drafter, weighting = trained(TokenShards(Path(folder) / "tokens"), Path(folder) / "run", robust=Robust(method))
    np.savez(Path(folder) / f"{rank}.npz", state=weighting.state, **weights(drafter))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["groups", "likelihood-ratio"])
def test_two_processes_hold_the_same_state_and_train_what_one_does(tmp_path, method):
    alone, weighting = trained(written(tmp_path), tmp_path / "alone", robust=Robust(method))
    code = f"from tests.training.test_robust import *; two_processes({str(tmp_path)!r}, {method!r})"
    launch = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--"]
    outcome = subprocess.run(
        [*launch, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert outcome.returncode == 0, outcome.stderr
    first, second = (np.load(tmp_path / f"{rank}.npz") for rank in (0, 1))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    np.testing.assert_allclose(first["state"], weighting.state, atol=1e-5)
    for name, weight in weights(alone).items():
        np.testing.assert_allclose(first[name], weight, atol=1e-5)


# ----------------------------------------------------------------------- recipes

RECIPE = f"""
target = "{DEMO / "target"}"

[drafter]
layers = [0, -1]
vocabulary_size = 200
share_embedding = true

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
log_every = 1
evaluate_every = 4
robust = "groups"

[evaluation]
count = 3
max_tokens = 8
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    tasks = {"dogs": "Once upon a time a dog ran {} times.", "cats": "There were {} cats."}
    lines = [{"prompt": text.format(n), "task": task} for n in range(8) for task, text in tasks.items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "small.toml").write_text(RECIPE)
    return tmp_path / "small.toml"


def test_the_tasks_of_prompts_come_to_the_metrics_of_a_recipe(recipe, mlxspec_command):
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 0, outcome.err
    assert TokenShards(recipe.with_suffix("") / "answers" / "tokens").tasks == ["dogs", "cats"]
    *steps, score = metrics(recipe.with_suffix("") / "finetune")
    for line in steps:
        assert line["worst_loss"] == max(line["loss/dogs"], line["loss/cats"])
        assert line["weight/dogs"] + line["weight/cats"] == pytest.approx(1)
        assert line["worst_acceptance_rate"] == min(line["acceptance_rate/dogs"], line["acceptance_rate/cats"])
    assert score["worst_block_efficiency"] == min(score["block_efficiency/dogs"], score["block_efficiency/cats"])
    record = json.loads((recipe.with_suffix("") / "finetune" / "stage.json").read_text())
    assert record["inputs"]["robust"] == "groups"
    recipe.write_text(recipe.read_text().replace('"groups"', '"likelihood-ratio"'))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert "was created with robust = groups, but this run has robust = likelihood-ratio" in outcome.err


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ('"groups"', '"worst"', "finetune: robust is 'worst'; use one of groups, likelihood-ratio"),
        ('"groups"', '"groups"\nrobust_rate = -1', "finetune: robust_rate is -1.0; use a positive number"),
        ('"groups"', '"groups"\nrobust_rat = 1', 'there is no key "robust_rat"; the nearest is "robust_rate"'),
        ("", "", "robust is groups, but the number of tasks is 1; give 2 to 64 tasks"),
    ],
)
def test_a_bad_value_is_one_line_before_any_stage_begins(recipe, mlxspec_command, before, after, complaint):
    recipe.write_text(recipe.read_text().replace(before, after) if before else recipe.read_text())
    if not before:
        lines = (recipe.parent / "prompts.jsonl").read_text().replace("cats", "dogs")
        (recipe.parent / "prompts.jsonl").write_text(lines.replace("There were", "No"))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert complaint in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not recipe.with_suffix("").exists()
