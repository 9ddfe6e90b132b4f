"""Branches of a run: training starts again from one of its steps, with one thing changed."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
from typing import Any

from transformer_jax.config import ExperimentConfig
from transformer_jax.runs.record import CHANGEABLE, FREE, RECORD, read_record, recorded_config
from transformer_jax.runs.training import train
from transformer_jax.runs.workdir import write_whole
from transformer_jax.settings import differences, to_dict
from transformer_jax.training.bundle import TOKENIZER_FILE, Bundle
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.errors import Interrupted
from transformer_jax.training.loop import Loop

# What a branch may change: settings that do not change the structure of the state.
_BRANCHABLE = (*CHANGEABLE, "seed")


def branch(workdir: str | pathlib.Path, to: str | pathlib.Path, *, step: int, config: ExperimentConfig | None = None,
           **arguments: Any) -> Bundle:
    """Trains again from a step of a run, with another config, in a directory of its own.

    The state at the step is that of the run, to the bit: if there is no checkpoint of it, the steps
    since the checkpoint before it (or since the beginning) are trained again. From then on the new
    config counts. A new ``seed`` changes the order of the data. ``loss.ablated_heads`` removes heads,
    and ``optim.layer_weight_decay`` changes the weight decay of single layers. Without a change, the
    branch ends with the weights of the run, to the bit.

    The same call resumes a branch that was stopped.

    Args:
      workdir: the directory of the run.
      to: the directory of the branch.
      step: the number of steps after which the config changes.
      config: the config of the branch; by default that of the run. Take ``tj.load(workdir).experiment``
        and change it.
      **arguments: the further arguments of ``tj.train`` that the run was started with, such as
        ``data``.

    Returns:
      The model at the end of the branch.

    Raises:
      ValueError: if there is no run in ``workdir``, if the config changes more than a branch can, or
        if ``to`` holds another run.
      Interrupted: if a signal stops the branch, after its state is saved.
    """
    workdir, to = pathlib.Path(workdir), pathlib.Path(to)
    record = read_record(workdir)
    if record is None:
        raise ValueError(f"there is no run in {workdir} to branch from")
    old = recorded_config(workdir, record)
    new = old if config is None else config
    changed = _differ(old, new)
    if refused := [line for line in changed if not line.startswith(_BRANCHABLE)]:
        raise ValueError(f"a branch cannot change {'; '.join(refused)}: the state of the run would not fit; train a "
                         "new run instead")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < new.steps:
        raise ValueError(f"step={step!r}; expected a step from 0 to {new.steps - 1}, before the end of the branch")
    origin = {"workdir": str(workdir.absolute()), "step": step}
    existing = read_record(to)
    if existing is not None and existing.get("branch") != origin:
        raise ValueError(f"{to} holds another run; a branch needs a directory of its own")
    if existing is None or _differ(recorded_config(to, existing), new):
        if existing is not None and _differ(recorded_config(to, existing), old):
            raise ValueError(f"{to} holds a branch with another config; use another directory")
        _copy(workdir, to, step, {**record, "branch": origin})
        _train_until(step, old, to, arguments)
        entry = {"after_step": step, "changed": changed}
        write_whole(to / RECORD, json.dumps({**record, "branch": origin, "config": to_dict(new), "changes": [
            *record.get("changes", []), *([entry] if changed else [])]}, indent=1).encode())
    return train(new, workdir=to, **arguments)


def _differ(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """Returns the settings in which two configs differ, without those that change no result."""
    if old.task is None or new.task is None:  # a record has the task that the config left out
        old, new = old.replace(task=None), new.replace(task=None)
    return [line for line in differences(old, new) if not line.startswith(FREE)]


def _copy(workdir: pathlib.Path, to: pathlib.Path, step: int, record: Any) -> None:
    """Copies the record, the tokenizer, the base and the last checkpoint up to a step."""
    (to / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in (TOKENIZER_FILE, "base"):
        if (workdir / name).is_dir():
            shutil.copytree(workdir / name, to / name, dirs_exist_ok=True)
        elif (workdir / name).exists():
            shutil.copy2(workdir / name, to / name)
    before = [saved for saved in Checkpoints(workdir / "checkpoints", read_only=True).steps() if saved <= step]
    if before and not Checkpoints(to / "checkpoints", read_only=True).steps():
        place = to / "checkpoints" / str(before[-1])
        shutil.copytree(workdir / "checkpoints" / place.name, place.with_name(f"{place.name}.writing"),
                        dirs_exist_ok=True)
        place.with_name(f"{place.name}.writing").rename(place)
    write_whole(to / RECORD, json.dumps(record, indent=1).encode())


def _train_until(step: int, config: ExperimentConfig, to: pathlib.Path, arguments: dict[str, Any]) -> None:
    """Trains the steps between the copied checkpoint and the step, as the run did."""
    if max(Checkpoints(to / "checkpoints", read_only=True).steps(), default=0) >= step:
        return

    def stop(loop: Loop) -> None:
        if loop.step == step and not loop.stop_signal:
            loop.stop_signal = signal.SIGUSR1

    hooks = [*arguments.get("hooks", ()), stop]
    try:
        train(config, workdir=to, **{**arguments, "hooks": hooks})
    except Interrupted as interrupted:
        if interrupted.step != step:
            raise
