"""Timing of benchmarks: the sides run one after the other, each in its own process."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any


class Seconds(float):
    """The median seconds of a side over several rounds.

    Args:
      rounds: The seconds of each round, in order.
    """

    rounds: list[float]

    def __new__(cls, rounds: list[float]) -> Seconds:
        made = super().__new__(cls, statistics.median(rounds))
        made.rounds = rounds
        return made


def ratios(peer: Seconds, ours: Seconds) -> dict[str, float]:
    """Computes how many times faster than a peer this library is.

    Args:
      peer: The seconds of the peer.
      ours: The seconds of this library, in the same rounds.

    Returns:
      ``ratio``, that of the medians, and ``lowest`` and ``highest``, those of single rounds.
    """
    each = [other / own for other, own in zip(peer.rounds, ours.rounds, strict=True)]
    return {"ratio": peer / ours, "lowest": min(each), "highest": max(each)}


def take_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, Seconds]:
    """Runs the sides one after the other, in several rounds after one warm-up.

    Args:
      sides: A function for each side, by name.
      rounds: The number of rounds.

    Returns:
      The seconds of each side.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            seconds = timed(run)
            if turn:
                times[name].append(seconds)
    return {name: Seconds(values) for name, values in times.items()}


def timed(run: Callable[[], object]) -> float:
    """Returns the seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class OtherProcess:
    """Runs one side of a benchmark in its own process, so that the sides do not share memory or
    threads.

    Args:
      worker: A function that is called with a pipe and the arguments. It answers every message on
        the pipe.
      *arguments: The arguments of the worker.
    """

    def __init__(self, worker: Callable, *arguments):
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=worker, args=(child, *arguments), daemon=True)
        self._process.start()

    def __call__(self, message: Any = "run") -> Any:
        """Sends a message to the worker and returns its answer."""
        self._pipe.send(message)
        return self._pipe.recv()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
