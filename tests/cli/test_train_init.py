"""``mlxspec train init``: a drafter from the target's layers, trained and used."""

import re

import pytest

from mlxspec.models.loading import DEMO

TARGET = str(DEMO / "target")


def test_a_drafter_from_the_targets_layers_is_trained_and_drafts(tmp_path, mlxspec_command):
    folder = tmp_path / "a folder"
    answers, start, trained = (str(folder / name) for name in ("answers", "start", "trained"))
    drawn = ("--samples", "4", "--temperatures", "1", "--max-tokens", "60", "--group", "4")
    assert mlxspec_command("train", "distill", "--target", TARGET, *drawn, "--out", answers).status == 0
    layers = ("--layers", "0", "--layers", "-1", "--vocabulary-size", "256", "--answers", answers)
    made = mlxspec_command("train", "init", "--target", TARGET, *layers, "--share-embedding", "--out", start)
    assert made.status == 0, made.err
    assert "% of the answers' tokens are in its vocabulary" in made.out
    small = ("--steps", "2", "--batch", "2", "--length", "32", "--loss", "kld")
    repeated = mlxspec_command("train", "init", "--target", TARGET, *layers, "--share-embedding", "--out", start)
    assert (repeated.status, repeated.out, repeated.err) == (0, made.out, "")
    other = mlxspec_command("train", "init", "--target", TARGET, "--layers", "0", "--out", start)
    assert "start was created with layers = [0, -1], but this run has layers = [0]; use another folder" in other.err
    start = f"{start}/drafter"
    command = ("train", "finetune", "--target", TARGET, "--drafter", start, "--answers", answers, "--out", trained)
    assert mlxspec_command(*command, *small).status == 0
    again = mlxspec_command(*command, *small)  # complete: the drafter is read with the target's embedding
    assert again.status == 0, again.err
    text = mlxspec_command(
        "generate", "--target", TARGET, "--drafter", f"{trained}/drafter", "--draft-length", "2", "Once upon a time"
    )
    plain = mlxspec_command("generate", "--target", TARGET, "--drafter", "none", "Once upon a time")
    assert text.status == 0, text.err
    assert text.out == plain.out
    refused = mlxspec_command("export", start, str(folder / "exported"))
    assert refused.status == 2
    assert "uses its target's embedding; name the target with --target" in refused.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "99"), r"layers are \[99\]; use numbers from"),
        (("--layers", "0", "--vocabulary-size", "64"), "need --answers"),
        ((), "there are no layers to copy; set layers"),
        (("--layers", "0", "--vocabulary-size", "64", "--answers", "nowhere"), "nowhere"),
    ],
)
def test_wrong_arguments_are_one_line_and_leave_no_drafter(tmp_path, mlxspec_command, options, message):
    outcome = mlxspec_command("train", "init", "--target", TARGET, *options, "--out", str(tmp_path / "out"))
    assert outcome.status == 2
    assert len(outcome.err.strip().splitlines()[-1]) < 300
    assert re.search(message, outcome.err)
    assert not list(tmp_path.rglob("model.safetensors"))
