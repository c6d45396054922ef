"""What a block costs is measured once for a pair on a device, and then known."""

import json
from dataclasses import replace

import pytest
from mlxspec.decoding.choice import LOOKUP, MODEL, BlockCosts, Choice

from mlxspec import ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding import calibration
from mlxspec.decoding.block import CompiledBlocks
from mlxspec.decoding.cache import CAPACITY_STEP, CachedModel
from mlxspec.decoding.calibration import (
    DRAFT,
    LONG,
    MORE,
    are_known,
    costs_file,
    known_costs,
    longer,
    measured_costs,
)
from tests.conftest import decoded, plain_greedy, random_llama


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def models():
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    return random_llama(num_hidden_layers=6, **shape), random_llama(1, num_hidden_layers=1, **shape)


@pytest.fixture(scope="module")
def costs(models):
    return measured_costs(blocks_of(models))


def blocks_of(models, sampling=None, verification="block") -> CompiledBlocks:
    return CompiledBlocks(ModelPair(*models, lookup=PromptLookup()), sampling or Sampling(), verification)


def test_costs_are_positive_and_grow_with_rows(costs):
    assert len(costs.verify) == 17
    assert 0 < costs.verify[0] < costs.verify[16]
    assert costs.draft[MODEL] < costs.verify[0]
    assert costs.draft[LOOKUP] < costs.verify[0]
    assert 0 < costs.catch_up[MODEL] < costs.verify[0]
    drafting = costs.once[MODEL] + 3 * costs.draft[MODEL]
    assert costs.block(Choice(MODEL, 3)) == pytest.approx(costs.verify[3] + drafting)
    assert costs.trace > 0
    assert costs.read < costs.verify[0]
    steps = 4 * costs.draft[MODEL] + 2 * costs.read
    assert costs.stepwise(3, 4, reads=2) == pytest.approx(costs.verify[3] + costs.step_once + steps)


def test_a_longer_text_costs_what_each_position_more_adds():
    near = BlockCosts(tuple(map(float, range(1, 10))), draft={MODEL: 2.0, LOOKUP: 1.0}, longer=(0.25, 0.125, 0.5))
    far = near.behind(4)
    assert far.verify == tuple(rows + 1 + 0.5 * (rows - 1) for rows in range(1, 10))
    assert far.draft == {MODEL: 4.0, LOOKUP: 1.0}
    assert near.behind(0) == replace(near, longer=(0.0, 0.0, 0.0))


def test_what_a_position_adds_comes_from_two_capacities_and_is_never_less_than_nothing(models, costs):
    compiled, positions = blocks_of(models), LONG - CAPACITY_STEP
    near = {1: 1.0, 17: 2.0, (DRAFT, MORE, MORE): 1.0}
    far = {(LONG, 1): 1.0 + 2 * positions, (LONG, 17): 2.0 + 18 * positions}
    far[LONG, DRAFT] = 1.0 + 3 * MORE * positions
    assert longer(compiled, near | far) == (2.0, 1.0, 3.0)
    assert longer(compiled, near | dict.fromkeys(far, 0.5)) == (0.0, 0.0, 0.0)
    assert min(costs.longer) >= 0


def test_they_are_measured_once_and_then_known(models, monkeypatch):
    assert not are_known(blocks_of(models))
    measured = known_costs(blocks_of(models))
    assert are_known(blocks_of(models))
    monkeypatch.setattr(calibration, "measured_costs", lambda compiled: pytest.fail("measured again"))
    assert known_costs(blocks_of(models)) == measured


EACH = {"model": 1.0, "lookup": 0.0}
NUMBERS = {
    "verify": [1.0] * 17,
    "once": EACH,
    "draft": EACH,
    "catch_up": {"model": 1.0},
    "trace": 0.0,
    "longer": [0.0] * 3,
    "step_once": 0.0,
    "read": 0.0,
}
DAMAGED = {
    "empty": "",
    "cut": "{",
    "a list": "[]",
    "no numbers": {},
    "not a list of rows": {"verify": 3},
    "an unknown field": {"x": 1},
    "no rows": NUMBERS | {"verify": []},
    "words": NUMBERS | {"verify": ["a"] * 17},
    "rows for nothing": NUMBERS | {"verify": [0.0] * 17},
    "no drafters": NUMBERS | {"draft": None},
    "another drafter": NUMBERS | {"draft": {"model": 1.0}},
    "steps for nothing": NUMBERS | {"draft": {"model": 0.0, "lookup": 0.0}},
    "no steps": {name: value for name, value in NUMBERS.items() if name != "step_once"},
    "nothing caught up": NUMBERS | {"catch_up": {}},
    "a length of one": NUMBERS | {"longer": [0.0]},
    "a read that is no number": NUMBERS | {"read": "a"},
    "no number": NUMBERS | {"trace": float("nan")},
}


def test_the_numbers_that_are_damaged_below_would_be_taken(models, monkeypatch):
    costs_file(blocks_of(models)).parent.mkdir(parents=True)
    costs_file(blocks_of(models)).write_text(json.dumps({"costs": NUMBERS}))
    monkeypatch.setattr(calibration, "measured_costs", lambda compiled: pytest.fail("measured again"))
    assert known_costs(blocks_of(models)).catch_up == {"model": 1.0}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_measured_anew(models, costs, content, monkeypatch):
    compiled = blocks_of(models)
    costs_file(compiled).parent.mkdir(parents=True)
    costs_file(compiled).write_text(content if isinstance(content, str) else json.dumps({"costs": content}))
    monkeypatch.setattr(calibration, "measured_costs", lambda compiled: costs)
    assert known_costs(blocks_of(models)) == costs
    assert json.loads(costs_file(compiled).read_text())["costs"]["trace"] == costs.trace


def test_a_cache_that_cannot_be_written_costs_only_time(models, costs, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(calibration, "measured_costs", lambda compiled: costs)
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / "a file")
    assert known_costs(blocks_of(models)) == costs


def test_another_pair_sampling_or_rule_has_other_costs(models):
    target, drafter = models
    files = {
        costs_file(compiled)
        for compiled in (
            blocks_of(models),
            blocks_of((drafter, drafter)),
            blocks_of((target, target)),
            blocks_of(models, Sampling(1.0)),
            blocks_of(models, Sampling(1.0, top_p=0.9)),
            blocks_of(models, verification="token"),
            CompiledBlocks(ModelPair(target, drafter), Sampling(), "block"),
        )
    }
    assert len(files) == 7
    assert costs_file(blocks_of(models, Sampling(0.7, seed=3))) == costs_file(blocks_of(models, Sampling(1.0)))


@pytest.mark.parametrize("traced", range(1, 26, 4))
def test_an_interruption_while_costs_are_measured_spoils_neither_models_nor_decoder(monkeypatch, traced):
    target, drafter = random_llama(vocab_size=60, scale=4), random_llama(1, vocab_size=60)
    decoder = SpeculativeDecoder(ModelPair(target, drafter))
    original, calls = CachedModel.__call__, 0

    def interrupted(self, *arguments):
        nonlocal calls
        calls += 1
        result = original(self, *arguments)
        if calls == traced:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(CachedModel, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoded(decoder, [1, 2], 20)
    monkeypatch.undo()
    assert decoded(SpeculativeDecoder(ModelPair(target, drafter), draft_length=3), [1, 2], 40) == plain_greedy(
        target, [1, 2], 40
    )
