"""Where the numbers of a run go: metric loggers, of which JSONL and TensorBoard are two."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from transformer_jax.training.metrics import read_metrics

Values = Mapping[str, "float | np.ndarray"]


class MetricLogger(Protocol):
    """Receives the numbers of a run; two methods are all that a logger of one's own needs."""

    def write(self, step: int, values: Values) -> None:
        """Takes the values of a step.

        A value is a number, an array ``[L, N]`` with a number for every head of every layer, or a
        picture, uint8 ``[height, width, 3]``. A logger ignores what it cannot show.
        """
        ...

    def close(self) -> None:
        """Writes out what is buffered; called once, at the end of the run."""
        ...


def is_picture(value: float | np.ndarray) -> bool:
    """Whether a value is a picture, uint8 ``[height, width, 3]``."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3


class JsonlLogger:
    """Appends one JSON object a step to ``metrics.jsonl``; pictures are left out, arrays are
    rounded to six places.

    Opened at a step, it drops what a run that was killed had written after that step.
    """

    def __init__(self, directory: str | pathlib.Path, start_step: int = 0):
        self.path = pathlib.Path(directory) / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
        partial = self.path.with_suffix(".jsonl.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self.path)
        self._file = self.path.open("a")

    def write(self, step: int, values: Values) -> None:
        """One line of the numbers of a step, on disk when this returns."""
        numbers = {name: np.round(np.asarray(value, np.float64), 6).tolist() if isinstance(value, np.ndarray) else value
                   for name, value in values.items() if not is_picture(value)}
        if not numbers:
            return
        try:
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()
        except OSError as error:  # such as a full disk; without the name of the file the message helps nobody
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class TensorBoardLogger:
    """Writes TensorBoard event files to ``tensorboard``: a curve for each number and each head, and
    pictures."""

    def __init__(self, directory: str | pathlib.Path, start_step: int = 0):
        from tensorboardX import SummaryWriter  # slow to import

        self._board = SummaryWriter(str(pathlib.Path(directory) / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, values: Values) -> None:
        """Adds the numbers and pictures of a step."""
        for name, value in values.items():
            if is_picture(value):
                self._board.add_image(name, value, step, dataformats="HWC")
            elif isinstance(value, np.ndarray):
                for (layer, head), number in np.ndenumerate(np.round(np.asarray(value, np.float64), 6)):
                    self._board.add_scalar(f"{name}/layer_{layer}_head_{head}", number, step)
            else:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is buffered."""
        self._board.close()
