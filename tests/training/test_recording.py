"""Recording answers in use: what is kept, for whom, and what happens when a process or a disk ends."""

import json
import os
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest

from mlxspec import InvalidRequestError, ModelPair, SpeculativeDecoder, TrainingError, WriteError
from mlxspec.models.export import files_to_push
from mlxspec.models.loading import DEMO
from mlxspec.models.quantizing import dequantized
from mlxspec.models.reading import read_model
from mlxspec.training.recording import Recording, delete_recording, target_fingerprint
from tests.conftest import decoded, random_llama
from tests.test_full_disks import call, small_disk  # noqa: F401

TARGET = ("--target", str(DEMO / "target"), "--drafter", "none", "--max-tokens", "20")


def target():
    return random_llama(7, vocab_size=40)


def recorded(folder, *prompts, model=None):
    """A recording of answers to some prompts, and the answers."""
    model = model or target()
    decoder = SpeculativeDecoder(ModelPair(model, model), None, 3, keep_top_k=5)
    recording, answers = Recording(folder, model), []
    for prompt in prompts:
        answers.append(decoded(decoder, prompt, 30))
        recording.add(*decoder.kept_probs())
    return recording, answers


def test_answers_are_read_as_they_were_recorded_and_in_order(tmp_path):
    prompts = [[1, 2], [3], [4, 5, 6]]
    recording, answers = recorded(tmp_path / "a folder", *prompts)
    found = list(Recording(tmp_path / "a folder").answers())
    assert [answer.prompt.tolist() for answer in found] == prompts
    assert [answer.answer.tolist() for answer in found] == answers
    logits = np.array(target()(mx.array([[1, 2, *answers[0]]]))[0], np.float64)[1:-1]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found[0].logprobs, np.take_along_axis(log_p, found[0].ids, -1), atol=5e-3)
    assert recording.bytes == sum(file.stat().st_size for file in recording.files())


def test_only_the_owner_can_read_what_is_recorded(tmp_path):
    recording, _ = recorded(tmp_path / "answers", [1])
    assert (tmp_path / "answers").stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in recording.files()} == {0o600}


def test_a_full_recording_refuses_the_next_answer_and_keeps_the_others(tmp_path):
    recording, _ = recorded(tmp_path / "answers", [1], [2])
    recording.limit = recording.bytes
    with pytest.raises(WriteError, match="has reached its limit"):
        recording.add([1], [2], np.array([[1, 2]]), np.array([[-1.0, -2.0]]))
    assert len(list(recording.answers())) == 2


def test_a_folder_with_other_files_or_another_targets_answers_is_refused(tmp_path):
    recorded(tmp_path / "answers", [1])
    with pytest.raises(InvalidRequestError, match="answers of another target"):
        Recording(tmp_path / "answers", random_llama(vocab_size=40, num_hidden_layers=3))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InvalidRequestError, match="holds other files"):
        Recording(tmp_path / "other", target())
    with pytest.raises(InvalidRequestError, match="is a file"):
        Recording(tmp_path / "other" / "file", target())
    with pytest.raises(InvalidRequestError, match="holds no recorded answers"):
        Recording(tmp_path / "nothing")


def test_a_target_has_one_fingerprint_in_every_precision():
    stored = read_model(DEMO / "target")
    assert target_fingerprint(stored) == target_fingerprint(dequantized(stored))
    assert target_fingerprint(stored) != target_fingerprint(target())


def rewritten(**changes):
    """A function that replaces arrays of a recorded file."""

    def change(file):
        with np.load(file) as arrays:
            kept = dict(arrays)
        np.savez(file, **{**kept, **{name: new(kept[name]) for name, new in changes.items()}})

    return change


