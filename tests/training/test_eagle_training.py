"""Training EAGLE heads. The oracle drafts from every position on its own, in float64."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxspec.models.eagle import EAGLE1, EAGLE3
from mlxspec.models.from_target import eagle_from_target
from mlxspec.models.loading import DEMO
from mlxspec.models.reading import read_lazily
from mlxspec.training.batches import Batches
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import STEP_DECAY, Batch, eagle_objective, weighted_sums
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.teachers import CachedTeacher, OnlineTeacher
from mlxspec.training.trainer import Trainer
from tests.conftest import random_llama
from tests.models.eagle_oracle import EagleOracle, softmax
from tests.models.test_eagle import SMALLER, VOCAB, random_head, states_of, stored, target

STEPS = 3


def expected_rates(head, model, text, folder):
    """Σ min(p, q) of each draft step for a draft from each position of one document, along the document's tokens."""
    head.save(folder)
    tables = {"target.embed": model.model.embed_tokens.weight, "target.head": model.lm_head.weight}
    reference = EagleOracle({**stored(folder), **tables}, json.loads((folder / "config.json").read_text()))
    true = reference.features(states_of(model, head, text))
    p = softmax(np.array(model(mx.array([text]))[0], np.float64))
    rates = [[] for _ in range(STEPS)]
    for row in range(len(text) - 2):  # the first row of a draft
        features = true[: row + 1]
        for step in range(min(STEPS, len(text) - 2 - row)):
            last = reference.rows(text[1 : row + step + 2], features)[-1]
            rates[step].append(np.minimum(p[row + step + 1], softmax(reference.logits(last))).sum())
            features = np.concatenate([features, last[None]])
    return rates


@pytest.mark.parametrize("tokens", [None, SMALLER], ids=["all tokens", "fewer"])
@pytest.mark.parametrize("read_layers", [None, [0, 5]])
def test_the_unrolled_loss_is_that_of_drafts_from_every_position(tmp_path, read_layers, tokens):
    model = target()
    head = random_head(model, EAGLE3, tokens=tokens, read_layers=read_layers)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, VOCAB, 9).tolist(), rng.integers(0, VOCAB, 5).tolist()
    ids = mx.array([[*first, *second, 0]])
    documents = mx.array([[0] * 9 + [1] * 5])
    counted = mx.array([[1] * 8 + [0] + [1] * 4 + [0]])  # positions whose next token is of the same document
    batch = Batch(ids, documents, counted / 14, (), mx.array(1.0), mx.random.key(0))
    teacher = OnlineTeacher(model, True, head.layers_read(6))
    value, values = eagle_objective(Loss("tvd"), teacher, STEPS)(head, batch)
    mean, *rates = weighted_sums(batch, values).tolist()
    assert abs(mean - value.item()) < 1e-6
    both = [[sum(step) for step in expected_rates(head, model, text, tmp_path)] for text in (first, second)]
    expected = np.sum(both, axis=0)
    np.testing.assert_allclose(np.array(rates) * 14, expected, atol=1e-4)
    shares = np.array([STEP_DECAY**step for step in range(STEPS)])
    counts = np.array([9 + 5 - 4 - 2 * step for step in range(STEPS)])
    losses = (counts - expected) / 14  # TVD = 1 − Σ min(p, q)
    if tokens is None:
        assert abs(value.item() - (shares / shares.sum() * losses).sum()) < 1e-4
    assert 0 < value.item() < 1


@pytest.mark.parametrize("tokens", [None, SMALLER], ids=["all tokens", "fewer"])
def test_stored_states_and_all_probabilities_give_the_loss_of_a_target_that_runs(tmp_path, tokens):
    model = target()
    head = random_head(model, EAGLE3, tokens=tokens, read_layers=[0, 3, 5])
    rng = np.random.default_rng(1)
    with ShardWriter(tmp_path, VOCAB, "x") as writer:
        for length in (9, 7, 16):
            ids = rng.integers(0, VOCAB, length)
            writer.add(ids, np.ones_like(ids))
        writer.finish()
    batches = Batches([TokenShards(tmp_path)], [1.0], 16, 2, seed=0)
    chosen = [(0, 0), (0, 1)]
    rows = batches.read(chosen)
    weights = mx.array((rows.mask[:, 1:] / rows.mask[:, 1:].sum()).astype(np.float32))
    ids, documents = mx.array(rows.ids), mx.array(rows.documents[:, :-1])
    found = []
    for teacher in (
        OnlineTeacher(model, True, (0, 3, 5)),
        CachedTeacher(model, batches, VOCAB, VOCAB - 1, 0.7, "t", True, (0, 3, 5)),
        CachedTeacher(model, batches, VOCAB, VOCAB - 1, 0.7, "t", True, (0, 3, 5)),  # reads what the first one stored
    ):
        batch = Batch(ids, documents, weights, teacher.load_rows(chosen), mx.array(0.7), mx.random.key(0))
        _, values = eagle_objective(Loss("kld"), teacher, STEPS)(head, batch)
        found.append(weighted_sums(batch, values).tolist())
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3)  # the stored values have 16 bits
    assert found[2] == found[1]


