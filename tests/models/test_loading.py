"""From names to models in memory: the hub's cache, offline, and what a folder may hold."""

import json
import shutil
import subprocess
import sys
import time

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_tokenizer
from transformers import LlamaTokenizer

import mlxspec
from mlxspec import InvalidRequestError, PromptLookup
from mlxspec.models.catalog import KNOWN_MODELS, KnownModel
from mlxspec.models.eagle import Eagle
from mlxspec.models.loading import DEMO, recommended_drafters
from mlxspec.models.reading import read_tokenizer
from mlxspec.models.tokens import LLAMA2_TEMPLATE
from tests.conftest import random_llama
from tests.models.test_eagle import random_head


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A hub cache that holds the demo drafter as somebody/a-model, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    put_into_cache(DEMO / "drafter", tmp_path / "models--somebody--a-model")
    return tmp_path


def put_into_cache(folder, repository):
    """Copy a model's folder into a hub cache, in its layout."""
    commit = "0" * 40
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    for i, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, repository / "blobs" / str(i))
        (repository / "snapshots" / commit / file.name).symlink_to(repository / "blobs" / str(i))


def test_a_cached_model_loads_without_a_network(hub_cache):
    pair = mlxspec.load(drafter="somebody/a-model", target=DEMO / "target")
    assert mlxspec.generate(pair, "Once upon a time", max_tokens=10, draft_length=4).stats.drafted > 0


def test_an_uncached_one_fails_within_seconds_and_says_what_to_do(hub_cache):
    start = time.monotonic()
    with pytest.raises(mlxspec.MlxspecError, match="connect to the network once, or give a folder"):
        mlxspec.load("somebody/another-model")
    assert time.monotonic() - start < 5


def test_a_short_name_stands_for_its_repository(hub_cache):
    with pytest.raises(mlxspec.MlxspecError, match="mlx-community/Llama-2-7b-chat-4-bit is not a folder"):
        mlxspec.load("llama2-7b-chat")


def test_drafters_that_are_no_models_go_by_name():
    assert mlxspec.load(drafter="lookup").drafter == PromptLookup()
    assert mlxspec.load(drafter=PromptLookup(2)).drafter == PromptLookup(2)
    assert mlxspec.load(drafter="none").drafter is None
    assert mlxspec.load(DEMO / "target", "none").drafter is None
    assert mlxspec.load().drafter is not None


def test_weights_are_float32_on_the_cpu_back_end_and_as_asked_otherwise():
    pair = mlxspec.load(quantize="none")
    kinds = {weight.dtype for _, weight in tree_flatten(pair.target.parameters())}
    assert kinds == {mx.float32, mx.uint32} or mx.default_device().type != mx.cpu
    half = mlxspec.load(dtype=mx.float16)
    assert {weight.dtype for _, weight in tree_flatten(half.drafter.parameters())} == {mx.float16}


def test_a_drafter_without_a_tokenizer_is_trusted_to_have_the_targets(tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(DEMO / "drafter" / name, tmp_path / name)
    assert mlxspec.load(DEMO / "target", tmp_path).drafter is not None


@pytest.mark.parametrize(
    ("name", "chats"), [("Llama-2-7b-chat-mlx", True), ("llama2-13b-chat", True), ("llama", False)]
)
def test_a_llama_2_chat_model_without_a_template_gets_metas(tmp_path, name, chats):
    shutil.copytree(DEMO / "target", tmp_path / name)
    tokenizer = mlxspec.load(tmp_path / name).tokenizer
    assert tokenizer.has_chat_template is chats
    assert (tokenizer.chat_template == LLAMA2_TEMPLATE) is chats


def test_weights_under_another_name_are_explained(tmp_path):
    shutil.copytree(DEMO / "target", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "weights.00.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    with pytest.raises(mlxspec.MlxspecError, match=r"rename weights\.00\.safetensors, which mlx-lm would not read"):
        mlxspec.load(tmp_path / "model")


def test_eos_tokens_of_the_generation_config_count(tmp_path):
    shutil.copytree(DEMO / "target", tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [1, 432]}')
    assert mlxspec.load(tmp_path / "model").eos_token_ids == {1, 432}


def test_the_context_is_the_configs_even_if_the_model_class_drops_it():
    assert mlxspec.load().context_length == 1024


def test_a_bare_tokenizer_takes_the_template_and_tokens_next_to_it(tmp_path, stories_folder):
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        shutil.copyfile(stories_folder / name, tmp_path / name)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 513, "<|im_start|>": 512}')
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages[0].content }}"}')
    tokenizer = mlxspec.load(tmp_path).tokenizer
    assert tokenizer.has_chat_template
    assert tokenizer.encode("<|im_start|>", add_special_tokens=False) == [512]


