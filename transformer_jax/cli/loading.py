"""The model that a program works with: of a workdir, or of Hugging Face."""

from __future__ import annotations

import pathlib

import transformer_jax as tj
from transformer_jax.training.bundle import Bundle


def load(workdir: str | None, model: str | None, *, step: str | None = None, average: int = 1) -> Bundle:
    """The model of ``--workdir`` or of ``--model``, of which one must be given.

    Args:
      workdir: a directory that a training program wrote.
      model: a directory that transformers' ``save_pretrained`` wrote, the id of a model on the
        Hugging Face hub, or a workdir too.
      step: of a workdir, the checkpoint.
      average: of a workdir, over how many checkpoints.

    Raises:
      ValueError: for neither or both, for a checkpoint of what has none, or a model that cannot be
        loaded.
    """
    check(workdir, model)
    directory = pathlib.Path(name(workdir, model))
    if workdir is not None or ((directory / "checkpoints").is_dir() and not (directory / "config.json").is_file()):
        return tj.load(directory, step=step, average=average)
    if step is not None or average != 1:
        raise ValueError(f"--step and --average choose among the checkpoints of a workdir; {model} has one state")
    return tj.from_huggingface(model)


def check(workdir: str | None, model: str | None) -> None:
    """Raises ValueError unless one of the two flags is given."""
    if workdir is None and model is None:
        raise ValueError("--workdir is missing: a directory that experiments.train wrote; or --model, a directory or "
                         "an id of Hugging Face")
    if workdir is not None and model is not None:
        raise ValueError(f"--workdir={workdir} and --model={model} are two models; give one")


def name(workdir: str | None, model: str | None) -> str:
    """What error messages call the model."""
    return model if workdir is None else workdir
