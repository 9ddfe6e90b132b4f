"""``tj.sweep``, which trains several small models in one program that differ in their seeds and in
numbers of the optimizer."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax import tasks
from transformer_jax.config import ExperimentConfig, MeshConfig
from transformer_jax.data import Tokenizer, make_batches
from transformer_jax.data.windows import BatchSource
from transformer_jax.runs.completing import check_arguments, check_corpora, config_of_call, with_data
from transformer_jax.runs.preparing import Run, Start, with_examples
from transformer_jax.runs.record import Record
from transformer_jax.runs.sweep_results import Sweep, Values, member_config
from transformer_jax.runs.training import evaluation_of
from transformer_jax.runs.workdir import Workdir, locked, write_whole
from transformer_jax.runtime import keep_freed_memory
from transformer_jax.settings import nearest, require
from transformer_jax.sharding import make_mesh
from transformer_jax.tasks.base import Task
from transformer_jax.training.bundle import files_to_store, save
from transformer_jax.training.learner import with_ablated_heads
from transformer_jax.training.member_session import run_members
from transformer_jax.training.members import TRACEABLE, MemberBatches
from transformer_jax.training.metrics import read_metrics


def sweep(config: str | ExperimentConfig | None = None, values: Mapping[str, Sequence[int | float]] | None = None,
          data: Any = None, *, held_out: Sequence[Any] | None = None, steps: int | None = None,
          workdir: str | pathlib.Path | None = None, tokenizer: Tokenizer | None = None) -> Sweep:
    """Trains a model for each combination of values, all of them in one compiled program.

    Each model is equal, up to the rounding of float32, to the one that ``tj.train`` trains with the
    same settings. On several devices the models are spread over as many as divide their number. A
    model whose updates are not finite does not stop the others. There are no samples and no records
    of attention.

    Args:
      config: The config that all models share, or the name of a recipe. ``None`` means that of the
        sweep in ``workdir``, which is resumed.
      values: The values of each setting that differs, such as ``{"optim.peak_lr": [1e-3, 3e-3],
        "seed": [0, 1, 2]}``. The settings are ``seed`` and, with the prefix ``optim.``, those in
        ``transformer_jax.training.members.TRACEABLE``. ``None`` means those of the sweep in
        ``workdir``.
      data: The training data, as for ``tj.train``: a path or a list of examples. ``None`` means the
        data that ``config.data`` names.
      held_out: Examples to evaluate on, if ``data`` is a list of examples.
      steps: The number of steps, instead of ``config.steps``.
      workdir: The directory of the sweep, with ``metrics.jsonl``, ``results.jsonl``, ``sweep.png``
        (if matplotlib is installed), checkpoints, and the best model in ``best_model``. The same
        call resumes a stopped sweep, and the result is the same to the bit. ``None`` means that
        nothing is written.
      tokenizer: A tokenizer, instead of the one that ``config.data.tokenizer`` describes.

    Returns:
      The losses of all models, and the models.

    Raises:
      ValueError: If the settings or the data are invalid, a setting cannot differ between models of
        one program, or the workdir belongs to a run or to another sweep.
      Interrupted: If a signal stops a sweep with a workdir, after its state is saved.
    """
    keep_freed_memory()
    check_arguments(workdir=workdir, tokenizer=tokenizer, held_out=held_out)
    config, record = config_of_call(config, steps, workdir)
    values = _checked(config, values, record)
    config, examples, batches = with_data(config, data)
    require(batches is None, "data is an iterator of batches, but the models of a sweep need batches in the order of "
            "their own seeds; pass a path or a list of examples")
    make_task = tasks.get(tasks.name_of(config, None))
    task = make_task(config)
    _check_task(task)
    check_corpora(task, examples)
    members = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    with contextlib.ExitStack() as stack:
        directory = None if workdir is None else Workdir(workdir, config, sweep=values)
        given = {"data": examples is not None, "held_out": held_out is not None}
        if directory is not None:
            directory.check_given(given)
        read = task.read(examples, held_out)
        if workdir is None:
            place = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            place = pathlib.Path(workdir)
            stack.enter_context(locked(place))
            directory = Workdir(place, config, sweep=values)
        mesh = _mesh(config.mesh, len(members))
        start = Start(config, place, directory, None, None, given, tokenizer,
                      functools.partial(make_task, workdir=None if directory is None else place), mesh)
        return _fit(with_examples(start, read), members, None if directory is None else place, mesh)


def _checked(config: ExperimentConfig, values: Mapping[str, Sequence[int | float]] | None,
             record: Record | None) -> dict[str, list[int | float]]:
    """Returns the values of the call or of the record, after a check of every name and number."""
    if values is None and record is not None:
        values = record.get("sweep")
    require(isinstance(values, Mapping) and len(values) > 0,
            f"values={values!r} must be a dict from settings to their values, such as "
            "{'optim.peak_lr': [1e-3, 3e-3], 'seed': [0, 1, 2]}")
    possible = ["seed", *(f"optim.{name}" for name in TRACEABLE[config.optim.name])]
    for name, numbers in cast(Mapping, values).items():
        require(name in possible, f"{name} cannot differ between the models of a sweep; with optim.name="
                f"{config.optim.name} these settings can: {', '.join(possible)}{nearest(str(name), possible)}. For "
                "another setting, run a sweep for each of its values")
        require(isinstance(numbers, Sequence | np.ndarray) and not isinstance(numbers, str) and len(numbers) > 0,
                f"the values of {name} are {numbers!r}; expected a list of at least one number")
        require(name != "optim.clip_norm" or None not in (config.optim.clip_norm, *numbers),
                "optim.clip_norm can only differ between models that all clip; set numbers")
    # A config checks each number, and converts it as JSON stores it.
    checked = {name: [_value(member_config(config, {name: number}), name) for number in numbers]
               for name, numbers in cast(Mapping, values).items()}
    for name, numbers in checked.items():
        require(len(set(numbers)) == len(numbers), f"the values of {name} contain a number twice: {numbers}")
    return checked


def _value(config: ExperimentConfig, name: str) -> int | float:
    """Returns the value of a setting."""
    return config.seed if name == "seed" else getattr(config.optim, name.removeprefix("optim."))


def _check_task(task: Task) -> None:
    """Raises ValueError if the models of a task cannot be trained together."""
    require(not task.needs_base, f"a sweep trains models from random weights, but the task {task.name!r} starts from "
            "a trained model; run tj.train for each value")
    require(task.train_step() is None, f"the task {task.name!r} has a training step of its own, which cannot train "
            "several models together; run tj.train for each value")
    task.check_family(task.config.model.family)


def _mesh(config: MeshConfig, num_members: int) -> Mesh:
    """Returns the mesh whose devices share the models."""
    require(config == MeshConfig(config.data), f"mesh={config} shards a single model, but the models of a sweep are "
            "not sharded; set mesh.data only")
    require(jax.process_count() == 1, f"a sweep runs in a single process, but there are {jax.process_count()}")
    num_devices = math.gcd(num_members, len(jax.devices())) if config.data is None else config.data
    require(num_members % num_devices == 0 and num_devices <= len(jax.devices()),
            f"mesh.data={config.data} must divide the {num_members} models, and there are {len(jax.devices())} devices")
    return make_mesh(devices=jax.devices()[:num_devices])


def _fit(run: Run, members: Sequence[Values], workdir: pathlib.Path | None, mesh: Mesh) -> Sweep:
    """Trains the models of a prepared run, and writes the results."""
    config, data = run.config, run.data
    learner = with_ablated_heads(run.learner, config.loss.ablated_heads)
    require(data.follow is None, f"the batches of the task {run.task.name!r} depend on the weights, so that its models "
            "cannot be trained together; run tj.train for each value")
    seeds = [int(values.get("seed", config.seed)) for values in members]
    numbers = {name.removeprefix("optim."): np.array([values[name] for values in members])
               for name in members[0] if name != "seed"}
    batches = MemberBatches(lambda seed: make_batches(cast(BatchSource, data.train), batch_size=config.batch_size,
                                                      seed=seed, transform=data.transform), seeds)
    history = _History()
    state = run_members(
        config, workdir, seeds=seeds, values=numbers, make_params=run.learner.make_params,
        loss_fn=learner.to_loss(run.task.loss), batches=batches, mesh=mesh, to_model=learner.to_model,
        evaluate=evaluation_of(run), files=files_to_store(run.tokenizer, run.files), loggers=[history],
        after_update=run.task.after_update())
    lines = history.lines if workdir is None else read_metrics(workdir / "metrics.jsonl")
    result = Sweep(config, members, lines, state, run.tokenizer, learner.to_model)
    if workdir is not None:
        _write(result, workdir)
    return result


class _History:
    """A metric logger that keeps all metrics in memory."""

    def __init__(self):
        self.lines: list[dict[str, Any]] = []

    def write(self, step: int, values: Mapping[str, float | np.ndarray]) -> None:
        """Keeps the values of a step."""
        self.lines.append({"step": step, **values})

    def close(self) -> None:
        """Does nothing."""


def _write(result: Sweep, workdir: pathlib.Path) -> None:
    """Writes the results, the figure and the best model."""
    write_whole(workdir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in result.rows()).encode())
    if np.isnan(result.losses).all():
        return
    if importlib.util.find_spec("matplotlib"):  # it is optional
        result.plot().savefig(workdir / "sweep.png", dpi=120)
    save(workdir / "best_model", result.bundle())
