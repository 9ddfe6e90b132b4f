"""Adapters on disk, without the model that they belong to."""

from __future__ import annotations

import contextlib
import pathlib

import jax

from transformer_jax.config import LoraConfig
from transformer_jax.models.functional import Model
from transformer_jax.nn.lora import Adapters, make_adapters
from transformer_jax.settings import from_dict, to_dict
from transformer_jax.training.checkpoint import CheckpointError, Checkpoints
from transformer_jax.training.leaves import tree_digest

BASE_FILE = "base.sha256"  # which model the adapters of a checkpoint belong to


def save_adapters(directory: str | pathlib.Path, adapters: Adapters, config: LoraConfig, base: Model, *,
                  step: int = 0) -> None:
    """Writes adapters alone where :func:`load_adapters` finds them; returns when they are on disk.

    Args:
      directory: another one than that of a run.
      adapters: of :func:`transformer_jax.nn.lora.make_adapters`, trained.
      config: what they were made with.
      base: the model that they belong to; only its digest is stored.
      step: training steps taken.

    Raises:
      ValueError: when they cannot be written, or the directory holds a later step, which would be
        loaded instead.
    """
    with contextlib.closing(Checkpoints(pathlib.Path(directory) / "checkpoints", keep=1)) as checkpoints:
        if max(checkpoints.steps(), default=0) > step:
            raise CheckpointError(f"{directory} holds step {checkpoints.steps()[-1]} already, later than step {step} "
                                  "of these adapters; save them in another directory")
        checkpoints.save(step, {"params": adapters}, metadata={"lora": to_dict(config)},
                         files={BASE_FILE: tree_digest(base).encode()})


def load_adapters(directory: str | pathlib.Path, base: Model, *, step: int | None = None) -> Adapters:
    """Reads the adapters that :func:`save_adapters` wrote, or those of a run with ``lora.rank``.

    Args:
      directory: the one given to ``save_adapters``, or the workdir of a run.
      base: the model that they belong to, whose digest is compared.
      step: which step; ``None``: the last.

    Raises:
      ValueError: when there are none, or they are damaged or those of another model.
    """
    return restore_adapters(Checkpoints(pathlib.Path(directory) / "checkpoints", read_only=True), base, step=step)


def restore_adapters(checkpoints: Checkpoints, base: Model, *, step: int | None = None) -> Adapters:
    """The adapters of a directory of checkpoints; see :func:`load_adapters`."""
    found = checkpoints.restore({}, step=step)
    if BASE_FILE not in found.files:
        raise CheckpointError(f"{checkpoints.directory} holds a whole model, and no adapters")
    if found.files[BASE_FILE].decode() != tree_digest(base):
        raise CheckpointError(f"the adapters in {checkpoints.directory} belong to a model with other weights than this "
                              "one")
    config = from_dict(LoraConfig, found.metadata["lora"] if "lora" in found.metadata
                       else found.metadata["config"]["lora"])
    shapes = jax.eval_shape(lambda base, key: make_adapters(base, config, key=key), base, jax.random.key(0))
    return checkpoints.restore({"params": shapes}, step=found.step).state["params"]
