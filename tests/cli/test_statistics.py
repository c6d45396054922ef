import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest

import mlxspec
from mlxspec.cli import statistics
from mlxspec.decoding.acceptance import LONGEST
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import LOOKUP, MODEL
from mlxspec.decoding.policy import Automatic
from mlxspec.models.loading import DEMO

CHEAP_ROWS = BlockCosts({1: 1.0, 17: 1.3}, draft_step=0.05)
COSTLY_ROWS = BlockCosts({1: 1.0, 17: 17.0}, draft_step=0.5)


PROMPT = 5  # tokens of "Once upon a time"


def decoded(
    costs: BlockCosts, max_tokens: int = 30, drafter: str | None = None, reach: float = math.inf,
    proposers: tuple[str, ...] = (MODEL,), **settings,
) -> str:  # fmt: skip
    policy = Automatic(costs, proposers, reach=reach) if not settings and drafter is None else None
    pair = mlxspec.load(drafter=drafter)
    pair.lookup = mlxspec.PromptLookup() if LOOKUP in proposers else None
    decoder = mlxspec.SpeculativeDecoder(pair, policy=policy, **settings)
    for _ in decoder.stream("Once upon a time", max_tokens=max_tokens):
        pass
    return statistics.summary(decoder)


def test_the_line_counts_tokens_per_pass_and_the_share_accepted_where_tokens_were_drafted():
    assert re.fullmatch(
        r"30 tokens, [\d.]+ tokens/s: [\d.]+ tokens per pass of the target, \d+% of \d+ drafted tokens accepted",
        decoded(CHEAP_ROWS),
    )


SLOWER = r"a draft of length \d+ and its verification would take [\d.]+ times a plain pass here, for [\d.]+ tokens"
OUTGROWN = "the text is longer than the drafter's context"
BY_LOOKUP = SLOWER.replace("and its", "by prompt lookup and its")


@pytest.mark.parametrize(
    ("reason", "costs", "settings"),
    [
        (SLOWER, COSTLY_ROWS, {}),
        (SLOWER, COSTLY_ROWS, {"max_tokens": 3}),
        ("the answer is short", CHEAP_ROWS, {"max_tokens": 1}),
        ("drafting is off", COSTLY_ROWS, {"drafter": "none"}),
        ("drafting is off", COSTLY_ROWS, {"draft_length": 0}),
        (OUTGROWN, CHEAP_ROWS, {"reach": 4}),
        (OUTGROWN, CHEAP_ROWS, {"reach": 4, "max_tokens": 3}),
        (SLOWER, COSTLY_ROWS, {"reach": PROMPT + LONGEST}),  # outgrown only after the first token
        (f"{OUTGROWN}, and {BY_LOOKUP}", COSTLY_ROWS, {"reach": 4, "proposers": (MODEL, LOOKUP)}),
        (
            "starting to draft would have cost more than it saved",
            replace(CHEAP_ROWS, draft_read=1e6),  # the prompt takes the draft model longer than all drafts save
            {},
        ),
    ],
)
def test_the_line_says_why_nothing_was_drafted(reason, costs, settings):
    assert re.fullmatch(rf"\d+ tokens, [\d.]+ tokens/s: nothing drafted, because {reason}", decoded(costs, **settings))


def test_the_line_says_so_if_a_draft_would_gain_too_little():
    costs = BlockCosts({1: 1.0, 17: 17.0}, draft_once=-0.22)  # 1.8 tokens in 1.78 passes
    assert "would take 1.78 times a plain pass here, for 1.80 tokens, too small a gain" in decoded(costs)


@pytest.mark.parametrize(
    ("context", "whose"),
    [("drafter_context_length", OUTGROWN), ("context_length", "the target's context has no room for a draft of 16")],
)
def test_the_line_says_whose_context_is_too_short_for_a_fixed_draft_length(context, whose):
    pair = mlxspec.load()
    setattr(pair, context, PROMPT + 12)
    decoder = mlxspec.SpeculativeDecoder(pair, draft_length=16)
    for _ in decoder.stream("Once upon a time", max_tokens=12):
        pass
    assert f"nothing drafted, because {whose}" in statistics.summary(decoder)


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
