import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from mlxspec import Drafter, DrafterConfig
from mlxspec.cli.options import MEASURING
from mlxspec.decoding import calibration
from mlxspec.decoding.costs import BlockCosts
from mlxspec.models.checks import check_safetensors
from mlxspec.models.loading import DEMO

DRAFTED = r"[\d.]+ tokens per pass of the target, \d+% of \d+ drafted tokens accepted"
SUMMARY = re.compile(rf"^\d+ tokens, [\d.]+ tokens/s: ({DRAFTED}|nothing drafted, because .*)$")


def told(err: str) -> str:
    """Standard error without the line of a calibration, which only the first answer on a machine needs."""
    return err.removeprefix(f"{MEASURING}\n").strip()


def test_text_goes_to_standard_output_and_one_line_to_standard_error(mlxspec_command):
    outcome = mlxspec_command("generate", "Once upon a time", "--max-tokens", "30")
    assert outcome.status == 0
    assert len(outcome.out.split()) > 10
    assert SUMMARY.match(told(outcome.err))


COSTS = BlockCosts(rows={1: 1.0, 17: 1.3}, draft_step=0.05)


@pytest.fixture
def new_machine(monkeypatch):
    """A machine on which nothing was measured yet, and on which measuring takes no time."""
    figures = []

    def calibrate(compiled, progress, again=False):
        progress(0, 2)
        time.sleep(0.2)  # a bar is shown after a tenth of a second
        progress(2, 2)
        figures.append(COSTS)
        return COSTS

    monkeypatch.setattr(calibration, "is_final", lambda compiled: bool(figures))
    monkeypatch.setattr(calibration, "calibrate", calibrate)
    return figures


def test_the_first_answer_on_a_machine_says_in_one_line_that_costs_are_measured(mlxspec_command, new_machine):
    first, second = (mlxspec_command("generate", "Once upon a time", "--max-tokens", "9") for _ in range(2))
    line, summary = first.err.splitlines()
    assert line == MEASURING == "measuring how long a pass takes on this machine"
    assert SUMMARY.match(summary)
    assert SUMMARY.match(second.err.strip())


def test_on_a_terminal_a_progress_bar_says_it_and_is_cleared(mlxspec_command, new_machine, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    err = mlxspec_command("generate", "Once upon a time", "--max-tokens", "9").err
    bar, summary = err.rsplit("\r", 1)
    assert re.search(rf"{MEASURING}: 100%.*2/2", bar)
    assert "\n" not in bar
    assert SUMMARY.match(summary.strip())


@pytest.mark.parametrize("options", [["--json"], ["--draft-length", "3"], ["--drafter", "none"]])
def test_nothing_is_said_where_nothing_is_measured_or_json_is_wanted(mlxspec_command, new_machine, options):
    outcome = mlxspec_command("generate", "Once upon a time", "--max-tokens", "9", *options)
    assert MEASURING not in outcome.err
    assert (outcome.err == "") == ("--json" in options)
    assert len(new_machine) == ("--json" in options)


def test_a_prompt_that_is_refused_is_refused_before_anything_is_measured(mlxspec_command, new_machine):
    one_line_error(mlxspec_command("generate", "word " * 2000), "the target's context holds 1024")
    assert not new_machine


def test_ctrl_c_while_costs_are_measured_exits_with_130_and_no_traceback(mlxspec_command, new_machine, monkeypatch):
    def interrupted(compiled, progress, again=False):
        progress(1, 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "calibrate", interrupted)
    outcome = mlxspec_command("generate", "Once upon a time")
    assert (outcome.status, outcome.out) == (130, "")
    assert outcome.err.strip() == MEASURING


def test_the_same_answer_whoever_drafts(mlxspec_command):
    answers = {
        mlxspec_command("generate", "One day, a dog", "--max-tokens", "60", *options).out
        for options in ([], ["--drafter", "lookup"], ["--drafter", "none"], ["--draft-length", "0"])
    }
    assert len(answers) == 1


def test_json_is_one_object_with_everything_in_it(mlxspec_command):
    options = ["--json", "--temperature", "1", "--seed", "3", "--max-tokens", "40", "--top-p", "0.9"]
    outcome = mlxspec_command("generate", "Once upon a time", *options)
    answer = json.loads(outcome.out)
    assert set(answer) == {"text", "tokens", "finish_reason", "stats", "target", "drafter", "sampling"}
    assert answer["sampling"] == {"temperature": 1, "top_p": 0.9, "top_k": 0, "min_p": 0, "seed": 3}
    assert len(answer["tokens"]) == answer["stats"]["tokens"] <= 40
    assert answer["finish_reason"] in ("stop", "length")
    assert outcome.err == ""
    assert json.loads(mlxspec_command("generate", "Once upon a time", *options).out)["text"] == answer["text"]


def test_all_statistics_on_request(mlxspec_command):
    err = mlxspec_command("generate", "Once upon a time", "--max-tokens", "30", "--stats").err
    for name in ("prompt", "decoding", "drafted", "by position", "peak memory"):
        assert f"\n{name} " in err


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_the_prompt_can_come_from_standard_input(mlxspec_command, arguments):
    piped = mlxspec_command("generate", *arguments, "--max-tokens", "20", stdin=b"Once upon a time\n")
    assert piped.status == 0
    assert piped.out == mlxspec_command("generate", "Once upon a time", "--max-tokens", "20").out


def test_an_answer_ends_before_a_stop_string(mlxspec_command):
    whole = mlxspec_command("generate", "Once upon a time", "--max-tokens", "60").out
    stop = whole.split()[8]
    outcome = mlxspec_command("generate", "Once upon a time", "--stop", stop, "--json")
    answer = json.loads(outcome.out)
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"
    assert len(answer["tokens"]) == answer["stats"]["tokens"]


def test_a_story_ends_with_its_eos_and_without_showing_it(mlxspec_command):
    answer = json.loads(mlxspec_command("generate", "Once upon a time", "--max-tokens", "-1", "--json").out)
    assert answer["finish_reason"] == "stop"
    assert answer["tokens"][-1] == 1
    assert "</s>" not in answer["text"]


def test_accepted_tokens_show_in_another_color(mlxspec_command, monkeypatch):
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *args: False)
    options = ["Once upon a time", "--max-tokens", "40", "--draft-length", "4"]
    plain = mlxspec_command("generate", *options).out
    colored = mlxspec_command("generate", *options, "--show-drafted").out
    assert "\x1b[32m" in colored
    assert re.sub(r"\x1b\[\d+m", "", colored) == plain


