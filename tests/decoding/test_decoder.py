import gc
import itertools
import weakref
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import mamba

import mlxspec
from mlxspec import ModelPair, Sampling, SpeculativeDecoder
from mlxspec.decoding.cache import CAPACITY_STEP
from mlxspec.decoding.costs import BlockCosts
from mlxspec.decoding.drafting import MODEL
from mlxspec.decoding.policy import Automatic
from mlxspec.decoding.verification import RULES
from mlxspec.models.drafter import Drafter, DrafterConfig, PromptLookup
from tests.conftest import WindowedLlama, decoded, plain_greedy, random_llama
from tests.decoding.test_sampling import reference_probs

DRAFTERS = ["itself", "a noised copy", "a random one", "prompt lookup", "none"]
DRAFT_LENGTHS = [0, 1, 2, 4, 7, "auto"]
GRID = [
    (drafter, draft_length, rule)
    for drafter, draft_length, rule in itertools.product(DRAFTERS, DRAFT_LENGTHS, RULES)
    if drafter != "none" or draft_length == "auto"  # without a drafter every length is 0
]


def assert_greedy_equals_plain(stories, stories_drafters, expected, drafter, draft_length, rule):
    pair = ModelPair(stories, stories_drafters[drafter])
    decoder = SpeculativeDecoder(pair, draft_length=draft_length, verification=rule)
    assert decoded(decoder, [1], 500) == expected
    assert decoder.stats.tokens == 500


def test_the_public_story_model_tells_the_story_that_its_author_published(stories_folder):
    pair = mlxspec.load(stories_folder, "lookup")
    answer = mlxspec.generate(pair, [1], max_tokens=120)
    assert answer.text.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    )


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_text_equals_plain_decoding_for_every_drafter(stories, stories_drafters, stories_greedy, drafter):
    assert_greedy_equals_plain(stories, stories_drafters, stories_greedy, drafter, "auto", "block")


@pytest.mark.parametrize("draft_length", DRAFT_LENGTHS)
def test_greedy_text_equals_plain_decoding_for_every_length(stories, stories_drafters, stories_greedy, draft_length):
    assert_greedy_equals_plain(stories, stories_drafters, stories_greedy, "a noised copy", draft_length, "block")


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "draft_length", "rule"), GRID, ids=str)
def test_greedy_text_equals_plain_decoding(stories, stories_drafters, stories_greedy, drafter, draft_length, rule):
    assert_greedy_equals_plain(stories, stories_drafters, stories_greedy, drafter, draft_length, rule)


@pytest.mark.parametrize(
    ("drafter", "draft_length", "rule"),
    [
        ("same", 3, "block"),
        ("random", 1, "token"),
        ("random", 7, "block"),
        ("lookup", 3, "match"),
        ("lookup", 3, "block"),
        ("none", 0, "block"),
    ],
)
def test_greedy_tokens_equal_mlx_lms_from_any_prompt(rule, drafter, draft_length):
    target = random_llama(vocab_size=300, scale=4)
    drafters = {"same": target, "random": random_llama(1, vocab_size=300), "lookup": PromptLookup(), "none": None}
    decoder = SpeculativeDecoder(ModelPair(target, drafters[drafter]), None, draft_length, rule)
    for prompt in ([5], [5, 6], list(range(3, 40)), [7, 8, 9] * 200):
        assert decoded(decoder, prompt, 60) == plain_greedy(target, prompt, 60)


SAMPLINGS = [
    Sampling(1.0, seed=1),
    Sampling(0.7, seed=2),
    Sampling(1.3, top_p=0.8, seed=3),
    Sampling(1.0, top_k=3, seed=4),
    Sampling(1.0, min_p=0.2, seed=5),
    Sampling(0.8, top_p=0.9, top_k=4, min_p=0.05, seed=6),
]


def markov_target() -> WindowedLlama:
    """One layer that sees two positions: the next token depends on the last two tokens and nothing else."""
    shape = random_llama(3, vocab_size=5, num_hidden_layers=1, scale=1.5)
    target = WindowedLlama(shape.args)
    target.update(shape.parameters())
    return target


