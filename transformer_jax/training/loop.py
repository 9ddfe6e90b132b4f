"""The training loop: data, step, log, evaluate, save; stops cleanly and resumes exactly.

Several processes run it in step, each feeding its rows of every batch; the first prints and writes.
"""

from __future__ import annotations

import contextlib
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from transformer_jax.config import ExperimentConfig
from transformer_jax.settings import to_dict
from transformer_jax.sharding import batch_sharding, data_share
from transformer_jax.training.checkpoint import Checkpoints
from transformer_jax.training.errors import Interrupted, NotFiniteError, explained
from transformer_jax.training.metrics import MetricsWriter, flops_per_token
from transformer_jax.training.optimizer import make_optimizer, make_schedule
from transformer_jax.training.processes import agreed, is_first, on_one_device
from transformer_jax.training.state import TrainState, abstract_state, init_state
from transformer_jax.training.step import LossFn, make_train_step

MAX_SKIPPED_IN_A_ROW = 10


def fit(config: ExperimentConfig, workdir: str | pathlib.Path, *, make_params: Callable[[jax.Array], Any],
        loss_fn: LossFn, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, files: dict[str, bytes],
        evaluate: Callable[[Any], float | dict[str, float]], sample: Callable[[Any, int], None] | None = None,
        watch: Callable[[Any, int, MetricsWriter], None] | None = None,
        follow: Callable[[Any, dict[str, jax.Array] | None], dict[str, float]] | None = None) -> TrainState:
    """Trains to ``config.steps``, from the last checkpoint in the workdir if there is one.

    Args:
      config: decides everything; it is stored in the checkpoints.
      workdir: holds ``checkpoints`` (the last few), ``best`` (lowest validation loss) and ``metrics.jsonl``.
      make_params: makes the weights from a key.
      loss_fn: ``(params, batch, key) -> (sum of losses, sum of weights)``, see :func:`make_train_step`.
      batches: this process's rows of each batch, with ``get_state`` and ``set_state``.
      mesh: from :func:`transformer_jax.sharding.make_mesh`.
      files: stored with every checkpoint, such as the tokenizer.
      evaluate: the validation loss of some weights, or a dict of what to log, ``validation_loss`` among it.
      sample: called with weights and step every ``config.sample.every`` steps.
      watch: called with weights, step and where to write metrics every ``config.metrics.attention_every`` steps.
      follow: for batches that depend on the weights, as in reinforcement learning: called with the weights before the
        first batch and then after every step, with its metrics, before anything is saved; returns what to log.

    Returns:
      The final state.

    Raises:
      Interrupted: after SIGINT or SIGTERM, once the state is saved; of several processes, one need have had it.
      NotFiniteError: after ten updates in a row that had to be skipped.
      OutOfMemoryError: naming what to change.
      LostProcessError: another process has ended.
    """
    workdir = pathlib.Path(workdir)
    optimizer = make_optimizer(config.optim, config.steps)
    schedule = make_schedule(config.optim, config.steps)
    train_step = make_train_step(loss_fn, optimizer, config.optim.accumulation, config.optim.gradient_dtype)
    best_loss = float("inf")
    first, num_shares = is_first(), data_share(mesh)[1]
    with contextlib.ExitStack() as stack:
        stack.enter_context(explained(config, mesh.size))
        stack.enter_context(jax.set_mesh(mesh))
        last = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
        stack.enter_context(contextlib.closing(last))
        best = stack.enter_context(contextlib.closing(Checkpoints(workdir / "best", keep=1)))
        if last.steps():
            restored = last.restore(abstract_state(make_params, optimizer, mesh))
            state, saved, best_loss = restored.state, restored.step, restored.metadata["best_loss"]
            batches.set_state(restored.metadata["data"])
            if first:
                print(f"resuming from step {restored.step} of {config.steps}")
        else:
            state, saved = init_state(make_params, optimizer, jax.random.key(config.seed), mesh), None
        start = step = int(state.step)
        num_parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        metrics = stack.enter_context(contextlib.closing(MetricsWriter(workdir, -1 if saved is None else start,
                                                                         enabled=first)))
        signals = stack.enter_context(_signals())
        bar = stack.enter_context(tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True,
                                       desc="training", smoothing=0.05, disable=not first))

        def lead(current: dict[str, jax.Array] | None) -> None:
            if follow is not None and step < config.steps and (scalars := follow(state.params, current)):
                metrics.write(step, **scalars)

        def save(into: Checkpoints) -> None:
            metadata = {"config": to_dict(config), "data": batches.get_state(), "best_loss": best_loss}
            into.save(step, state, metadata=metadata, files=files)

        lead(None)
        previous, since, tokens_since = None, time.perf_counter(), 0
        stopping = False
        while step < config.steps and not stopping:
            batch = next(batches)
            state, current = train_step(state, _to_devices(batch, mesh))
            step += 1
            tokens_since += batch["tokens"].size * num_shares
            # Metrics are read one step late, so that the devices never wait for Python.
            if previous is not None:
                _check_finite(previous, step - 1)
            previous = current
            bar.update()
            if step == start + 1:
                jax.block_until_ready(current)  # compiled: from here on the clock tells the speed
                since, tokens_since = time.perf_counter(), 0
            if step % config.log_every == 0 or step == config.steps:
                values = {name: float(value) for name, value in current.items()}
                rate = tokens_since / (time.perf_counter() - since)
                speed = {"tokens_per_second": rate}
                if not config.lora.rank:  # else the params are not those that the model is run with
                    speed["model_flops_per_second"] = rate * flops_per_token(config.model, num_parameters)
                metrics.write(step, **{name: value for name, value in values.items() if name != "skipped_in_a_row"},
                              learning_rate=float(schedule(step - 1)), **(speed if tokens_since else {}))
                bar.set_postfix_str(f"loss {values['loss']:.3f}, {rate:,.0f} tokens/s")
                since, tokens_since = time.perf_counter(), 0
            if step % config.eval.every == 0 or step == config.steps:
                found = evaluate(state.params)
                found = found if isinstance(found, dict) else {"validation_loss": found}
                loss = found["validation_loss"]
                metrics.write(step, **found)
                if first:
                    bar.write(f"step {step}: " + ", ".join(f"{name.replace('_', ' ')} {value:.4f}"
                                                           for name, value in found.items()))
                if loss < best_loss:
                    best_loss = loss
                    save(best)
                since, tokens_since = time.perf_counter(), 0
            if sample is not None and config.sample.every and (config.sample.due(step) or step == config.steps):
                on_one_device(sample, state.params, mesh, step)
                since, tokens_since = time.perf_counter(), 0
            every = config.metrics.attention_every
            if watch is not None and every and (step % every == 0 or step == config.steps):
                watch(state.params, step, metrics)
                since, tokens_since = time.perf_counter(), 0
            lead(current)
            if step % config.checkpoint.every == 0:
                save(last)
                saved = step
            if jax.process_count() == 1 or step % config.log_every == 0:  # asking the others takes a moment
                stopping = agreed(bool(signals))
        if previous is not None:
            _check_finite(previous, step)
        if saved != step:
            save(last)
        last.wait()
        best.wait()
        if stopping and step < config.steps:
            raise Interrupted(signals[0] if signals else signal.SIGTERM, step)
    return state


def _to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def _check_finite(metrics: dict[str, jax.Array], step: int) -> None:
    if int(metrics["skipped_in_a_row"]) >= MAX_SKIPPED_IN_A_ROW:
        raise NotFiniteError(
            f"step {step}: {MAX_SKIPPED_IN_A_ROW} updates in a row had gradients that are not finite; training stops, "
            "and the checkpoints are those of before. Lower optim.peak_lr, lengthen optim.warmup_steps, or look at "
            "the data")


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them; a second one has its usual effect."""
    received: list[int] = []
    usual = {}

    def on_signal(signum: int, frame: Any) -> None:
        received.append(signum)
        signal.signal(signum, usual[signum])

    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            usual[signum] = signal.signal(signum, on_signal)
    except ValueError:  # not in the main thread, as in some notebooks: signals stay as they are
        pass
    try:
        yield received
    finally:
        for signum, handler in usual.items():
            signal.signal(signum, handler)