@pytest.fixture
def llama_folder(tmp_path):
    folder = tmp_path / "a llama"
    shutil.copytree(DEMO / "drafter", folder)
    return folder


def edited_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def one_line_error(outcome, *words):
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--target", "/no/such/folder"], ["no such folder: /no/such/folder"]),
        (["x", "--target", "not a hub id"], ["no such folder: not a hub id"]),
        (["x", "--drafter", "./nowhere"], ["no such folder: ./nowhere"]),
        ([""], ["prompt is empty"]),
        (["x", "--temperature", "-1"], ["temperature is -1"]),
        (["x", "--temperature", "warm"], ["--temperature", "warm"]),
        (["x", "--top-p", "0"], ["top-p is 0"]),
        (["x", "--top-p", "1.5"], ["top-p is 1.5"]),
        (["x", "--min-p", "2"], ["min-p is 2"]),
        (["x", "--top-k", "-2"], ["top-k is -2"]),
        (["x", "--draft-length", "-3"], ["draft length is -3"]),
        (["x", "--target", "~nobody-of-that-name/x"], ["no such folder"]),
        (["x", "--target", "x" * 300], ["no such folder"]),
        (["x", "--temperature", "1e-46"], ["temperature is 1e-46"]),
        (["x", "--draft-length", "many"], ["many", "auto"]),
        (["x", "--max-tokens", "-5"], ["max-tokens is -5"]),
        (["x", "--verification", "hope"], ["hope", "block", "token", "match"]),
        (["x", "--stop", ""], ["stop string is empty"]),
        (["x", "--system", "Be brief."], ["chat template"]),
        (["x", "--no-such-option"], ["--no-such-option"]),
        (["x", "y"], ["unexpected extra argument"]),
        (["word " * 2000], ["the target's context holds 1024", "shorten it"]),
    ],
)
def test_bad_input_gets_one_line_and_exit_status_2(mlxspec_command, arguments, words):
    one_line_error(mlxspec_command("generate", *arguments), *words)


def test_invalid_utf8_on_standard_input_is_named(mlxspec_command):
    one_line_error(mlxspec_command("generate", stdin=b"Once \xff upon"), "not valid UTF-8 (byte 5)")


def test_no_prompt_on_standard_input_is_named(mlxspec_command):
    one_line_error(mlxspec_command("generate", stdin=b"\n"), "prompt is empty")


