"""Draws the losses of one or several runs over their steps.

python -m experiments.plot runs/a runs/b --out=losses.png [--log_steps] [--log_loss]

Each run is a workdir, or its metrics.jsonl. If both axes are logarithmic, a power law is a straight
line.
"""

from __future__ import annotations

import pathlib
import sys

from absl import flags

from transformer_jax.cli.flags import run
from transformer_jax.training.metrics import plot_losses

_RUNS = flags.DEFINE_multi_string("run", [], "A workdir. The flag may be repeated, and its name may be left out.")
_OUT = flags.DEFINE_string("out", "losses.png", "The picture to write: a file that ends in .png or .svg.")
_TITLE = flags.DEFINE_string("title", "", "The title above the picture.")
_LOG_STEPS = flags.DEFINE_bool("log_steps", False, "Use a logarithmic axis for the steps.")
_LOG_LOSS = flags.DEFINE_bool("log_loss", False, "Use a logarithmic axis for the losses.")


def main() -> None:
    """Runs ``transformer-jax plot``."""
    sys.argv[:] = [sys.argv[0], *_with_flags(sys.argv[1:])]
    run(_plot)


def _plot() -> None:
    """Draws the losses of all runs in one picture."""
    if not _RUNS.value:
        raise ValueError("no run is named; pass one or more workdirs: transformer-jax plot runs/a runs/b")
    if not _OUT.value.strip():
        raise ValueError("--out is empty: name a file that ends in .png or .svg")
    found = {str(name).rstrip("/"): _metrics(pathlib.Path(name)) for name in _RUNS.value}
    pathlib.Path(_OUT.value).resolve().parent.mkdir(parents=True, exist_ok=True)
    only = next(iter(found.values())) if len(found) == 1 else None
    plot_losses(only or found, _OUT.value, _TITLE.value or (next(iter(found)) if only else ""),
                log_steps=_LOG_STEPS.value, log_loss=_LOG_LOSS.value)
    print(f"{_OUT.value}: open it in an image viewer")


def _metrics(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of the metrics of a run."""
    if not path.exists():
        raise ValueError(f"there is no directory {path}")
    file = path / "metrics.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} has no metrics.jsonl; expected a workdir that a training program wrote")
    return file


def _with_flags(arguments: list[str]) -> list[str]:
    """Adds ``--run=`` to arguments without a flag, because absl has no positional arguments."""
    found, follows = [], False
    for argument in arguments:
        is_flag = argument.startswith("-")
        found.append(argument if is_flag or follows else f"--run={argument}")
        follows = is_flag and argument.lstrip("-") in ("run", "out", "title")  # the next argument is its value
    return found


if __name__ == "__main__":
    main()
