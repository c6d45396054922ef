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
    is_final,
    names,
    stored,
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
        return stored(blocks_of(models))[0]


def blocks_of(models, sampling=None, verification="block") -> CompiledBlocks:
    return CompiledBlocks(ModelPair(*models, lookup=PromptLookup()), sampling or Sampling(), verification)


def whole(figures, **others) -> dict[str, float]:
    return dict.fromkeys([*COARSE, *FINE, "trace"], 1.0) | figures | others


def keep(models, figures) -> None:
    file = costs_file(blocks_of(models))
    file.parent.mkdir(parents=True, exist_ok=True)
    rounds = dict.fromkeys([*COARSE, *FINE], 3)
    file.write_text(figures if isinstance(figures, str) else json.dumps({"seconds": figures, "rounds": rounds}))


def refuse_to_measure(monkeypatch) -> None:
    monkeypatch.setattr(calibration, "measure", lambda *_: pytest.fail("measured again"))


def measure_at_once(monkeypatch, known) -> None:
    def measure(compiled, figures, rounds, progress):
        figures |= known
        rounds |= dict.fromkeys([*COARSE, *FINE], 3)

    monkeypatch.setattr(calibration, "measure", measure)


def test_costs_are_positive_and_grow_with_rows():
    shape = {
        "vocab_size": 300,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
    }  # work, not noise
    costs = calibrate(
        blocks_of((random_llama(num_hidden_layers=6, **shape), random_llama(num_hidden_layers=1, **shape)))
    )
    assert 0 < costs.verify(1) < costs.verify(17)
    assert 0 < costs.draft_step < costs.verify(1)
    assert 0 < costs.draft_read < costs.draft_step
    assert 0 < costs.trace < 5
    assert costs.block(Choice(LOOKUP, 3)) == costs.verify(4) < costs.block(Choice(MODEL, 3))


def test_a_drafted_token_costs_what_one_more_of_them_takes():
    costs = costs_of(whole({"draft 1": 3.0, "draft 4": 9.0}))
    assert (costs.draft_once, costs.draft_step) == (1.0, 2.0)
    disturbed = costs_of(whole({"draft 1": 9.0, "draft 4": 8.0}))
    assert (disturbed.draft_once, disturbed.draft_step) == (0.0, 8.0 / MORE)


@pytest.mark.parametrize("capacities", [(LONG, LONG), (1024, 512)])
def test_what_a_position_adds_comes_from_two_capacities_and_is_never_less_than_nothing(capacities):
    positions, drafters = (capacity - calibration.CAPACITY_STEP for capacity in capacities)
    near = {"rows 1": 1.0, "rows 5": 2.0, "draft 4": 1.0, "draft 1": 0.25, "read": 1.0}
    far = {
        "long rows 1": 1 + 2 * positions,
        "long rows 5": 2 + 14 * positions,
        "long draft 4": 1 + 12 * drafters,
        "long read": 1 + 5 * calibration.READ * drafters,
    }
    costs = costs_of(whole(near | far), *capacities)
    found = (costs.position, costs.position_row, costs.position_draft, costs.position_read)
    assert found == (2.0, 3.0, 3.0, 5.0)
    costs = costs_of(whole(near | dict.fromkeys(far, 0.5)), *capacities)
    assert (costs.position, costs.position_row, costs.position_draft, costs.position_read) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(("context", "longest"), [(200, 256), (900, 1024), (10**6, LONG)])
def test_a_longer_text_is_measured_within_the_context_of_the_model(context, longest):
    compiled = SpeculativeDecoder(
        ModelPair(random_llama(), random_llama(1), context_length=5000, drafter_context_length=context)
    ).compiled
    assert calibration.long_capacities(compiled) == (LONG, longest)
    known = calibration.names(compiled)
    assert ("long read" in known, "long draft 4" in known, "long rows 1" in known) == (*[longest > 256] * 2, True)


def test_a_table_that_was_cut_short_is_cautious():
    costs = costs_of({"rows 1": 2.0, "trace": 0.1})
    assert costs.verify(5) == 10.0
    assert costs.draft_step == 2.0
    assert (costs.position, costs.position_row, costs.position_draft) == (0.0, 0.0, 0.0)


def test_costs_are_measured_once_and_then_known(models, monkeypatch):
    assert not is_final(blocks_of(models))
    monkeypatch.setattr(calibration, "FIRST_CAP", (60.0, 0))
    measured = calibrate(blocks_of(models))
    refuse_to_measure(monkeypatch)
    assert is_final(blocks_of(models))
    assert calibrate(blocks_of(models)) == measured


def test_later_processes_measure_what_is_missing_or_was_measured_too_rarely(models, monkeypatch):
    monkeypatch.setattr(calibration, "ROUNDS", 0)  # as if the time had been over at once
    calibrate(blocks_of(models))
    figures, rounds = stored(blocks_of(models))
    assert figures.keys() == {"rows 1", "trace"}
    monkeypatch.setattr(calibration, "FIRST_CAP", (60.0, 0))
    monkeypatch.setattr(calibration, "LATER_CAP", (60.0, 0))
    monkeypatch.setattr(calibration, "ROUNDS", 2)
    for expected in (2, 4):
        calibrate(blocks_of(models))
        figures, rounds = stored(blocks_of(models))
        assert figures.keys() == {*COARSE, *FINE, "trace"}
        assert set(rounds.values()) == {expected}
    refuse_to_measure(monkeypatch)
    calibrate(blocks_of(models))


