import dataclasses
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.llama import ModelArgs

import mlxspec
from mlxspec import ModelPair, SpeculativeDecoder
from mlxspec.decoding.sampling import Sampling
from mlxspec.errors import InvalidRequestError, ModelLoadError, UnsupportedModelError
from mlxspec.evaluation.benchmark import engine_names
from mlxspec.evaluation.engines import OURS, PLAIN
from mlxspec.models.eagle import EAGLE1, EAGLE3, Eagle
from mlxspec.models.export import export
from mlxspec.models.parts import parts_of, run_with_states
from mlxspec.models.quantizing import quantize_in_memory
from mlxspec.models.reading import read_model
from tests.conftest import random_llama
from tests.models.eagle_oracle import EagleOracle

VOCAB = 60


def target(**config):
    return random_llama(5, vocab_size=VOCAB, num_hidden_layers=6, **config)


def random_head(model, layout=EAGLE1, seed=1, tokens=None, shape=None, **options) -> Eagle:
    """A head with random weights for a target; ``tokens`` are those of its smaller vocabulary."""
    mx.random.seed(seed)
    args = ModelArgs.from_dict({**vars(model.args), "num_hidden_layers": 1, "layer_types": None, **(shape or {})})
    head = Eagle(args, layout, draft_vocab_size=tokens and len(tokens), **options)
    if tokens:
        head.d2t = mx.array(tokens) - mx.arange(len(tokens))
    head.fc.weight = head.fc.weight * 3
    mx.eval(head.parameters())
    return head


def stored(folder) -> dict:
    return dict(mx.load(str(folder / "model.safetensors")))


def oracle(head, model, tmp_path) -> EagleOracle:
    head.save(tmp_path)
    tables = {"target.embed": model.model.embed_tokens.weight, "target.head": model.lm_head.weight}
    return EagleOracle({**stored(tmp_path), **tables}, json.loads((tmp_path / "config.json").read_text()))


def states_of(model, head, text) -> np.ndarray:
    return np.array(run_with_states(model, head.layers_read(6), lambda: model(mx.array([text])))[1][0])


SMALLER = list(range(0, VOCAB, 3))
HEADS = [
    (EAGLE1, {}),
    (EAGLE3, {}),
    (EAGLE3, {"tokens": SMALLER}),
    (EAGLE3, {"tokens": SMALLER, "read_layers": [0, 1, 5], "norm_before_residual": True}),
]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("layout", "options"), HEADS, ids=str)
def test_logits_of_three_draft_steps_equal_a_float64_reference(tmp_path, layout, options, groups):
    model = target(num_key_value_heads=groups)
    head = random_head(model, layout, **options)
    text = [3, 8, 1, 44, 27, 9, 2, 2, 30]
    drafted, expected = oracle(head, model, tmp_path).draft(text, states_of(model, head, text), 3)
    compiled = SpeculativeDecoder(ModelPair(model, head), Sampling(), 3).compiled
    proposer = compiled.proposers["model"]
    buffers = compiled.target.prefill(mx.array(text[:-1]), [], 0, lambda count: None)
    state = proposer.start([], text, 0, lambda count: None, buffers)
    found, features = [], state.feature
    for step, token in enumerate(drafted):
        found.append(head.logits(features, model.lm_head)[0, 0])
        features, rest = proposer._run(mx.array([token]), features, state.buffers, mx.array(len(text) - 1 + step))
        state = state._replace(buffers=rest)
    known = np.isfinite(expected)
    assert (known == np.isfinite(np.array(found))).all()
    np.testing.assert_allclose(np.array(found)[known], expected[known], atol=1e-5)
    tokens, q, _ = proposer.propose(
        proposer.start([], text, 0, lambda count: None, buffers), mx.array(text[-2:]), mx.array(len(text)), mx.zeros(3)
    )
    assert tokens.tolist() == drafted
    assert q.argmax(-1).tolist() == drafted


def test_the_parts_of_a_target_are_told_apart_only_where_they_make_its_logits():
    model = target()
    parts = parts_of(model)
    assert parts.embedding is model.model.embed_tokens
    assert parts.head is model.lm_head
    tied = type(model)(dataclasses.replace(model.args, tie_word_embeddings=True))
    assert parts_of(tied).head == tied.model.embed_tokens.as_linear

    class Scaled(type(model)):
        def __call__(self, *args, **options):
            return super().__call__(*args, **options) * 0.5

    scaled = Scaled(model.args)
    assert parts_of(scaled) is None
    with pytest.raises(UnsupportedModelError, match="more steps than a body and an output head"):
        ModelPair(scaled, random_head(model))
    model.model.norm.weight = mx.full(16, mx.nan)
    assert parts_of(model)


