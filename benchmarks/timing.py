"""How benchmarks measure: sides that take turns, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any


def take_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, run in turn after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            seconds = timed(run)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(run: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class OtherProcess:
    """Runs a benchmark's other side in a process of its own, so that neither changes the other's
    memory or threads.

    The worker is called with a pipe and the arguments; it answers every message on the pipe.
    """

    def __init__(self, worker: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=worker, args=(child, *arguments), daemon=True)
        self._process.start()

    def __call__(self, message: Any = "run") -> Any:
        """The worker's answer to a message."""
        self._pipe.send(message)
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
