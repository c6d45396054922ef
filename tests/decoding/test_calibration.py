"""What a block costs is measured once for a pair on a device, in a capped time, and then known."""

import json
import math
import time

import mlx.core as mx
import pytest

from mlxspec import ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding import calibration
from mlxspec.decoding.cache import CachedModel
from mlxspec.decoding.calibration import (
    COARSE,
    FINE,
    LONG,
    MORE,
    Timer,
    calibrate,
    costs_file,
    costs_of,
    known_costs,
    names,
    stored_figures,
)
from mlxspec.decoding.compiled import CompiledBlocks
from mlxspec.decoding.drafting import LOOKUP, MODEL, PLAIN, Choice
from tests.conftest import decoded, plain_greedy, random_llama


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def models():
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    return random_llama(num_hidden_layers=6, **shape), random_llama(1, num_hidden_layers=1, **shape)


@pytest.fixture(scope="module")
def figures(models, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(calibration, "cache_folder", lambda: folder)
        calibrate(blocks_of(models))
        return stored_figures(blocks_of(models))


def blocks_of(models, sampling=None, verification="block") -> CompiledBlocks:
    return CompiledBlocks(ModelPair(*models, lookup=PromptLookup()), sampling or Sampling(), verification)


def whole(figures, **others) -> dict[str, float]:
    return dict.fromkeys([*COARSE, *FINE, "trace"], 1.0) | figures | others


def keep(models, figures) -> None:
    file = costs_file(blocks_of(models))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(figures if isinstance(figures, str) else json.dumps({"seconds": figures}))


def refuse_to_measure(monkeypatch) -> None:
    monkeypatch.setattr(calibration, "measured_figures", lambda *_: pytest.fail("measured again"))


def test_costs_are_positive_and_grow_with_rows(figures):
    costs = costs_of(figures)
    assert 0 < costs.verify(1) < costs.verify(17)
    assert 0 < costs.draft_step < costs.verify(1)
    assert 0 < costs.draft_read < costs.draft_step
    assert 0 < costs.trace < 5
    assert costs.block(Choice(LOOKUP, 3)) == costs.verify(4) < costs.block(Choice(MODEL, 3))


def test_a_drafted_token_costs_what_one_more_of_them_takes():
    costs = costs_of(whole({"draft 1": 3.0, "draft 4": 9.0}))
    assert (costs.draft_once, costs.draft_step) == (1.0, 2.0)
    assert costs_of(whole({"draft 1": 9.0, "draft 4": 8.0})).draft_step == 8.0 / MORE


def test_what_a_position_adds_comes_from_two_capacities_and_is_never_less_than_nothing():
    positions = LONG - calibration.CAPACITY_STEP
    near = {"rows 1": 1.0, "rows 5": 2.0, "draft 4": 1.0, "draft 1": 0.25}
    far = {"long rows 1": 1 + 2 * positions, "long rows 5": 2 + 14 * positions, "long draft 4": 1 + 12 * positions}
    costs = costs_of(whole(near | far))
    assert (costs.position, costs.position_row, costs.position_draft) == (2.0, 3.0, 3.0)
    costs = costs_of(whole(near | dict.fromkeys(far, 0.5)))
    assert (costs.position, costs.position_row, costs.position_draft) == (0.0, 0.0, 0.0)


def test_a_table_that_was_cut_short_is_cautious():
    costs = costs_of({"rows 1": 2.0, "trace": 0.1})
    assert costs.verify(5) == 10.0
    assert costs.draft_step == 2.0
    assert (costs.position, costs.position_row, costs.position_draft) == (0.0, 0.0, 0.0)


def test_costs_are_measured_once_and_then_known(models, monkeypatch):
    assert known_costs(blocks_of(models)) is None
    measured = calibrate(blocks_of(models))
    refuse_to_measure(monkeypatch)
    assert known_costs(blocks_of(models)) == calibrate(blocks_of(models)) == measured


def test_measuring_goes_on_where_the_cap_cut_it_short(models, monkeypatch):
    monkeypatch.setattr(calibration, "CAP_SECONDS", 0.0)
    monkeypatch.setattr(calibration, "CAP_PASSES", 0)
    calibrate(blocks_of(models))
    assert stored_figures(blocks_of(models)).keys() < {*COARSE, *FINE, "trace"}
    monkeypatch.setattr(calibration, "CAP_SECONDS", 60.0)
    calibrate(blocks_of(models))
    assert stored_figures(blocks_of(models)).keys() == {*COARSE, *FINE, "trace"}


def test_measuring_takes_no_longer_than_the_cap(models, monkeypatch):
    """With a model whose blocks take 0.1 s for each row: ten of its passes are more than the cap in seconds."""
    monkeypatch.setattr(calibration, "CAP_SECONDS", 0.5)
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def timed(self):
        calls.append(self)
        seconds = 0.1 * (self.rows or 1)
        clock[0] += seconds
        return seconds

    original = calibration.timer_for

    def timer_for(compiled, name):
        timer = original(compiled, name)
        timer.rows = int(name.split()[-1]) if "rows" in name else 0
        return timer

    monkeypatch.setattr(calibration, "timer_for", timer_for)
    monkeypatch.setattr(Timer, "__call__", timed)
    calibrate(blocks_of(models))
    assert len(calls) > 5
    assert clock[0] <= 0.1 + 10 * 0.1


def test_progress_is_told_from_nothing_to_everything(models):
    told = []
    calibrate(blocks_of(models), lambda *numbers: told.append(numbers))
    count = len(COARSE) + len(FINE)
    assert told[0] == (0, count)
    assert told == sorted(told)
    assert told[-1] == (count, count)


def test_without_a_model_drafter_only_rows_are_measured(models):
    lookup = CompiledBlocks(ModelPair(models[0], PromptLookup()), Sampling(), "block")
    assert all("rows" in name for name in names(lookup))


def test_the_blocks_that_were_timed_are_those_that_decoding_uses(models, monkeypatch):
    compiled = blocks_of(models)
    calibrate(compiled)
    assert {PLAIN, Choice(LOOKUP, 4)} <= compiled._blocks.keys()


DAMAGED = {
    "empty": "",
    "cut": "{",
    "a list": "[]",
    "no seconds": "{}",
    "seconds that are a number": '{"seconds": 3}',
    "an unknown figure": whole({"x": 1.0}),
    "no rows": {name: 1.0 for name in (*COARSE, *FINE) if name != "rows 1"},
    "no trace": dict.fromkeys([*COARSE, *FINE], 1.0),
    "words": whole({"rows 1": "a"}),
    "rows for nothing": whole({"rows 1": 0.0}),
    "less than nothing": whole({"read": -1.0}),
    "not a number": whole({"trace": math.nan}),
}


def test_the_figures_that_are_damaged_below_would_be_taken(models, monkeypatch):
    keep(models, whole({}))
    refuse_to_measure(monkeypatch)
    assert known_costs(blocks_of(models)).draft_read == 1.0 / calibration.READ


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_measured_anew(models, figures, content, monkeypatch):
    keep(models, content)
    monkeypatch.setattr(calibration, "measured_figures", lambda *_: figures)
    assert known_costs(blocks_of(models)) is None
    assert calibrate(blocks_of(models)) == costs_of(figures) == known_costs(blocks_of(models))


def test_a_cache_that_cannot_be_written_costs_only_time(models, figures, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(calibration, "measured_figures", lambda *_: figures)
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / "a file")
    assert calibrate(blocks_of(models)) == costs_of(figures)


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
        )
    }
    assert len(files) == 6
    assert costs_file(blocks_of(models, Sampling(0.7, seed=3))) == costs_file(blocks_of(models, Sampling(1.0)))


def test_a_decoder_that_was_not_calibrated_calibrates_itself(models, figures, monkeypatch):
    monkeypatch.setattr(calibration, "measured_figures", lambda *_: figures)
    decoder = SpeculativeDecoder(ModelPair(*models))
    assert not decoder.calibrated
    assert decoded(decoder, [1, 2], 20) == plain_greedy(models[0], [1, 2], 20)
    assert decoder.calibrated
    assert SpeculativeDecoder(ModelPair(*models)).calibrated


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
    again = SpeculativeDecoder(ModelPair(target, drafter), draft_length=3)
    assert decoded(again, [1, 2], 40) == plain_greedy(target, [1, 2], 40)


def test_a_timer_leaves_the_first_trace_out():
    def slow(state):
        time.sleep(0.05 if not slow.traced else 0.0)
        slow.traced = True
        return mx.array(1), state

    slow.traced = False
    timer = Timer(slow, lambda: mx.array(0))
    assert timer() < 0.03
    assert timer.trace >= 0.05