def test_running_with_states_leaves_the_model_as_it_was_even_after_an_error():
    model = target()
    body, layers = model.model, list(model.model.layers)
    names = [name for name, _ in tree_flatten(model.parameters())]
    for reads in ((), (2, 3, 3)):
        logits, states = run_with_states(model, reads, lambda: model(mx.array([[1, 2, 3]])))
        assert mx.array_equal(logits, model(mx.array([[1, 2, 3]])))
        assert states.shape == (1, 3, 16 * max(1, len(reads)))
        with pytest.raises(ValueError, match="indices"):
            run_with_states(model, reads, lambda: model(mx.array([[1.5]])))
        assert model.model is body
        assert model.model.layers == layers
        assert [name for name, _ in tree_flatten(model.parameters())] == names


@pytest.mark.parametrize(("layout", "options"), HEADS, ids=str)
def test_a_saved_head_loads_with_the_same_weights(tmp_path, layout, options):
    head = random_head(target(), layout, **options)
    head.save(tmp_path)
    loaded = read_model(tmp_path)
    assert isinstance(loaded, Eagle)
    assert loaded.layout == layout
    assert loaded.layers_read(6) == head.layers_read(6)
    before, after = dict(tree_flatten(head.parameters())), dict(tree_flatten(loaded.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)


def public_files(folder, layout):
    """A head as it is published: EAGLE-1 with the target's table, EAGLE-3 with t2d and 64-bit d2t."""
    model = target()
    head = random_head(model, layout, tokens=SMALLER if layout == EAGLE3 else None)
    head.save(folder)
    weights, config = stored(folder), json.loads((folder / "config.json").read_text())
    if layout == EAGLE1:
        weights["embed_tokens.weight"] = model.model.embed_tokens.weight
    else:
        assert weights["t2d"].dtype == mx.bool_
        assert weights["t2d"].sum() == len(SMALLER)
        assert weights["d2t"].dtype == mx.int64
    return model, head, weights, config


def write_files(folder, weights, config):
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("layout", [EAGLE1, EAGLE3])
def test_the_target_own_table_in_a_published_head_takes_no_memory(tmp_path, layout):
    _, head, weights, config = public_files(tmp_path, layout)
    write_files(tmp_path, weights, config)
    assert {name for name, _ in tree_flatten(read_model(tmp_path).parameters())} == {
        name for name, _ in tree_flatten(head.parameters())
    }


def test_a_head_in_the_layout_of_vllms_speculators_is_the_same_head(tmp_path):
    _, head, weights, config = public_files(tmp_path, EAGLE3)
    renamed = {name.replace("midlayer.", "layers.0."): weight for name, weight in weights.items()}
    own = {"speculators_model_type": "eagle3", "draft_vocab_size": len(SMALLER), "target_hidden_size": None}
    layer = {**config, "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}
    write_files(tmp_path, renamed, {**own, "norm_before_residual": True, "transformer_layer_config": layer})
    loaded = read_model(tmp_path)
    assert loaded.layout == EAGLE3
    assert loaded.norm_before_residual
    assert loaded.layer.self_attn.rope.base == 500000
    assert mx.array_equal(loaded.midlayer.hidden_norm.weight, head.midlayer.hidden_norm.weight)


DAMAGE = {
    "a missing tensor": (lambda w, c: w.pop("layers.0.mlp.up_proj.weight"), "layers.0.mlp.up_proj.weight"),
    "another table": (lambda w, c: w.update({"embed_tokens.weight": mx.zeros((7, 16))}), "embed_tokens.weight has the"),
    "quantized weights": (lambda w, c: w.update({"fc.scales": mx.zeros((16, 1))}), "fc.scales"),
    "a tensor of another shape": (lambda w, c: w.update({"fc.weight": mx.zeros((16, 48))}), "fc.weight"),
    "an unknown tensor": (lambda w, c: w.update({"layers.1.mlp.weight": mx.zeros(3)}), "layers.1.mlp.weight"),
    "a config without a width": (lambda w, c: c.pop("hidden_size"), "and the target's would have"),
    "integers": (lambda w, c: w.update({"fc.weight": w["fc.weight"].astype(mx.int32)}), "fc.weight has the type"),
    "a rope_theta of letters": (lambda w, c: c.update(rope_theta="x"), "rope"),
    "NaN": (lambda w, c: w.update({"fc.bias": mx.full(16, mx.nan)}), "NaN"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_head_is_refused_with_one_line(tmp_path, name):
    damage, words = DAMAGE[name]
    _, _, weights, config = public_files(tmp_path, EAGLE1)
    damage(weights, config)
    write_files(tmp_path, weights, config)
    with pytest.raises(ModelLoadError, match=words) as caught:
        read_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_tensors_decide_which_projections_have_a_bias(tmp_path):
    _, _, weights, config = public_files(tmp_path, EAGLE1)
    del weights["fc.bias"]
    for name in ("q", "k", "v"):  # as in Qwen2
        size = weights[f"layers.0.self_attn.{name}_proj.weight"].shape[0]
        weights[f"layers.0.self_attn.{name}_proj.bias"] = mx.ones(size)
    weights["layers.0.self_attn.rotary_emb.inv_freq"] = mx.ones(4)
    write_files(tmp_path, weights, config)
    head = read_model(tmp_path)
    attention = head.layer.self_attn
    assert ["bias" in module for module in (head.fc, attention.q_proj, attention.v_proj, attention.o_proj)] == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_a_head_takes_its_rotary_settings_from_either_place_of_a_config(tmp_path, nested):
    _, _, weights, config = public_files(tmp_path, EAGLE1)
    config.pop("rope_theta")
    config.pop("rms_norm_eps")
    settings = {"rope_theta": 500000.0, "rope_type": "default"}
    write_files(tmp_path, weights, {**config, **({"rope_parameters": settings} if nested else settings)})
    head = read_model(tmp_path)
    assert head.layer.self_attn.rope.base == 500000
    assert head.args.rms_norm_eps == 1e-6  # as in transformers


@pytest.mark.parametrize(
    ("keys", "read"),
    [
        ({}, (2, 3, 3)),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 5]}, (1, 3, 5)),  # layers whose inputs are read
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}}, (1, 3, 5)),  # whose outputs are read
        ({"eagle_config": {"use_aux_hidden_state": True}}, (2, 3, 3)),
    ],
)
def test_the_layers_that_a_head_reads_are_named_as_in_vllm_or_as_in_sglang(tmp_path, keys, read):
    _, _, weights, config = public_files(tmp_path, EAGLE3)
    write_files(tmp_path, weights, {**config, **keys})
    head = read_model(tmp_path)
    assert head.layers_read(6) == read
    head.save(tmp_path)
    assert read_model(tmp_path).layers_read(6) == read


