"""Prompts come from where their names say, in order, and a bad line is named by file and number."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import parse_qs, urlparse

import pytest

from mlxspec import InvalidRequestError
from mlxspec.evaluation import tasks
from mlxspec.evaluation.tasks import HUB_TASKS, OWN_TASKS, read_tasks
from mlxspec.models.loading import DEMO
from mlxspec.models.reading import read_tokenizer
from tests.conftest import shared


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(DEMO / "target")


@pytest.fixture
def lines(tmp_path):
    def write(*entries: str | dict, name: str = "mine.jsonl"):
        path = tmp_path / name
        path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries))
        return str(path)

    return write


def texts(task, tokenizer):
    return [tokenizer.decode(prompt[1:]) for prompt in task.prompts]


@pytest.mark.parametrize("name", OWN_TASKS)
def test_our_own_tasks_are_there(tokenizer, name):
    (task,) = read_tasks([name], tokenizer, 3)
    assert task.name == name
    assert len(task.prompts) == 3


def test_a_file_is_a_task_of_its_name(tokenizer, lines):
    file = lines({"prompt": "One day"}, {"text": "The cat"}, {"prompt": "Tom saw"})
    (task,) = read_tasks([file], tokenizer, 2)
    assert task.name == "mine"
    assert texts(task, tokenizer) == ["One day", "The cat"]


def test_spec_bench_is_a_task_for_each_category(tokenizer, lines):
    entry = {"question_id": 1, "turns": ["first", "second"]}
    file = lines(*({**entry, "category": c, "turns": [t, "x"]} for c, t in [("qa", "a"), ("math", "b"), ("qa", "c")]))
    tasks = read_tasks([file], tokenizer, 5)
    assert [(task.name, texts(task, tokenizer)) for task in tasks] == [("qa", ["a", "c"]), ("math", ["b"])]


def test_the_real_spec_bench_has_13_categories_and_480_questions(tokenizer):
    tasks = read_tasks([str(shared("prompts/spec_bench.jsonl"))], tokenizer, 1000)
    assert len(tasks) == 13
    assert sum(len(task.prompts) for task in tasks) == 480


def test_prompts_that_leave_no_room_for_an_answer_are_left_out(tokenizer, lines):
    file = lines({"prompt": "word " * 100}, {"prompt": "short"})
    (task,) = read_tasks([file], tokenizer, 5, room=20)
    assert texts(task, tokenizer) == ["short"]
    with pytest.raises(InvalidRequestError, match=r"task mine: no prompt fits into the 1 tokens"):
        read_tasks([file], tokenizer, 5, room=1)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        (['{"prompt": "a"}', "{", '{"prompt": "b"}'], r"mine.jsonl:2: .*fix or remove this line"),
        (['{"prompt": "a"}', '{"other": 1}'], r'mine.jsonl:2: has no text; use one of "text", "prompt"'),
        (
            ['{"category": "qa", "turns": ["x"]}', '{"category": "qa", "turns": []}'],
            r"mine.jsonl:2: not a line of Spec-Be",
        ),
        (
            ['{"category": "qa", "turns": ["x"]}', '{"category": 3, "turns": ["x"]}'],
            r"mine.jsonl:2: not a line of Spec-Be",
        ),
        ([], "contains no prompts"),
    ],
)
def test_a_malformed_line_is_named_by_file_and_number(tokenizer, lines, entries, words):
    with pytest.raises(InvalidRequestError, match=words):
        read_tasks([lines(*entries)], tokenizer, 1)


def test_lines_end_where_the_file_says_and_not_where_unicode_does(tokenizer, lines):
    odd = '{"question_id": 1, "category": "qa", "turns": ["a\u2028b"]}'
    (task,) = read_tasks([lines("", odd, '{"category": "qa", "turns": ["c"]}')], tokenizer, 5)
    assert texts(task, tokenizer) == ["a\u2028b", "c"]


def test_unknown_names_and_names_given_twice_are_refused(tokenizer, lines):
    with pytest.raises(InvalidRequestError, match="there is no task and no file named sotries; use a"):
        read_tasks(["sotries"], tokenizer, 1)
    with pytest.raises(InvalidRequestError, match="there is no task and no file named ~nosuchuser/a; use a"):
        read_tasks(["~nosuchuser/a"], tokenizer, 1)
    with pytest.raises(InvalidRequestError, match="two tasks are named stories"):
        read_tasks(["stories", lines({"prompt": "a"}, name="stories.jsonl")], tokenizer, 1)


class Rows(BaseHTTPRequestHandler):
    """The hub's rows service, with 250 rows of Dolly."""

    def do_GET(self):
        asked = {name: values[0] for name, values in parse_qs(urlparse(self.path).query).items()}
        start, length = int(asked["offset"]), int(asked["length"])
        numbers = range(start, min(start + length, 250))
        category = {0: "creative_writing", 1: "closed_qa"}
        rows = [{"row": {"instruction": f"say {n}", "category": category[n % 2]}} for n in numbers]
        body = json.dumps({"rows": rows if asked["dataset"].startswith("databricks/") else "nothing"}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def rows_service(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Rows)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(tasks, "ROWS", f"http://127.0.0.1:{server.server_port}/rows")
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_public_set_is_read_page_by_page_and_filtered(tokenizer, rows_service):
    (task,) = read_tasks(["dolly"], tokenizer, 120)
    assert texts(task, tokenizer) == [f"say {n}" for n in range(0, 240, 2)]
    assert task.sampling == {"temperature": 0.6, "top_p": 0.9}


def test_no_more_pages_are_asked_for_than_needed(tokenizer, rows_service, monkeypatch):
    asked = []
    monkeypatch.setattr(Rows, "log_request", lambda self, *_: asked.append(self.path))
    read_tasks(["dolly"], tokenizer, 50)
    assert len(asked) == 1


def test_other_columns_than_expected_are_one_line(tokenizer, rows_service, monkeypatch):
    source, _, sampling = HUB_TASKS["dolly"]
    monkeypatch.setitem(HUB_TASKS, "dolly", (source, lambda row: row["article"], sampling))
    with pytest.raises(InvalidRequestError, match="now has the columns instruction, category"):
        read_tasks(["dolly"], tokenizer, 1)


def test_what_the_service_should_not_say_is_one_line(tokenizer, rows_service):
    with pytest.raises(InvalidRequestError, match="xsum cannot be read from the hub now"):
        read_tasks(["xsum"], tokenizer, 1)


def test_without_a_network_a_public_set_is_refused_in_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(tasks, "ROWS", "http://127.0.0.1:9/rows")
    with pytest.raises(InvalidRequestError, match=r"cnn_dailymail cannot be read from the hub now .*give prompts in"):
        read_tasks(["cnn-dm"], tokenizer, 1)