def test_importing_mlxspec_leaves_mlx_lm_able_to_load_a_bare_tokenizer(tmp_path, stories_folder):
    for name in ("config.json", "model.safetensors", "tokenizer.model"):
        shutil.copyfile(stories_folder / name, tmp_path / name)
    program = "import sys, mlxspec, mlx_lm; mlxspec.load(sys.argv[1]); mlx_lm.load(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, timeout=60)


def test_auto_is_the_targets_own_drafter_and_prompt_lookup():
    pair = mlxspec.load(drafter="auto")
    assert pair.drafter.args.hidden_size == mlxspec.load().drafter.args.hidden_size
    assert pair.lookup == PromptLookup()
    for name in ("llama2-7b-chat", "mlx-community/Llama-2-7b-chat-4-bit"):
        assert recommended_drafters(name) == [("amd-135m", "amd-135m")]
    assert recommended_drafters("some/model") == []


@pytest.mark.parametrize("drafter", [None, "auto"])
def test_a_target_without_a_known_drafter_has_prompt_lookup(drafter):
    pair = mlxspec.load(DEMO / "target", drafter)
    assert (pair.drafter, pair.drafter_name) == (PromptLookup(), "lookup")
    assert pair.drafter_note == "no drafter is known for target"


def test_a_recommended_drafter_that_cannot_be_used_is_replaced_by_prompt_lookup_with_the_reason(hub_cache, monkeypatch):
    monkeypatch.setitem(KNOWN_MODELS, "mine", KnownModel("mine", "somebody/a-model", "target", 0, "", drafter="other"))
    monkeypatch.setitem(KNOWN_MODELS, "other", KnownModel("other", "somebody/other", "drafter", 0, ""))
    monkeypatch.setattr("mlxspec.models.loading.read_tokenizer", lambda *_: load_tokenizer(DEMO / "target"))
    pair = mlxspec.load("mine")
    assert pair.drafter_name == "lookup"
    assert pair.drafter_note.startswith("other cannot be used: somebody/other is not a folder, not in the hub's local")
    with pytest.raises(mlxspec.MlxspecError, match="somebody/other"):
        mlxspec.load("mine", "other")
    monkeypatch.setitem(KNOWN_MODELS, "other", KnownModel("other", str(DEMO / "drafter"), "drafter", 0, ""))
    pair = mlxspec.load("mine")
    assert (pair.drafter_name, pair.drafter_note, pair.lookup) == ("other+lookup", "", PromptLookup())


def test_auto_prefers_an_eagle_head_that_is_on_disk_and_never_downloads_one(hub_cache, tmp_path, monkeypatch):
    target = KnownModel("mine", str(DEMO / "target"), "target", 0, "", "none", "other", "head")
    monkeypatch.setitem(KNOWN_MODELS, "mine", target)
    monkeypatch.setitem(KNOWN_MODELS, "other", KnownModel("other", "somebody/a-model", "drafter", 0, ""))
    monkeypatch.setitem(KNOWN_MODELS, "head", KnownModel("head", "somebody/head", "head", 0, ""))
    assert mlxspec.load("mine").drafter_name == "other+lookup"
    random_head(mlxspec.load().target).save(tmp_path / "a head")
    put_into_cache(tmp_path / "a head", hub_cache / "models--somebody--head")
    pair = mlxspec.load("mine")
    assert (pair.drafter_name, pair.drafter_note) == ("head+lookup", "")
    assert isinstance(pair.drafter, Eagle)
    assert mlxspec.generate(pair, "Once", max_tokens=10, draft_length=2).stats.drafted > 0
    random_head(random_llama(vocab_size=2048, hidden_size=32, num_hidden_layers=4)).save(tmp_path / "another")
    shutil.rmtree(hub_cache / "models--somebody--head")
    put_into_cache(tmp_path / "another", hub_cache / "models--somebody--head")
    pair = mlxspec.load("mine")
    assert pair.drafter_name == "other+lookup"
    assert pair.drafter_note.startswith("head cannot be used: the EAGLE-1 head is for another target")


