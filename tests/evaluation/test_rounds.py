"""Engines take turns, warm-up rounds do not count, and ratios are taken within a round."""

import time

import pytest

from mlxspec.evaluation.rounds import by_engine, interleaved, ratio, seconds, spread, tokens_per_second


def test_every_engine_runs_once_in_each_round_and_warm_up_rounds_do_not_count():
    ran = []

    def engine(name):
        return lambda number: ran.append((number, name)) or 10 * number

    found = by_engine(interleaved({"a": engine("a"), "b": engine("b")}, rounds=2, warm_up=1))
    assert ran == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert found == {"a": [10, 20], "b": [10, 20]}


def test_a_round_is_yielded_before_the_next_one_runs():
    ran = []
    rounds = interleaved({"a": ran.append}, rounds=3, warm_up=2)
    next(rounds)
    assert ran == [0, 1, 2]


def test_progress_counts_every_run_and_ends_with_all():
    seen = []
    engines = {"a": lambda number: 0, "b": lambda number: 0}
    list(interleaved(engines, 1, 1, lambda done, total: seen.append((done, total))))
    assert seen == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_ratios_are_taken_within_a_round():
    found = ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0])
    assert (found.median, found.least, found.most) == (3.0, 2.0, 4.0)
    assert str(found) == "3.00 (2.00-4.00)"
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ratio([1.0], [1.0, 2.0])


def test_a_spread_of_one_round_is_that_round():
    assert spread([5.0]).to_dict() == {"median": 5.0, "least": 5.0, "most": 5.0}


def test_seconds_and_tokens_per_second_are_of_the_run_alone():
    def engine(number):
        time.sleep(0.02)
        return [1] * 5

    assert 0.02 <= seconds(engine)(0) < 0.2
    assert 5 / 0.2 < tokens_per_second(engine)(0) <= 5 / 0.02
