import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import get_total_parameters, load_model

import mlxspec
from mlxspec import Drafter, DrafterConfig, InvalidRequestError

TINY = DrafterConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip


def test_the_preset_has_the_papers_116_9_million_parameters():
    assert DrafterConfig.llama2_chat_115m().num_parameters == 116_925_440


@pytest.mark.parametrize("tied", [False, True])
def test_counts_are_those_of_the_weights(tied):
    drafter = Drafter(DrafterConfig.from_dict({**TINY.to_dict(), "tie_word_embeddings": tied}))
    weights = dict(tree_flatten(drafter.parameters()))
    assert drafter.num_parameters == get_total_parameters(drafter) == sum(w.size for w in weights.values())


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_drafter_is_a_llama_that_mlx_lm_loads_with_the_same_logits(tmp_path, tied):
    drafter = Drafter(DrafterConfig.from_dict({**TINY.to_dict(), "tie_word_embeddings": tied}))
    drafter.save(tmp_path)
    theirs, config = load_model(tmp_path)
    tokens = mx.array([[1, 2, 3, 4]])
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert mx.array_equal(theirs(tokens), drafter(tokens))
    assert mx.array_equal(Drafter.load(tmp_path)(tokens), drafter(tokens))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_public_llama_loads_as_a_drafter_with_the_same_logits(stories, stories_folder):
    tokens = mx.array([[1, 403, 407, 261]])
    assert mx.allclose(Drafter.load(stories_folder)(tokens), stories(tokens), atol=1e-5)


@pytest.mark.parametrize("size", [0, 10**20])
def test_a_size_that_no_model_can_have_is_named(size):
    with pytest.raises(InvalidRequestError, match=f"hidden_size is {size}; use a positive number below"):
        DrafterConfig(8, hidden_size=size, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)


def test_a_config_that_does_not_say_is_untied_as_in_hugging_face():
    config = {key: value for key, value in TINY.to_dict().items() if key != "tie_word_embeddings"}
    assert DrafterConfig.from_dict(config).tie_word_embeddings is False


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 5}, "even multiple"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
)
def test_an_impossible_shape_is_named(change, words):
    with pytest.raises(mlxspec.MlxspecError, match=words):
        DrafterConfig.from_dict({**TINY.to_dict(), **change})


def test_a_folder_that_is_no_drafter_is_named(tmp_path):
    with pytest.raises(mlxspec.MlxspecError, match="cannot read a drafter"):
        Drafter.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 5}))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros(1)})
    with pytest.raises(mlxspec.MlxspecError, match="not a Llama config"):
        Drafter.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    with pytest.raises(mlxspec.MlxspecError, match="weights do not fit"):
        Drafter.load(tmp_path)