def assert_emits_the_targets_distribution(rule, sampling, drafter, draft_length, count):
    """Chi-square over the transitions of one long run, against the target run plainly in float64 filters."""
    target = markov_target()
    decoder = SpeculativeDecoder(ModelPair(target, drafter), sampling, draft_length, rule)
    tokens = decoded(decoder, [0, 1], count)
    transitions = Counter(zip(tokens, tokens[1:], tokens[2:], strict=False))
    statistic = freedom = 0
    for pair in itertools.product(range(5), repeat=2):
        total = sum(transitions[*pair, token] for token in range(5))
        expected = total * reference_probs(np.array(target(mx.array([pair]))[0, -1]), sampling)
        observed = np.array([transitions[*pair, token] for token in range(5)])
        assert not observed[expected == 0].any()  # what a filter removed never comes out
        likely = expected > 5
        if total and likely.sum() > 1:
            statistic += float(((observed - expected)[likely] ** 2 / expected[likely]).sum())
            freedom += int(likely.sum()) - 1
    assert freedom > 10
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations; the seed is fixed


@pytest.mark.parametrize("rule", RULES)
def test_emitted_distribution_is_the_targets(rule):
    drafter = random_llama(4, vocab_size=5, scale=2)
    assert_emits_the_targets_distribution(rule, SAMPLINGS[0], drafter, 3, 2500)


@pytest.mark.parametrize("sampling", SAMPLINGS[1:], ids=str)
def test_emitted_distribution_is_the_filtered_targets(sampling):
    drafter = random_llama(4, vocab_size=5, scale=2)
    assert_emits_the_targets_distribution("block", sampling, drafter, 2, 2500)


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "draft_length"), [("model", 4), ("lookup", 2)])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_emitted_distribution_is_the_targets_for_every_combination(rule, sampling, draft_length, drafter):
    drafter = PromptLookup(2) if drafter == "lookup" else random_llama(4, vocab_size=5, scale=2)
    assert_emits_the_targets_distribution(rule, sampling, drafter, draft_length, 3500)


@pytest.mark.parametrize("rule", ["block", "token"])
def test_a_target_drafting_for_itself_is_accepted_whole_at_temperature_1(stories, rule):
    decoder = SpeculativeDecoder(ModelPair(stories, stories), Sampling(1.0, seed=0), 4, rule)
    decoded(decoder, [1], 300)
    assert decoder.stats.block_efficiency == 5
    assert decoder.stats.acceptance_rate == 1
    assert decoder.stats.accepted_at == [decoder.stats.blocks] * 4


def test_block_accepts_at_least_what_token_does_and_match_less(stories, stories_drafters):
    efficiency = {}
    for rule in RULES:
        pair = ModelPair(stories, stories_drafters["a noised copy"])
        decoder = SpeculativeDecoder(pair, Sampling(1.0, seed=0), 4, rule)
        decoded(decoder, [1], 500)
        efficiency[rule] = decoder.stats.block_efficiency
    assert efficiency["block"] > efficiency["token"] - 0.1  # equal or better but for the noise of 500 tokens
    assert efficiency["token"] > efficiency["match"]


def test_seeded_runs_repeat_exactly_and_unseeded_ones_differ():
    target, drafter = random_llama(vocab_size=50), random_llama(1, vocab_size=50)

    def answer(seed):
        return decoded(SpeculativeDecoder(ModelPair(target, drafter), Sampling(1.0, seed=seed), 3), [1, 2, 3], 80)

    assert answer(11) == answer(11)
    assert answer(11) != answer(12)
    assert answer(None) != answer(None)


