"""On the clocks of simulated Macs the automatic policy is nearly the best fixed length, and hardly ever slower than
plain decoding. Arithmetic: the seeds are fixed."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "simulate_macs.py"
SPEC = importlib.util.spec_from_file_location("simulate_macs", SCRIPT)
simulate_macs = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(simulate_macs)

PROFILES = simulate_macs.profiles()


def test_there_are_nine_machines():
    assert len(PROFILES) == 9


@pytest.mark.parametrize("name", PROFILES)
def test_automatic_is_nearly_the_best_fixed_length_and_hardly_slower_than_plain_decoding(name):
    cases = simulate_macs.simulate(name, PROFILES[name], runs=10)
    assert len(cases) == 4 * 9
    assert min(cases, key=lambda case: case.of_best).of_best >= 0.95
    assert min(cases, key=lambda case: case.of_plain).of_plain >= 0.98
