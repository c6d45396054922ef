"""Adapting a drafter to recorded answers: what it trains on, what it decides, and what an interruption leaves."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

import mlxspec
from mlxspec.errors import InvalidRequestError
from mlxspec.files import locked
from mlxspec.models.loading import DEMO
from mlxspec.training import stages
from mlxspec.training.adapting import AdaptSettings, acceptance_rate, check_answers, recorded_shards, store_recorded
from mlxspec.training.batches import Batches
from mlxspec.training.drafter_folders import load_drafter
from mlxspec.training.recording import Recording
from mlxspec.training.shards import ShardWriter, TokenShards
from mlxspec.training.target import Listener, Target
from mlxspec.training.teachers import CachedTeacher, OnlineTeacher
from mlxspec.training.trainer import Trainer
from tests.conftest import random_llama

TARGET = str(DEMO / "target")
FAST = ("--steps", "20", "--batch", "4", "--length", "64", "--learning-rate", "3e-3")


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Twelve recorded stories about one girl, answers to other prompts, and a drafter that has learned nothing yet."""
    folder = tmp_path_factory.mktemp("answers in use")
    pair = mlxspec.load(TARGET, "none")
    decoder = mlxspec.SpeculativeDecoder(pair, mlxspec.Sampling(0.8, seed=1), keep_top_k=64)
    recording = Recording(folder / "recorded", pair.target)
    for seed in range(12):
        list(decoder.stream("Once upon a time there was a girl named Lily", max_tokens=40, seed=seed))
        recording.add(*decoder.kept_probs())
    return folder


@pytest.fixture
def general(answers, mlxspec_command):
    out = answers / "general"
    drawn = ("--samples", "12", "--temperatures", "1", "--max-tokens", "40", "--group", "12")
    assert mlxspec_command("train", "distill", "--target", TARGET, *drawn, "--out", str(out)).status == 0
    made = ("--layers", "0", "--vocabulary-size", "300", "--answers", str(out), "--out", str(answers / "start"))
    assert mlxspec_command("train", "init", "--target", TARGET, *made).status == 0
    return out


def adapt(mlxspec_command, answers, general, out, *options):
    return mlxspec_command(
        "train", "adapt", "--target", TARGET, "--drafter", str(answers / "start" / "drafter"), "--recorded",
        str(answers / "recorded"), "--general", str(general), "--out", str(out), *FAST, *options,
    )  # fmt: skip


def test_the_teacher_of_recorded_answers_is_the_target_where_they_were_recorded(answers, general, tmp_path):
    target, recorded = Target(TARGET), list(Recording(answers / "recorded").answers())
    shards = recorded_shards(target, recorded, tmp_path)
    drafter = load_drafter(answers / "start" / "drafter", target)
    for length, single in ((64, False), (30, True)):  # several documents in a row, and documents that are split
        batches, settings = Batches([shards], [1.0], length, 8, 0, single), AdaptSettings(length=length).training
        teacher = stages.new_teacher(target, drafter, batches, settings, 64)
        store_recorded(teacher, recorded)
        teacher._online = None  # it does not run the target
        for row in range(teacher.batches.count_rows(0)):
            ids, logprobs = (np.array(part[0]) for part in teacher.load_rows([(0, row)]))
            rows = teacher.batches.read([(0, row)])
            online = OnlineTeacher(target.model, not single)
            states = online.states(mx.array(rows.ids[:, :-1]), mx.array(rows.documents[:, :-1]), ())
            _, log_p = online.probs(mx.array(1.0))((states[0][0],), mx.zeros((1, target.vocab_size)))
            answered = rows.mask[0, 1:] > 0
            if length == 64:  # a document that is split lacks the context of its first part
                expected = np.take_along_axis(np.array(log_p), ids, -1)
                np.testing.assert_allclose(logprobs[answered], expected[answered], atol=2e-2)


@pytest.mark.parametrize(("count", "measured"), [(5, 5), (400, 256)])
def test_an_acceptance_rate_is_that_of_at_most_256_rows_and_its_progress_is_shown(tmp_path, count, measured):
    random, vocab = np.random.default_rng(0), 32
    with ShardWriter(tmp_path / "general" / "tokens", vocab, "tokens") as writer:
        for _ in range(count):
            writer.add(random.integers(0, vocab, 9), [0, 0, *[1] * 7])
        writer.finish()
    batches = Batches([TokenShards(tmp_path / "general" / "tokens")], [1.0], 8, 3, 0, single=True)
    target, drafter = (
        random_llama(vocab_size=vocab, scale=3),
        mlxspec.Drafter(mlxspec.DrafterConfig(vocab, 16, 32, 1, 2)),
    )
    teacher, stages_seen, work = CachedTeacher(target, batches, vocab, vocab - 1, 1.0, "f"), [], []
    listener = Listener(stage=lambda *what: stages_seen.append(what), work=lambda *done: work.append(done))
    rate = acceptance_rate(drafter, teacher, listener)
    assert stages_seen == [("general", f"measuring the acceptance rate on {measured} rows")]
    assert work == [(done, measured, 7 * done) for done in range(1, measured + 1)]
    known = [row for row in range(count) if teacher._stores[0].has(row)]
    assert len(known) == measured
    rates = []
    for row in known:
        ids = mx.array(batches.read([(0, row)]).ids[:, :-1])
        p, q = (np.exp(np.array(model(ids)[0, 1:], np.float64)) for model in (target, drafter))
        rates.append(np.minimum(p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)).sum(-1).mean())
    assert rate == pytest.approx(np.mean(rates), abs=1e-3)  # the teacher stores float16


