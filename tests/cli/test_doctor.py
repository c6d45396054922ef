"""``mlxspec doctor`` as a user runs it, mostly on small shapes."""

import getpass
import json
import os
import signal
import socket
import time
from pathlib import Path

import mlx.core as mx
import pytest

import mlxspec
from mlxspec.cli.doctor import print_kernels, print_machine
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import MODEL
from mlxspec.decoding.policy import Automatic
from mlxspec.evaluation import doctor
from tests.decoding.test_simulated_macs import simulate_macs

CHECKS = ["identity", "kernels", "rows", "attention", "policy"]


@pytest.fixture
def small(monkeypatch):
    sizes = {
        "DTYPES": {mx.float32: 8, mx.bfloat16: 4},
        "DRAFT_LENGTHS": (0, 2),
        "PROMPTS": 1,
        "MAX_TOKENS": 8,
        "HIDDEN": 64,
        "INTERMEDIATE": 128,
        "POSITIONS": (32, 64),
        "ATTENTION_ROWS": (1, 5),
    }
    for name, value in sizes.items():
        monkeypatch.setattr(doctor, name, value)


@pytest.fixture
def folder(tmp_path, monkeypatch, small):
    """A folder with a space in its name, in which the command runs on small shapes."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_doctor_prints_every_check_and_writes_a_record_without_personal_data(mlxspec_command, folder):
    outcome = mlxspec_command("doctor", "--rounds", "1")
    assert outcome.status == 0
    assert "float32   the same in 2 of 2 answers" in outcome.out
    assert "Passes over 1 to 17 rows: 4-bit matmul" in outcome.out
    assert "Attention in one layer" in outcome.out
    assert "Speed relative to plain decoding: predicted" in outcome.out
    assert "FAILED" not in outcome.out
    assert outcome.err.splitlines()[-1] == "written to doctor.json"
    assert max(map(len, outcome.out.splitlines())) <= 130
    content = (folder / "doctor.json").read_text()
    record = json.loads(content)
    assert record["complete"]
    assert all("failed" not in record[name] for name in CHECKS)
    assert {"mlx", "mlx_lm", "mlxspec", "python", "system", "chip", "memory_bytes", "wired_limit_bytes"} <= set(
        record["machine"]
    )
    assert record["identity"]["float32"]["same"] == record["identity"]["float32"]["answers"] == 2
    assert list(record["rows"]["stack"]["seconds"]) == [str(count) for count in range(1, 18)]
    assert record["policy"]["measured"]["median"] > 0
    words = (getpass.getuser(), socket.gethostname(), str(Path.home()), str(folder.parent))
    assert [word for word in words if f'"{word}' in content or f"/{word}" in content] == []


def test_on_metal_the_chip_and_the_kernels_are_printed(capsys):
    machine = {"mlxspec": "1", "mlx": "2", "mlx_lm": "3", "python": "4", "system": "Darwin 24", "macos": "15.5"}
    machine |= {"chip": "Apple M1", "blas": None, "architecture": "applegpu_g13g", "memory_bytes": 16e9}
    print_machine({"machine": {**machine, "wired_limit_bytes": 11e9}})
    print_kernels(doctor.kernels(mlxspec.load(quantize="none"), "applegpu_g13g"), {})
    assert capsys.readouterr().out.splitlines() == [
        "mlxspec 1, mlx 2, mlx-lm 3, Python 4, macOS 15.5",
        "Apple M1 (GPU applegpu_g13g), 16.0 GB of memory, of which 11.0 GB can be wired",
        "Kernels of the target by rows, as MLX chooses them",
        "  attention vector 1-8, full 9-17",
        "  matmul    qmv 1-13, qmm 14-17",
    ]


def test_the_simulation_of_macs_reads_its_profiles(mlxspec_command, folder):
    assert mlxspec_command("doctor", "--rounds", "1").status == 0
    found = simulate_macs.profiles(folder / "doctor.json")
    assert [name.split(", ", 1)[1] for name in found] == ["4-bit matmul 64x128", "demo, whole model"]
    for rows in found.values():
        assert list(rows) == list(range(1, 18))
        assert rows[1] == 1
        policy = Automatic(BlockCosts(rows, draft_step=0.1), [MODEL])
        policy.start([1, 2], 100, 0)
        assert policy.choose(100).length >= 0
    stored = json.loads((Path(simulate_macs.PROFILES)).read_text())["profiles"]
    assert {frozenset(profile) for profile in json.loads(Path("doctor.json").read_text())["profiles"]} == {
        frozenset(profile) for profile in stored
    }


def test_a_folder_given_as_target_is_measured_and_not_named(mlxspec_command, folder, stories_folder):
    outcome = mlxspec_command("doctor", "--rounds", "1", "--target", str(stories_folder), "--drafter", "lookup")
    assert outcome.status == 0, outcome.out
    content = Path("doctor.json").read_text()
    assert str(stories_folder) not in content
    assert stories_folder.name not in content
    assert json.loads(content)["target"]["drafter"] == "lookup"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "0 is not in the range x>=1"),
        (["--rounds", "many"], "'many' is not a valid integer"),
        (["--out", "."], ". cannot be written"),
        (["--out", "no/such/folder/d.json"], "there is no folder no/such/folder"),
        (["--drafter", "none"], "doctor needs a drafter; leave out --drafter none"),
        (["--target", "nosuch"], "no such folder: nosuch"),
        (["--quantize", "4"], "--quantize needs a --target"),
        (["--nothing"], "No such option"),
        (["something"], "Got unexpected extra argument"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(mlxspec_command, folder, arguments, words):
    outcome = mlxspec_command("doctor", *arguments)
    assert outcome.status == 2
    assert words in outcome.err
    assert outcome.out == ""
    assert len(outcome.err.strip().splitlines()) == 1
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable_is_named_before_anything_is_measured(mlxspec_command, folder):
    folder.chmod(0o500)
    outcome = mlxspec_command("doctor")
    folder.chmod(0o700)
    assert (outcome.status, outcome.out) == (2, "")
    assert "doctor.json cannot be written" in outcome.err


def test_a_check_that_fails_is_named_and_does_not_stop_the_others(mlxspec_command, folder, monkeypatch):
    monkeypatch.setattr(doctor, "POSITIONS", (3, 0))  # no keys at all
    outcome = mlxspec_command("doctor", "--rounds", "1")
    record = json.loads(Path("doctor.json").read_text())
    assert outcome.status == 1
    assert f"FAILED: attention: {record['attention']['failed']}" in outcome.out
    assert record["complete"]
    assert "median" in record["policy"]["measured"]


def test_a_text_that_differs_in_float32_fails(mlxspec_command, folder, monkeypatch):
    real = doctor.mlx_lm_engine
    monkeypatch.setattr(doctor, "mlx_lm_engine", lambda pair, sampling, count: real(pair, sampling, count + 1))
    outcome = mlxspec_command("doctor", "--rounds", "1")
    assert outcome.status == 1
    assert "float32   the same in 0 of 2 answers; the first difference comes after 8 tokens: PLEASE REPORT THIS" in (
        outcome.out
    )


def test_ctrl_c_keeps_the_finished_checks(mlxspec_command, folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "attention", interrupted)
    outcome = mlxspec_command("doctor", "--rounds", "1")
    assert outcome.status == 130
    assert outcome.err.splitlines()[-1] == "interrupted; the finished checks are in doctor.json"
    record = json.loads(Path("doctor.json").read_text())
    assert not record["complete"]
    assert record["rows"]
    before = Path("doctor.json").read_bytes()
    monkeypatch.setattr(doctor, "identity", interrupted)
    outcome = mlxspec_command("doctor", "--rounds", "1")
    assert outcome.err.splitlines()[-1] == "interrupted; no check was finished"
    assert Path("doctor.json").read_bytes() == before


@pytest.mark.slow
def test_ctrl_c_in_a_process_leaves_no_traceback(mlxspec_process):
    process = mlxspec_process("doctor")
    assert process.stdout.readline().startswith("mlxspec ")
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("interrupted; ")


@pytest.mark.slow
def test_the_full_shapes_work(mlxspec_command, tmp_path):
    outcome = mlxspec_command("doctor", "--rounds", "1", "--out", str(tmp_path / "d.json"))
    assert outcome.status == 0, outcome.out
    assert "4-bit matmul 4096x11008" in outcome.out
