"""What holds for every verb, and for the first seconds of the command."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

import mlxspec
from mlxspec.cli.verbs import VERBS, cli
from mlxspec.errors import is_out_of_memory
from mlxspec.models import quantizing


def all_commands(command: click.Command, name: str = "mlxspec"):
    """Yield every command with its name, the groups' own included."""
    yield name, command
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for verb in command.list_commands(ctx):
            yield from all_commands(command.get_command(ctx, verb), f"{name} {verb}")


@pytest.mark.parametrize(
    ("name", "command"), list(all_commands(cli)), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_and_every_option_has_a_help_text(name, command):
    assert command.help
    if name.startswith("mlxspec train "):  # click cuts these to fit into the list of commands
        assert not command.get_short_help_str(limit=64).endswith("...")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_the_list_of_verbs_says_what_each_command_does():
    ctx = click.Context(cli)
    for verb, (_, line) in VERBS.items():
        first = cli.get_command(ctx, verb).help.split("\n")[0]
        assert set(line.lower().rstrip(".").split()) & set(first.lower().rstrip(".").split()) - {"a", "the", "of"}, verb


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_neither_mlx_nor_transformers(option):
    code = f"""
import sys
from mlxspec.cli import main
sys.argv = ["mlxspec", {option!r}]
try:
    main()
finally:
    print(sorted({{"mlx", "transformers", "numpy"}} & sys.modules.keys()), file=sys.stderr)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr == "[]\n"
    assert "mlxspec" in result.stdout


def test_the_version_names_mlx_and_mlx_lm(mlxspec_command):
    words = mlxspec_command("--version").out.split(", ")
    assert [word.split()[0] for word in words] == ["mlxspec", "mlx", "mlx-lm"]


def test_every_public_name_can_be_imported_and_is_listed():
    for name in mlxspec.__all__:
        assert getattr(mlxspec, name).__name__ == name
        assert name in dir(mlxspec)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mlxspec.nothing  # noqa: B018


def test_the_package_is_marked_as_typed():
    assert (Path(mlxspec.__file__).parent / "py.typed").exists()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "Once", "--max-tokens", "3"], ["chat"], ["models"]], ids=str
)
def test_ctrl_c_in_the_first_seconds_leaves_no_traceback(mlxspec_process, arguments):
    random.seed(len(arguments))
    for _ in range(5):
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", "import mlxspec"], check=True)
        starting = time.monotonic() - start  # until then, Python and the package itself are starting
        process = mlxspec_process(*arguments, stdin=subprocess.DEVNULL)
        time.sleep(starting + random.uniform(0, 1.5))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        assert process.returncode in (0, 2, 130, -signal.SIGINT)


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colors_can_be_turned_off(mlxspec_command, monkeypatch, variables):
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda stream=None, color=None: color is False)
    colored = mlxspec_command("generate", "Once", "--top-p", "7")
    assert "\x1b[" in colored.err
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "\x1b[" not in mlxspec_command("generate", "Once", "--top-p", "7").err


def test_a_home_folder_that_does_not_exist_is_not_created(mlxspec_process, tmp_path):
    home = tmp_path / "missing"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    process = mlxspec_process("generate", "Once", "--max-tokens", "2", env={**environment, "HOME": str(home)})
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert not home.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--drafter", "none", "--draft-length", "4"], "--draft-length 4 needs a drafter"),
        (["generate", "x", "--json", "--show-drafted"], "--show-drafted has no effect with --json"),
        (["generate", "x", "--json", "--stats"], "--stats has no effect with --json"),
        (["generate", "x", "--raw", "--system", "y"], "--raw leaves out the chat template"),
        (["generate", "x", "--quantize", "4"], "--quantize needs a --target"),
        (["generate", "x", "--target", "y", "--quantize", "3"], "--quantize is 3"),
        (["generate", "x", "--target", "nosuch"], "`mlxspec models`"),
        (["generate", "x", "--target", "lama2-7b-chat"], 'did you mean "llama2-7b-chat"?'),
        (["generate", "", "--target", "nosuch"], "the prompt is empty"),
        (["generate", "x", "--stop", "", "--target", "nosuch"], "a stop string is empty"),
        (["generate", "x", "--max-tokens", "-3", "--target", "nosuch"], "--max-tokens is -3"),
        (["generate", "x", "--draft-length", "99", "--target", "nosuch"], "draft length is 99"),
        (["chat", "--max-tokens", "-3", "--target", "nosuch"], "--max-tokens is -3"),
        (["bench", "--compare", "a", "b", "--rounds", "3"], "--rounds has no effect with --compare"),
        (["bench", "--calibrate", "--drafter", "none"], "--calibrate needs a drafter"),
        (["cache", "--delete", "nothing"], "there is no entry nothing"),
    ],
    ids=str,
)
def test_what_is_wrong_without_a_model_is_named_without_one(mlxspec_command, arguments, words):
    outcome = mlxspec_command(*arguments)
    assert outcome.status == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_too_little_memory_is_one_line(mlxspec_command, monkeypatch):
    monkeypatch.setattr("mlxspec.cli.verbs.cli", lambda **options: bytearray(1 << 60))
    outcome = mlxspec_command()
    assert outcome.status == 2
    assert outcome.err.startswith("error: out of memory (MemoryError); close other programs")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...)",
            True,
        ),
        ("[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed buffer size", True),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", True),
        ("[broadcast_shapes] Shapes (1,2) and (3) cannot be broadcast", False),
    ],
)
def test_the_messages_of_each_device_about_memory_are_known(message, expected):
    assert is_out_of_memory(RuntimeError(message)) is expected


def test_no_tokens_print_no_line(mlxspec_command):
    outcome = mlxspec_command("generate", "Once upon a time", "--max-tokens", "0")
    assert (outcome.status, outcome.out) == (0, "")
    assert outcome.err.splitlines()[-1].startswith("0 tokens")


def test_the_cache_lists_and_deletes_what_mlxspec_made_and_nothing_else(mlxspec_command, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    assert "nothing is kept" in mlxspec_command("cache").out
    copy, other = quantizing.cache_folder() / "a-model-0123456789ab-4", quantizing.cache_folder() / "mine"
    for folder in (copy, other, quantizing.cache_folder() / "costs"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(200_000_000) if folder == copy else b"x")
    listed = mlxspec_command("cache").out
    assert "200.0 MB" in listed
    assert copy.name in listed
    assert "mine" not in listed
    assert mlxspec_command("cache", "--delete", copy.name).out == f"deleted {copy}\n"
    assert not copy.exists()
    assert mlxspec_command("cache", "--delete", "all").status == 0
    assert [path.name for path in quantizing.cache_folder().iterdir()] == ["mine"]