def test_a_better_drafter_is_kept_and_drafts(answers, general, tmp_path, mlxspec_command):
    outcome = adapt(mlxspec_command, answers, general, tmp_path, "--tolerance", "0.5")
    assert outcome.status == 0, outcome.err
    first, _, folder = outcome.out.splitlines()
    before, after = (float(word) for word in first.replace(",", "").split() if word.startswith("0."))
    assert first.startswith("acceptance rate on recorded answers: ")
    assert after > before
    assert folder == str(tmp_path / "drafter")
    shown = [line for line in outcome.err.splitlines() if "measuring the acceptance rate" in line]
    assert [line.split(":")[0] for line in shown] == ["held-out", "general"] * 2  # before and after
    again = adapt(mlxspec_command, answers, general, tmp_path, "--tolerance", "0.5")
    assert again.out == outcome.out
    for copied in ("recorded", "held-out"):
        assert (tmp_path / copied).stat().st_mode & 0o777 == 0o700
        assert (tmp_path / copied / "recording.json").exists()  # so that push refuses it
    served = mlxspec_command("generate", "Once", "--target", TARGET, "--drafter", folder, "--max-tokens", "12")
    assert served.status == 0, served.err


@pytest.mark.slow
def test_a_drafter_that_forgets_is_not_kept(answers, general, tmp_path, mlxspec_command):
    outcome = adapt(mlxspec_command, answers, general, tmp_path, "--learning-rate", "0.03")  # general: 0.51 to 0.12
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines()[-1] == "the drafter was not kept, since it is not better"
    assert not (tmp_path / "drafter").exists()


def test_a_folder_with_a_drafter_of_another_command_is_refused_and_keeps_it(
    answers, general, tmp_path, mlxspec_command
):
    start = shutil.copytree(answers / "start", tmp_path / "start") / "drafter"
    command = (mlxspec_command, answers, general, start.parent, "--drafter", str(start), "--steps", "1")
    outcome = adapt(*command, "--learning-rate", "1e-9", "--tolerance", "0")  # it would not be kept
    assert outcome.status == 2
    assert outcome.err == f"error: {start} was not made by train adapt; use another folder for the results\n"
    assert (start / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["recorded", "held-out"])
def test_recorded_answers_where_their_copies_would_be_written_are_refused_and_stay(
    answers, general, tmp_path, mlxspec_command, name
):
    recording = shutil.copytree(answers / "recorded", tmp_path / name)
    outcome = adapt(mlxspec_command, answers, general, tmp_path, "--recorded", str(recording), "--steps", "1")
    assert outcome.status == 2
    assert outcome.err == f"error: {recording} holds recorded answers; use another folder for the results\n"
    assert len(list(Recording(recording).answers())) == 12


def test_only_one_process_adapts_in_a_folder(answers, general, tmp_path, mlxspec_command):
    with locked(tmp_path):
        outcome = adapt(mlxspec_command, answers, general, tmp_path, "--steps", "1")
    assert outcome.status == 2
    assert f"{tmp_path} is in use by process" in outcome.err


@pytest.mark.slow
def test_an_interrupted_adaptation_ends_as_one_that_was_not(answers, general, tmp_path, mlxspec_command, monkeypatch):
    whole = adapt(mlxspec_command, answers, general, tmp_path / "whole", "--tolerance", "0.5")
    original = Trainer._save

    def interrupted(self, done):
        original(self, done)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", interrupted)
    assert adapt(mlxspec_command, answers, general, tmp_path / "parts", "--tolerance", "0.5").status == 130
    monkeypatch.setattr(Trainer, "_save", original)
    resumed = adapt(mlxspec_command, answers, general, tmp_path / "parts", "--tolerance", "0.5")
    assert resumed.out.replace("parts", "whole") == whole.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tolerance", "2"), "tolerance is 2"),
        (("--loss", "best"), "best"),
        (("--steps", "0"), "steps"),
        (("--length", "0"), "length is 0"),
        (("--batch", "0"), "batch"),
        (("--damping", "0"), "damping is 0"),
        (("--learning-rate", "-1"), "learning_rate"),
    ],
)
def test_a_wrong_setting_is_one_line(answers, general, tmp_path, mlxspec_command, options, words):
    outcome = adapt(mlxspec_command, answers, general, tmp_path / "out", *options)
    assert (outcome.status, len(outcome.err.splitlines())) == (2, 1), outcome.err
    assert words in outcome.err
    assert not (tmp_path / "out").exists()


def test_answers_of_another_target_are_refused(answers, general, tmp_path):
    target, recorded = Target(TARGET), list(Recording(answers / "recorded").answers())
    check_answers(recorded, target, tmp_path)
    others = [answer._replace(logprobs=np.roll(answer.logprobs, 7, axis=0)) for answer in recorded]
    outside = [recorded[0]._replace(ids=recorded[0].ids + target.vocab_size)]
    for wrong in (others, outside):
        with pytest.raises(InvalidRequestError, match="answers of another target"):
            check_answers(wrong, target, tmp_path)
    narrow = recorded[1]._replace(ids=recorded[1].ids[:, :5], logprobs=recorded[1].logprobs[:, :5])
    with pytest.raises(InvalidRequestError, match="different keep_top_k"):
        check_answers([recorded[0], narrow], target, tmp_path)
