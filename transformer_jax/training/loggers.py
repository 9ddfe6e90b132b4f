"""Metric loggers, which record the numbers of a run: the protocol, JSONL and TensorBoard."""

from __future__ import annotations

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from transformer_jax.files import partial_path
from transformer_jax.training.metrics import read_metrics

Values = Mapping[str, "float | np.ndarray"]

_FLUSH_SECONDS = 120  # how often the events of TensorBoard are written to disk


class MetricLogger(Protocol):
    """The interface of a metric logger; a custom logger needs only these two methods.

    If a method of a logger raises an exception, the run continues without the logger and prints a
    warning. If the logger has an attribute ``required = True``, the exception ends the run instead.
    """

    def write(self, step: int, values: Values) -> None:
        """Records the values of a step.

        Args:
          step: the number of the step.
          values: the values by name. A value is a number, an array ``[L, N]`` with one number for
            each head of each layer, or a picture, uint8 ``[height, width, 3]``. A logger ignores
            the values that it cannot show.
        """
        ...

    def close(self) -> None:
        """Writes buffered values and closes the logger; called once, at the end of the run."""
        ...


def is_picture(value: float | np.ndarray) -> bool:
    """Returns True if a value is a picture, uint8 ``[height, width, 3]``."""
    return isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3


class JsonlLogger:
    """Appends one JSON object per step to ``metrics.jsonl``.

    It leaves pictures out and rounds arrays to six decimal places. The logger is required, so that
    the record of a run has no gaps.

    Args:
      directory: the directory of ``metrics.jsonl``.
      start_step: the step that the run continues from. Lines of later steps, which a killed run has
        written, are deleted.

    Attributes:
      path: the path of ``metrics.jsonl``.
    """

    required = True

    def __init__(self, directory: str | pathlib.Path, start_step: int = 0):
        self.path = pathlib.Path(directory) / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if line["step"] <= start_step]
        partial = partial_path(self.path)
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(self.path)
        self._file = self.path.open("a")

    def write(self, step: int, values: Values) -> None:
        """Writes the numbers of a step as one line, and returns when it is in the file.

        Args:
          step: the number of the step.
          values: the values by name; pictures are ignored.
        """
        numbers = {name: np.round(np.asarray(value, np.float64), 6).tolist() if isinstance(value, np.ndarray) else value
                   for name, value in values.items() if not is_picture(value)}
        if not numbers:
            return
        with self._named_errors():
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        with self._named_errors():
            self._file.close()

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Adds the path of the file to errors that lack it, such as that of a full disk."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


class TensorBoardLogger:
    """Writes TensorBoard event files into the folder ``tensorboard``.

    TensorBoard shows one curve for each number, one curve for each attention head, and pictures.

    This logger writes in the thread of its caller. The usual writer of tensorboardX passes events
    to another thread through a queue of limited size. If that thread ends, for example because the
    disk is full or the clock was set back by weeks, the queue fills up and the caller waits
    forever.

    Args:
      directory: the directory in which the folder ``tensorboard`` is made.
      start_step: the step that the run continues from. TensorBoard hides the events of later steps,
        which an earlier start of the run has written.
    """

    def __init__(self, directory: str | pathlib.Path, start_step: int = 0):
        from tensorboardX import event_file_writer  # slow to import
        from tensorboardX.proto import event_pb2

        folder = pathlib.Path(directory) / "tensorboard"
        folder.mkdir(exist_ok=True)
        events: Any = event_pb2  # Any, because its classes are created at import, where type checkers do not see them
        self._make_event = events.Event
        # The file name contains the time in seconds; the suffix distinguishes starts in one second.
        self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".{time.monotonic_ns():020d}")
        self._flushed = time.monotonic()
        # This event makes TensorBoard hide what an earlier start wrote at this step and later.
        self._add(start_step + 1, file_version="brain.Event:2")
        self._add(start_step + 1, session_log=events.SessionLog(status=events.SessionLog.START))

    def write(self, step: int, values: Values) -> None:
        """Writes the numbers and pictures of a step.

        Args:
          step: the number of the step.
          values: the values by name.
        """
        from tensorboardX import summary

        for name, value in values.items():
            if is_picture(value):
                self._add(step, summary=summary.image(name, value, dataformats="HWC"))
            elif isinstance(value, np.ndarray):
                for (layer, head), number in np.ndenumerate(np.round(np.asarray(value, np.float64), 6)):
                    self._add(step, summary=summary.scalar(f"{name}/layer_{layer}_head_{head}", number))
            else:
                self._add(step, summary=summary.scalar(name, value))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Writes buffered events and closes the file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        """Writes one event."""
        self._writer.write_event(self._make_event(step=step, wall_time=time.time(), **content))