def count_host_reads(monkeypatch) -> Counter:
    """Count everything that makes the host wait for an array."""
    reads = Counter()

    def counted(owner, name):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            reads[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    for name in ("tolist", "item", "__int__", "__float__", "__bool__", "__index__", "__array__", "__buffer__"):
        if hasattr(mx.array, name):
            counted(mx.array, name)
    for name in ("eval", "synchronize"):
        counted(mx, name)
    return reads


def always_drafting(longest: int = 16) -> Automatic:
    """The default policy, on a machine where up to ``longest`` drafted tokens and their rows are nearly free."""
    return Automatic(BlockCosts({1: 1.0, longest + 1: 1.001, 18: 9.0}, draft_step=1e-6), [MODEL])


@pytest.mark.parametrize("draft_length", [0, 3, "auto"])
def test_one_host_read_per_block(monkeypatch, draft_length):
    target, drafter = random_llama(vocab_size=50), random_llama(1, vocab_size=50)
    policy = always_drafting() if draft_length == "auto" else None
    decoder = SpeculativeDecoder(ModelPair(target, drafter), Sampling(1.0, seed=0), draft_length, policy=policy)
    blocks = decoder.blocks([1, 2, 3], 1500 if policy else 400)
    next(blocks)  # the prompt's prefill has reads of its own
    reads = count_host_reads(monkeypatch)
    count = sum(1 for _ in blocks)
    assert count > 90
    assert reads == {"tolist": count}


@pytest.mark.parametrize("draft_length", [0, 3, "auto"])
def test_the_next_block_is_queued_before_a_result_is_read(monkeypatch, draft_length):
    target = random_llama(vocab_size=50)
    policy = always_drafting() if draft_length == "auto" else None
    decoder = SpeculativeDecoder(ModelPair(target, target), Sampling(1.0, seed=0), draft_length, policy=policy)
    blocks = decoder.blocks([1, 2, 3], 240)
    next(blocks)
    events, read, queue = [], mx.array.tolist, mx.async_eval
    monkeypatch.setattr(mx.array, "tolist", lambda self: (events.append("read"), read(self))[1])
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (events.append("queue"), queue(*arrays))[1])
    assert sum(1 for _ in blocks) > 10
    assert events[:20] == ["queue", "read"] * 10  # one more was in flight from the beginning


@pytest.mark.parametrize("draft_length", [3, "auto"])
def test_a_block_copies_no_cache_buffer(draft_length):
    # Wide heads and few of them, so that a buffer dwarfs the attention scores over it.
    model = random_llama(hidden_size=256, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=4)

    def decoder() -> SpeculativeDecoder:
        policy = always_drafting(4) if draft_length == "auto" else None
        return SpeculativeDecoder(ModelPair(model, model), None, draft_length, policy=policy)

    assert_no_buffer_is_copied(decoder)


def assert_no_buffer_is_copied(new_decoder):
    """Memory that a block takes on top of what is resident must not grow by a buffer when the capacity does."""

    def on_top(context: int) -> tuple[int, int]:
        decoder = new_decoder()
        blocks = decoder.blocks([1] * context, 250)
        for _ in range(4):
            next(blocks)
        taken = []
        for _ in range(12):  # on a busy machine a buffer may still be read when it is written, and is copied then
            mx.synchronize()
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            for _ in range(2):
                next(blocks)
            mx.synchronize()
            taken.append(mx.get_peak_memory() - before)
        return min(taken), decoder._state.target[0][0].nbytes

    (small, small_buffer), (large, large_buffer) = on_top(CAPACITY_STEP - 250), on_top(8 * CAPACITY_STEP - 250)
    assert large_buffer == 8 * small_buffer
    assert large - small < (large_buffer - small_buffer) / 4


def test_memory_beyond_the_cache_does_not_grow_with_the_answer():
    model = small_buffers()
    assert_memory_is_bounded(SpeculativeDecoder(ModelPair(model, model), Sampling(1.0, seed=0), 4), count=2000)


@pytest.mark.slow
def test_memory_beyond_the_cache_does_not_grow_over_10000_tokens():
    model = small_buffers()
    assert_memory_is_bounded(SpeculativeDecoder(ModelPair(model, model), Sampling(1.0, seed=0), 4), count=10_000)


def small_buffers(**shape):
    return random_llama(hidden_size=64, num_attention_heads=1, num_key_value_heads=1, vocab_size=64, **shape)


def assert_memory_is_bounded(decoder, count):
    """What is resident between two blocks, beyond the buffers, must not grow with the answer."""
    mx.clear_cache()
    beyond = []
    for _ in decoder.blocks([1, 2], count):
        mx.synchronize()  # a block in flight holds its attention scores, which grow with the context
        resident = [array.nbytes for _, array in tree_flatten((decoder._state.target, decoder._state.drafter))]
        beyond.append(mx.get_active_memory() - sum(resident))
    half = len(beyond) // 2
    assert decoder.stats.tokens == count
    assert max(beyond[half:]) <= max(beyond[:half]) + 16 * 1024


