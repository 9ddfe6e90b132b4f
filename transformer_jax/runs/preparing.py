"""Preparation of a run, from the call of ``tj.train`` to the first step: it tokenizes the data,
completes the config and writes the record of the workdir."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax.config import ExperimentConfig, ModelConfig, OptimConfig
from transformer_jax.data import Tokenizer, make_batches
from transformer_jax.data.windows import BatchSource
from transformer_jax.models.functional import count_parameters
from transformer_jax.runs.completing import AnyTokenizer, make_tokenizer, model_config_for, model_config_from
from transformer_jax.runs.record import last_step, recorded_config
from transformer_jax.runs.workdir import Workdir
from transformer_jax.settings import check_type
from transformer_jax.sharding import data_share
from transformer_jax.tasks.base import Task
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle, save
from transformer_jax.training.learner import Learner, make_learner
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.optimizer import make_schedule
from transformer_jax.training.processes import is_first


@dataclasses.dataclass(frozen=True)
class Start:
    """The arguments of a call of ``tj.train``, before the data is tokenized.

    Attributes:
      config: The config of the run; the config of its model may still be incomplete.
      place: The path of the workdir or, if there is none, of a temporary directory.
      directory: The workdir, or ``None``.
      base: The model that training starts from, after ``Task.start_from``, or ``None``.
      source: The place that the base was loaded from, for the record.
      given: The names of the arguments that a record cannot store, each with True if the caller
        passed it.
      tokenizer: The tokenizer that the caller passed, or ``None``.
      make_task: A function that creates the task of a config.
      mesh: The mesh of devices.
    """

    config: ExperimentConfig
    place: pathlib.Path
    directory: Workdir | None
    base: Bundle | None
    source: Mapping[str, Any] | None
    given: Mapping[str, Any]
    tokenizer: AnyTokenizer | None
    make_task: Callable[..., Task]
    mesh: Mesh

    def claim(self, contents: list[str], tokenizer: AnyTokenizer | None, exact: bool = True) -> None:
        """Writes the record into the workdir, after all checks have passed.

        Args:
          contents: The digests of the data and of the base.
          tokenizer: The tokenizer of the run, or ``None``.
          exact: True if a resumed run gets the same batches as a run that was never stopped.
        """
        if self.directory is None or not is_first():
            return
        _report_change(self.directory, self.config, exact)
        self.directory.claim(contents, tokenizer, base=self.source, given=self.given)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that is ready for its first step.

    Attributes:
      config: The complete config.
      task: The task.
      data: The tokenized data.
      tokenizer: The tokenizer, or ``None`` if the caller passed batches without one.
      batches: The training batches, as dicts of arrays.
      learner: The parameters that are trained, and how the model is made from them.
      files: The texts of files that a base from Hugging Face keeps for an export.
    """

    config: ExperimentConfig
    task: Task
    data: TaskData
    tokenizer: AnyTokenizer | None
    batches: Iterator[Mapping[str, Any]]
    learner: Learner
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def with_examples(start: Start, examples: tuple[Any, Any]) -> Run:
    """Prepares a run on examples.

    Args:
      start: The arguments of the call.
      examples: The training examples and the held-out examples.

    Returns:
      The prepared run.

    Raises:
      ValueError: If the config does not fit the data, the base or the earlier start of the run.
    """
    config, directory, base = start.config, start.directory, start.base
    tokenizer = _tokenizer(start, examples)
    if base is not None:
        config = config.replace(model=model_config_from(config, base))
    elif tokenizer is not None:
        model_config = model_config_for(config, tokenizer)
        config = config.replace(model=start.make_task(config).complete_model(model_config, examples))
    task = start.make_task(config)
    cache_dir = pathlib.Path(config.data.cache_dir or start.place / "data")
    data = task.prepare(*examples, cast(Tokenizer, tokenizer), cache_dir)
    check_type(f"what {type(task).__name__}.prepare returns", data, TaskData, "a tj.tasks.TaskData")
    contents = [*data.contents, *([] if base is None else [tree_digest(base.model)])]
    if directory is not None:
        directory.check_contents(contents, has_base=base is not None)
    if data.follow is not None and jax.process_count() > 1:
        raise ValueError("reinforcement learning supports a single process only, but there are "
                         f"{jax.process_count()}; start one process")
    if config.metrics.attention_every and data.held_out is None:
        raise ValueError(f"metrics.attention_every needs a task with held-out examples that the model can read, "
                         f"such as language_model or translation, but the task is {task.name!r}; leave it out")
    if config.metrics.attention_every and not isinstance(config.model, ModelConfig):
        raise ValueError(f"metrics.attention_every watches the attention of a Transformer, but the model is of family "
                         f"{config.model.family!r}; leave it out")
    share, num_shares = data_share(start.mesh)
    batches: Any = data.train if data.follow is not None else make_batches(
        cast(BatchSource, data.train), batch_size=config.batch_size, seed=config.seed, process_index=share,
        process_count=num_shares, transform=data.transform)
    learner = make_learner(config.model, config.lora, None if base is None else base.model, start.mesh)
    base_copy = start.place / "base"
    if directory is not None and base is not None and is_first() and config.lora.rank and not base_copy.exists():
        save(base_copy, base)
    start.claim(contents, tokenizer, exact=data.follow is None or config.rl.max_step_kl is None)
    _report_sizes(config, data.summary, tokenizer, learner, start.mesh)
    return Run(config, task, data, tokenizer, batches, learner, {} if base is None else base.files)


