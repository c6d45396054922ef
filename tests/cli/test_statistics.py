import re
import subprocess
import sys

import pytest

import mlxspec
from mlxspec.cli import statistics
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import MODEL
from mlxspec.decoding.policy import Automatic
from mlxspec.models.loading import DEMO

CHEAP_ROWS = BlockCosts({1: 1.0, 17: 1.3}, draft_step=0.05)
COSTLY_ROWS = BlockCosts({1: 1.0, 17: 17.0}, draft_step=0.5)


def decoded(costs: BlockCosts, max_tokens: int = 30, drafter: str | None = None, **settings) -> str:
    policy = Automatic(costs, [MODEL]) if not settings and drafter is None else None
    decoder = mlxspec.SpeculativeDecoder(mlxspec.load(drafter=drafter), policy=policy, **settings)
    for _ in decoder.stream("Once upon a time", max_tokens=max_tokens):
        pass
    return statistics.summary(decoder)


def test_the_line_counts_tokens_per_pass_and_the_share_accepted_where_tokens_were_drafted():
    assert re.fullmatch(
        r"30 tokens, [\d.]+ tokens/s: [\d.]+ tokens per pass of the target, \d+% of \d+ drafted tokens accepted",
        decoded(CHEAP_ROWS),
    )


@pytest.mark.parametrize(
    ("reason", "settings"),
    [
        (
            r"a draft of length \d+ and its verification would take [\d.]+ times a plain pass here, for [\d.]+ tokens",
            {},
        ),
        ("the answer is short", {"max_tokens": 3}),
        ("drafting is off", {"drafter": "none"}),
        ("drafting is off", {"draft_length": 0}),
    ],
)
def test_the_line_says_why_nothing_was_drafted(reason, settings):
    assert re.fullmatch(
        rf"\d+ tokens, [\d.]+ tokens/s: nothing drafted, because {reason}", decoded(COSTLY_ROWS, **settings)
    )


def test_the_line_says_that_the_text_is_too_long_for_a_drafter_with_a_fixed_draft_length():
    pair = mlxspec.load()
    pair.drafter_context_length = 4
    decoder = mlxspec.SpeculativeDecoder(pair, draft_length=2)
    for _ in decoder.stream("Once upon a time", max_tokens=30):
        pass
    assert "nothing drafted, because the text is longer than the drafter's context" in statistics.summary(decoder)


def test_the_line_names_the_package_that_is_missing_on_linux_only_if_a_drafter_could_use_it(monkeypatch):
    monkeypatch.delenv("MLXSPEC_OPENBLAS", raising=False)
    monkeypatch.setattr(statistics, "has_fast_blas", lambda: False)
    on_linux = sys.platform == "linux"
    assert ("apt install libopenblas0-pthread" in decoded(COSTLY_ROWS)) == on_linux
    assert "apt install" not in decoded(COSTLY_ROWS, drafter="none")
    monkeypatch.setattr(statistics, "has_fast_blas", lambda: True)
    assert "apt install" not in decoded(COSTLY_ROWS)


def test_the_option_names_of_mlx_lm_are_understood(mlxspec_command):
    ours = ["--target", "--drafter", "--draft-length", "--temperature"]
    theirs = ["--model", "--draft-model", "--num-draft-tokens", "--temp"]
    values = [str(DEMO / "target"), str(DEMO / "drafter"), "3", "0.5"]
    texts = []
    for names in (ours, theirs):
        options = [word for pair in zip(names, values, strict=True) for word in pair]
        outcome = mlxspec_command("generate", "Once upon a time", "--max-tokens", "20", "--seed", "1", *options)
        assert outcome.status == 0
        texts.append(outcome.out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("words", "expected"), [("mlxspec gen", "generate"), ("mlxspec generate --draft-l", "--draft-length")]
)
def test_the_shell_completes_verbs_and_options(mlxspec_process, monkeypatch, words, expected):
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    monkeypatch.setenv("_MLXSPEC_COMPLETE", "bash_complete")
    assert expected in mlxspec_process().communicate(timeout=60)[0]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_completion_that_the_readme_names_is_a_script_of_the_shell(mlxspec_process, monkeypatch, shell):
    monkeypatch.setenv("_MLXSPEC_COMPLETE", f"{shell}_source")
    script = mlxspec_process().communicate(timeout=60)[0]
    assert "_mlxspec_completion" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="MLX compiles CPU kernels with g++ on Linux")
def test_the_compiling_of_kernels_is_announced_while_there_are_none(mlxspec_command, monkeypatch, tmp_path):
    arguments = ("generate", "Once", "--max-tokens", "2", "--draft-length", "0")
    assert "compiles its kernels" not in mlxspec_command(*arguments).err
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where MLX of another machine would find none
    assert mlxspec_command(*arguments).err.startswith("MLX compiles its kernels for this machine")
    assert "compiles its kernels" not in mlxspec_command(*arguments, "--json").err


def test_before_the_first_answer_the_line_says_so():
    assert statistics.summary(mlxspec.SpeculativeDecoder(mlxspec.load())) == "there is no answer yet"
