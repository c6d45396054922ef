"""A benchmark measures what it says, keeps what it has, and adds up."""

import json

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlxspec
from mlxspec import Drafter, DrafterConfig, InvalidRequestError, ModelPair, PromptLookup, Sampling
from mlxspec.decoding import calibration
from mlxspec.decoding.choice import MODEL, Choice
from mlxspec.decoding.choice import PLAIN as NOTHING
from mlxspec.decoding.stats import DecodingStats
from mlxspec.evaluation import speedup
from mlxspec.evaluation.benchmark import BenchmarkSettings, compared, new_record, run_benchmark, summaries, summary
from mlxspec.evaluation.engines import OURS, PEER, PLAIN
from mlxspec.evaluation.machine import joules, machine
from mlxspec.evaluation.metrics import memory_bound_speedup, parameter_count, step_bytes
from mlxspec.evaluation.pictures import pictures
from mlxspec.evaluation.report import read_record, write_report
from mlxspec.evaluation.speedup import calibrated, profile
from mlxspec.evaluation.tasks import Task, read_tasks
from tests.conftest import random_llama

NAMES = {"target": "a <target>", "drafter": "demo"}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def demo():
    return mlxspec.load()


@pytest.fixture(scope="module")
def record(demo, tmp_path_factory, module_cache):
    tasks = read_tasks(["stories"], demo.tokenizer, 2)
    settings = BenchmarkSettings(rounds=2, max_tokens=24, draft_length=3)
    made = new_record(demo, settings, NAMES)
    made["profile"] = profile(demo, Sampling(), 3, rounds=2)
    made["calibration"] = calibrated(demo, tasks[0].prompts, Sampling(), 1, 16)
    run_benchmark(demo, tasks, settings, made, tmp_path_factory.mktemp("bench") / "b.json")
    return made


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(calibration, "cache_folder", lambda: folder)
        yield


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


def test_what_was_finished_is_on_disk_after_every_round(demo, tmp_path):
    seen = []

    def progress(what, done, total):
        seen.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    tasks, settings = [Task("stories", [[1, 2, 3]])], BenchmarkSettings(rounds=3, max_tokens=8, draft_length=2)
    with pytest.raises(KeyboardInterrupt):
        run_benchmark(demo, tasks, settings, new_record(demo, settings, NAMES), tmp_path / "b.json", progress)
    kept = read_record(tmp_path / "b.json")
    assert seen == [(0, 8), (1, 8), (2, 8), (3, 8)]
    assert not kept["complete"]
    assert len(kept["results"][0]["rounds"]) == 2
    assert summaries(kept)[0]["rounds"] == 2


def test_a_pair_without_a_model_drafter_is_compared_with_plain_only(demo):
    pair = ModelPair(demo.target, PromptLookup(), demo.tokenizer)
    settings = BenchmarkSettings((0.0,), rounds=1, max_tokens=8, draft_length=2)
    made = new_record(pair, settings, NAMES)
    run_benchmark(pair, [Task("mine", [[1, 2, 3]])], settings, made)
    (row,) = summaries(made)
    assert list(row["ratio"]) == [PLAIN]
    assert row["blocks_by"].keys() == {"lookup"}


@pytest.mark.parametrize("given", [
    {"rounds": 0}, {"max_tokens": 0}, {"peer_draft_length": 0}, {"temperatures": (-1,)}, {"temperatures": (1.0, 1.0)},
    {"draft_length": 99}, {"verification": "nope"},
])  # fmt: skip
def test_settings_out_of_range_are_refused(given):
    with pytest.raises(InvalidRequestError, match=r"use|give each once"):
        BenchmarkSettings(**given)


# ----------------------------------------------------------------------- measures


def test_statistics_add_up_position_by_position():
    one, other, whole = DecodingStats(), DecodingStats(), DecodingStats()
    for number, (choice, accepted) in enumerate([(Choice(MODEL, 3), 2), (NOTHING, 0), (Choice(MODEL, 5), 5)]):
        (one if number < 2 else other).add(accepted + 1, choice, accepted)
        whole.add(accepted + 1, choice, accepted)
    assert one + other == whole
    assert DecodingStats.from_dict(whole.to_dict()) == whole
    assert whole.acceptance_by_position == [1, 1, 0.5, 1, 1]
    assert whole.blocks_by == {"model": 2, "none": 1}
    assert whole.drafted_by == {"model": 8, "none": 0}


def test_parameters_are_those_before_quantisation():
    model = random_llama(hidden_size=64, intermediate_size=128, vocab_size=100)
    plain = sum(weight.size for _, weight in tree_flatten(model.parameters()))
    assert parameter_count(model) == plain
    nn.quantize(model, group_size=32, bits=4)
    assert parameter_count(model) == plain


