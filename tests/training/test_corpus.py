"""Text and chat files become documents; what is wrong in them is reported by file and line."""

import gzip
import json
import os

import numpy as np
import pytest

import mlxspec
from mlxspec.errors import TrainingError
from mlxspec.models.loading import DEMO
from mlxspec.models.reading import read_tokenizer
from mlxspec.models.tokens import encode_prompt
from mlxspec.training import corpus
from mlxspec.training.corpus import BadLines, corpus_files, read_documents, tokenize_corpus
from mlxspec.training.prompts import read_prompts
from mlxspec.training.shards import TokenShards
from tests.conftest import shared


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


def test_a_corpus_becomes_tokens_with_the_tokenizers_bos_and_eos_all_learned_but_the_first(tmp_path, tokenizer):
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


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".txt.gz"])
def test_the_position_of_a_document_is_its_share_of_the_bytes_on_disk(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(corpus, "LONGEST_TEXT", 100)  # several documents in a text
    random, first, second = np.random.default_rng(0), tmp_path / "a.jsonl", tmp_path / f"b{suffix}"
    lines = [json.dumps({"text": random.bytes(80).hex()}).encode() + b"\n" for _ in range(5000)]
    first.write_bytes(lines[0])
    second.write_bytes(gzip.compress(b"".join(lines)) if suffix.endswith("gz") else b"".join(lines))
    found = [document.bytes for document in read_documents([first, second], BadLines())]
    size = second.stat().st_size
    assert found[0] == len(lines[0])
    assert found[-1] == len(lines[0]) + size
    expected = len(lines[0]) + size * np.arange(1, 5001) / 5000
    np.testing.assert_allclose(found[1:], expected, atol=0.05 * size)


def test_documents_are_encoded_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_TEXT", 10)
    some = [corpus.Document(text, "") for text in ("x" * 4, "x" * 30, "y", "z")]
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


def documents_of(tmp_path, tokenizer, *lines):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenize_corpus([tmp_path / "a.jsonl"], tokenizer, len(tokenizer), "x", tmp_path / "out")
    return [ids.tolist() for ids, _ in TokenShards(tmp_path / "out").documents()]


@pytest.fixture(scope="module")
def smollm():
    return read_tokenizer(shared("models/SmolLM2-135M-Instruct-4bit"))


def test_a_text_begins_as_the_tokenizer_begins_it(tmp_path, tokenizer, smollm):
    for one in (tokenizer, smollm):
        assert documents_of(tmp_path, one, {"text": "A dog."}) == [[*one.encode("A dog."), one.eos_token_id]]
        (tmp_path / "out").rename(tmp_path / f"out-{len(one)}")


def test_a_text_that_the_tokenizer_ends_with_eos_gets_no_second(tmp_path, stories_folder):
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_bytes((stories_folder / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_eos_token": true}')
    ending = read_tokenizer(tmp_path)
    (document,) = documents_of(tmp_path, ending, {"text": "A dog."})
    assert document == ending.encode("A dog.")
    assert document.count(ending.eos_token_id) == 1


def test_control_tokens_that_a_text_or_a_message_spells_are_text(tmp_path, smollm):
    text = "a<|im_end|>\n<|im_start|>system\nb"
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    plain, conversation = documents_of(tmp_path, smollm, {"text": text}, {"messages": chat})
    assert smollm.decode(plain[:-1]) == text
    assert [token for token in plain if token in (1, 2)] == [2]
    assert [token for token in conversation if token in (1, 2)] == [1, 2] * 3  # system, user, assistant


def test_a_conversation_is_encoded_as_a_whole_and_ends_with_the_eos_of_its_template(tmp_path, smollm):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (document,) = documents_of(tmp_path, smollm, {"messages": chat})
    whole = smollm.apply_chat_template(chat)
    assert document == whole[:-1]
    assert smollm.decode(whole[-2:]) == "<|im_end|>\n"


def test_an_answer_is_encoded_as_what_follows_the_question(tmp_path, stories_folder):
    stories = read_tokenizer(stories_folder)
    stories.chat_template, stories.has_chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}", True
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (document,) = documents_of(tmp_path, stories, {"messages": chat})
    assert document == [*stories.encode("[Hi][Hello.]", add_special_tokens=False), stories.eos_token_id]


def test_a_prompt_with_a_completion_is_a_conversation(tmp_path, smollm):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    documents = documents_of(tmp_path, smollm, {"prompt": "Hi", "completion": "Hello."}, {"messages": chat})
    assert documents[0] == documents[1]


def test_the_prompt_of_a_completion_is_answered_without_a_template_too(tmp_path, tokenizer, smollm):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Hi", "completion": "Hello."}')
    for one in (tokenizer, smollm):
        prompts, _ = read_prompts([tmp_path / "a.jsonl"], one, None)
        assert prompts == [encode_prompt(one, "Hi")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ({"text": "a", "messages": [{"role": "user", "content": "b"}]}, 'has "text" and "messages"; use one of'),
        ({"prompt": "a", "response": "b"}, 'has "prompt" and "response"; use one of'),
        ({"instruction": "a", "input": "b", "output": "c"}, 'has "instruction" and "input" and "output"; use one of'),
        ({"prompt": "a", "completion": ["b"]}, '"completion" is empty or not a string'),
        ({"completion": "a"}, 'has "completion"; use one of'),
        ({"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 'has "messages" and "tools"; use one of'),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, 'a message has "tool_calls"'),
        ({"messages": []}, '"messages" is empty or not a list'),
        ({"id": 1}, "has no text; use one of"),
    ],
)
def test_a_line_of_which_a_part_would_be_left_out_is_bad(line, reason):
    with pytest.raises(ValueError, match=reason):
        corpus.parse_line(json.dumps(line).encode())


def test_fields_that_are_empty_or_no_content_do_not_matter():
    line = {"text": "a", "id": 3, "source": "web", "input": "", "messages_count": 2, "completion": None}
    assert corpus.parse_line(json.dumps(line).encode()) == "a"


def test_the_task_of_a_document_is_that_of_its_line_or_the_name_of_its_file(tmp_path):
    lines = [
        {"text": "a", "task": "sums", "category": "numbers"},
        {"text": "b", "category": "songs"},
        {"text": "c", "task": 3},
        {"text": "d", "task": ""},
        {"text": "the task"},
    ]
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "stories.txt").write_text("once")
    with gzip.open(tmp_path / "news.jsonl.gz", "wt") as file:
        file.write(json.dumps({"prompt": "e"}))
    found = list(corpus.read_documents(corpus.corpus_files([tmp_path]), corpus.BadLines()))
    assert {document.content: document.task for document in found} == {
        "a": "sums", "b": "songs", "c": "mixed", "d": "mixed", "the task": "mixed", "once": "stories", "e": "news",
    }  # fmt: skip


NESTED = '{"text": "a", "id": ' + "[" * 9000 + "]" * 9000 + "}"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (NESTED, "its brackets are nested too deeply"),
        (r'{"messages": [{"role": "\ud800", "content": "a"}]}', "surrogates not allowed"),
        (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "surrogates not allowed"),
        (r'{"text": "\ud800"}', "surrogates not allowed"),
    ],
    ids=["nested", "role", "content", "text"],
)
def test_a_line_that_json_or_unicode_cannot_hold_is_bad(tmp_path, mlxspec_command, line, reason):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 10 + line)
    target = ("--target", str(DEMO / "target"))
    for command in (("pretrain", "--data"), ("distill", "--prompts")):
        options = (*target, command[1], str(tmp_path / "a.jsonl"), "--out", str(tmp_path / command[0]))
        outcome = mlxspec_command("train", command[0], *options)
        assert outcome.status == 2
        assert f"1 of 11 lines are bad, more than 1 %; the first is {tmp_path / 'a.jsonl'}:11: " in outcome.err
        assert reason in outcome.err


def test_a_name_that_begins_with_a_tilde_is_a_file_or_is_not_found(tmp_path, mlxspec_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrainingError, match="~nosuchuser/x: no such file, folder or pattern"):
        corpus_files(["~nosuchuser/x"])
    (tmp_path / "~notes.txt").write_text("A dog.")
    assert contents(*corpus_files(["~notes.txt"])) == ["A dog."]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert corpus_files(["~/*.txt"]) == [tmp_path / "~notes.txt"]
    (tmp_path / "a.toml").write_text(f'target = "{DEMO / "target"}"\n[pretrain]\ndata = ["~nosuchuser/x"]')
    outcome = mlxspec_command("train", "run", "a.toml")
    assert (outcome.status, outcome.err.count("\n")) == (2, 1)
    assert "~nosuchuser/x: no such file, folder or pattern" in outcome.err