def test_a_figure_that_is_measured_again_only_falls(models):
    before = dict.fromkeys([*COARSE, *FINE, "trace"], 0.05) | {"rows 2": 1e-9}  # slower, and faster, than all here
    keep(models, before)
    costs_file(blocks_of(models)).write_text(json.dumps({"seconds": before, "rounds": {}}))
    calibrate(blocks_of(models))
    figures, _ = stored(blocks_of(models))
    assert figures["rows 2"] == 1e-9
    assert figures["rows 5"] < 0.05


class SlowTimer:
    """A timer of a model that takes 0.1 s for each row, on a clock of its own."""

    now = 0.0

    def __init__(self, name, first=0.1):
        self.name, self.count, self.trace, self.first = name, 1, 0.01, first
        self.seconds = 0.1 * (int(name.split()[-1]) if "rows" in name else 1)

    def __call__(self):
        SlowTimer.now += self.seconds + self.first
        self.first = 0.0
        return self.seconds


@pytest.mark.parametrize("first", [0.0, 5.0])
def test_measuring_takes_no_longer_than_the_cap(models, monkeypatch, first):
    """The first block, which compiles kernels, is not counted, however long it takes."""
    SlowTimer.now = 0.0
    monkeypatch.setattr(calibration, "FIRST_CAP", (0.5, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: SlowTimer.now)
    monkeypatch.setattr(calibration, "timer_for", lambda _, name: SlowTimer(name, first if name == "rows 1" else 0.0))
    calibrate(blocks_of(models))
    assert 0.5 < SlowTimer.now - first <= 0.1 + 10 * 0.1
    assert stored(blocks_of(models))[0]["rows 1"] == 0.1


def test_what_is_never_affordable_is_not_tried_again_and_again(models, monkeypatch):
    SlowTimer.now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: SlowTimer.now)
    monkeypatch.setattr(calibration, "timer_for", lambda _, name: SlowTimer(name))
    monkeypatch.setattr(calibration, "FIRST_CAP", (0.0, 10))
    monkeypatch.setattr(calibration, "LATER_CAP", (0.0, 10))
    for _ in range(20):
        calibrate(blocks_of(models))
    assert is_final(blocks_of(models))
    assert "rows 17" not in stored(blocks_of(models))[0]


def test_a_busy_moment_does_not_leave_a_pair_without_figures_for_good(models, monkeypatch):
    """A first process in which a block took 100 times as long; the next ones measure what it could not."""
    monkeypatch.setattr(time, "perf_counter", lambda: SlowTimer.now)

    def busy(factor):
        def timer_for(_, name):
            timer = SlowTimer(name)
            timer.seconds *= factor
            return timer

        return timer_for

    for factor in (100, 0.1, 0.1):
        SlowTimer.now = 0.0
        monkeypatch.setattr(calibration, "timer_for", busy(factor))
        calibrate(blocks_of(models))
    figures, _ = stored(blocks_of(models))
    assert {"rows 1", "rows 2", "rows 5", "rows 9", "rows 17", "draft 4"} <= figures.keys()
    assert figures["rows 1"] == pytest.approx(0.01)


def test_an_interrupted_calibration_keeps_what_it_has_measured(models, monkeypatch):
    def interrupted(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(blocks_of(models), interrupted)
    assert len(stored(blocks_of(models))[0]) > 3


def test_what_another_process_has_written_meanwhile_is_kept(models, figures, monkeypatch):
    def measure(compiled, mine, rounds, progress):
        keep(models, whole({"rows 3": 0.25}))  # the other process
        mine |= {"rows 1": 0.5, "trace": 2.0}

    monkeypatch.setattr(calibration, "measure", measure)
    calibrate(blocks_of(models))
    found, _ = stored(blocks_of(models))
    assert (found["rows 1"], found["rows 3"], found["trace"]) == (0.5, 0.25, 1.0)


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
    "a number beyond all numbers": json.dumps({"seconds": whole({}), "rounds": {}}).replace("1.0", "1" + 400 * "0", 1),
    "rounds that are words": json.dumps({"seconds": whole({}), "rounds": {"rows 1": "a"}}),
}


def test_the_figures_that_are_damaged_below_would_be_taken(models, monkeypatch):
    keep(models, whole({}))
    refuse_to_measure(monkeypatch)
    assert calibrate(blocks_of(models)).draft_read == 1.0 / calibration.READ


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_measured_anew(models, figures, content, monkeypatch):
    keep(models, content)
    measure_at_once(monkeypatch, figures)
    assert not is_final(blocks_of(models))
    assert calibrate(blocks_of(models)) == costs_of(figures)
    assert is_final(blocks_of(models))


def test_a_cache_that_cannot_be_written_costs_only_time(models, figures, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    measure_at_once(monkeypatch, figures)
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
    measure_at_once(monkeypatch, figures)
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


def test_a_timer_does_not_count_a_first_step_that_traces_and_compiles():
    def slow(state):
        time.sleep(0.05 if not slow.traced else 0.0)
        slow.traced = True
        return mx.array(1), state

    slow.traced = False
    timer = Timer(slow, lambda: mx.array(0))
    assert timer() < 0.03
    assert timer.trace >= 0.05