def test_heads_that_read_other_layers_have_stores_of_their_own(tmp_path):
    model = target()
    with ShardWriter(tmp_path, VOCAB, "x") as writer:
        writer.add([1] * 16, [1] * 16)
        writer.finish()
    batches = Batches([TokenShards(tmp_path)], [1.0], 15, 1, seed=0)
    for layers in (None, (0, 3, 5), (0, 3, 4), (0, 5)):
        CachedTeacher(model, batches, VOCAB, 4, 1.0, "t", True, layers).load_rows([(0, 0)])
    assert len(list(tmp_path.glob("teacher-t-*"))) == 4


@pytest.mark.parametrize("part", ["ids", "logprobs", "states"])
def test_a_store_that_lost_the_end_of_a_file_is_filled_again(tmp_path, part):
    model = target()
    with ShardWriter(tmp_path, VOCAB, "x") as writer:
        for _ in range(3):
            writer.add([1, 2, 3] * 5, [1] * 15)
        writer.finish()
    batches, rows = Batches([TokenShards(tmp_path)], [1.0], 14, 3, seed=0), [(0, 0), (0, 1), (0, 2)]

    def stored_rows():
        return CachedTeacher(model, batches, VOCAB, 4, 1.0, "t", True, (0, 3, 5)).load_rows(rows)

    whole = stored_rows()
    (file,) = tmp_path.glob(f"teacher-*/{part}")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    for before, after in zip(whole, stored_rows(), strict=True):
        assert mx.array_equal(before, after)


def test_hidden_states_beyond_16_bits_are_stored_as_the_largest_number(tmp_path):
    model = target()
    model.model.embed_tokens.weight = model.model.embed_tokens.weight * 1e7
    model.set_dtype(mx.bfloat16)
    with ShardWriter(tmp_path, VOCAB, "x") as writer:
        writer.add([1, 2, 3] * 5, [1] * 15)
        writer.finish()
    batches = Batches([TokenShards(tmp_path)], [1.0], 14, 1, seed=0)
    *_, states = CachedTeacher(model, batches, VOCAB, 4, 1.0, "t", True, (0, 3, 5)).load_rows([(0, 0)])
    assert mx.abs(states).max() == 65504


