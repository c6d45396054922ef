"""What is measured of an answer adds up, and an engine is timed from its prompt to its last token."""

import pytest

from mlxspec import Sampling, SpeculativeDecoder
from mlxspec.decoding.drafting import MODEL, Choice
from mlxspec.decoding.policy import Fixed
from mlxspec.evaluation.engines import Answer, mlx_lm_engine, mlxspec_engine, timed


def test_answers_add_up_and_energy_is_unknown_if_it_is_for_one():
    one = Answer(5, 1, 3, 2.0, 0.5, 100, 4.0, (1, 2, 3, 4, 5))
    assert one + one == Answer(10, 2, 6, 4.0, 1.0, 100, 8.0)
    assert (one + Answer(peak_memory_bytes=200, joules=None)).to_dict() == {
        "tokens": 5, "first_tokens": 1, "prompt_tokens": 3, "seconds": 2.0, "first_seconds": 0.5,
        "peak_memory_bytes": 200, "joules": None,
    }  # fmt: skip


@pytest.mark.parametrize("which", ["mlx-lm", "mlxspec"])
def test_an_engine_repeats_a_sampled_answer_with_the_same_seed(demo, which):
    sampling, policy = Sampling(1.0), Fixed(Choice(MODEL, 3))
    engine = {
        "mlx-lm": lambda: mlx_lm_engine(demo, sampling, 12),
        "mlxspec": lambda: mlxspec_engine(SpeculativeDecoder(demo, sampling, policy=policy), 12),
    }[which]()
    one, again, other = (engine([1, 2, 3], seed) for seed in (1, 1, 2))
    assert one.ids == again.ids
    assert one.ids != other.ids
    assert one.tokens == len(one.ids)
    assert 0 < one.first_seconds < one.seconds


def test_the_tokens_of_the_first_block_are_those_that_came_with_the_first_piece():
    answer = timed([1, 2], lambda: iter([[7], [8], [9]]), arrived=lambda: 2)
    assert (answer.first_tokens, answer.tokens, answer.prompt_tokens, answer.ids) == (2, 3, 2, (7, 8, 9))