def test_a_hub_id_without_a_network_is_named(mlxspec_command, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outcome = mlxspec_command("generate", "x", "--target", "nobody/no-such-model")
    one_line_error(outcome, "nobody/no-such-model", "not in the hub's local cache", "connect to the network")


def test_a_folder_without_weights_is_named(mlxspec_command, llama_folder):
    (llama_folder / "model.safetensors").unlink()
    one_line_error(mlxspec_command("generate", "x", "--drafter", str(llama_folder)), str(llama_folder), "no weights")


@pytest.mark.parametrize("size", [0, 5, 8, 1000, 100_000])
def test_a_torn_weight_file_is_named(mlxspec_command, llama_folder, size):
    weights = llama_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    one_line_error(mlxspec_command("generate", "x", "--drafter", str(llama_folder)), str(weights), "again")


def test_an_unknown_architecture_is_named(mlxspec_command, llama_folder):
    edited_config(llama_folder, model_type="abacus")
    one_line_error(mlxspec_command("generate", "x", "--drafter", str(llama_folder)), "abacus")


@pytest.mark.parametrize("model_type", ["mamba", "gpt_neox"])
def test_a_config_of_another_architecture_is_named(mlxspec_command, llama_folder, model_type):
    edited_config(llama_folder, model_type=model_type)
    one_line_error(mlxspec_command("generate", "x", "--drafter", str(llama_folder)), str(llama_folder), model_type)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": 5}'])
def test_a_mangled_config_is_named(mlxspec_command, llama_folder, text):
    (llama_folder / "config.json").write_text(text)
    one_line_error(mlxspec_command("generate", "x", "--drafter", str(llama_folder)), "config.json")


def test_weights_of_another_shape_are_named(mlxspec_command, llama_folder):
    config = DrafterConfig.from_dict(json.loads((llama_folder / "config.json").read_text()))
    edited_config(llama_folder, hidden_size=2 * config.hidden_size)
    one_line_error(mlxspec_command("generate", "x", "--drafter", str(llama_folder)), str(llama_folder), "shape")


def test_different_tokenizers_are_named_with_the_first_difference(mlxspec_command, llama_folder):
    tokenizer = json.loads((llama_folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    names = {i: token for token, i in vocab.items()}
    vocab[names[300]], vocab[names[301]] = 301, 300
    (llama_folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    outcome = mlxspec_command("generate", "x", "--drafter", str(llama_folder))
    one_line_error(outcome, f"id 300 is {names[300]!r} in the target and {names[301]!r} in the drafter")


def test_a_file_in_place_of_a_folder_is_named(mlxspec_command, llama_folder):
    one_line_error(mlxspec_command("generate", "x", "--target", str(llama_folder / "config.json")), "is a file")


def test_a_whole_safetensors_file_passes_the_check(tmp_path):
    config = DrafterConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    Drafter(config).save(tmp_path)
    check_safetensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_written_and_exits_with_130(mlxspec_process, as_json):
    # Hot, and with a seed, so that the story is sure not to end before the signal comes.
    story = ["Once upon a time", "--max-tokens", "1000", "--temperature", "3", "--seed", "1", "--draft-length", "0"]
    slow = {**os.environ, "MLXSPEC_OPENBLAS": "off"}
    process = mlxspec_process("generate", *story, "--json" if as_json else "--stats", env=slow)
    if as_json:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=4)
        first = ""
    else:
        first = process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert "Traceback" not in err
    assert process.returncode == 130
    if first:
        assert "peak memory" in err


def test_a_reader_that_leaves_early_causes_no_traceback(mlxspec_process):
    with mlxspec_process("generate", "Once upon a time", "--max-tokens", "400", "--temperature", "1") as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(timeout=60) in (0, 1)  # 0: the whole story fitted into the pipe
        assert told(process.stderr.read()).count("\n") <= 1  # the summary or nothing


def test_a_path_with_spaces_works(mlxspec_process, llama_folder):
    process = mlxspec_process("generate", "Once", "--drafter", str(llama_folder), "--max-tokens", "5")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert SUMMARY.match(told(err))
    assert out.strip()


@pytest.mark.parametrize("verb", ["generate", "generate --json", "chat"])
def test_a_character_that_the_output_encoding_lacks_is_replaced(mlxspec_process, tmp_path, verb):
    folder = tmp_path / "a target"
    shutil.copytree(DEMO / "target", folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    llamas = {"type": "Replace", "pattern": {"String": "e"}, "content": "🦙"}
    content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], llamas]}
    file.write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}")
    command, *options = verb.split()
    prompt = ["Once upon a time"] if command == "generate" else []
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    process = mlxspec_process(
        command, *prompt, *options, "--target", str(folder), "--draft-length", "0", "--max-tokens", "20",
        env=environment, stdin=subprocess.PIPE,
    )  # fmt: skip
    out, err = process.communicate("Once upon a time\n", timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert ("?" if not options else "\\ud83e") in out
