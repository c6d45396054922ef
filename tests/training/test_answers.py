"""The target's answers as training data."""

import mlx.core as mx
import pytest
from mlx_lm.utils import load_tokenizer

from mlxspec.errors import MlxspecError, NumericalError
from mlxspec.models.loading import DEMO, load
from mlxspec.training.prompts import Prompt
from mlxspec.training.responses import AnswerSettings, Group, answer_counts, answer_group, write_answers
from mlxspec.training.shards import TokenShards


@pytest.fixture(scope="module")
def greedy():
    """The demo target, a prompt, and the first tokens that it answers."""
    pair = load()
    tokenizer = load_tokenizer(DEMO / "target")
    prompt = tokenizer.encode("Once upon a time")
    settings = AnswerSettings((0.0,), max_tokens=12)
    tokenizer.eos_token_ids = set()
    (answer,) = answer_group(pair.target, tokenizer, Group(0, [prompt], 0.0), settings)
    return pair.target, prompt, answer


@pytest.mark.parametrize("others", [set(), {1}, {2000, 2001}])
def test_an_answer_ends_with_the_eos_token_that_the_target_chose(greedy, tmp_path, others):
    target, prompt, answer = greedy
    tokenizer = load_tokenizer(DEMO / "target")
    chosen = next(token for i, token in enumerate(answer) if i > 4 and token not in answer[:i])
    tokenizer.eos_token_ids = {chosen, *others - {*answer}}
    settings = AnswerSettings((0.0,), max_tokens=12)
    groups = [Group(0, [Prompt(prompt, "stories"), Prompt(prompt[:2])], 0.0)]
    write_answers(target, tokenizer, 2048, "x", groups, settings, tmp_path / "out")
    shards = TokenShards(tmp_path / "out")
    ids, mask = next(iter(shards.documents()))
    assert shards.tasks == ["stories", tmp_path.name]
    assert ids[mask.astype(bool)].tolist() == answer[: answer.index(chosen) + 1]


def test_an_answer_that_ends_at_the_limit_with_any_eos_is_not_truncated(greedy, tmp_path):
    target, prompt, answer = greedy
    tokenizer = load_tokenizer(DEMO / "target")
    last = max(i for i, token in enumerate(answer) if token not in answer[:i])
    tokenizer.eos_token_ids = {tokenizer.eos_token_id, answer[last]}
    for limit, truncated in ((last + 1, 0), (last, 1)):
        settings, groups = AnswerSettings((0.0,), max_tokens=limit), [Group(0, [Prompt(prompt)], 0.0)]
        write_answers(target, tokenizer, 2048, "x", groups, settings, tmp_path / str(limit))
        assert answer_counts(TokenShards(tmp_path / str(limit)))["truncated"] == truncated


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_target_that_computes_nan_is_named_and_none_of_its_tokens_are_stored(tmp_path, temperature):
    target = load().target
    target.model.norm.weight = target.model.norm.weight * mx.nan
    settings = AnswerSettings((temperature,), max_tokens=4)
    groups = [Group(0, [[1, 2, 3], [4, 5, 6]], temperature)]
    with pytest.raises(NumericalError, match="computes NaN"):
        write_answers(target, load_tokenizer(DEMO / "target"), 2048, "x", groups, settings, tmp_path / "out")
    with pytest.raises(MlxspecError, match="holds no token shards"):
        TokenShards(tmp_path / "out")