@pytest.mark.parametrize(("tied", "unread"), [(False, 100 * 64 * 4), (True, 0)])
def test_an_embedding_is_read_by_every_step_only_if_it_is_the_head_too(tied, unread):
    model = Drafter(DrafterConfig(100, 64, 128, 1, 2, tie_word_embeddings=tied))
    everything = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    assert step_bytes(model) == everything - unread


def test_mbsu_of_mixed_blocks_charges_what_the_model_drafted(record):
    """Half plain blocks and half of four tokens by the model, all accepted: τ = 3, 2 drafted a block."""
    stats = DecodingStats()
    for choice, accepted in [(Choice(MODEL, 4), 4), (NOTHING, 0)]:
        stats.add(accepted + 1, choice, accepted)
    result = json.loads(json.dumps(record["results"][0]))
    for turn in result["rounds"]:
        turn["blocks"] = stats.to_dict()
    pair = {**record["pair"], "drafter_parameters": 1, "target_parameters": 10}
    assert summary({**record, "pair": pair}, result)["mbsu_parameters"] == pytest.approx(3 / (1 + 0.1 * 2))


def test_mbsu_is_the_papers_formula():
    assert memory_bound_speedup(2.3, 0.0164, 3) == pytest.approx(2.3 / (0.0164 * 3 + 1))


def test_energy_is_summed_over_packages_where_it_can_be_read(tmp_path):
    assert joules(tmp_path) is None
    for name, count in [("intel-rapl:0", "2500000"), ("intel-rapl:1", "1500000"), ("intel-rapl:0:0", "7")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(count)
    assert joules(tmp_path) == 4.0
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert joules(tmp_path) is None


def test_a_profile_has_the_parts_that_were_measured(demo, monkeypatch):
    seconds = {"target_passes": 0.010, "drafter_passes": 0.004, "blocks": 0.016}
    for name, each in seconds.items():
        monkeypatch.setattr(speedup, name, lambda *_, each=each, **__: lambda: each)
    monkeypatch.setattr(speedup, "served_seconds", lambda decoder: 0.017)
    found = profile(demo, Sampling(), 3)
    expected = {"drafting": 0.004, "verification": 0.010, "acceptance": 0.002, "host": 0.001, "block": 0.017}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["outside_the_models"] == pytest.approx(3 / 17)


def test_a_profile_is_of_whole_blocks_whatever_the_context_and_whenever_the_text_ends(demo):
    """A target that says EOS at once, with room for 20 tokens."""
    ending = random_llama(vocab_size=2048, max_position_embeddings=20)
    ending.lm_head.weight = mx.zeros_like(ending.lm_head.weight)  # token 0 at temperature 0
    found = profile(ModelPair(ending, random_llama(1, vocab_size=2048), demo.tokenizer), Sampling(), 3, rounds=2)
    assert found["block"] > 0.5 * found["verification"] > 0


def test_the_calibration_has_every_length_and_is_1_without_a_draft(record):
    lengths = record["calibration"]["lengths"]
    assert [entry["draft_length"] for entry in lengths] == [*range(9), 16]
    assert lengths[0]["predicted"] == lengths[0]["measured"] == 1
    assert all(entry["predicted"] > 0 and entry["measured"] > 0 for entry in lengths)
    assert record["calibration"]["auto"]["measured"] > 0


# ----------------------------------------------------------------------- the report


def test_a_report_is_one_page_that_needs_nothing_beside_it(record, tmp_path):
    page = write_report(record, tmp_path / "report")
    content = page.read_text()
    assert content.count("data:image/png;base64,") == 4
    assert 'src="http' not in content
    assert "<script" not in content
    assert "a &lt;target&gt;" in content
    assert {file.name for file in page.parent.iterdir()} == {
        "index.html", "tasks.png", "acceptance.png", "draft-length.png", "block.png",
    }  # fmt: skip
    assert all((page.parent / f"{name}.png").read_bytes() == image for name, image in pictures(record).items())
    assert all(image.startswith(PNG) for image in pictures(record).values())


def test_a_report_without_calibration_has_only_the_pictures_it_can(record):
    assert set(pictures({**record, "calibration": None, "profile": None}).keys()) == {"tasks", "acceptance"}


def test_pictures_without_matplotlib_say_what_to_install(record, monkeypatch):
    monkeypatch.setattr("mlxspec.evaluation.pictures.can_draw", lambda: False)
    with pytest.raises(InvalidRequestError, match=r"pip install 'mlxspec\[plots\]'"):
        pictures(record)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 1, "results": [{}]}', '{"format": 9, "results": []}'])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InvalidRequestError, match=r"x.json was not written by this version's `mlxspec bench`"):
        read_record(tmp_path / "x.json")


def test_a_record_without_a_finished_round_makes_no_report(record, tmp_path):
    empty = {**record, "results": [{**record["results"][0], "rounds": []}]}
    (tmp_path / "x.json").write_text(json.dumps(empty))
    with pytest.raises(InvalidRequestError, match="interrupted before its first round"):
        write_report(read_record(tmp_path / "x.json"), tmp_path / "out")
