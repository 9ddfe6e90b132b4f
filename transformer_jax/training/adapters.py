"""Save and load LoRA adapters without the base model that they belong to."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any, TypedDict

import jax

from transformer_jax.config import LoraConfig
from transformer_jax.json_files import check_shape, located
from transformer_jax.models.functional import Model
from transformer_jax.nn.lora import Adapters, make_adapters
from transformer_jax.settings import checked_path, from_dict, to_dict
from transformer_jax.training.checkpoint import CheckpointError, Checkpoints
from transformer_jax.training.leaves import tree_digest

BASE_FILE = "base.sha256"  # holds the digest of the base model that the adapters belong to


class _ConfigWithLora(TypedDict):
    """The part of a run's config that describes its adapters."""

    lora: dict[str, Any]


class _RunMetadata(TypedDict):
    """The part of the metadata of a run's checkpoint that is read here."""

    config: _ConfigWithLora


def save_adapters(directory: str | pathlib.Path, adapters: Adapters, config: LoraConfig, base: Model, *,
                  step: int = 0) -> None:
    """Saves adapters without their base model, and returns when they are on disk.

    Args:
      directory: where to save them; it must not be the workdir of a run.
      adapters: trained adapters, which ``transformer_jax.nn.make_adapters`` made.
      config: the LoRA settings that the adapters were made with.
      base: the model that the adapters belong to, of which only the digest is stored.
      step: number of training steps taken.

    Raises:
      ValueError: if the adapters cannot be written, or the directory contains a later step, which
        ``load_adapters`` would load instead.
    """
    with contextlib.closing(Checkpoints(checked_path("directory", directory) / "checkpoints", keep=1)) as checkpoints:
        if max(checkpoints.steps(), default=0) > step:
            raise CheckpointError(f"{directory} already contains step {checkpoints.steps()[-1]}, which is later than "
                                  f"step {step} of these adapters; save them in another directory")
        checkpoints.save(step, {"params": adapters}, metadata={"lora": to_dict(config)},
                         files={BASE_FILE: tree_digest(base).encode()})


def load_adapters(directory: str | pathlib.Path, base: Model, *, step: int | None = None) -> Adapters:
    """Loads the adapters that ``save_adapters`` or a run with ``lora.rank`` saved.

    Args:
      directory: the directory that was given to ``save_adapters``, or the workdir of a run.
      base: the model that the adapters belong to; its digest must be the stored one.
      step: the step to load; ``None`` loads the last one.

    Returns:
      The adapters.

    Raises:
      ValueError: if there are no adapters, they are damaged, or they belong to another model.
    """
    path = checked_path("directory", directory)
    return restore_adapters(Checkpoints(path / "checkpoints", read_only=True), base, step=step)


def restore_adapters(checkpoints: Checkpoints, base: Model, *, step: int | None = None) -> Adapters:
    """Loads adapters from a directory of checkpoints.

    Args:
      checkpoints: the directory.
      base: the model that the adapters belong to; its digest must be the stored one.
      step: the step to load; ``None`` loads the last one.

    Returns:
      The adapters.

    Raises:
      CheckpointError: if there are no adapters, they are damaged, or they belong to another model.
    """
    restored = checkpoints.restore({}, step=step)
    if BASE_FILE not in restored.files:
        raise CheckpointError(f"{checkpoints.directory} contains a whole model and no adapters; load it with tj.load")
    if restored.files[BASE_FILE] != tree_digest(base).encode():
        raise CheckpointError(f"the adapters in {checkpoints.directory} belong to a model with other weights than "
                              "the given one; give the model that they were trained on")
    where = str(checkpoints.directory / str(restored.step) / "metadata.json")
    metadata = restored.metadata
    settings = metadata if "lora" in metadata else check_shape(metadata, where, _RunMetadata)["config"]
    with located(where):
        config = from_dict(LoraConfig, settings["lora"])
    shapes = jax.eval_shape(lambda base, key: make_adapters(base, config, key=key), base, jax.random.key(0))
    return checkpoints.read(restored, {"params": shapes})["params"]
