"""Loading of the model that a program uses, from a workdir or from Hugging Face."""

from __future__ import annotations

import transformer_jax as tj
from transformer_jax.runs.bases import load_base
from transformer_jax.training.bundle import Bundle


def load(workdir: str | None, model: str | None, *, step: str | None = None, average: int = 1) -> Bundle:
    """Loads the model that ``--workdir`` or ``--model`` names. Exactly one of them must be given.

    Args:
      workdir: A directory that a training program wrote.
      model: A directory that transformers' ``save_pretrained`` wrote, the id of a model on the
        Hugging Face hub, or a workdir.
      step: The step of a checkpoint in a workdir, or ``"best"``. ``None`` means the last one.
      average: The number of last checkpoints of a workdir whose weights are averaged.

    Returns:
      The model with its tokenizer and config.

    Raises:
      ValueError: If neither or both are given, ``step`` or ``average`` is given for a model without
        checkpoints, or the model cannot be loaded.
    """
    check(workdir, model)
    if workdir is not None:
        return tj.load(workdir, step=step, average=average)
    return load_base(name(workdir, model), step=step, average=average)


def check(workdir: str | None, model: str | None) -> None:
    """Raises ValueError unless exactly one of ``--workdir`` and ``--model`` is given."""
    for flag, value in (("workdir", workdir), ("model", model)):
        if value is not None and not value.strip():
            raise ValueError(f"--{flag} is empty: name a directory")
    if workdir is None and model is None:
        raise ValueError("--workdir is missing: the directory of a run, which transformer-jax train wrote; or pass "
                         "--model, a directory or an id of Hugging Face")
    if workdir is not None and model is not None:
        raise ValueError(f"--workdir={workdir} and --model={model} name two models; pass only one of them")


def name(workdir: str | None, model: str | None) -> str:
    """Returns the name of the model for error messages: the value of the flag that is given."""
    return str(model if workdir is None else workdir)
