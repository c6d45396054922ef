"""What a cached teacher stores is the target's distribution, whatever order and batch it is asked for in."""

import mlx.core as mx
import numpy as np
import pytest

from mlxspec.errors import InvalidRequestError, WriteError
from mlxspec.training.batches import Batches
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.teachers import CachedTeacher, TeacherStore
from tests.conftest import random_llama

VOCAB, LENGTH, K = 96, 12, 8


@pytest.fixture
def batches(tmp_path):
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "tokens", VOCAB, "tokens") as writer:
        for _ in range(10):
            length = int(rng.integers(5, 13))
            writer.add(rng.integers(0, VOCAB, length).tolist(), [1] * length)
        writer.finish()
    return Batches([TokenShards(tmp_path / "tokens")], [1.0], LENGTH, 2, 0)


class CountingTarget:
    """Has no body and head of its own, so it is asked for whole logits."""

    def __init__(self):
        self.network, self.calls = random_llama(vocab_size=VOCAB, hidden_size=32, scale=5), 0

    def __call__(self, tokens):
        self.calls += 1
        return self.network(tokens)


def test_the_most_likely_tokens_and_their_probabilities_come_back(batches):
    target = CountingTarget()
    teacher = CachedTeacher(target, batches, VOCAB, K, 0.7, "f")
    ids, logprobs = teacher.load_rows([(0, 3), (0, 1)])
    for place, row in enumerate([3, 1]):
        tokens = mx.array(batches.shards[0].rows(LENGTH, [row]).ids[:, :-1])
        expected = np.array(mx.softmax(target(tokens)[0] / 0.7, axis=-1), np.float64)
        for position in range(LENGTH):
            best = np.argsort(-expected[position])[:K]
            assert sorted(ids[place, position].tolist()) == sorted(best.tolist())
            found = dict(zip(ids[place, position].tolist(), np.exp(logprobs[place, position]).tolist(), strict=True))
            assert found == pytest.approx({int(i): expected[position, i] for i in best}, rel=4e-3, abs=1e-6)


def test_a_batch_is_asked_of_the_target_once_and_also_not_by_the_next_process(batches):
    target = CountingTarget()
    first = CachedTeacher(target, batches, VOCAB, K, 1.0, "f").load_rows([(0, 0), (0, 1), (0, 0)])
    CachedTeacher(target, batches, VOCAB, K, 1.0, "f").load_rows([(0, 1), (0, 0)])
    assert target.calls == 1
    again = CachedTeacher(target, batches, VOCAB, K, 1.0, "f").load_rows([(0, 1), (0, 0), (0, 2)])
    assert target.calls == 2
    assert mx.array_equal(first[1][0], again[1][1])
    CachedTeacher(target, batches, VOCAB, K, 1.0, "of another target").load_rows([(0, 0)])
    CachedTeacher(target, batches, VOCAB, K, 0.5, "f").load_rows([(0, 0)])
    assert target.calls == 4


def test_a_batch_of_which_some_rows_were_written_before_a_kill_is_filled_as_if_none_were(batches):
    whole = CachedTeacher(CountingTarget(), batches, VOCAB, K, 1.0, "whole").load_rows([(0, 3), (0, 1), (0, 2)])
    killed = CachedTeacher(CountingTarget(), batches, VOCAB, K, 1.0, "killed")
    killed._stores[0].write(1, *(np.array(part[1]) for part in whole))
    resumed = killed.load_rows([(0, 3), (0, 1), (0, 2)])
    assert all(mx.array_equal(one, other) for one, other in zip(whole, resumed, strict=True))


def test_a_row_is_stored_in_the_same_order_in_whatever_order_its_tokens_come(batches):
    """Two runs that share a store may then mix their files without pairing a token with another's probability."""
    stored = []
    for run, order in (("one", np.arange(K)), ("other", np.random.default_rng(0).permutation(K))):
        teacher = CachedTeacher(CountingTarget(), batches, VOCAB, K, 1.0, run)
        ids = np.tile(np.arange(K)[::-1] * 7, (LENGTH, 1))
        teacher.store(0, 2, ids[:, order], -1.0 - ids[:, order] / 8)
        stored.append(teacher.load_rows([(0, 2)]))
    assert all(mx.array_equal(one, other) for one, other in zip(*stored, strict=True))
    ids, logprobs = (np.array(part) for part in stored[0])
    assert np.array_equal(logprobs, -1 - ids / 8)


def test_a_row_that_was_written_in_part_counts_as_not_written(tmp_path):
    rows = TeacherStore(tmp_path, 3, LENGTH, K, np.uint16)
    ids = np.tile(np.arange(K), (LENGTH, 1))
    logprobs = np.full((LENGTH, K), -3.0)
    rows.write(1, ids, logprobs)
    assert [rows.has(row) for row in range(3)] == [False, True, False]
    rows.write(2, ids, np.zeros((LENGTH, K)))  # the ids had reached the disk when the power went, the others not
    assert not rows.has(2)
    ids[LENGTH // 2 :] = 0
    rows.write(1, ids, logprobs)
    assert not rows.has(1)


def test_more_than_the_vocabulary_is_refused_and_a_full_disk_is_one_line(batches, monkeypatch):
    with pytest.raises(InvalidRequestError, match="teacher_top_k is 96; use 2 to 95"):
        CachedTeacher(CountingTarget(), batches, VOCAB, VOCAB, 1.0, "f")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TeacherStore, "write", full)
    with pytest.raises(WriteError, match="No space left on device"):
        CachedTeacher(CountingTarget(), batches, VOCAB, K, 1.0, "f").load_rows([(0, 0)])