def with_batches(start: Start, batches: Iterator[Mapping[str, Any]]) -> Run:
    """Prepares a run on batches that the caller makes. Such a run has no held-out data and no
    evaluation.

    Args:
      start: The arguments of the call.
      batches: The training batches, as dicts of arrays.

    Returns:
      The prepared run.

    Raises:
      ValueError: If the size of the vocabulary is unknown, or the config asks for something that
        needs examples.
    """
    config, directory, base, tokenizer = start.config, start.directory, start.base, start.tokenizer
    if base is not None:
        config = config.replace(model=model_config_from(config, base))
        tokenizer = base.tokenizer
    elif tokenizer is not None:
        config = config.replace(model=model_config_for(config, tokenizer))
    if config.model.vocab_size is None:
        raise ValueError("the size of the vocabulary cannot be read from batches; set model.vocab_size, or pass "
                         "tokenizer=...")
    if config.metrics.attention_every:
        raise ValueError("metrics.attention_every needs held-out examples, but data is an iterator of batches; leave "
                         "it out, and compute these metrics in a hook")
    if config.lora.rank and directory is not None:
        raise ValueError("a run that trains adapters on an iterator of batches cannot store its base in a workdir; "
                         "leave workdir out and use tj.save_adapters, or pass examples")
    learner = make_learner(config.model, config.lora, None if base is None else base.model, start.mesh)
    contents = [] if base is None else [tree_digest(base.model)]
    if directory is not None:
        directory.check_contents(contents, has_base=base is not None)
    start.claim(contents, tokenizer)
    data = TaskData(train=batches, contents=[], summary="batches of the caller")
    return Run(config, start.make_task(config), data, tokenizer, batches, learner, {} if base is None else base.files)


def _tokenizer(start: Start, examples: tuple[Any, Any]) -> AnyTokenizer | None:
    """Returns the tokenizer of the base, of the earlier start or of the caller, whichever is the
    first that exists. If there is none, trains one on the examples. Returns ``None`` if the examples
    are not texts."""
    directory, tokenizer = start.directory, start.tokenizer
    if not start.make_task(start.config).reads_text:
        return None
    if start.base is not None:
        if start.base.tokenizer is None:
            raise ValueError("the model to start from has no tokenizer, so it cannot read text; pass a workdir, or a "
                             "Hugging Face directory that includes the tokenizer")
        return start.base.tokenizer
    if directory is not None and directory.record is not None:
        if tokenizer is not None and tokenizer.digest != directory.tokenizer().digest:
            raise ValueError(f"the run in {directory.path} started with another tokenizer; use another workdir, or "
                             "leave tokenizer out to resume")
        return directory.tokenizer()
    if tokenizer is not None:
        return tokenizer
    return make_tokenizer(start.config.data, start.make_task(start.config).texts(examples[0]))


def _report_change(directory: Workdir, config: ExperimentConfig, exact: bool) -> None:
    """Prints which settings of a resumed run have changed, and how its learning rates change."""
    if not directory.changed or directory.record is None:
        return
    step = last_step(directory.path)
    print(f"settings changed after step {step}: {'; '.join(directory.changed)}")
    old = recorded_config(directory.path, directory.record)
    if config.steps == old.steps or not step or not exact or "optimizer" in directory.record.get("given", ()):
        return
    if _same_rates(old.optim, old.steps, config.optim, config.steps, step):
        print(f"the steps up to {step} had the learning rates of a run of {config.steps} steps: the result is the same")
    else:
        before, now = _rate(old.optim, old.steps, step), _rate(config.optim, config.steps, step)
        print(f"optim.schedule={config.optim.schedule} is stretched over {config.steps} steps: the learning rate at "
              f"step {step} goes from {before:.3g} to {now:.3g}, and the result is not that of a run "
              f"that had {config.steps} steps from the beginning")


def _rate(optim: OptimConfig, steps: int, step: int) -> float:
    """Returns the learning rate at a step."""
    return float(np.asarray(make_schedule(optim, steps)(step)))


def _same_rates(old: OptimConfig, old_steps: int, new: OptimConfig, new_steps: int, until: int) -> bool:
    """True if two schedules have the same learning rates at all steps before ``until``."""
    steps = np.arange(until)
    before, now = (np.broadcast_to(make_schedule(optim, num)(steps), steps.shape)
             for optim, num in ((old, old_steps), (new, new_steps)))
    return bool(np.array_equal(before, now))


def _report_sizes(config: ExperimentConfig, summary: str, tokenizer: AnyTokenizer | None, learner: Learner,
                  mesh: Mesh) -> None:
    """Prints the sizes of the data, the vocabulary and the model, and the number of devices."""
    if not is_first():
        return
    shapes = jax.eval_shape(learner.make_params, jax.random.key(0))
    counts = (sum(leaf.size for leaf in jax.tree.leaves(shapes)), count_parameters(config.model))
    vocabulary = "" if tokenizer is None else f"a vocabulary of {tokenizer.vocab_size}, "
    print(f"{summary}, {vocabulary}"
          f"{' of '.join(dict.fromkeys(map('{:,}'.format, counts)))} parameters, "
          f"{mesh.size} {jax.default_backend()} device(s)")