DAMAGE = {
    "cut off": lambda file: file.write_bytes(file.read_bytes()[:-40]),
    "an array instead of several": lambda file: file.write_bytes(b"\x93NUMPY" + file.read_bytes()),
    "a pickle": rewritten(answer=lambda a: np.array([{"a": 1}], dtype=object)),
    "a number instead of tokens": rewritten(answer=lambda a: a[0]),
    "an empty prompt": rewritten(prompt=lambda p: p[:0]),
    "a negative token": rewritten(ids=lambda ids: ids - 100),
    "real numbers as tokens": rewritten(ids=lambda ids: ids + 0.5),
    "a token twice": rewritten(ids=lambda ids: ids * 0),
    "ids of another shape": rewritten(ids=lambda ids: ids[:, :3]),
    "NaN": rewritten(logprobs=lambda p: p * np.float16("nan")),
    "probabilities above 1": rewritten(logprobs=lambda p: -p),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_answer_is_named_in_one_line_and_can_be_deleted(tmp_path, damage):
    recording, _ = recorded(tmp_path / "answers", [1], [2])
    file = recording.files()[1]
    DAMAGE[damage](file)
    with pytest.raises(TrainingError, match=rf"{file.name} is damaged \(.+\); delete it") as caught:
        list(recording.answers())
    assert "\n" not in str(caught.value)
    assert delete_recording(tmp_path / "answers") == 2


def test_a_damaged_recording_is_refused_and_can_be_deleted(tmp_path):
    recording, _ = recorded(tmp_path / "answers", [1])
    (recording.folder / "recording.json").write_text("[" * 10_000)
    with pytest.raises(InvalidRequestError, match=r"recording\.json is damaged"):
        Recording(tmp_path / "answers")
    (recording.folder / ".writing-abc").mkdir()  # of a process that was killed
    assert delete_recording(tmp_path / "answers") == 1
    assert not (tmp_path / "answers").exists()


def test_a_recording_that_is_deleted_in_between_begins_again_for_its_owner_alone(tmp_path):
    recording, _ = recorded(tmp_path / "answers", [1])
    delete_recording(tmp_path / "answers")
    recording.add([1], [2], np.array([[1, 2]]), np.array([[-1.0, -2.0]]))
    assert recording.folder.stat().st_mode & 0o777 == 0o700
    assert len(list(Recording(tmp_path / "answers").answers())) == 1


def test_a_folder_that_others_could_read_is_closed_before_anything_is_recorded(tmp_path):
    (tmp_path / "answers").mkdir(mode=0o777)
    recording, _ = recorded(tmp_path / "answers", [1])
    recording.folder.chmod(0o755)
    assert Recording(tmp_path / "answers", target()).folder.stat().st_mode & 0o777 == 0o700


def test_a_recording_is_never_pushed(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        (tmp_path / name).touch()
    recorded(tmp_path / "answers", [1])
    with pytest.raises(InvalidRequestError, match="answers holds recorded answers, which are private"):
        files_to_push(tmp_path)


def test_deleting_leaves_nothing_but_what_others_put_there(tmp_path):
    recording, _ = recorded(tmp_path / "answers", [1])
    np.savez(tmp_path / "answers" / "mine.npz", a=np.zeros(3))
    (tmp_path / "link").symlink_to(tmp_path / "answers")
    assert delete_recording(tmp_path / "link") == 1
    assert os.listdir(recording.folder) == ["mine.npz"]
    with pytest.raises(InvalidRequestError, match="holds no recorded answers"):
        delete_recording(tmp_path / "answers")


def test_a_process_that_is_killed_while_it_records_leaves_only_complete_answers(tmp_path):
    program = f"""
from tests.training.test_recording import *
recording, _ = recorded({str(tmp_path / "answers")!r}, [1])
print("recording", flush=True)
while True:
    recording.add([1, 2], [3] * 200, np.tile(np.arange(64), (200, 1)), np.full((200, 64), -5.0))
"""
    for kills in range(3):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.05 + 0.1 * kills)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert len(list(Recording(tmp_path / "answers").answers())) == len(list((tmp_path / "answers").glob("*.npz")))
    assert len(list((tmp_path / "answers").glob("*.npz"))) > 3


def test_generate_and_chat_record_what_they_answer(mlxspec_command, tmp_path):
    folder = tmp_path / "my answers"
    outcome = mlxspec_command("generate", "Once upon", *TARGET, "--record", str(folder), "--json")
    assert outcome.status == 0, outcome.err
    (answer,) = Recording(folder).answers()
    assert answer.answer.tolist() == json.loads(outcome.out)["tokens"]
    shown = mlxspec_command("train", "recorded", str(folder))
    assert shown.out.startswith(f"{folder}: answers: 1, tokens: 20, size: 0.0 MB")
    assert mlxspec_command("train", "recorded", str(folder), "--delete").out == f"deleted in {folder}: 1\n"
    assert not folder.exists()
    gone = mlxspec_command("train", "recorded", str(folder))
    assert (gone.status, len(gone.err.splitlines())) == (2, 1)


def test_a_wrong_folder_is_refused_before_the_model_is_loaded(mlxspec_command, tmp_path):
    (tmp_path / "file").touch()
    outcome = mlxspec_command("generate", "Once", "--target", "no/such/model", "--record", str(tmp_path))
    assert outcome.status == 2
    assert outcome.err == f"error: {tmp_path} holds other files; record into a new folder\n"


def test_a_full_disk_stops_recording_with_one_line_and_not_the_answer(small_disk):  # noqa: F811
    (small_disk / "filler").write_bytes(b"x" * (1200 * 1024 - 8 * 1024))
    outcome = call("generate", "Once upon a time", *TARGET, "--record", str(small_disk / "answers"))
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith(", there was")
    (line,) = [line for line in outcome.stderr.splitlines() if "recording" in line]
    assert line.startswith("recording has stopped: cannot write ")
    assert "free some space" in line
