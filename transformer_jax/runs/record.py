"""The record of a run, ``run.json``, and the rules for settings that may change when it is
resumed."""

from __future__ import annotations

import pathlib
from typing import Any, TypedDict

from transformer_jax.config import ExperimentConfig
from transformer_jax.json_files import located, read_json
from transformer_jax.runs.paths import current_directory, found_from, with_equal_paths
from transformer_jax.settings import differences, from_dict
from transformer_jax.training.checkpoint import Checkpoints

RECORD = "run.json"

# Fields that may always change between two starts of a run, because they do not change the result.
# The number of steps changes the result only if the learning rate depends on it. The program then
# prints a message.
FREE = ("steps", "log_every", "checkpoint.", "eval.", "sample.", "metrics.", "mesh.", "data.cache_dir",
        "model.unroll", "model.remat", "loss.most_logits")
# Fields that may change if the caller passes ``change``: the structure of the weights and of the
# optimizer's state does not depend on them.
CHANGEABLE = (*(f"optim.{field}" for field in (
    "peak_lr", "muon_lr", "schedule", "warmup_steps", "end_lr", "decay_fraction", "weight_decay", "layer_weight_decay",
    "beta1", "beta2", "epsilon", "accumulation", "gradient_dtype")), "loss.", "model.dropout",
    "model.attention_dropout", "lora.dropout")

_ADVICE = ("this file records the config and the data of the run; restore it from a copy to resume the run, or start a "
           "new run in another --workdir")


class _Started(TypedDict):
    """The fields that every record has."""

    config: dict[str, Any]
    contents: list[str]


class Record(_Started, total=False):
    """The contents of ``run.json``.

    Attributes:
      config: The config of the last start, before the tokenizer completed it.
      contents: The digests of the data, followed by the digest of the base if there is one.
      tokenizer: The digest of the tokenizer, if there is one.
      base: The ``source`` and the ``step`` that the base was loaded from.
      directory: The directory that the relative paths of the config start from.
      given: The names of the arguments of ``tj.train`` that a file cannot store.
      branch: The ``workdir`` and the ``step`` that a branch started from.
      changes: The settings that changed between two starts, and the last step before each change.
      sweep: For a sweep, the values of each setting that differs between its models.
    """

    tokenizer: str
    base: dict[str, Any] | None
    directory: str | None
    given: list[str]
    branch: dict[str, Any]
    changes: list[dict[str, Any]]
    sweep: dict[str, list[Any]]


def read_record(path: str | pathlib.Path) -> Record | None:
    """Reads the record of a run.

    Args:
      path: The directory of the run.

    Returns:
      The record, or ``None`` if there is no run in the directory.

    Raises:
      ValueError: If the file is damaged. The message names the file.
    """
    file = pathlib.Path(path) / RECORD
    if not file.exists():
        return None
    try:
        return read_json(file, Record)
    except ValueError as error:
        raise ValueError(f"{error}; {_ADVICE}") from error


def recorded_config(path: str | pathlib.Path, record: Record) -> ExperimentConfig:
    """Returns the config of a run's last start.

    If the run was started in another directory, its relative paths are absolute in the result.

    Args:
      path: The directory of the run.
      record: The record of the run.

    Returns:
      The config.

    Raises:
      ValueError: If the record does not contain a valid config. The message names the file.
    """
    try:
        with located(str(pathlib.Path(path) / RECORD)):
            return found_from(from_dict(ExperimentConfig, record["config"]), record.get("directory"))
    except ValueError as error:
        raise ValueError(f"{error}; {_ADVICE}") from error


def last_step(path: pathlib.Path) -> int:
    """Returns the last saved step of a workdir, or 0 if no step is saved."""
    return max(Checkpoints(path / "checkpoints", read_only=True).steps(), default=0)


def changed_settings(path: pathlib.Path, record: Record, new: ExperimentConfig, change: bool) -> list[str]:
    """Compares the config of a new start with that of the last start. Two paths are equal if they
    are written alike, or name the same file.

    Args:
      path: The directory of the run.
      record: The record of the run.
      new: The config of the new start.
      change: True if settings of the optimizer, the loss and dropout may change.

    Returns:
      The changed settings, as ``name: old -> new``, without those that do not change the result.

    Raises:
      ValueError: If a setting changed that must not change, or the run has already taken more steps
        than the new config has.
    """
    old = recorded_config(path, record)
    as_written = from_dict(ExperimentConfig, record["config"])
    # Each path that is equal in one of the two ways becomes the one of the record.
    new = with_equal_paths(with_equal_paths(new, as_written, current_directory()), as_written, record.get("directory"))
    old = with_equal_paths(old, as_written, record.get("directory"))
    changed = [line for line in differences(old, new) if not line.startswith(FREE)]
    if old.task is None:  # an older version did not store the task in the record
        changed = [line for line in changed if not line.startswith("task:")]
    allowed = CHANGEABLE
    # Switching clipping on or off would change the structure of the optimizer's state.
    if old.optim.clip_norm is not None and new.optim.clip_norm is not None:
        allowed += ("optim.clip_norm",)
    if other := [line for line in changed if not (change and line.startswith(allowed))]:
        hint = ""
        if all(line.startswith(allowed) for line in other):
            hint = "; or add --change (in Python change=True) to continue with the new settings"
        raise ValueError(f"{path} holds a run with another config ({'; '.join(other)}); use another --workdir, or the "
                         f"same settings to resume{hint}")
    if new.steps != old.steps:
        if new.steps < (done := last_step(path)):
            raise ValueError(f"steps={new.steps}, but the run in {path} has already taken {done} steps; set more "
                             "steps, or use another --workdir")
        changed.append(f"steps: {old.steps} -> {new.steps}")
    return changed
