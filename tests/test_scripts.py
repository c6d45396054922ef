"""The maintainer's scripts: their usage lines parse, and they run as processes on a small scale."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import mlxspec
from mlxspec import ModelPair, SpeculativeDecoder
from mlxspec.models.eagle import EAGLE1, EAGLE3
from mlxspec.models.loading import DEMO
from mlxspec.training.recipe import Recipe
from mlxspec.training.shards import ShardWriter
from mlxspec.training.target import Target
from tests.conftest import decoded, random_llama, shared
from tests.models.test_eagle import random_head

SCRIPTS = Path(__file__).parent.parent / "scripts"
MEASUREMENTS = SCRIPTS / "MEASUREMENTS.md"


def usage_lines(script: Path) -> list[str]:
    """The commands in the docstring of a script."""
    docstring = ast.get_docstring(ast.parse(script.read_text())) or ""
    return [line.strip() for line in docstring.splitlines() if line.strip().startswith("python ")]


def measured_commands() -> list[str]:
    """The commands in MEASUREMENTS.md."""
    blocks = re.findall(r"^```bash\n(.*?)^```", MEASUREMENTS.read_text(), flags=re.MULTILINE | re.DOTALL)
    return "".join(blocks).splitlines()


def without_work(command: click.Command) -> None:
    """Let a command parse its options and do nothing. A group still makes what its subcommands are given."""
    if isinstance(command, click.Group):
        for subcommand in command.commands.values():
            without_work(subcommand)
    else:
        command.callback = lambda **options: None


def parse(line: str, monkeypatch, folder: Path) -> None:
    """Parse a command line as its script does, with empty files and folders for the names in capitals."""
    python, script, *words = shlex.split(line, comments=True)
    assert python == "python"
    assert script.startswith("scripts/")
    for place, word in enumerate(words):
        if re.fullmatch(r"[A-Z][A-Z0-9_]*(\.\w+)?", word):
            path = folder / word
            path.touch() if path.suffix else path.mkdir(exist_ok=True)
            words[place] = str(path)
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.chdir(SCRIPTS.parent)
    main = importlib.reload(importlib.import_module(Path(script).stem)).main
    without_work(main)
    main(words, standalone_mode=False)


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.py")), ids=lambda path: path.name)
def test_the_usage_lines_of_a_script_are_commands_that_it_takes(script, monkeypatch, tmp_path):
    lines = usage_lines(script)
    assert lines
    for line in lines:
        assert line.startswith(f"python scripts/{script.name}")
        parse(line, monkeypatch, tmp_path)


def test_the_usage_lines_name_every_subcommand(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    for name in ("measure_auto", "measure_context", "compare_training", "chat_drafters"):
        words = {word for line in usage_lines(SCRIPTS / f"{name}.py") for word in line.split()}
        assert set(importlib.import_module(name).main.commands) <= words


@pytest.mark.parametrize("line", [
    "python scripts/measure_auto.py never-slower --stories STORIES_FOLDER",
    "python scripts/measure_auto.py --stories STORIES_FOLDER never-faster",
    "python scripts/full_size.py --work WORK_FOLDER",
])  # fmt: skip
def test_a_wrong_usage_line_is_noticed(line, monkeypatch, tmp_path):
    with pytest.raises(click.UsageError):
        parse(line, monkeypatch, tmp_path)


@pytest.mark.parametrize("line", measured_commands())
def test_the_commands_of_the_measurements_are_those_that_the_scripts_take(line, monkeypatch, tmp_path):
    if line.startswith("mlxspec train run "):
        assert (SCRIPTS / line.split()[-1]).exists()
    elif not line.startswith(("export ", "pytest ", "pip ")):
        parse(line, monkeypatch, tmp_path)


def test_every_path_that_the_measurements_name_exists():
    for name in re.findall(r"`((?:mlxspec|scripts|tests)/[\w/.-]*)", MEASUREMENTS.read_text()):
        assert (SCRIPTS.parent / name).exists(), name


def test_the_blocks_expected_for_a_greedy_answer_are_those_that_decoding_needs(stories, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("chat_drafters")
    drafter = random_llama(vocab_size=512)
    few = random_llama(11, vocab_size=4, num_hidden_layers=6)  # a random head is often right
    heads = [random_head(few, layout, seed=9) for layout in (EAGLE1, EAGLE3)]
    for target, model in ((stories, stories), (stories, drafter), *((few, head) for head in heads)):
        decoder = SpeculativeDecoder(ModelPair(target, model), None, 3)
        prompt = [1, 2, 3]
        answer = decoded(decoder, prompt, 61)
        p = target(mx.array([[*prompt, *answer[:-1]]]))[0, 2:]
        drafts = script.draft_logits(model, target, prompt, answer, 3)
        accepted = [script.acceptance_of(p, q, mx.array(answer), 0) for q in drafts]
        assert script.expected_blocks(accepted) == decoder.stats.blocks
    assert decoder.stats.accepted > 5


def test_the_blocks_expected_for_a_sampled_answer_are_the_mean_over_all_outcomes(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    expected_blocks = importlib.import_module("chat_drafters").expected_blocks
    chances = [0.3, 0.9, 0.5, 0.7, 0.1, 0.6]

    def mean(start: int) -> float:
        if start >= len(chances):
            return 0.0
        total, reached = 1.0, 1.0
        for drafted in range(2):  # the first token that is rejected ends the block
            chance = chances[start + drafted] if start + drafted < len(chances) else 0.0
            total += reached * (1 - chance) * mean(start + drafted + 1)
            reached *= chance
        return total + reached * mean(start + 3)

    assert abs(expected_blocks([chances, chances]) - mean(0)) < 1e-12
    # The second token of a draft is never accepted, as if drafts had one token.
    assert abs(expected_blocks([chances, [0.0] * 6]) - expected_blocks([chances])) < 1e-12


def run_script(name: str, *arguments) -> str:
    result = subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_speed_comparison_measures_all_four(tmp_path, stories_folder, temperature):
    options = ["--pad-layers", 2, "--pad-width", 256, "--tokens", 20, "--rounds", 1, "--draft-length", 3]
    out = run_script(
        "compare_speed.py", "--target", stories_folder, *options, "--temperature", temperature, "--json", tmp_path / "x"
    )
    assert "padded with 2 layers that change no text" in out
    assert temperature or "all four give the same text" in out
    record = json.loads((tmp_path / "x").read_text())
    assert set(record["rates"]) == {
        "mlx-lm plain", "mlx-lm speculative", "mlxspec", "mlxspec, nothing drafted"
    }  # fmt: skip
    assert all(rate > 0 for rates in record["rates"].values() for rate in rates)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "options", "words"),
    [
        ("never-slower", ["--tokens", 8], "8-token answers, long prompts"),
        ("nearly-best", ["--tokens", 8, "--only", "middling"], "at worst"),
        ("peer", ["--tokens", 8, "--target", "demo", "--layers", 1], "auto / peer"),
        ("lookup", ["--tokens", 8, "--steps", 2], "copying, draft length auto"),
        ("context", ["--long", 300], "at 300 over at 200"),
        ("block", [], "besides the draft and the target's pass"),
    ],
)
def test_the_promises_of_the_automatic_draft_length_are_measured(stories_folder, what, options, words):
    small = ["--stories", stories_folder, "--pad-width", 16]
    assert words in run_script("measure_auto.py", *small, what, *options, "--rounds", 1)


@pytest.mark.parametrize(
    ("what", "options", "pictures", "words"),
    [
        ("costs", ["--at", 256, "--at", 512, "--from", 512], ["costs"], "predicted from 512: rows 5"),
        ("decode", ["--at", 20, "--at", 300, "--tokens", 6], ["decode"], "mlxspec γ = 3, 300: block efficiency"),
        ("prefill", ["--at", 20, "--at", 300], ["prefill", "first_token"], "read the prompt"),
    ],
)
def test_speed_over_the_length_of_the_text_is_measured(tmp_path, what, options, pictures, words):
    words_of_text = [] if what == "costs" else ["--text", SCRIPTS.parent / "README.md"]
    models = [DEMO / "target", DEMO / "drafter"]
    out = run_script("measure_context.py", what, *models, tmp_path, *options, *words_of_text, "--rounds", 1)
    assert words in out
    for name in pictures:
        assert (tmp_path / f"{name}.png").exists()
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert all(figure > 0 for entry in record["figures"] for figure in entry["rounds"])
        for engine in {entry["engine"] for entry in record["figures"]}:
            assert f"\n| {engine} | " in out


def test_the_cost_of_recording_is_measured(stories_folder):
    out = run_script("measure_recording.py", stories_folder, "--tokens", 8, "--rounds", 1)
    assert re.fullmatch(r"with / without recording: \d\.\d+.*\n", out)


@pytest.mark.slow
def test_the_cost_of_tracing_is_measured(stories_folder):
    out = run_script("measure_tracing.py", "--model", stories_folder, "--tokens", 400)
    assert "5 layers: a trace takes" in out
    assert "6 lengths at 2 capacities" in out


@pytest.mark.slow
def test_the_simulated_macs_are_printed_as_a_table():
    out = run_script("simulate_macs.py", "--runs", 1, "--worst", 2)
    assert out.count("\n| M") >= 8
    assert "324 cases" in out


@pytest.mark.slow
def test_a_record_of_the_doctor_becomes_a_simulated_mac(tmp_path):
    rows = {"1": 10.0, "2": 11.0, "5": 14.0, "17": 40.0}
    (tmp_path / "doctor.json").write_text(json.dumps({"profiles": [{"name": "A chip", "rows_ms": rows}]}))
    out = run_script("simulate_macs.py", "--runs", 1, "--profiles", tmp_path / "doctor.json")
    assert out.count("\n| A chip") == 1 + 10
    assert "36 cases" in out


@pytest.mark.parametrize("recipe", sorted(SCRIPTS.glob("*.toml")), ids=lambda path: path.name)
def test_a_recipe_can_be_read(recipe):
    assert Recipe.read(recipe).trainings


@pytest.mark.slow
def test_the_demo_pair_can_be_trained_further(tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    stories = tmp_path / "stories.jsonl"
    texts = [f'Tom and Lily saw {n} birds. Tom said to Lily, "Look!"' for n in range(40)]
    stories.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "Lily said, “No!”"]))
    files = ["--start", DEMO, "--stories", stories, "--work", work, "--out", out]
    run_script("build_demo_pair.py", *files, "--scale", 0.005)
    for name in ("target", "drafter"):
        load_model(out / name)
    assert mlxspec.generate(mlxspec.load(out / "target", out / "drafter"), "Once", max_tokens=8).tokens
    assert sum(path.stat().st_size for path in out.rglob("*")) <= 4_000_000
    written = [json.loads(line)["text"] for line in (work / "stories" / "0.jsonl").read_text().splitlines()]
    assert written[:40] == texts
    assert len(written) == 160
    for text in written:
        boy, girl = re.match(r"(\w+) and (\w+) saw", text).groups()
        assert text.endswith(f'{boy} said to {girl}, "Look!"')
        assert boy != girl


@pytest.mark.slow
def test_the_ablation_trains_with_each_loss_and_goes_on_where_it_was(tmp_path, stories_folder):
    prompts = shared("text/tinystories_500.jsonl")
    small = ["--samples", 64, "--pretrain-steps", 2, "--steps", 2, "--batch", 2, "--length", 32, "--count", 1]
    options = ["--target", stories_folder, "--prompts", prompts, "--work", tmp_path, "--seeds", 2, *small]
    run_script("ablate_losses.py", *options, "--only", "kld")
    table = run_script("ablate_losses.py", *options, "--only", "kld", "--only", "tvd, k = 8").splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["pretraining only", "kld", "tvd, k = 8"]
    assert all(line.count(" ± ") == 3 for line in table[2:])


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("loss", ["--vocabulary", 64, "--hidden", 16, "--positions", 64]),
        ("throughput", ["--vocabulary", 64, "--hidden", 16, "--intermediate", 32, "--layers", 1, "--heads", 2]),
        ("distill", ["--vocabulary", 64, "--hidden", 16, "--intermediate", 32, "--layers", 1, "--heads", 2,
                     "--target-hidden", 32, "--target-layers", 1]),
        ("answers", ["--tokens", 4, "--group", 1, "--group", 2]),
    ],
)  # fmt: skip
def test_the_costs_of_training_are_measured(what, options):
    small = ["--length", 16, "--steps", 1] if what in ("throughput", "distill") else []
    out = run_script("compare_training.py", what, *options, *small, "--rounds", 1)
    assert re.search(r"ratio \d|over mlx-lm \d|costs \d|\d\) of its time", out)


@pytest.mark.slow
def test_worst_case_training_and_retention_are_compared(tmp_path, mlxspec_command):
    target, answers = Target(str(DEMO / "target")), tmp_path / "answers"
    with ShardWriter(answers / "tokens", target.vocab_size, target.tokenizer_fingerprint) as writer:
        for number in range(36):
            ids = np.random.default_rng(number).integers(3, 300, 20).tolist()
            writer.add(ids, [0] * 5 + [1] * 15, "abc"[number % 3])
        writer.finish()
    start = ("--layers", "0", "--vocabulary-size", "300", "--answers", str(answers), "--out", str(tmp_path / "start"))
    assert mlxspec_command("train", "init", "--target", str(DEMO / "target"), *start).status == 0
    prompts = [json.dumps({"prompt": f"Tell me about {number}", "task": "abc"[number % 3]}) for number in range(6)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    small = ["--earlier", 3, "--steps", 2, "--batch", 2, "--length", 32, "--seeds", 1, "--count", 2, "--max-tokens", 8]
    tasks = ["--mix", "a:6", "--mix", "b:2", "--absent", "c"]
    folders = [DEMO / "target", tmp_path / "start" / "drafter", answers, tmp_path / "prompts.jsonl", tmp_path / "out"]
    lines = [json.loads(line) for line in run_script("robust_drafters.py", *folders, *tasks, *small).splitlines()]
    names = ["before", "plain", "groups", "ratios", "9:1", "penalty", "co-natural"]
    assert [line["method"] for line in lines] == [name for name in names for _ in (0, 1)]
    assert all(1 <= line[task] <= 4 for line in lines for task in "abc")


@pytest.mark.slow
def test_learning_from_use_is_measured_and_goes_on_where_it_was(tmp_path, mlxspec_command):
    target, answers, prompts = DEMO / "target", tmp_path / "answers", tmp_path / "prompts.jsonl"
    drawn = ("--samples", "8", "--temperatures", "1", "--max-tokens", "24", "--group", "8")
    assert mlxspec_command("train", "distill", "--target", str(target), *drawn, "--out", str(answers)).status == 0
    prompts.write_text("\n".join(json.dumps({"prompt": f"Tell me about {number}"}) for number in range(14)))
    small = ["--answers", 10, "--answer-tokens", 12, "--count", 2, "--max-tokens", 8]
    small += ["--steps", 2, "--batch", 2, "--length", 64]
    command = [target, DEMO / "drafter", prompts, answers, prompts, tmp_path / "out", *small]
    before, after = map(json.loads, run_script("learn_from_use.py", *command).splitlines())
    assert len(list((tmp_path / "out" / "recorded").glob("*.npz"))) == 10
    measured = ["topic, T = 0", "topic, T = 1", "general, T = 0", "general, T = 1"]
    assert all(1 <= line[name] <= 4 for line in (before, after) for name in measured)
    again = [json.loads(line) for line in run_script("learn_from_use.py", *command).splitlines()]
    figures = [[line[name] for name in measured] for line in (before, after)]
    assert [[line[name] for name in measured] for line in again] == figures


@pytest.mark.slow
def test_starts_losses_costs_and_tasks_of_a_chat_model_are_compared(tmp_path, mlxspec_command, monkeypatch):
    target, answers, out = DEMO / "target", tmp_path / "answers", tmp_path / "out"
    drawn = ("--samples", "16", "--temperatures", "1", "--max-tokens", "24", "--group", "8")
    assert mlxspec_command("train", "distill", "--target", str(target), *drawn, "--out", str(answers)).status == 0
    small = ["--held-out", 4, "--steps", 1, "--batch", 2, "--length", 32]
    command = ["starts", target, answers, out, *small, "--vocabulary", 200, "--every", 1]
    printed = run_script("chat_drafters.py", *command)
    assert len(re.findall(r"^.+: 0 0\.\d+, 64 0\.\d+, 128 0\.\d+$", printed, re.M)) == 8
    assert (out / "starts.png").exists()
    assert run_script("chat_drafters.py", *command).splitlines() == [str(out / "starts.png")]  # all is done
    start = out / "2 layers: first two"
    printed = run_script("chat_drafters.py", "losses", target, answers, start, tmp_path / "l", *small, "--seeds", 1)
    names = ["ce", "kld", "tvd", "tvd++", "tvd, half by rejection", "tvd, all by rejection"]
    assert re.findall(r"seed 0, (.+):", printed) == names
    rates = dict(re.findall(r"seed 0, (.+): (.+)", printed))
    assert len({rates[name] for name in names if name.startswith("tvd,") or name == "tvd"}) > 1  # the weights count
    head = ["--steps", 2, "--batch", 2, "--length", 32, "--vocabulary", 200, "--held-out", 4]
    printed = run_script("chat_drafters.py", "heads", target, answers, tmp_path / "heads", *head)
    step_rates = r"\[(0\.\d+, ){2}0\.\d+\]"
    assert re.search(rf"^before: {step_rates}\n2 steps of kld: {step_rates}\n$", printed, re.M)
    assert (tmp_path / "heads" / "-1" / "kld" / "drafter" / "model.safetensors").exists()
    more = ["--start", 0, "--start", 1, "--more-steps", 1]
    printed = run_script("chat_drafters.py", "heads", target, answers, tmp_path / "heads", *head, *more)
    assert re.search(
        r"^before: \[0\.\d+\]\n2 steps of kld: \[0\.\d+\]\n1 steps of tvd\+\+: \[0\.\d+\]\n$", printed, re.M
    )
    sizes = ["--vocabulary", 300, "--vocabulary", 100]
    printed = run_script("chat_drafters.py", "costs", target, answers, start, "--rounds", 1, "--held-out", 4, *sizes)
    assert "100 tokens: step / target step" in printed
    assert "4 bits: α" in printed
    prompts = tmp_path / "few.jsonl"
    prompts.write_text('{"prompt": "A dog"}\n{"prompt": "A cat"}\n')
    monkeypatch.chdir(tmp_path)  # where a file of the task's name is
    options = ["--prompts", prompts, "--max-tokens", 8]
    both = [start, tmp_path / "heads" / "-1" / "kld" / "drafter"]
    options += ["--draft-length", 3, "--draft-length", 5]
    lines = [json.loads(line) for line in run_script("chat_drafters.py", "tasks", target, *both, *options).splitlines()]
    assert [(line["task"], line["temperature"], line["prompts"]) for line in lines] == [("few", 0, 2), ("few", 1, 2)]
    for line in lines:
        for found in (line["block_efficiency"][str(drafter)] for drafter in both):
            assert 1 <= found["3"] <= found["5"] <= 6
    assert prompts.exists()
