"""Text and chat files become documents; what is wrong in them is reported by file and line."""

import gzip
import json
import os

import pytest

import mlxspec
from mlxspec.errors import TrainingError
from mlxspec.models.loading import DEMO, read_tokenizer
from mlxspec.training import corpus
from mlxspec.training.corpus import BadLines, corpus_files, read_documents, read_prompts, tokenize_corpus
from mlxspec.training.shards import TokenShards


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(DEMO / "target")


def contents(*files):
    return [record.content for record in read_documents(files, BadLines())]


def test_text_lines_and_gzipped_files_are_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one text\nof two lines\n")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n\n{"prompt": "c"}\n')
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write('{"messages": [{"role": "user", "content": "d", "more": 1}]}\n')
    (tmp_path / "notes.md").write_text("not one of them")
    files = corpus_files([tmp_path])
    assert contents(*files) == ["one text\nof two lines", "b", "c", [{"role": "user", "content": "d"}]]
    assert corpus_files([tmp_path / "*.jsonl*", tmp_path]) == [*files[1:], files[0]]


def test_a_corpus_becomes_tokens_with_bos_and_eos_all_learned_but_the_bos(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"A dog, number {n}. </s>"}) + "\n" for n in range(300))
    )
    index, bad = tokenize_corpus([tmp_path], tokenizer, 2048, "x", tmp_path / "out")
    documents = list(TokenShards(tmp_path / "out").documents())
    assert (index.documents, bad.skipped) == (300, 0)
    for number, (ids, mask) in enumerate(documents):
        assert tokenizer.decode(ids[1:-1].tolist()) == f"A dog, number {number}. </s>"
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert tokenizer.eos_token_id not in ids[1:-1]  # what a text spells is no control token
        assert mask.tolist() == [0] + [1] * (len(ids) - 1)


def test_a_long_text_is_cut_after_a_line_and_nothing_of_it_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_TEXT", 50)
    text = "".join(f"Line number {n} of the text.\n" for n in range(9))
    (tmp_path / "a.txt").write_text(text)
    found = list(read_documents([tmp_path / "a.txt"], BadLines()))
    assert "\n".join(record.content for record in found) == text.strip()
    assert [record.where.rsplit(":")[-1] for record in found] == ["1", "3", "5", "7", "9"]
    assert found[-1].bytes == len(text)


def test_documents_are_encoded_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_TEXT", 10)
    some = [corpus.Document(text, "", 0) for text in ("x" * 4, "x" * 30, "y", "z")]
    assert [len(group) for group in corpus.group_documents(some)] == [2, 2]


def test_a_damaged_gzip_is_named(tmp_path):
    whole = gzip.compress(b'{"text": "a story"}\n' * 500)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:20] + b"\xff\xff" + whole[22:])
    with pytest.raises(TrainingError, match=r"a\.jsonl\.gz cannot be read"):
        list(read_documents([tmp_path / "a.jsonl.gz"], BadLines()))


def test_bad_lines_are_counted_named_and_skipped(tmp_path, tokenizer):
    lines = ['{"text": "fine"}'] * 400
    for number, line in enumerate(["{", "[1]", '{"text": 3}', '{"messages": [{"role": "user"}]}']):
        lines[number * 100] = line
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    index, bad = tokenize_corpus([tmp_path / "a.jsonl"], tokenizer, 2048, "x", tmp_path / "out")
    assert (index.documents, bad.skipped) == (396, 4)
    assert [example.split("a.jsonl:")[1].split(":")[0] for example in bad.examples] == ["1", "101", "201", "301"]


def test_more_than_one_in_a_hundred_bad_lines_is_an_error(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 50 + "oops\n")
    with pytest.raises(TrainingError, match=r"1 of 51 lines are bad, more than 1 %; the first is .*a\.jsonl:51"):
        tokenize_corpus([tmp_path / "a.jsonl"], tokenizer, 2048, "x", tmp_path / "out")


def test_nothing_to_read_is_an_error_that_names_it(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(TrainingError, match=r"a\.jsonl and 0 more files contain no text"):
        tokenize_corpus([tmp_path / "a.jsonl"], tokenizer, 2048, "x", tmp_path / "out")
    with pytest.raises(TrainingError, match="no such file, folder or pattern"):
        corpus_files([tmp_path / "nothing.jsonl"])
    (tmp_path / "b.pdf").write_text("")
    with pytest.raises(TrainingError, match=r"b\.pdf is not a"):
        corpus_files([tmp_path / "b.pdf"])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}' * 100)[:20])
    with pytest.raises(TrainingError, match=r"c\.jsonl\.gz cannot be read"):
        contents(tmp_path / "c.jsonl.gz")
    if os.geteuid():
        (tmp_path / "a.jsonl").chmod(0)
        with pytest.raises(TrainingError, match=r"a\.jsonl cannot be read"):
            contents(tmp_path / "a.jsonl")


def test_prompts_go_through_the_chat_template_up_to_the_last_answer(tmp_path):
    tokenizer = read_tokenizer(DEMO / "target")
    tokenizer.chat_template = mlxspec.models.tokens.LLAMA2_TEMPLATE
    tokenizer.has_chat_template = True
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "not this"}]
    lines = [{"prompt": "hi"}, {"messages": messages}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts, _ = read_prompts([tmp_path / "a.jsonl"], tokenizer, "be brief")
    assert prompts[0] == prompts[1]
    assert tokenizer.decode(prompts[0]) == "<s>[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nhi [/INST]"


def test_the_first_words_of_texts_can_be_prompts(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "One day a dog went away."}\n')
    prompts, _ = read_prompts([tmp_path / "a.jsonl"], tokenizer, None, words=3)
    assert tokenizer.decode(prompts[0][1:]) == "One day a"
