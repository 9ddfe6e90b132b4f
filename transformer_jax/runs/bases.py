"""Loading of the trained model that a run starts from: from a workdir or from Hugging Face."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from transformer_jax.interop.gguf import from_gguf
from transformer_jax.interop.huggingface import from_huggingface
from transformer_jax.training.bundle import Bundle, load


def load_base(source: str | pathlib.Path, *, step: int | str | None = None, average: int = 1) -> Bundle:
    """Loads a model from a workdir, from a Hugging Face directory, from a GGUF file, or by its id on
    the hub.

    Args:
      source: A directory that a training program or ``tj.save`` wrote, a directory that
        transformers' ``save_pretrained`` wrote, a file whose name ends in ``.gguf``, or the id
        of a model on the Hugging Face hub.
      step: The step of a checkpoint in a workdir, or ``"best"`` for the checkpoint with the lowest
        validation loss. ``None`` means the last one.
      average: The number of last checkpoints of a workdir whose weights are averaged.

    Returns:
      The model with its tokenizer and config.

    Raises:
      ValueError: If ``step`` or ``average`` is given but the source has no checkpoints, or the
        model cannot be loaded.
    """
    directory = pathlib.Path(source)
    if (directory / "checkpoints").is_dir() and not (directory / "config.json").is_file():
        return load(directory, step=step, average=average)
    if step is not None or average != 1:
        raise ValueError(f"step and average select checkpoints of a workdir, but {source} has no checkpoints; "
                         "leave them out")
    if directory.suffix == ".gguf":
        return from_gguf(directory)
    return from_huggingface(str(source))


def describe_base(source: str | pathlib.Path, step: int | str | None, base: Bundle) -> dict[str, Any]:
    """Describes the base for the record of a run, so that ``recorded_base`` can load it again.

    Args:
      source: The path or id that the base was loaded from.
      step: The step that the caller asked for.
      base: The loaded base.

    Returns:
      ``source`` and ``step``, as the record stores them.
    """
    directory = pathlib.Path(source)
    if not directory.is_dir():
        return {"source": str(directory.resolve() if directory.is_file() else source), "step": None}
    is_run = (directory / "checkpoints").is_dir() and not (directory / "config.json").is_file()
    return {"source": str(directory.resolve()), "step": (step if step == "best" else base.step) if is_run else None}


def recorded_base(path: pathlib.Path, record: Mapping[str, Any]) -> Bundle | None:
    """Loads the model that a run started from, as its record describes it.

    Args:
      path: The directory of the run.
      record: The record of the run.

    Returns:
      The model, or ``None`` if the record does not describe one.

    Raises:
      ValueError: If the model cannot be loaded any more.
    """
    recorded = record.get("base")
    if not recorded:
        return None
    try:
        return load_base(recorded["source"], step=recorded["step"])
    except (ValueError, OSError) as error:
        raise ValueError(f"the run in {path} started from {recorded['source']}, which cannot be loaded: {error}; if "
                         "the model is now somewhere else, pass its place with --model=... or base=...") from error
