"""One training step for every stage: gradients, accumulation, clipping, the non-finite guard."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transformer_jax.sharding import shardings
from transformer_jax.training.state import TrainState

Batch = Mapping[str, jax.Array]
LossFn = Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array]]


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation,
                    accumulation: int = 1) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """A jitted ``step(state, batch) -> (state, metrics)`` that donates the old state.

    The gradient is that of (sum of losses) / (sum of weights) over the whole batch, also when it is
    accumulated over microbatches. Where it is not finite, weights and optimizer state stay as they
    were, and the state counts it.

    Args:
      loss_fn: ``(params, batch, key) -> (sum of losses, sum of weights)``.
      optimizer: an optax transformation.
      accumulation: number of microbatches; divides the batch size.

    Returns:
      The step; its metrics are ``loss`` (before the update), ``grad_norm`` (before clipping), ``skipped`` and
      ``skipped_in_a_row``.
    """
    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        loss, grads = _gradients(loss_fn, state.params, batch, key, accumulation)
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
        return state, {"loss": loss, "grad_norm": grad_norm, "skipped": state.skipped,
                       "skipped_in_a_row": state.skipped_in_a_row}

    return train_step


def _gradients(loss_fn: LossFn, params: Any, batch: Batch, key: jax.Array,
               accumulation: int) -> tuple[jax.Array, Any]:
    """The mean loss of the batch and its gradient."""
    def sums(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        loss, weight = loss_fn(params, batch, key)
        return loss, (loss, weight)

    gradient = jax.grad(sums, has_aux=True)
    if accumulation == 1:
        grads, (loss, weight) = gradient(params, batch, key)
    else:
        # Microbatch i takes the rows i, i + A, ...: each device keeps its own rows.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: Any, part_and_index: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            part, index = part_and_index
            return jax.tree.map(jnp.add, total, gradient(params, part, jax.random.fold_in(key, index))), None

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
            gradient, params, jax.tree.map(lambda x: x[0], parts), key))
        (grads, (loss, weight)), _ = jax.lax.scan(add, zero, (parts, jnp.arange(accumulation)))
    scale = 1.0 / jnp.where(weight == 0.0, 1.0, weight)
    return loss * scale, jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)


def make_eval_step(loss_fn: LossFn) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted ``step(params, batch) -> (sum of losses, sum of weights)`` without dropout."""
    return jax.jit(lambda params, batch: loss_fn(params, batch, None))
