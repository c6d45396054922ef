"""What the doctor measures is what it says, and its record tells nothing about the user."""

import mlx.core as mx
import numpy as np
import pytest

from mlxspec import ModelPair, PromptLookup
from mlxspec.decoding.calibration import Timer
from mlxspec.evaluation import doctor, rounds
from mlxspec.evaluation.doctor import common, described, kernels, linear_stack, medians, profiles, without_paths
from tests.conftest import random_llama


def test_the_first_difference_of_two_texts():
    assert common((1, 2, 3), (1, 2, 3)) is None
    assert common((1, 2, 3), (1, 5, 3)) == 1
    assert common((1, 2, 3), (1, 2)) == 2


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("cannot open /Users/jane/models/x.safetensors now", "cannot open … now"),
        ("cannot open '/Users/jane/a': no", "cannot open '…': no"),
        ("no ~/jane/models", "no …"),
        ("13 tokens/s and 3/4 of owner/name", "13 tokens/s and 3/4 of owner/name"),
    ],
)
def test_an_error_is_recorded_without_paths(text, clean):
    assert without_paths(text) == clean


def test_only_public_names_of_models_are_recorded(demo):
    assert described(demo, None)["name"] == described(demo, None)["drafter"] == "demo"
    assert described(demo, "llama2-7b-chat")["name"] == "llama2-7b-chat"
    demo_size = "llama, 4 M parameters"
    assert described(demo, "/Users/jane/model")["name"] == described(demo, "jane/model")["name"] == demo_size
    private = ModelPair(demo.target, random_llama(vocab_size=2048), demo.tokenizer, drafter_name="/Users/jane/d+lookup")
    assert described(private, None)["drafter"] == "Model"
    assert described(ModelPair(demo.target, PromptLookup(), drafter_name="lookup"), None)["drafter"] == "lookup"


def test_the_stack_is_a_product_of_4_bit_matrices(monkeypatch):
    made = []
    monkeypatch.setattr(doctor, "HIDDEN", 64)
    monkeypatch.setattr(doctor, "INTERMEDIATE", 128)
    monkeypatch.setattr(doctor, "CPU_LAYERS", 2)
    product = mx.quantized_matmul

    def spy(x, weights, scales, biases, *more):
        made.append(np.array(mx.dequantize(weights, scales, biases, 64, 4), np.float64))
        return product(x, weights, scales, biases, *more)

    monkeypatch.setattr(mx, "quantized_matmul", spy)
    x = mx.random.normal((3, 64))
    result, following = linear_stack()(x)
    assert following.shape == x.shape
    assert [one.shape for one in made] == [(128, 64), (64, 128)]
    np.testing.assert_allclose(np.array(result), np.array(x, np.float64) @ made[0].T @ made[1].T, rtol=1e-3, atol=1e-4)
    assert 0.1 < np.abs(np.array(result)).mean() < 10  # neither overflow nor zero after eight layers


def test_rounds_are_interleaved_and_each_timing_comes_after_a_pause(monkeypatch):
    order = []
    monkeypatch.setattr(doctor, "default_pause", lambda: 0.25)
    monkeypatch.setattr(rounds.time, "sleep", lambda seconds: order.append(seconds))

    class Named(Timer):
        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def __call__(self):
            order.append(self.name)
            return next(self.seconds)

    found = medians({"a": Named("a", [9, 1, 9, 9, 3, 9, 9, 2, 9]), "b": Named("b", [7, 5, 6])}, 3, lambda *_: None)
    assert order == [0.25, "a", "a", 0.25, "a", "b"] * 3  # the first wakes the GPU
    assert found == {"a": 2, "b": 6}


def test_on_metal_the_kernels_of_the_target_are_named(demo):
    found = kernels(demo, "applegpu_g15s")
    names = {part: [kernel["name"] for kernel in by_rows.values()] for part, by_rows in found.items()}
    assert names["attention"] == ["vector"] * 8 + ["full"] * 9
    assert names["matmul"] == ["qmv"] + ["qmv_wide"] * 11 + ["qmm"] * 5
    assert kernels(demo, "x86_64") == {}


def test_a_check_that_failed_gives_no_profile():
    machine = {"chip": "Apple M3 Max", "mlx": "0.32.4", "mlxspec": "0.1.0"}
    assert profiles({"machine": machine, "rows": {"failed": "RuntimeError: no memory"}}) == []
    stack = {"name": "4-bit matmul 4096x11008", "seconds": {"1": 0.001, "2": 0.0015}}
    assert profiles({"machine": machine, "rows": {"stack": stack}}) == [
        {
            "name": "Apple M3 Max, 4-bit matmul 4096x11008",
            "rows_ms": {"1": 1.0, "2": 1.5},
            "source": "mlxspec doctor 0.1.0, MLX 0.32.4",
        }
    ]
