"""Signals that end a program between two of its steps."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

SECONDS_OF_ONE_SIGNAL = 1.0  # a terminal and a launcher may both send it


@contextlib.contextmanager
def recorded_signals() -> Iterator[list[int]]:
    """Records SIGINT (Ctrl-C) and SIGTERM instead of ending the process.

    A terminal and a launcher may send a signal twice, so signals within one second of the first
    are taken for the same one. A later signal ends the process at once, as it does outside of the
    ``with`` block.

    The handler itself must not raise an exception: Python ignores exceptions inside callbacks, for
    example inside those of the garbage collector, and the signal would be lost.

    Yields:
      A list to which the number of the first signal is added. It stays empty outside of the main
      thread, as in some notebooks, where Python allows no handlers.
    """
    received: list[int] = []
    usual: dict[int, Any] = {}
    first = 0.0

    def on_signal(signum: int, frame: Any) -> None:
        nonlocal first
        if not received:
            received.append(signum)
            first = time.monotonic()
        elif time.monotonic() - first > SECONDS_OF_ONE_SIGNAL:
            _restore(usual)
            signal.raise_signal(signum)

    with contextlib.suppress(ValueError):  # outside of the main thread
        for signum in (signal.SIGINT, signal.SIGTERM):
            usual[signum] = signal.signal(signum, on_signal)
    try:
        yield received
    finally:
        _restore(usual)


def _restore(handlers: dict[int, Any]) -> None:
    """Installs the earlier handlers of signals again."""
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
