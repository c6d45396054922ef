"""Energy of a run: the counter of the processor packages on Linux, samples of ``powermetrics`` on macOS.

Both need permissions that usually only root has.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

RAPL = Path("/sys/class/powercap")  # Linux counts the microjoules of each processor package here, usually for root only
# CPU, GPU and ANE together, every 100 ms, without a buffer for the output
POWERMETRICS = ("powermetrics", "--samplers", "cpu_power,gpu_power", "--sample-rate", "100", "--buffer-size", "0")
SAMPLE = re.compile(r"^\*\*\* Sampled system activity .*\(([\d.]+)ms elapsed\)", re.MULTILINE)
COMBINED = re.compile(r"^Combined Power \(CPU \+ GPU \+ ANE\): ([\d.]+) mW", re.MULTILINE)
START_SECONDS = 3.0  # to wait for the first sample

Joules = Callable[[float], float | None]  # seconds of the run -> its energy, None where it cannot be read


def needs_root() -> bool:
    """Return whether energy could be measured here by root, and this process is not root's."""
    return sys.platform == "darwin" and os.geteuid() != 0


@contextmanager
def energy() -> Iterator[Joules]:
    """Measure the energy of a run.

    Yields:
        A function to call when the run ends, with the seconds that it took. It returns joules, or None where energy
        cannot be read.
    """
    if sys.platform == "darwin":
        with sampled() if not needs_root() else unknown() as joules:
            yield joules
    else:
        before = counted_joules()

        def used(seconds: float) -> float | None:
            after = counted_joules()
            return None if before is None or after is None or after < before else after - before  # it wraps around

        yield used


@contextmanager
def unknown() -> Iterator[Joules]:
    """Yield a function for energy that cannot be read."""
    yield lambda seconds: None


@contextmanager
def sampled(command: tuple[str, ...] = POWERMETRICS) -> Iterator[Joules]:
    """Measure the energy of a run as ``powermetrics`` samples it. It is None if the run ends before a sample.

    Args:
        command: The command that writes samples until it is terminated.
    """
    with tempfile.TemporaryFile("w+") as output:
        try:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        except OSError:
            yield lambda seconds: None
            return

        def written() -> str:
            output.seek(0)
            return output.read()

        try:
            deadline = time.perf_counter() + START_SECONDS
            while not COMBINED.search(written()) and time.perf_counter() < deadline and process.poll() is None:
                time.sleep(0.01)
            idle = len(written())

            def used(seconds: float) -> float | None:
                watts = mean_watts(written()[idle:])
                return None if watts is None else watts * seconds

            yield used
        finally:
            process.terminate()
            process.wait()


def mean_watts(samples: str) -> float | None:
    """Return the mean combined power in the text output of ``powermetrics``, or None without a complete sample.

    Each sample counts for as long as it lasted. A sample may have been cut off at either end of the text.
    """
    millijoules = milliseconds = 0.0
    for sample in re.split(r"(?=^\*\*\* Sampled system activity )", samples, flags=re.MULTILINE):
        elapsed, power = SAMPLE.search(sample), COMBINED.search(sample)
        if elapsed and power:
            millijoules += float(power[1]) * float(elapsed[1]) / 1000
            milliseconds += float(elapsed[1])
    return millijoules / milliseconds if milliseconds else None


def counted_joules(folder: Path = RAPL) -> float | None:
    """Return the energy counter of the processor packages, in joules.

    It is None where the counter cannot be read, as without the permission that Linux requires.
    """
    packages = [path for path in folder.glob("*:*") if path.name.count(":") == 1]
    try:
        return sum(int((path / "energy_uj").read_text()) for path in packages) / 1e6 if packages else None
    except (OSError, ValueError):
        return None
