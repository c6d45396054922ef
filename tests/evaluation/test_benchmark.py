"""A benchmark measures what it says, keeps what it has, and adds up."""

import json

import mlx.core as mx
import pytest

from mlxspec import InvalidRequestError, ModelPair, PromptLookup
from mlxspec.decoding.drafting import MODEL, Choice
from mlxspec.decoding.drafting import PLAIN as NO_DRAFT
from mlxspec.decoding.stats import DecodingStats
from mlxspec.evaluation.benchmark import (
    BenchmarkSettings,
    compared,
    machine,
    new_record,
    run_benchmark,
    slowdown,
    summaries,
    summary,
    throttled,
)
from mlxspec.evaluation.engines import OURS, PEER, PLAIN
from mlxspec.evaluation.report import read_record
from mlxspec.evaluation.tasks import Task


def test_every_engine_answers_every_prompt_in_every_round(record):
    assert record["complete"]
    assert [(r["task"], r["sampling"]["temperature"], len(r["rounds"])) for r in record["results"]] == [
        ("stories", 0.0, 2),
        ("stories", 1.0, 2),
    ]
    for result in record["results"]:
        for turn in result["rounds"]:
            assert list(turn["engines"]) == [PLAIN, PEER, OURS]
            assert all(0 < engine["tokens"] <= 48 for engine in turn["engines"].values())
            assert all(0 < engine["first_seconds"] < engine["seconds"] for engine in turn["engines"].values())
    assert all(turn["same_text"] == 2 for turn in record["results"][0]["rounds"])


def test_its_summary_is_of_the_blocks_that_were_decoded(record):
    greedy, sampled = summaries(record)
    assert greedy["same_text"] is True
    assert sampled["same_text"] is None
    assert 1 < greedy["block_efficiency"] <= 4
    assert len(greedy["acceptance_by_position"]) == 3
    ratio = greedy["ratio"][PLAIN]
    assert ratio["least"] <= ratio["median"] <= ratio["most"]
    assert greedy["mbsu_parameters"] > greedy["mbsu_step_bytes"]  # the drafter is in 16 bits, the target in 4


def test_the_record_names_machine_and_versions(record):
    assert record["machine"] == machine()
    assert record["machine"]["mlx"] == mx.__version__
    assert record["pair"]["target_parameters"] == 3_737_856


def test_a_record_over_itself_is_1_everywhere(record):
    rows = compared(record, record)
    assert len(rows) == 2
    assert all(row[name] == 1 for row in rows for name in ("block_efficiency", "tokens_per_second", "over_plain"))


def test_what_was_finished_is_on_disk_after_every_round(demo, names, tmp_path):
    """Interrupted when the first of three engines begins the third round that counts."""
    seen = []

    def progress(what, done, total):
        seen.append((done, total))
        if done == 9:
            raise KeyboardInterrupt

    tasks, settings = [Task("stories", [[1, 2, 3]])], BenchmarkSettings(rounds=3, max_tokens=8, draft_length=2)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(demo, tasks, settings, new_record(demo, settings, names), tmp_path / "b.json", progress)
    kept = read_record(tmp_path / "b.json")
    assert seen == [(done, 24) for done in range(10)]  # 4 rounds of 3 engines, at 2 temperatures
    assert not kept["complete"]
    assert len(kept["results"][0]["rounds"]) == 2
    assert summaries(kept)[0]["rounds"] == 2


def test_a_pair_without_a_model_drafter_is_compared_with_plain_only(demo, names):
    pair = ModelPair(demo.target, PromptLookup(), demo.tokenizer)
    settings = BenchmarkSettings((0.0,), rounds=1, max_tokens=8, draft_length=2)
    made = new_record(pair, settings, names)
    run_benchmark(pair, [Task("mine", [[1, 2, 3]])], settings, made)
    (row,) = summaries(made)
    assert list(row["ratio"]) == [PLAIN]
    assert row["blocks_by"].keys() == {"lookup"}


@pytest.mark.parametrize("given", [
    {"rounds": 0}, {"max_tokens": 0}, {"peer_draft_length": 0}, {"temperatures": (-1,)}, {"temperatures": (1.0, 1.0)},
    {"draft_length": 99}, {"verification": "nope"}, {"pause": -1.0}, {"pause": float("nan")},
])  # fmt: skip
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(InvalidRequestError, match=r"use|give each once"):
        BenchmarkSettings(**given)


# ----------------------------------------------------------------------- throttling


def rounds_of(*speeds):
    """Rounds of two engines with these tokens per second."""
    return [{"engines": {name: {"tokens": speed * 2, "seconds": 2.0} for name, speed in zip("ab", pair, strict=True)}}
            for pair in speeds]  # fmt: skip


@pytest.mark.parametrize(("speeds", "lost"), [
    ([(100, 200), (10, 20), (80, 150)], 0.2),
    ([(100, 200), (80, 210)], 0.0),  # the text of a round slowed down one engine
    ([(100, 200)], 0.0),
])  # fmt: skip
def test_the_slowdown_is_what_every_engine_lost_from_the_first_round_to_the_last(speeds, lost):
    assert slowdown(rounds_of(*speeds)) == pytest.approx(lost)


def test_a_machine_that_was_throttled_is_named_in_one_line(record):
    assert all(0 <= result["slowdown"] < 1 for result in record["results"])
    steady, hot = ({"results": [{"slowdown": 0.0}, {"slowdown": loss}]} for loss in (0.1, 0.17))
    assert throttled(steady) == ""
    assert "every engine was at least 17% slower than in the first" in throttled(hot)
    assert throttled({"results": [{"rounds": []}]}) == ""  # of an earlier version


# ----------------------------------------------------------------------- sums


def test_statistics_add_up_position_by_position():
    one, other, whole = DecodingStats(), DecodingStats(), DecodingStats()
    for number, (choice, accepted) in enumerate([(Choice(MODEL, 3), 2), (NO_DRAFT, 0), (Choice(MODEL, 5), 5)]):
        (one if number < 2 else other).add(accepted + 1, choice, accepted)
        whole.add(accepted + 1, choice, accepted)
    assert one + other == whole
    assert DecodingStats.from_dict(whole.to_dict()) == whole
    assert whole.acceptance_by_position == [1, 1, 0.5, 1, 1]
    assert whole.blocks_by == {"model": 2, "none": 1}
    assert whole.drafted_by == {"model": 8, "none": 0}


def test_mbsu_of_mixed_blocks_charges_what_the_model_drafted(record):
    """Half plain blocks and half of four tokens by the model, all accepted: τ = 3, 2 drafted a block."""
    stats = DecodingStats()
    for choice, accepted in [(Choice(MODEL, 4), 4), (NO_DRAFT, 0)]:
        stats.add(accepted + 1, choice, accepted)
    result = json.loads(json.dumps(record["results"][0]))
    for turn in result["rounds"]:
        turn["blocks"] = stats.to_dict()
    pair = {**record["pair"], "drafter_parameters": 1, "target_parameters": 10}
    assert summary({**record, "pair": pair}, result)["mbsu_parameters"] == pytest.approx(3 / (1 + 0.1 * 2))
