"""What a block costs is measured once for a pair on a device, and then known."""

import json

import pytest

from mlxspec import ModelPair, PromptLookup, Sampling, SpeculativeDecoder
from mlxspec.decoding import calibration
from mlxspec.decoding.calibration import are_known, costs_file, known_costs, measured_costs
from mlxspec.decoding.draft_length import LOOKUP, MODEL, Choice
from tests.conftest import random_llama


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / "cache")


@pytest.fixture(scope="module")
def models():
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128}
    return random_llama(num_hidden_layers=6, **shape), random_llama(1, num_hidden_layers=1, **shape)


def decoder_for(models, sampling=None, **options) -> SpeculativeDecoder:
    return SpeculativeDecoder(ModelPair(*models, lookup=PromptLookup()), sampling, **options)


def test_costs_are_positive_and_grow_with_rows(models):
    costs = measured_costs(decoder_for(models))
    assert len(costs.verify) == 9
    assert 0 < costs.verify[0] < costs.verify[8]
    assert costs.draft[MODEL] < costs.verify[0]
    assert costs.draft[LOOKUP] < costs.verify[0]
    assert 0 < costs.catch_up[MODEL] < costs.verify[0]
    assert costs.block(Choice(MODEL, 3)) == costs.verify[3] + 3 * costs.draft[MODEL]
    assert costs.trace > 0


def test_they_are_measured_once_and_then_known(models, monkeypatch):
    assert not are_known(decoder_for(models))
    measured = known_costs(decoder_for(models))
    assert are_known(decoder_for(models))
    monkeypatch.setattr(calibration, "measured_costs", lambda decoder: pytest.fail("measured again"))
    assert known_costs(decoder_for(models)) == measured


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"costs": {}}', '{"costs": {"verify": 3}}', '{"costs": {"x": []}}']
)
def test_a_damaged_file_is_measured_anew(models, content, monkeypatch):
    decoder = decoder_for(models)
    measured = known_costs(decoder)
    costs_file(decoder).write_text(content)
    monkeypatch.setattr(calibration, "measured_costs", lambda decoder: measured)
    assert known_costs(decoder_for(models)) == measured
    assert json.loads(costs_file(decoder).read_text())["costs"]["trace"] == measured.trace


def test_a_cache_that_cannot_be_written_costs_only_time(models, monkeypatch, tmp_path):
    (tmp_path / "a file").write_text("")
    monkeypatch.setattr(calibration, "cache_folder", lambda: tmp_path / "a file")
    assert known_costs(decoder_for(models)).verify[0] > 0


def test_another_pair_sampling_or_rule_has_other_costs(models):
    target, drafter = models
    files = {
        costs_file(decoder)
        for decoder in (
            decoder_for(models),
            decoder_for((drafter, drafter)),
            decoder_for((target, target)),
            decoder_for(models, Sampling(1.0)),
            decoder_for(models, Sampling(1.0, top_p=0.9)),
            decoder_for(models, verification="token"),
            SpeculativeDecoder(ModelPair(target, drafter)),
        )
    }
    assert len(files) == 7
    assert costs_file(decoder_for(models, Sampling(0.7, seed=3))) == costs_file(decoder_for(models, Sampling(1.0)))