RECIPE = f"""
target = "{DEMO / "target"}"

[drafter]
kind = "eagle"
vocabulary_size = 200

[distill]
samples = 24
temperatures = [1.0]
max_tokens = 40
group = 24

[[finetune]]
loss = "kld"
steps = 6
batch = 4
length = 32
checkpoint_every = 2
learning_rate = 2e-3

[[finetune]]
loss = "tvd++"
steps = 4
batch = 4
length = 32
teacher_top_k = 16
fake_quantize = "4"
draft_steps = 2
evaluate_every = 2

[evaluation]
count = 1
max_tokens = 8
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "a recipe.toml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_trains_a_head_that_drafts_and_a_second_run_skips_its_stages(recipe, mlxspec_command):
    first = mlxspec_command("train", "run", str(recipe))
    assert first.status == 0, first.err
    assert [line.split(":")[0] for line in first.err.splitlines()] == ["answers", "start", "finetune-1", "finetune-2"]
    assert "% of the answers' tokens are in its vocabulary" in first.err
    head = recipe.with_suffix("") / "finetune-2" / "drafter"
    assert first.out.startswith(f"{head}, block efficiency ")
    lines = (head.parent.parent / "finetune-1" / "metrics.jsonl").read_text().splitlines()
    assert {"acceptance_rate", "acceptance_rate_2", "acceptance_rate_3"} <= json.loads(lines[-1]).keys()
    again = mlxspec_command("train", "run", str(recipe))
    assert (again.status, again.out, again.err) == (0, first.out, "")
    options = ("--drafter", str(head), "--draft-length", "2", "--max-tokens", "12", "--quantize-drafter", "4")
    served = mlxspec_command("generate", "Once", "--target", str(DEMO / "target"), *options)
    assert served.status == 0, served.err
    assert served.out == mlxspec_command("generate", "Once", "--drafter", "none", "--max-tokens", "12").out


def test_the_dry_run_of_a_head_tells_memory_and_time(recipe, mlxspec_command):
    outcome = mlxspec_command("train", "run", str(recipe), "--dry-run")
    assert outcome.status == 0, outcome.err
    assert len([line for line in outcome.out.splitlines() if line.lstrip().startswith("finetune-")]) == 2


def test_a_head_that_was_interrupted_in_training_ends_with_the_same_weights(recipe, mlxspec_command, monkeypatch):
    assert mlxspec_command("train", "run", str(recipe)).status == 0
    folder = recipe.with_suffix("")
    whole = stored(folder / "finetune-2" / "drafter")
    for stage in ("finetune-1", "finetune-2"):
        shutil.rmtree(folder / stage)
    original = Trainer._save

    def interrupted(self, done):
        original(self, done)
        if done in (2, 4) and not (folder / f"stopped-{done}").exists():
            (folder / f"stopped-{done}").touch()
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", interrupted)
    statuses = [mlxspec_command("train", "run", str(recipe)).status for _ in range(3)]
    assert statuses[:2] == [130, 130]
    assert statuses[2] == 0
    resumed = stored(folder / "finetune-2" / "drafter")
    assert resumed.keys() == whole.keys()
    assert all(mx.array_equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('kind = "eagle"', 'kind = "eagle3"', "kind is 'eagle3'; use eagle, the only kind"),
        ('kind = "eagle"', 'kind = "eagle"\nhidden_size = 64', '"hidden_size" is not a key of an EAGLE head'),
        ('kind = "eagle"', 'kind = "eagle"\nlayer = 9', "use numbers from -4 to 3"),
        ('kind = "eagle"', 'kind = "eagle"\nread_layers = [1, 2, 4]', "reads layer 4, and the target has 4 layers"),
        ('loss = "kld"', 'loss = "ce"', "cannot be trained with loss ce"),
        ('loss = "kld"', 'loss = "kld"\ndraft_steps = 0', "draft_steps is 0; use 1 to 8"),
        ("length = 32", "length = 1", "length is 1, but an EAGLE head takes 3 draft steps; use a larger length"),
        ("length = 32", "length = 3", "length is 3, but an EAGLE head takes 3 draft steps; use a larger length"),
        ("length = 32", "length = 8\ndraft_steps = 8", "length is 8, but an EAGLE head takes 8 draft steps"),
    ],
)
def test_a_wrong_recipe_of_a_head_is_one_line_before_any_stage(recipe, mlxspec_command, old, new, words):
    recipe.write_text(RECIPE.replace(old, new, 1))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert words in outcome.err.splitlines()[-1]
    assert not (recipe.with_suffix("") / "answers" / "tokens").exists()


def test_a_head_is_trained_on_rows_one_longer_than_its_draft_steps(recipe, mlxspec_command):
    short = RECIPE.split("[[finetune]]")
    recipe.write_text(short[0] + "[[finetune]]" + short[1].replace("length = 32", "length = 4"))
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 0, outcome.err


def test_an_eagle_1_head_is_not_trained(recipe, tmp_path, mlxspec_command):
    whole, _ = read_lazily(DEMO / "target")
    random_head(whole, EAGLE1).save(tmp_path / "one")
    parts = RECIPE.split("[drafter]")
    recipe.write_text(f'{parts[0]}drafter = "{tmp_path / "one"}"\n\n[distill]{parts[1].split("[distill]")[1]}')
    outcome = mlxspec_command("train", "run", str(recipe))
    assert outcome.status == 2
    assert "the drafter is an EAGLE-1 head; only EAGLE-3 heads can be trained" in outcome.err


def test_training_makes_a_head_draft_better():
    model = random_llama(5, vocab_size=VOCAB, num_hidden_layers=6, scale=2)
    head = eagle_from_target(model)
    teacher = OnlineTeacher(model, True, head.layers_read(6))
    goal = eagle_objective(Loss("kld"), teacher)
    ids = mx.array(np.random.default_rng(0).integers(0, VOCAB, (8, 33)))
    shape = (8, 32)
    batch = Batch(ids, mx.zeros(shape, mx.int32), mx.full(shape, 1 / 256), (), mx.array(1.0), mx.random.key(0))
    optimizer = optim.Adam(3e-3)
    step = nn.value_and_grad(head, lambda head: goal(head, batch))
    before = weighted_sums(batch, goal(head, batch)[1])
    for _ in range(30):
        _, gradients = step(head)
        optimizer.update(head, gradients)
        mx.eval(head.parameters(), optimizer.state)
    after = weighted_sums(batch, goal(head, batch)[1])
    assert after[0] < before[0]
    assert (after[1:] > before[1:]).all()
