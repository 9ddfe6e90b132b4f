"""Measurements of every checkpoint of a run, which are stored and computed only once."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from transformer_jax.files import read_file
from transformer_jax.inspection import curves, plots
from transformer_jax.runs.workdir import write_whole
from transformer_jax.training.bundle import Bundle, load
from transformer_jax.training.checkpoint import CheckpointError, Checkpoints

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEY = "__key__"  # the entry of a stored file that says what it was measured with


@dataclasses.dataclass(frozen=True)
class OverTraining:
    """What was measured at the checkpoints of a run.

    Attributes:
      steps: the steps of the checkpoints, ``[E]``, ascending.
      values: for each name, the numbers of all checkpoints, ``[E, ...]``.
    """

    steps: np.ndarray
    values: Mapping[str, np.ndarray]

    def plot(self, *names: str, title: str = "") -> Figure:
        """Draws what was measured against the steps.

        Args:
          *names: the names of numbers to draw together, by default all that are single numbers; or
            the name of one number for each head, ``[E, L, N]``.
          title: the title of the figure.

        Returns:
          The figure.

        Raises:
          ValueError: if there is no such name, or if its values have another shape.
        """
        chosen = names or tuple(name for name, values in self.values.items() if values.ndim == 1)
        for name in chosen:
            if name not in self.values:
                raise ValueError(f"{name!r} was not measured; there are {', '.join(self.values)}")
        if len(chosen) == 1 and self.values[chosen[0]].ndim == 3:
            return plots.over_training(self.steps.tolist(), self.values[chosen[0]], chosen[0], title=title)
        if not chosen:
            raise ValueError(f"none of {', '.join(self.values)} is a single number: name one that has a number for "
                             "each head")
        return curves.lines(self.steps, {name: self.values[name] for name in chosen}, "step",
                            chosen[0] if len(chosen) == 1 else "", title=title)


def over_training(workdir: str | pathlib.Path, measure: Callable[[Bundle], Mapping[str, Any]], *,
                  name: str | None = None, steps: Sequence[int] | None = None) -> OverTraining:
    """Measures every checkpoint of a run.

    The results are stored in the workdir, in ``measured/NAME``. A later call computes only what is
    new: other checkpoints, or all of them if the source code of ``measure`` has changed. A change of
    something that ``measure`` uses is not noticed; then pass another name.

    Args:
      workdir: the directory of the run. Set ``checkpoint.every`` and ``checkpoint.keep`` when you
        train, so that there are many checkpoints.
      measure: a function from the bundle of a checkpoint to a dict of numbers or arrays. What it
        compiles for the first checkpoint serves all others.
      name: the name of the measurement; by default that of the function.
      steps: the steps to measure; by default all.

    Returns:
      The steps, and the measurements of all of them.

    Raises:
      ValueError: if the run has no checkpoints, or if ``measure`` returns other names or shapes for
        another checkpoint.
    """
    checkpoints = Checkpoints(pathlib.Path(workdir) / "checkpoints", read_only=True)
    known = checkpoints.steps()
    wanted = known if steps is None else sorted(steps)
    if not wanted or not set(wanted) <= set(known):
        raise CheckpointError(f"{checkpoints.directory} holds the steps {known}; asked for "
                              f"{'all' if steps is None else wanted}")
    name = str(getattr(measure, "__name__", "")) if name is None else name
    if not name.isidentifier():
        raise ValueError(f"the measurement has the name {name!r}, which cannot be a directory: pass name=...")
    source = hashlib.sha256(_source(measure).encode()).hexdigest()
    folder = pathlib.Path(workdir) / "measured" / name
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for step in tqdm(wanted, desc=name, unit="checkpoint", disable=None):
        sealed = (checkpoints.directory / str(step) / "manifest.sha256").read_text()
        path, key = folder / f"{step}.npz", f"{source} {sealed}"
        values = _stored(path, key)
        if values is None:
            values = {each: np.asarray(value) for each, value in measure(load(workdir, step=step)).items()}
            content = io.BytesIO()
            stored: dict[str, Any] = {_KEY: np.array(key), **values}
            np.savez(content, **stored)
            write_whole(path, content.getvalue())
        found.append(values)
    if any({each: value.shape for each, value in values.items()} != {each: value.shape for each, value in
                                                                     found[0].items()} for values in found):
        raise ValueError(f"{name} returned other names or shapes for another checkpoint, so that they cannot be "
                         "compared")
    return OverTraining(np.array(wanted), {each: np.stack([values[each] for values in found]) for each in found[0]})


def _source(measure: Callable[..., Any]) -> str:
    """Returns the source code of a function; its name if there is none, such as of a partial."""
    try:
        return inspect.getsource(measure)
    except (OSError, TypeError):
        return repr(type(measure))


def _stored(path: pathlib.Path, key: str) -> dict[str, np.ndarray] | None:
    """Returns a stored measurement; ``None`` if there is none, it is damaged, or it is of another
    function or checkpoint."""
    try:
        with np.load(io.BytesIO(read_file(path))) as stored:
            if str(stored[_KEY]) != key:
                return None
            return {name: stored[name] for name in stored.files if name != _KEY}
    except Exception:  # a damaged archive raises exceptions of many kinds
        return None