def test_a_sliding_window_stays_equal_to_plain_decoding_past_the_window():
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {"num_hidden_layers": 3, "layer_types": layers, "sliding_window": 16, "vocab_size": 200, "scale": 4}
    target, drafter = random_llama(**shape), random_llama(1, **shape)
    decoder = SpeculativeDecoder(ModelPair(target, drafter), None, 4)
    for prompt in ([3], list(range(1, 70))):
        assert decoded(decoder, prompt, 120) == plain_greedy(target, prompt, 120)


def test_a_second_prompt_on_the_same_decoder_equals_a_fresh_one():
    target, drafter = random_llama(vocab_size=200), random_llama(1, vocab_size=200)
    sampling = Sampling(1.0, seed=5)
    used = SpeculativeDecoder(ModelPair(target, drafter), sampling, 3)
    long, short = [n % 200 for n in range(300)], [9, 8, 7]
    for prompt in (long, short, long[:250] + short, long, [1]):
        fresh = SpeculativeDecoder(ModelPair(target, drafter), sampling, 3)
        assert decoded(used, prompt, 90) == decoded(fresh, prompt, 90)
        assert used.stats.block_efficiency == fresh.stats.block_efficiency


def test_a_conversation_reuses_what_the_caches_hold():
    target, drafter = random_llama(vocab_size=200), random_llama(1, vocab_size=200)
    decoder = SpeculativeDecoder(ModelPair(target, drafter), None, 3)
    first = list(range(50))
    answer = decoded(decoder, first, 30)
    longer = [*first, *answer, 5, 6, 7]
    assert decoded(decoder, longer, 30) == plain_greedy(target, longer, 30)
    assert decoder.stats.prompt_tokens_reused == 78


def test_abandoning_a_stream_leaves_the_decoder_usable():
    target, drafter = random_llama(vocab_size=200, scale=4), random_llama(1, vocab_size=200)
    decoder = SpeculativeDecoder(ModelPair(target, drafter), None, 3)
    for abandoned_after in (0, 1, 5):
        blocks = decoder.blocks(list(range(20)), 200)
        for _ in range(abandoned_after):
            next(blocks)
        blocks.close()
        assert decoded(decoder, list(range(10)), 50) == plain_greedy(target, list(range(10)), 50)


@pytest.mark.parametrize("drafter", ["itself", "none"])
def test_the_old_cache_is_freed_before_an_unrelated_prompt_is_read(drafter):
    target = random_llama(hidden_size=64, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=4)
    decoder = SpeculativeDecoder(ModelPair(target, target if drafter == "itself" else None), None, 2)
    peaks = []
    for prompt in ([1] * 3000, [2] * 3000, [3] * 3000):
        decoded(decoder, prompt, 3)
        peaks.append(decoder.stats.peak_memory_bytes)
    cache = sum(array.nbytes for layer in decoder._state.target for array in layer)
    assert max(peaks[1:]) < peaks[0] + cache / 4


def test_blocks_that_were_queued_and_never_read_are_counted():
    target = random_llama(vocab_size=50)
    decoder = SpeculativeDecoder(ModelPair(target, target), None, 3)
    blocks = decoder.blocks([1, 2, 3], 200)
    next(blocks)
    blocks.close()
    assert decoder.stats.blocks == 1
    assert decoder.stats.dropped_blocks == 1
    decoded(decoder, [1, 2, 3], 200)
    assert decoder.stats.dropped_blocks == 0


def test_the_wired_limit_of_the_process_is_raised_while_tokens_are_decoded_and_only_then(monkeypatch):
    limits = [0]

    def set_limit(limit):
        limits.append(limit)
        return limits[-2]

    device_info = {**mx.device_info(), "max_recommended_working_set_size": 2**30}
    monkeypatch.setattr(mx, "device_info", lambda: device_info)
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    pair = mlxspec.load()
    decoder = SpeculativeDecoder(pair, draft_length=2)
    assert limits == [0]
    blocks = decoder.blocks([1, 2, 3], 20)
    next(blocks)
    assert limits == [0, 2**30]
    blocks.close()
    assert limits == [0, 2**30, 0]


