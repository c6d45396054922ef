"""What the progress bars of training show in a terminal."""

import os
import re
import sys
import termios
import time

from mlxspec.cli.bars import Bars


def test_the_remaining_time_of_a_resumed_run_counts_only_the_steps_that_it_took_itself(monkeypatch):
    """Two steps of 0.2 s are taken after step 900, so the other 98 take about 20 s."""
    terminal, its_program = os.openpty()
    termios.tcsetwinsize(its_program, (24, 120))
    with os.fdopen(its_program, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Bars() as bars:
            for step in (901, 902, 903):
                bars.listener.step(1000, step, {"loss": 1.0})
                time.sleep(0.2)
    shown = os.read(terminal, 10_000).decode()
    os.close(terminal)
    minutes, seconds = re.findall(r"903/1000 \[.*?<(\d+):(\d+)", shown)[-1]
    assert 60 * int(minutes) + int(seconds) >= 10, shown
