"""The ``mlxspec`` command. Each verb has a module, and ``verbs.py`` lists them."""

import os
import signal


def main() -> None:
    """Run the command."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave_at_once)
    try:
        from mlxspec.cli.verbs import run  # here, so that Ctrl-C is handled while it is imported

        run()
    finally:
        signal.signal(signal.SIGINT, before)


def leave_at_once(number: int, frame: object) -> None:
    """Exit on Ctrl-C while modules are imported. There is no result to keep yet."""
    os._exit(130)
