"""Token ids on disk: what was committed is there, and the order is a function of seed and step."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from mlxspec.errors import TrainingError
from mlxspec.training.batches import Batches, permuted
from mlxspec.training.shards import PARTS, ShardWriter, TokenShards, pack


def documents(count=50, vocab_size=512):
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, random.integers(1, 40)).tolist() for _ in range(count)]


def written(folder, docs, vocab_size=512):
    writer = ShardWriter(folder, vocab_size, "tokens", shard_tokens=100)
    for doc in docs:
        writer.add(doc, [0] + [1] * (len(doc) - 1))
    writer.finish()
    return TokenShards(folder, verify=True)


@pytest.mark.parametrize("vocab_size", [512, 100_000])
def test_documents_come_back_as_they_were_added_over_many_shards(tmp_path, vocab_size):
    docs = documents(vocab_size=vocab_size)
    shards = written(tmp_path, docs, vocab_size)
    assert len(shards.index.shards) > 5
    assert [doc.ids.tolist() for doc in shards.documents()] == docs
    assert all(doc.mask.tolist() == [0] + [1] * (len(doc.ids) - 1) for doc in shards.documents())
    assert shards.index.learned == sum(len(doc) - 1 for doc in docs)


def test_rows_hold_whole_documents_and_padding_that_is_not_learned(tmp_path):
    docs = documents()
    shards = written(tmp_path, docs)
    ids, mask, *_ = shards.rows(60, range(shards.count_rows(60)))
    assert ids.shape[1] == 61
    waiting = list(docs)
    for row, learned in zip(ids.tolist(), mask.tolist(), strict=True):
        filled = 0
        while waiting and filled + len(waiting[0]) <= 61:
            doc = waiting.pop(0)
            assert row[filled : filled + len(doc)] == doc
            assert learned[filled : filled + len(doc)] == [0] + [1] * (len(doc) - 1)
            filled += len(doc)
        assert filled
        assert not any(learned[filled:])
    assert not waiting


def test_a_document_longer_than_a_row_continues_in_the_next_row_with_the_last_token():
    assert pack([25], 10).tolist() == [[0, 10], [9, 19], [18, 25]]
    assert pack([3, 25, 4], 10).tolist() == [[0, 3], [3, 13], [12, 22], [21, 28], [28, 32]]
    assert pack([10, 19, 10], 10).tolist() == [[0, 10], [10, 20], [19, 29], [29, 39]]
    assert pack([4, 6, 1], 10).tolist() == [[0, 10], [10, 11]]


@pytest.mark.parametrize("room", [2, 5, 16, 100])
def test_every_token_of_a_document_but_its_first_is_predicted_exactly_once(room):
    lengths = [len(doc) for doc in documents()]
    predicted = Counter(place for start, end in pack(lengths, room) for place in range(start + 1, end))
    firsts = set(np.cumsum([0, *lengths]).tolist())
    assert all(predicted[place] == 1 for place in range(sum(lengths)) if place not in firsts)
    assert all(end - start <= room for start, end in pack(lengths, room))


def test_what_was_not_committed_is_cut_off_and_written_anew(tmp_path):
    docs = documents()
    writer = ShardWriter(tmp_path, 512, "tokens", shard_tokens=100)
    for number, doc in enumerate(docs):
        writer.add(doc, [1] * len(doc))
        if number == 25:
            writer.commit(done=number)
    writer.close()  # as if killed, after much more had gone into the files
    (tmp_path / ".writing-index").mkdir()
    writer = ShardWriter(tmp_path, 512, "tokens", shard_tokens=100)
    assert writer.index.notes == {"done": 25}
    assert writer.index.documents == 26
    for doc in docs[26:]:
        writer.add(doc, [1] * len(doc))
    writer.finish()
    assert [doc.ids.tolist() for doc in TokenShards(tmp_path, verify=True).documents()] == docs
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_the_order_of_an_epoch_is_a_permutation_and_each_epoch_has_its_own(count):
    epochs = [[permuted(place, count, (0, epoch)) for place in range(count)] for epoch in (0, 1)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count >= 64:
        assert epochs[0] != epochs[1]
        assert epochs[0] != sorted(epochs[0])


def test_batches_keep_their_shares_and_use_every_row_before_any_twice(tmp_path):
    shards = written(tmp_path / "a", documents()), written(tmp_path / "b", documents())
    batches = Batches(shards, [0.9, 0.1], length=16, batch=4, seed=3)
    chosen = [row for step in range(50) for row in batches.row_numbers(step)]
    assert Counter(which for which, _ in chosen) == {0: 180, 1: 20}
    count = shards[0].count_rows(16)
    assert sorted([row for which, row in chosen if which == 0][:count]) == list(range(count))


@pytest.mark.parametrize(
    "shares", [[1.0], [0.9, 0.1], [1 - 0.1, 0.1], [1, 0], [0, 1], [1, 2], [0.3, 0.7], [1 / 3, 0.5]]
)
def test_rows_of_one_or_two_sources_are_those_of_differences_of_floors(tmp_path, shares):
    """Runs that began with that arithmetic are resumed. It is wrong for three sources."""

    def rows_below(rows: int, share: float) -> int:
        return int(np.floor(rows * share + 1e-9))

    sources = [written(tmp_path / str(number), documents()) for number in range(len(shares))]
    batches = Batches(sources, shares, length=16, batch=7, seed=3)
    ends = [0.0, *(np.cumsum(shares) / np.sum(shares))]
    expected = []
    for number in range(7 * 300):
        for source, (start, end) in enumerate(pairwise(ends)):
            used, after = (rows_below(number + i, end) - rows_below(number + i, start) for i in (0, 1))
            if after > used:
                epoch, place = divmod(used, count := sources[source].count_rows(16))
                expected.append((source, permuted(place, count, (3, source, epoch))))
                break
    assert [row for step in range(300) for row in batches.row_numbers(step)] == expected


@pytest.mark.parametrize(
    "shares", [[0.5, 0.2, 0.3], [0.1, 0.1, 0.8], [1, 1, 1], [3, 0, 2, 5], [0.4, 0.6, 0], [1 / n for n in range(1, 10)]]
)
def test_each_of_several_sources_has_its_share_and_uses_every_row_before_any_twice(tmp_path, shares):
    sources = [written(tmp_path / str(number), documents()) for number in range(len(shares))]
    batches = Batches(sources, shares, length=16, batch=10, seed=3)
    chosen = [row for step in range(100) for row in batches.row_numbers(step)]
    for source, share in enumerate(shares):
        expected = share / sum(shares)
        used = np.cumsum([other == source for other, _ in chosen])
        assert np.abs(used - expected * np.arange(1, 1001)).max() <= len(shares) - 1
        count, rows = sources[source].count_rows(16), [row for other, row in chosen if other == source]
        for start in range(0, len(rows), count):
            epoch = rows[start : start + count]
            assert len(set(epoch)) == len(epoch)
    if shares == [0.5, 0.2, 0.3]:
        assert Counter(source for source, _ in chosen[:10]) == {0: 5, 1: 2, 2: 3}


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    shards = written(tmp_path, documents())
    one, same, other = (Batches([shards], [1], 16, 4, seed) for seed in (3, 3, 4))
    assert np.array_equal(one(17).ids, same(17).ids)
    assert not np.array_equal(one(17).ids, other(17).ids)


def test_shards_that_are_not_whole_are_refused_with_the_file(tmp_path):
    shards = written(tmp_path / "a", documents())
    file = tmp_path / "a" / "00001.ids"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    TokenShards(shards.folder)
    with pytest.raises(TrainingError, match=r"00001\.ids has changed"):
        TokenShards(shards.folder, verify=True)
    file.write_bytes(content[:-2])
    with pytest.raises(TrainingError, match=r"00001\.ids has \d+ bytes but the index says \d+"):
        TokenShards(shards.folder)
    with pytest.raises(TrainingError, match="holds no token shards"):
        TokenShards(tmp_path / "nothing")
    (tmp_path / "a" / "index.json").write_text("{}")
    with pytest.raises(TrainingError, match="damaged"):
        TokenShards(shards.folder)


def test_damage_to_any_part_is_found_and_none_is_written_over(tmp_path):
    for part in PARTS:
        shards = written(tmp_path / part, documents())
        file = shards.folder / f"00000.{part}"
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
        with pytest.raises(TrainingError, match=rf"00000\.{part} has changed"):
            TokenShards(shards.folder, verify=True)
    writer = ShardWriter(tmp_path / "short", 512, "tokens")
    writer.add([1, 2, 3], [1, 1, 1])
    writer.commit()
    writer.close()
    file = tmp_path / "short" / "00000.ids"
    file.write_bytes(file.read_bytes()[:2])
    with pytest.raises(TrainingError, match=r"00000\.ids has changed since it was written"):
        ShardWriter(tmp_path / "short", 512, "tokens")


def test_unfinished_empty_and_foreign_shards_are_refused(tmp_path):
    writer = ShardWriter(tmp_path / "a", 512, "tokens")
    writer.commit()
    with pytest.raises(TrainingError, match="not finished"):
        TokenShards(tmp_path / "a")
    writer.finish()
    with pytest.raises(TrainingError, match="holds no tokens"):
        TokenShards(tmp_path / "a")
    with pytest.raises(TrainingError, match="another tokenizer"):
        ShardWriter(tmp_path / "a", 512, "other tokens")
    with pytest.raises(TrainingError, match="below 512"), ShardWriter(tmp_path / "b", 512, "tokens") as writer:
        writer.add([512], [1])


def with_tasks(folder, tasks):
    with ShardWriter(folder / "tokens", 512, "tokens", shard_tokens=100) as writer:
        for doc, task in zip(documents(), tasks, strict=True):
            writer.add(doc, [1] * len(doc), task)
        writer.finish()
    return TokenShards(folder / "tokens", verify=True)


def test_each_token_of_a_batch_has_the_task_of_its_document(tmp_path):
    tasks = ["sums", "songs", None, "sums", "lists"] * 10
    one, other = with_tasks(tmp_path / "answers", tasks), with_tasks(tmp_path / "text", [None, "lists"] * 25)
    batches = Batches([one, other], [1, 1], 60, 8, seed=0)
    assert batches.tasks == ["sums", "songs", "answers", "lists", "text"]
    named = {tuple(doc): task or "answers" for doc, task in zip(documents(), tasks, strict=True)}
    also = {tuple(doc): task or "text" for doc, task in zip(documents(), [None, "lists"] * 25, strict=True)}
    for step in range(4):
        rows = batches(step)
        for row, (source, _) in enumerate(batches.row_numbers(step)):
            for number in range(rows.documents[row].max() + 1):
                inside = rows.documents[row] == number
                wanted = (also if source else named)[tuple(rows.ids[row][inside])]
                assert {batches.tasks[task] for task in rows.tasks[row][inside]} == {wanted}


def test_a_resumed_writer_goes_on_with_the_tasks_of_its_last_commit(tmp_path):
    folder = tmp_path / "tokens"
    with ShardWriter(folder, 512, "tokens") as writer:
        writer.add([1, 2], [1, 1], "sums")
        writer.commit()
        writer.add([3, 4], [1, 1], "songs")  # lost
    with ShardWriter(folder, 512, "tokens") as writer:
        writer.add([5, 6], [1, 1], "lists")
        writer.add([7, 8], [1, 1], "sums")
        writer.finish()
    shards = TokenShards(folder, verify=True)
    assert shards.tasks == ["sums", "lists"]
    assert shards.rows(2, [0, 1, 2])[3].tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]