def test_a_head_that_reads_another_number_of_layers_than_its_weights_is_refused(tmp_path):
    _, _, weights, config = public_files(tmp_path, EAGLE3)
    write_files(tmp_path, weights, {**config, "eagle_aux_hidden_state_layer_ids": [1, 2]})
    with pytest.raises(ModelLoadError, match=r"fc\.weight"):
        read_model(tmp_path)


@pytest.mark.parametrize("layers", ["123", 5, [1.5, 2, 3], [True, 2, 3]])
def test_layers_that_are_not_a_list_of_numbers_are_refused(tmp_path, layers):
    _, _, weights, config = public_files(tmp_path, EAGLE3)
    write_files(tmp_path, weights, {**config, "eagle_aux_hidden_state_layer_ids": layers})
    with pytest.raises(ModelLoadError, match="instead of a list of layer numbers"):
        read_model(tmp_path)


@pytest.mark.parametrize("kind", [mx.float32, mx.bfloat16, mx.bool_])
def test_a_vocabulary_map_of_other_numbers_than_integers_is_refused(tmp_path, kind):
    _, _, weights, config = public_files(tmp_path, EAGLE3)
    write_files(tmp_path, {**weights, "d2t": weights["d2t"].astype(kind)}, config)
    with pytest.raises(ModelLoadError, match="instead of integers"):
        read_model(tmp_path)


