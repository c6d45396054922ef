"""The cost of a block is arithmetic on a table of seconds."""

from dataclasses import replace

from mlxspec.decoding.cache import CAPACITY_STEP, capacity_for
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import LOOKUP, MODEL, PLAIN, Choice

TABLE = BlockCosts({1: 10.0, 3: 12.0, 5: 11.0, 9: 19.0}, draft_once=1.0, draft_step=0.5)


def test_rows_that_were_not_measured_lie_between_those_that_were():
    assert [TABLE.verify(rows) for rows in range(1, 10)] == [10, 11, 12, 11.5, 11, 13, 15, 17, 19]


def test_beyond_the_last_measured_row_the_slope_goes_on():
    assert TABLE.verify(17) == 19 + 8 * 2


def test_rows_never_cost_less_than_one_row():
    assert BlockCosts({1: 10.0, 2: 10.0, 5: 4.0}).verify(9) == 10


def test_where_only_one_row_was_measured_each_row_costs_the_same():
    assert BlockCosts({1: 2.0}).verify(5) == 10


def test_only_the_model_pays_for_its_drafts():
    assert TABLE.block(PLAIN) == 10
    assert TABLE.block(Choice(LOOKUP, 4)) == 11
    assert TABLE.block(Choice(MODEL, 4)) == 11 + 1 + 4 * 0.5


def test_a_longer_text_costs_what_each_position_adds():
    far = replace(TABLE, position=0.25, position_row=0.125, position_draft=0.5).at_length(CAPACITY_STEP + 4)
    more = capacity_for(CAPACITY_STEP + 4) - CAPACITY_STEP
    assert far.rows == {m: TABLE.rows[m] + more * (0.25 + (m - 1) * 0.125) for m in TABLE.rows}
    assert far.draft_step == 0.5 + more * 0.5
    assert TABLE.at_length(5) == TABLE


def test_reading_costs_more_after_a_longer_text():
    table = replace(TABLE, draft_read=2.0, position_read=0.5)
    assert table.reading(10, 10) == 10 * (2 + 0.5 * 5)
    assert table.reading(10, 1000) == 10 * (2 + 0.5 * 995) == table.at_length(1000).reading(10, 1000)
    in_parts = sum(table.reading(10, length) for length in range(10, 101, 10))
    assert table.reading(100, 100) == in_parts
