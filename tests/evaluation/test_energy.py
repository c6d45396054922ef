"""Energy is read from the counter on Linux, and from what powermetrics writes on macOS."""

import sys
import time

import pytest

from mlxspec.evaluation.energy import counted_joules, mean_watts, sampled

# The layout of macOS 14's powermetrics; only the lines before the power are left out.
SAMPLE = """
*** Sampled system activity (Sat Mar  8 10:53:{second} 2025 +0100) ({elapsed}ms elapsed) ***


**** Processor usage ****

E-Cluster Online: 100%
E-Cluster HW active frequency: 1021 MHz
E-Cluster HW active residency:  13.47% (600 MHz:   0% 972 MHz:  10%)
CPU 0 frequency: 1037 MHz
CPU Power: {cpu} mW
GPU Power: {gpu} mW
ANE Power: 0 mW
Combined Power (CPU + GPU + ANE): {combined} mW

**** GPU usage ****

GPU HW active frequency: 389 MHz
GPU HW active residency:   5.26% (389 MHz: 5.3% 486 MHz:   0%)
GPU idle residency:  94.74%
GPU Power: {gpu} mW
"""
HEADER = """Machine model: Mac14,5
OS version: 23F79
Boot arguments:
Boot time: Mon Mar  3 08:12:05 2025
"""


def sample(elapsed, combined):
    return SAMPLE.format(second=42, elapsed=elapsed, cpu=combined - 1000, gpu=1000, combined=combined)


def test_power_is_the_mean_of_the_samples_by_their_duration():
    assert mean_watts(HEADER + sample(100.0, 2000)) == pytest.approx(2)
    assert mean_watts(HEADER + sample(100.0, 2000) + sample(300.5, 6000)) == pytest.approx((200 + 1803) / 400.5)


def test_a_sample_that_is_cut_off_does_not_count():
    whole = sample(100.0, 2000)
    cut = whole[: whole.index("Combined")]
    assert mean_watts(whole + cut) == pytest.approx(2)
    assert mean_watts(whole[whole.index("CPU Power") :] + sample(100.0, 3000)) == pytest.approx(3)
    assert mean_watts(HEADER + cut) is None
    assert mean_watts("") is None


def test_the_samples_before_a_run_are_not_part_of_it():
    code = f"import sys, time; print({HEADER + sample(100.0, 9000)!r}, flush=True); time.sleep(0.3); "
    code += f"print({sample(100.0, 4000)!r}, flush=True); time.sleep(60)"
    start = time.perf_counter()
    with sampled((sys.executable, "-c", code)) as joules:
        assert joules(2.0) is None
        while (found := joules(2.0)) is None:
            assert time.perf_counter() < start + 20
            time.sleep(0.02)
    assert found == pytest.approx(8)


def test_without_the_command_energy_is_unknown():
    with sampled(("no-such-command-as-this",)) as joules:
        assert joules(1.0) is None


def test_energy_is_summed_over_packages_where_it_can_be_read(tmp_path):
    assert counted_joules(tmp_path) is None
    for name, count in [("intel-rapl:0", "2500000"), ("intel-rapl:1", "1500000"), ("intel-rapl:0:0", "7")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(count)
    assert counted_joules(tmp_path) == 4.0
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert counted_joules(tmp_path) is None