@pytest.mark.parametrize(("row", "words"), [(VOCAB, "names token"), (-40, "names token"), (-3, "names a token twice")])
def test_a_damaged_vocabulary_map_is_refused(tmp_path, row, words):
    _, _, weights, config = public_files(tmp_path, EAGLE3)
    offsets = np.array(weights["d2t"])
    offsets[1] = row + (2 if row == -3 else 0)
    if row == -3:
        offsets[1] = offsets[0] - 1  # the same token as row 0
    write_files(tmp_path, {**weights, "d2t": mx.array(offsets)}, config)
    with pytest.raises(ModelLoadError, match=words):
        read_model(tmp_path)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"hidden_size": 32}, "width of 32, and the target of 16"),
        ({"vocab_size": 50}, "vocabulary of 50, and the target of 60"),
    ],
)
def test_a_head_of_another_target_is_refused(other, words):
    model = random_llama(1, **{"vocab_size": VOCAB, "num_hidden_layers": 6, **other})
    with pytest.raises(UnsupportedModelError, match=words):
        ModelPair(target(), random_head(model))


def test_a_head_that_reads_a_layer_that_the_target_lacks_is_refused():
    model = random_llama(1, vocab_size=VOCAB, num_hidden_layers=2)
    with pytest.raises(UnsupportedModelError, match="reads layer 2, and the target has 2 layers"):
        ModelPair(model, random_head(model, EAGLE3))


@pytest.mark.parametrize("layout", [EAGLE1, EAGLE3])
def test_a_head_drafts_through_load_quantized_or_not(tmp_path, stories_folder, layout):
    stories, _ = mlxspec.models.reading.read_lazily(stories_folder)
    for bits in (None, "8"):
        shape = {"intermediate_size": 128}  # whole groups of 64
        head = random_head(stories, layout, shape=shape, read_layers=[1, 2, 3] if layout == EAGLE3 else None)
        head.save(tmp_path)
        pair = mlxspec.load(stories_folder, tmp_path, quantize_drafter=bits)
        decoder = SpeculativeDecoder(pair, draft_length=2)
        text = "".join(segment.text for segment in decoder.stream([1], max_tokens=40))
        assert text.startswith("Once upon a time")
        assert decoder.stats.drafted > 0


@pytest.mark.parametrize("layout", [EAGLE1, EAGLE3])
def test_a_quantized_head_is_saved_and_loads_with_the_same_weights(tmp_path, layout):
    head = random_head(random_llama(hidden_size=64, intermediate_size=128, num_attention_heads=4), layout)
    quantize_in_memory(head, "4")
    head.save(tmp_path / "4")
    loaded = read_model(tmp_path / "4")
    before, after = dict(tree_flatten(head.parameters())), dict(tree_flatten(loaded.parameters()))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    weights, config = stored(tmp_path / "4"), json.loads((tmp_path / "4" / "config.json").read_text())
    write_files(tmp_path / "4", weights, {**config, "quantization": {"group_size": 0, "bits": 4}})
    with pytest.raises(ModelLoadError, match="group_size is 0"):
        read_model(tmp_path / "4")
    write_files(tmp_path / "4", {**weights, "fc.weight": weights["fc.scales"]}, config)
    with pytest.raises(ModelLoadError, match="head that mlxspec can read"):
        read_model(tmp_path / "4")
    weights.pop("fc.scales")
    write_files(tmp_path / "4", weights, config)
    with pytest.raises(ModelLoadError, match=r"head that mlxspec can read: .*fc"):
        read_model(tmp_path / "4")


def test_a_head_is_neither_a_target_nor_exported(tmp_path, stories_folder):
    stories, _ = mlxspec.models.reading.read_lazily(stories_folder)
    random_head(stories).save(tmp_path / "head")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        if (stories_folder / name).exists():
            shutil.copyfile(stories_folder / name, tmp_path / "head" / name)
    with pytest.raises(ModelLoadError, match="an EAGLE head, which only drafts"):
        mlxspec.load(tmp_path / "head", "none")
    with pytest.raises(InvalidRequestError, match="an EAGLE head, which needs no export"):
        export(tmp_path / "head", tmp_path / "out")


def test_bench_leaves_out_mlx_lms_own_speculative_decoding_for_a_head():
    model = target()
    assert engine_names(ModelPair(model, random_head(model))) == [PLAIN, OURS]
