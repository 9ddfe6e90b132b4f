"""The hook that prints samples of the model while it is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformer_jax.training.loop import Loop
from transformer_jax.training.processes import on_one_device


class Sample:
    """Prints samples from the model at the steps of ``config.sample``, and at the last step.

    Args:
      show: a function that is called with the model and the step, and prints samples.
    """

    def __init__(self, show: Callable[[Any, int], None]):
        self._show = show

    def start(self, loop: Loop) -> None:
        """Prints a sample of the random weights, if ``config.sample.at_start`` asks for it.

        Args:
          loop: the loop before the first step.
        """
        if loop.config.sample.every and loop.config.sample.at_start and loop.step == 0:
            self._print(loop)

    def __call__(self, loop: Loop) -> None:
        sample, is_last = loop.config.sample, loop.step == loop.config.steps
        if sample.every and (sample.due(loop.step) or is_last):
            self._print(loop)

    def _print(self, loop: Loop) -> None:
        """Calls ``show`` with the model on one device."""
        on_one_device(lambda params, step: self._show(loop.to_model(params), step), loop.state.params, loop.mesh,
                      loop.step)
        loop.restart_clock()
