"""The progress of training on standard error."""

import time
from types import TracebackType

import click
from tqdm import tqdm

from mlxspec.training.corpus import BadLines
from mlxspec.training.run_folder import Metrics
from mlxspec.training.target import Listener

SHOWN_METRICS = ("loss", "acceptance_rate", "worst_acceptance_rate", "block_efficiency")


class Bars:
    """Shows stages and progress bars on standard error. The bars appear only in a terminal."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._started: tuple[float, int] | None = None  # when work was first reported, and its tokens
        self.listener = Listener(self._stage, self._work, self._step, self._bad_lines)

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _stage(self, name: str, what: str) -> None:
        self._close()
        self._started = None
        click.echo(f"{name}: {what}", err=True)

    def _work(self, done: int, total: int, tokens: int) -> None:
        self._started = self._started or (time.monotonic(), tokens)
        seconds = time.monotonic() - self._started[0]
        speed = f", {(tokens - self._started[1]) / seconds:.0f} tokens/s" if seconds > 1 else ""
        self._show(done, total, f"{tokens} tokens{speed}")

    def _step(self, steps: int, step: int, metrics: Metrics) -> None:
        shown = [f"{name} {metrics[name]:.3g}" for name in SHOWN_METRICS if name in metrics]
        if speed := metrics.get("tokens_per_second"):
            shown.append(f"{speed:,.0f} tokens/s")
        self._show(step, steps, " ".join(shown))

    def _show(self, done: int, total: int, text: str) -> None:
        if self._bar is None:
            self._bar = tqdm(total=total, initial=done, disable=None, dynamic_ncols=True)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(done - self._bar.n)

    def _bad_lines(self, bad: BadLines) -> None:
        if bad.skipped:
            click.echo(f"skipped {bad.skipped} of {bad.read} lines: {'; '.join(bad.examples)}", err=True)