def test_a_stream_that_another_one_replaced_says_so():
    target = random_llama(vocab_size=50)
    decoder = SpeculativeDecoder(ModelPair(target, target), None, 2)
    first = decoder.blocks([1, 2], 100)
    next(first)
    next(decoder.blocks([3, 4], 100))
    with pytest.raises(mlxspec.InvalidRequestError, match="another one was started"):
        next(first)


def test_a_stream_that_was_replaced_before_it_began_leaves_the_new_one_alone():
    target = random_llama(vocab_size=200, scale=4)
    decoder = SpeculativeDecoder(ModelPair(target, target), None, 2)
    first, second = decoder.blocks([1, 2], 40), decoder.blocks([3, 4], 40)
    tokens = next(second).tokens
    with pytest.raises(mlxspec.InvalidRequestError, match="another one was started"):
        next(first)
    assert tokens + [token for block in second for token in block.tokens] == plain_greedy(target, [3, 4], 40)


@pytest.mark.parametrize("when", [1, 2])
def test_an_interruption_while_a_block_is_traced_spoils_neither_models_nor_decoder(monkeypatch, when):
    target, drafter = random_llama(vocab_size=200, scale=4), random_llama(1, vocab_size=200)
    decoder = SpeculativeDecoder(ModelPair(target, drafter), None, 3)
    original, traced = Sampling.probs, 0

    def interrupted(self, logits):
        nonlocal traced
        traced += 1
        if traced == 3 * when:  # three drafted tokens a trace
            raise KeyboardInterrupt
        return original(self, logits)

    monkeypatch.setattr(Sampling, "probs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoded(decoder, [1, 2], 400)  # traces again when the capacity grows
    monkeypatch.undo()
    assert decoded(decoder, [1, 2], 40) == plain_greedy(target, [1, 2], 40)
    assert decoded(SpeculativeDecoder(ModelPair(target, drafter)), [1, 2], 40) == plain_greedy(target, [1, 2], 40)


def test_caches_of_other_weights_are_not_reused():
    target = random_llama(vocab_size=200, scale=4)
    decoder = SpeculativeDecoder(ModelPair(target, PromptLookup()), None, 3)
    prompt = list(range(100))
    decoded(decoder, prompt, 10)
    target.update(random_llama(5, vocab_size=200, scale=4).parameters())
    assert decoded(decoder, prompt, 60) == plain_greedy(target, prompt, 60)
    assert decoder.stats.prompt_tokens_reused == 0


def test_caches_of_other_weights_are_not_reused_after_a_calibration():
    target, drafter = random_llama(vocab_size=200, scale=4), random_llama(1, vocab_size=200)
    decoder = SpeculativeDecoder(ModelPair(target, drafter))
    prompt = list(range(40))
    decoded(decoder, prompt, 10)
    target.update(random_llama(5, vocab_size=200, scale=4).parameters())
    decoder.calibrate(again=True)
    assert decoded(decoder, prompt, 40) == plain_greedy(target, prompt, 40)
    assert decoder.stats.prompt_tokens_reused == 0


def test_a_seed_out_of_range_is_refused_before_anything_runs():
    decoder = SpeculativeDecoder(ModelPair(random_llama()))
    with pytest.raises(mlxspec.InvalidRequestError, match="seed is -1"):
        decoder.blocks([1], 5, seed=-1)


def test_a_decoder_that_nobody_refers_to_frees_its_caches_at_once():
    target = random_llama(vocab_size=50)
    gc.disable()
    try:
        decoder = SpeculativeDecoder(ModelPair(target, target), None, 3)
        decoded(decoder, [1] * 600, 20)
        held = weakref.ref(decoder)
        del decoder
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(("drafter", "length"), [("model", 1300), ("lookup", 1300), ("none", 3)])
def test_progress_goes_up_and_reaches_the_end_of_the_prompt(drafter, length):
    target = random_llama(vocab_size=50)
    drafters = {"model": target, "lookup": PromptLookup(), "none": None}
    told = []
    decoder = SpeculativeDecoder(ModelPair(target, drafters[drafter]), None, 2)
    for _ in decoder.blocks([1] * length, 5, lambda *numbers: told.append(numbers)):
        pass
    assert told == sorted(told)
    assert told[-1] == (length, length)
    assert all(done < length for done, _ in told[:-1])


def test_a_seed_of_its_own_makes_a_run_repeatable():
    target = random_llama(vocab_size=50)
    decoder = SpeculativeDecoder(ModelPair(target, target), Sampling(1.0), 2)
    runs = [[t for block in decoder.blocks([1, 2], 40, seed=seed) for t in block.tokens] for seed in (3, 4, 3)]
    assert runs[0] == runs[2] != runs[1]


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6])
def test_never_more_than_max_tokens(count):
    target = random_llama(vocab_size=50)
    decoder = SpeculativeDecoder(ModelPair(target, target), None, 4)
    tokens = decoded(decoder, [1, 2, 3], count)
    assert tokens == plain_greedy(target, [1, 2, 3], 6)[:count]
    assert decoder.stats.tokens == count


