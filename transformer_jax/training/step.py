"""One training step for every stage: gradients, accumulation, clipping, the non-finite guard."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from transformer_jax.sharding import is_divided, shardings
from transformer_jax.training.state import TrainState, as_pytree

Batch = Mapping[str, jax.Array]
Sums = tuple[jax.Array, jax.Array] | tuple[jax.Array, jax.Array, dict[str, jax.Array]]
LossFn = Callable[[Any, Batch, jax.Array | None], Sums]
Gradients = tuple[Any, tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


def make_train_step(
        loss_fn: LossFn, optimizer: optax.GradientTransformation, accumulation: int = 1,
        gradient_dtype: str | None = None) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted ``step(state, batch) -> (state, metrics)`` that donates the old state.

    The gradient is that of (sum of losses) / (sum of weights) over the whole batch, also when it is
    accumulated over microbatches. Where it is not finite, weights and optimizer state stay as they
    were, and the state counts it.

    Args:
      loss_fn: ``(params, batch, key) -> (sum of losses, sum of weights)``, and maybe a dict of
        further sums, of which the means over the same weights are wanted, such as the accuracy.
        Weights that it reads and nobody trains, as a frozen base, are bound by
        ``jax.tree_util.Partial``: so they are arguments of the program, where those of a closure
        would be constants in it.
      optimizer: an optax transformation.
      accumulation: number of microbatches; divides the batch size, and with ``gradient_dtype`` that
        of each device.
      gradient_dtype: over a mesh of the axis ``data`` alone, devices sum their gradients once a
        step, in this type. ``None``: the compiler puts in the sums, after every product and in its
        type. Dropout draws other numbers.

    Returns:
      The step; its metrics are ``loss`` (before the update), ``grad_norm`` (before clipping),
      ``skipped``, ``skipped_in_a_row`` and the means of what else ``loss_fn`` sums.
    """
    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch, loss_fn: LossFn) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        gradients = functools.partial(_gradients, accumulation=accumulation)
        if gradient_dtype is not None and is_divided():
            gradients = _on_each_device(gradients, gradient_dtype)
        grads, (loss, weight, others) = gradients(loss_fn, state.params, batch, key)
        scale = 1.0 / jnp.where(weight == 0.0, 1.0, weight)
        loss, means = jax.tree.map(lambda total: total * scale, (loss, others))
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old),
                                         (params, opt_state), (state.params, state.opt_state))
        state = TrainState(params=params, opt_state=opt_state, step=state.step + 1, key=state.key,
                           skipped=state.skipped + ~finite,
                           skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1))
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:  # else the compiler may choose another layout, and the second step compiles anew
            state = jax.lax.with_sharding_constraint(state, shardings(state, mesh))
        return state, means | {"loss": loss, "grad_norm": grad_norm, "skipped": state.skipped,
                               "skipped_in_a_row": state.skipped_in_a_row}

    step = functools.partial(train_step, loss_fn=as_pytree(loss_fn))
    step.lower = functools.partial(train_step.lower, loss_fn=as_pytree(loss_fn))
    return step


def _gradients(loss_fn: LossFn, params: Any, batch: Batch, key: jax.Array, accumulation: int) -> Gradients:
    """The gradient of the sum of losses; that sum, the sum of weights and what else the loss
    function sums."""
    def sums(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, dict]]:
        loss, weight, *others = loss_fn(params, batch, key)
        return loss, (loss, weight, *(others or [{}]))

    gradient = jax.grad(sums, has_aux=True)
    if accumulation == 1:
        return gradient(params, batch, key)
    # Microbatch i takes the rows i, i + A, ...: each device keeps its own rows.
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, part_and_index: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        part, index = part_and_index
        return jax.tree.map(jnp.add, total, gradient(params, part, jax.random.fold_in(key, index))), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
        gradient, params, jax.tree.map(lambda x: x[0], parts), key))
    return jax.lax.scan(add, zero, (parts, jnp.arange(accumulation)))[0]


def _on_each_device(gradients: Callable[..., Gradients], dtype: str) -> Callable[..., Gradients]:
    """The gradients of each device's rows, summed over the axis ``data`` in this type."""
    def local(loss_fn: LossFn, params: Any, batch: Batch, key: jax.Array) -> Gradients:
        grads, sums = gradients(loss_fn, params, batch, jax.random.fold_in(key, jax.lax.axis_index("data")))
        total = jax.lax.psum((jax.tree.map(lambda g: g.astype(dtype), grads), sums), "data")
        return jax.tree.map(lambda g, summed: summed.astype(g.dtype), grads, total[0]), total[1]

    whole, rows = PartitionSpec(), PartitionSpec("data")
    # Unchecked: checking would sum the gradient of what all devices hold alike where it is made.
    return jax.shard_map(local, in_specs=(whole, whole, rows, whole), out_specs=whole, check_vma=False)


def make_eval_step(loss_fn: LossFn) -> Callable[[Any, Batch], Sums]:
    """A jitted ``step(params, batch) -> (sum of losses, sum of weights)``, and what else is summed,
    without dropout."""
    eval_step = jax.jit(lambda params, batch, loss_fn: loss_fn(params, batch, None))
    return functools.partial(eval_step, loss_fn=as_pytree(loss_fn))