def test_a_prompt_can_be_refused_before_the_weights_are_read(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DEMO / "target", folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"torn")

    def refuse(tokenizer, context):
        raise InvalidRequestError(f"{len(tokenizer.encode('a'))} of {context}")

    with pytest.raises(InvalidRequestError, match=r"\d of \d+"):
        mlxspec.load(folder, before_weights=refuse)


def test_lookup_behind_a_name_adds_it_to_that_drafter():
    pair = mlxspec.load(drafter=f"{DEMO / 'drafter'}+lookup")
    assert pair.lookup == PromptLookup()
    assert pair.drafter is not None
    for name in ("+lookup", "auto+lookup", "none+lookup", "lookup+lookup"):
        with pytest.raises(InvalidRequestError, match=r'name a model before "\+lookup"'):
            mlxspec.load(drafter=name)


IM_END = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
BARE = {  # what is next to a bare tokenizer.model
    "nothing": {},
    "no BOS": {"tokenizer_config": {"add_bos_token": False}},
    "EOS at the end": {"tokenizer_config": {"add_bos_token": False, "add_eos_token": True}},
    "an EOS of its own": {"tokenizer_config": {"eos_token": "<|im_end|>"}, "added_tokens": {"<|im_end|>": 512}},
    "the EOS is an object": {
        "tokenizer_config": {"eos_token": {"__type": "AddedToken", **IM_END}, "unk_token": "<unk>", "bos_token": None},
        "added_tokens": {"<|im_end|>": 513, "<|im_start|>": 512},
    },
    "a space only where a text begins": {"tokenizer_config": {"legacy": False}, "added_tokens": {"<|im_end|>": 512}},
    "no space where a text begins": {"tokenizer_config": {"add_prefix_space": False}},
    "special_tokens_map.json": {
        "special_tokens_map": {
            "eos_token": IM_END,
            "pad_token": "<pad>",
            "additional_special_tokens": ["<|im_start|>"],
        },
        "added_tokens": {"<|im_end|>": 512, "<pad>": 514, "<|im_start|>": 513},
    },
    "added_tokens_decoder": {
        "tokenizer_config": {
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                "512": {**IM_END, "special": True},
                "513": {**IM_END, "content": "<tool>", "special": False, "lstrip": True},
            },
        },
        "special_tokens_map": {"eos_token": "</s>"},
    },
}


@pytest.mark.parametrize("case", list(BARE))
def test_a_bare_tokenizer_is_what_the_files_next_to_it_say_as_for_transformers(tmp_path, stories_folder, case):
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(stories_folder / name, tmp_path / name)
    for name, content in BARE[case].items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    config = BARE[case].get("tokenizer_config", {})
    theirs = LlamaTokenizer.from_pretrained(tmp_path, add_bos_token=config.get("add_bos_token", True))
    ours = read_tokenizer(tmp_path)
    for name in ("bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for text in ("Once upon", "Hi<|im_end|>", "a <tool>", "b<|im_start|>", "c<pad>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    if config.get("legacy") is False:
        assert ours.encode("a<|im_end|>b") == theirs.encode("a<|im_end|>b")
    assert ours.eos_token_ids >= {theirs.eos_token_id}


def test_an_added_token_that_does_not_fit_the_model_is_named(tmp_path, stories_folder):
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(stories_folder / name, tmp_path / name)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 600}')
    with pytest.raises(mlxspec.MlxspecError, match=r"'<\|im_end\|>' .* cannot have the id 600"):
        read_tokenizer(tmp_path)