def test_minus_one_goes_on_until_the_context_is_full():
    target = random_llama(vocab_size=50, max_position_embeddings=40)
    decoder = SpeculativeDecoder(ModelPair(target, target), None, 4)
    assert len(decoded(decoder, [1, 2, 3], -1)) == 37
    assert len(decoded(decoder, [1, 2, 3], 1000)) == 37


def test_the_longest_possible_prompt_leaves_room_for_one_token():
    target = random_llama(vocab_size=50, max_position_embeddings=40)
    decoder = SpeculativeDecoder(ModelPair(target, target), None, 4)
    assert len(decoded(decoder, [1] * 39, -1)) == 1
    with pytest.raises(mlxspec.InvalidRequestError, match="40 tokens and the target's context holds 40"):
        decoder.blocks([1] * 40)


@pytest.mark.parametrize(("target_vocab", "drafter_vocab"), [(50, 64), (64, 50), (20_000, 50)])
def test_a_padded_vocabulary_on_either_side_changes_nothing(target_vocab, drafter_vocab):
    target, drafter = random_llama(vocab_size=target_vocab, scale=4), random_llama(1, vocab_size=drafter_vocab)
    decoder = SpeculativeDecoder(ModelPair(target, drafter), None, 3)
    for prompt in ([1, 2], [1, target_vocab - 1, 2, target_vocab - 1, 3]):
        assert decoded(decoder, prompt, 100) == plain_greedy(target, prompt, 100)
    sampled = decoded(SpeculativeDecoder(ModelPair(target, drafter), Sampling(1.0, seed=0), 3), [1, 2], 300)
    assert max(sampled) < target_vocab


def test_a_drafter_trained_further_drafts_with_its_new_weights():
    config = DrafterConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                           num_attention_heads=2)  # fmt: skip
    target, drafter = Drafter(config), Drafter(config)
    decoder = SpeculativeDecoder(ModelPair(target, drafter), Sampling(1.0, seed=0), 3)
    decoded(decoder, [1, 2], 100)
    assert decoder.stats.acceptance_rate < 0.99
    drafter.update(target.parameters())
    decoded(decoder, [1, 2], 100)
    assert decoder.stats.acceptance_rate == 1


def test_a_state_space_model_is_refused_with_the_reason():
    args = mamba.ModelArgs.from_dict(
        {
            "model_type": "mamba", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "state_size": 4,
            "num_hidden_layers": 1, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
        }
    )  # fmt: skip
    with pytest.raises(mlxspec.MlxspecError, match=r"mamba keeps its past in a \w+, which cannot be rewound"):
        SpeculativeDecoder(ModelPair(mamba.Model(args)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draft_length": -1}, "draft length is -1"),
        ({"draft_length": 1000}, "draft length is 1000"),
        ({"draft_length": 1.5}, "draft length is 1.5"),
        ({"draft_length": "long"}, "draft length is 'long'"),
        ({"verification": "hope"}, "use one of block, token, match"),
    ],
)
def test_a_bad_option_is_named(options, words):
    target = random_llama()
    with pytest.raises(mlxspec.InvalidRequestError, match=words):
        SpeculativeDecoder(ModelPair(target, target), **options)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "words"), [([], 5, "empty"), ([1], -2, "max_tokens is -2"), ([1, 99], 5, "token id 99")]
)
def test_a_bad_request_is_named_before_anything_runs(prompt, max_tokens, words):
    decoder = SpeculativeDecoder(ModelPair(random_llama()))
    with pytest.raises(mlxspec.InvalidRequestError, match=words):
        decoder.blocks(prompt, max_tokens)
