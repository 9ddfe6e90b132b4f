"""Training from Python: ``tj.train`` runs any task of any config, with or without a directory to
keep it in."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from transformer_jax import recipes, tasks
from transformer_jax.config import ExperimentConfig
from transformer_jax.data import Tokenizer, make_batches
from transformer_jax.models.functional import count_parameters
from transformer_jax.runs.completing import check_batch_size, make_tokenizer, model_config_for, model_config_from
from transformer_jax.runs.telemetry import WatchAttention
from transformer_jax.runs.workdir import Workdir, locked
from transformer_jax.runtime import keep_freed_memory
from transformer_jax.sharding import data_share, make_mesh
from transformer_jax.tasks.base import Task, TaskData
from transformer_jax.training.bundle import TOKENIZER_FILE, Bundle, save
from transformer_jax.training.evaluation import mean_loss
from transformer_jax.training.learner import Learner, make_learner
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.loggers import MetricLogger
from transformer_jax.training.loop import Hook
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.processes import first_before_others, is_first
from transformer_jax.training.session import run_training
from transformer_jax.training.state import TrainState, init_state


def train(config: str | ExperimentConfig, data: Any = None, *, texts: Sequence[str] | None = None,
          held_out: Sequence[Any] | None = None, steps: int | None = None,
          workdir: str | pathlib.Path | None = None, base: Bundle | None = None,
          tokenizer: Tokenizer | None = None, task: Callable[..., Task] | None = None, hooks: Sequence[Hook] = (),
          loggers: Sequence[MetricLogger] = (), optimizer: optax.GradientTransformation | None = None,
          mesh: Mesh | None = None) -> Bundle:
    """Trains a model and returns it with its tokenizer.

    Args:
      config: an :class:`~transformer_jax.config.ExperimentConfig`, or the name of one in
        ``tj.recipes``.
      data: what to learn from: a path, as ``config.data.path``; a list of examples as the task
        reads them (texts, pairs, conversations ...); or an iterator of batches (dicts of arrays
        ``[batch_size, ...]``), which can be resumed if it has ``get_state`` and ``set_state``, as
        iterators of grain have. ``None``: what ``config.data`` names.
      texts: the same as ``data``, for a list of texts.
      held_out: examples to evaluate on, where ``data`` are examples; by default the last
        ``config.data.validation_fraction`` of them.
      steps: in place of ``config.steps``.
      workdir: where checkpoints, metrics and the tokenizer go; the same call again resumes the run
        with the bits that it would have had. ``None``: nothing is written.
      base: a trained model to start from, with its tokenizer; fine-tuning tasks need one.
      tokenizer: in place of the one that ``config.data.tokenizer`` describes.
      task: a class of a task, or a function that makes one from a config, in place of
        ``config.task``.
      hooks: called after every step with the :class:`~transformer_jax.training.loop.Loop`.
      loggers: further metric loggers.
      optimizer: any optax transformation, in place of that of ``config.optim``.
      mesh: of devices, in place of that of ``config.mesh``.

    Returns:
      The model after the last step, or, without a workdir, as far as it came when Ctrl-C stopped
      it.

    Raises:
      ValueError: for bad settings or data, or a workdir that belongs to another run.
      Interrupted: with a workdir, after a signal, once the state is saved.
    """
    keep_freed_memory()
    config = recipes.get(config) if isinstance(config, str) else config
    config = config if steps is None else config.replace(steps=steps)
    config, data, batches = _with_data(config, data, texts)
    if held_out is not None and data is None:
        raise ValueError("held_out goes with examples in data; for files set config.data.validation_path")
    mesh = make_mesh(config.mesh) if mesh is None else mesh
    make_task = tasks.get(tasks.name_of(config)) if task is None else task
    new = make_task(config, base=base)
    if new.needs_base and base is None:
        raise ValueError(f"the task {new.name!r} starts from a trained model: pass base=tj.load(...), or --model=...")
    if base is not None and tokenizer is not None:
        raise ValueError("base comes with its tokenizer, which its weights belong to; leave tokenizer out")
    started = None if base is None else new.start_from(base)
    # Read before the workdir is made: where there is nothing to learn from, nothing is left behind.
    examples = None if batches is not None else new.read(data, held_out)
    check_batch_size(config, mesh)
    with contextlib.ExitStack() as stack:
        if workdir is None:
            directory, place = None, pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            place = pathlib.Path(workdir)
            stack.enter_context(locked(place))
            directory = Workdir(place, config)
        preparing = stack.enter_context(contextlib.ExitStack())
        preparing.enter_context(first_before_others("prepared"))
        options = {"base": base, "workdir": None if directory is None else place}
        if batches is not None:
            run = _of_batches(config, batches, directory, started, tokenizer, functools.partial(make_task, **options),
                              mesh)
        else:
            run = _prepare(config, examples, place, directory, started, tokenizer,
                           functools.partial(make_task, **options), mesh)
        preparing.close()
        return _fit(run, None if directory is None else place, mesh, hooks, loggers, optimizer)


def init_training(config: ExperimentConfig, task: Task | None = None, *, base: Bundle | None = None,
                  optimizer: optax.GradientTransformation | None = None, mesh: Mesh | None = None) -> TrainState:
    """The state before the first step, for a training loop of one's own.

    Args:
      config: of the run; its model's ``vocab_size`` must be set.
      task: what is learned; by default that of the config.
      base: a trained model to start from.
      optimizer: by default that of ``config.optim``.
      mesh: where the state lives; by default one device.
    """
    task = tasks.make(config) if task is None else task
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    base = base if base is None else task.start_from(base)
    learner = make_learner(config.model if base is None else base.config, config.lora,
                           None if base is None else base.model, mesh)
    optimizer = make_optimizer(config.optim, config.steps) if optimizer is None else optimizer
    return init_state(learner.make_params, optimizer, jax.random.key(config.seed), mesh)


@dataclasses.dataclass(frozen=True)
class _Run:
    """A run with everything that it needs before the first step."""

    config: ExperimentConfig
    task: Task
    data: TaskData
    tokenizer: Tokenizer | None
    batches: Iterator[Mapping[str, Any]]
    learner: Learner


def _with_data(config: ExperimentConfig, data: Any, texts: Sequence[str] | None) -> tuple[
        ExperimentConfig, Any, Iterator[Mapping[str, Any]] | None]:
    """The config, whose ``data.path`` is the path if one was given; else examples; else an iterator
    of batches."""
    if texts is not None:
        if data is not None:
            raise ValueError("data and texts are two names of the same argument; give one of them")
        if isinstance(texts, str):
            raise ValueError("texts is one string; pass a list of strings, or data=PATH to read a file")
        data = list(texts)
    if isinstance(data, (str, pathlib.Path)):
        paths = dataclasses.replace(config.data, path=str(data), tfds=None, generated=None)
        return config.replace(data=paths), None, None
    # What has a length is examples; what has none, as an iterator or a data set of grain, yields
    # batches.
    if data is None or hasattr(data, "__len__"):
        return config, data, None
    return config, None, iter(data)


def _prepare(config: ExperimentConfig, examples: tuple[Any, Any], place: pathlib.Path, directory: Workdir | None,
             started: Bundle | None, tokenizer: Tokenizer | None, make_task: Callable[..., Task], mesh: Mesh) -> _Run:
    """A run on examples to learn from, and held-out ones; ``started`` is the model that is trained
    on, if any."""
    if started is not None:
        tokenizer = started.tokenizer
    elif directory is not None and directory.record is not None:
        if tokenizer is not None and tokenizer.digest != directory.tokenizer().digest:
            raise ValueError(f"the run in {directory.path} began with another tokenizer; use another workdir, or leave "
                             "tokenizer out to resume")
        tokenizer = directory.tokenizer()
    elif tokenizer is None:
        tokenizer = make_tokenizer(config.data, make_task(config).texts(examples[0]))
    shape = model_config_for(config, tokenizer) if started is None else model_config_from(config, started)
    config = config.replace(model=shape)
    task = make_task(config)
    found = task.prepare(*examples, tokenizer, pathlib.Path(config.data.cache_dir or place / "data"))
    contents = [*found.contents, *([] if started is None else [tree_digest(started.model)])]
    if directory is not None:
        directory.check_contents(contents, has_base=started is not None)
    if found.follow is not None and jax.process_count() > 1:
        raise ValueError(f"reinforcement learning runs in one process, and here are {jax.process_count()}")
    if config.metrics.attention_every and found.held_out is None:
        raise ValueError("metrics.attention_every is for tasks whose held-out examples can be watched, such as "
                         "language_model and translation; leave it out here")
    share, num_shares = data_share(mesh)
    batches = found.train if found.follow is not None else make_batches(
        found.train, batch_size=config.batch_size, seed=config.seed, process_index=share, process_count=num_shares,
        transform=found.transform)
    learner = make_learner(config.model, config.lora, None if started is None else started.model, mesh)
    # Only now, with nothing left to go wrong, does the workdir belong to this run.
    if directory is not None and is_first():
        if config.lora.rank and not (place / "base").exists():
            save(place / "base", started)
        directory.claim(contents, tokenizer)
    _report_sizes(config, found.summary, tokenizer, learner, mesh)
    return _Run(config, task, found, tokenizer, batches, learner)


def _of_batches(config: ExperimentConfig, batches: Iterator[Mapping[str, Any]], directory: Workdir | None,
                base: Bundle | None, tokenizer: Tokenizer | None, make_task: Callable[..., Task], mesh: Mesh) -> _Run:
    """A run on batches that the caller makes: nothing is read, tokenized, held out or evaluated."""
    if base is not None:
        config = config.replace(model=model_config_from(config, base))
        tokenizer = base.tokenizer
    elif tokenizer is not None:
        config = config.replace(model=model_config_for(config, tokenizer))
    if config.model.vocab_size is None:
        raise ValueError("batches do not say how many tokens there are: set model.vocab_size, or pass tokenizer=...")
    if config.metrics.attention_every:
        raise ValueError("metrics.attention_every needs held-out examples, and batches of your own come without; leave "
                         "it out, and watch in a hook")
    if config.lora.rank and directory is not None:
        raise ValueError("a run of adapters keeps its base in the workdir, which batches of your own do not; leave "
                         "workdir out and use tj.save_adapters, or pass examples")
    learner = make_learner(config.model, config.lora, None if base is None else base.model, mesh)
    data = TaskData(train=batches, contents=[], summary="batches of the caller")
    if directory is not None:
        contents = [] if base is None else [tree_digest(base.model)]
        directory.check_contents(contents, has_base=base is not None)
        if is_first():
            directory.claim(contents, tokenizer)
    return _Run(config, make_task(config), data, tokenizer, batches, learner)


def _fit(run: _Run, workdir: pathlib.Path | None, mesh: Mesh, hooks: Sequence[Hook],
         loggers: Sequence[MetricLogger], optimizer: optax.GradientTransformation | None) -> Bundle:
    config, task, data = run.config, run.task, run.data
    if run.tokenizer is None or data.shown is None:
        show = None
    else:
        def show(model: Any, step: int) -> None:
            text = task.show(model, step, data)
            if text is not None and is_first():
                tqdm.write(f"--- step {step} ---\n{text}\n")
        if task.shows_base:
            show(task.base.model, 0)
    if config.metrics.attention_every:
        hooks = [WatchAttention(task, data.held_out, workdir), *hooks]
    files = {} if run.tokenizer is None else {TOKENIZER_FILE: run.tokenizer.to_bytes()}
    state = run_training(
        config, workdir, make_params=run.learner.make_params, loss_fn=run.learner.to_loss(task.loss),
        batches=run.batches, mesh=mesh, to_model=run.learner.to_model, files=files | dict(run.learner.files),
        evaluate=_evaluation(run), show=show, follow=data.follow, hooks=hooks, loggers=loggers, optimizer=optimizer)
    if workdir is not None and is_first():
        text = task.finish()
        if text is not None:
            print(text)
    return Bundle(model=run.learner.to_model(state.params), tokenizer=run.tokenizer, config=config.model,
                  step=int(state.step), experiment=config)


def _evaluation(run: _Run) -> Callable[[Any], Mapping[str, float]] | None:
    """The task's own evaluation, or the mean of its evaluation loss; ``None`` where nothing is held
    out."""
    data, settings = run.data, run.config.eval
    if type(run.task).evaluate is not Task.evaluate:
        return lambda model: run.task.evaluate(model, data)
    if data.evaluation_batches is None:
        return None
    return mean_loss(run.task.evaluation_loss, lambda: data.evaluation_batches(settings.batch_size),
                     settings.max_batches)


def _report_sizes(config: ExperimentConfig, summary: str, tokenizer: Tokenizer, learner: Learner, mesh: Mesh) -> None:
    if not is_first():
        return
    shapes = jax.eval_shape(learner.make_params, jax.random.key(0))
    counts = (sum(leaf.size for leaf in jax.tree.leaves(shapes)), count_parameters(config.model))
    print(f"{summary}, {tokenizer.vocab_size} pieces, {' of '.join(dict.fromkeys(map('{:,}'.format, counts)))} "
          f"parameters, {mesh.size} {jax.default_backend()} device(s)")
