"""What the embedded pair promises."""

import pytest
from mlx.utils import tree_flatten

import mlxspec
from mlxspec import Sampling, SpeculativeDecoder
from mlxspec.models.loading import DEMO
from tests.conftest import decoded, plain_greedy


@pytest.fixture(scope="module")
def demo():
    return mlxspec.load()


def test_it_takes_at_most_4_megabytes():
    assert sum(path.stat().st_size for path in DEMO.rglob("*")) <= 4_000_000


def test_the_drafter_has_about_a_tenth_of_the_targets_weights_or_less(demo):
    stored = mlxspec.models.reading.read_config(DEMO / "target")["quantization"]
    assert stored["bits"] == 4
    target = mlxspec.DrafterConfig.from_dict(mlxspec.models.reading.read_config(DEMO / "target"))
    drafter = sum(weight.size for _, weight in tree_flatten(demo.drafter.parameters()))
    assert drafter <= 0.1 * target.num_parameters


def test_its_greedy_story_is_mlx_lms_own_and_comes_to_an_end(demo):
    prompt = demo.tokenizer.encode("Once upon a time")
    tokens = decoded(SpeculativeDecoder(demo), prompt, 400)
    assert tokens[-1] in demo.eos_token_ids
    assert tokens == plain_greedy(demo.target, prompt, len(tokens))


@pytest.mark.parametrize("temperature", [0, 1])
def test_its_drafter_earns_its_keep(demo, temperature):
    decoder = SpeculativeDecoder(demo, Sampling(temperature, seed=0), draft_length=4)
    for _ in decoder.stream("Once upon a time", max_tokens=200):
        pass
    assert decoder.stats.block_efficiency > 2
