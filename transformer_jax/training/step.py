"""The training step: gradients, accumulation, the update, and skipping of non-finite updates."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from transformer_jax.sharding import is_sharded, shardings
from transformer_jax.training.state import TrainState, as_pytree

Batch = Mapping[str, jax.Array]
Sums = tuple[jax.Array, jax.Array] | tuple[jax.Array, jax.Array, dict[str, jax.Array]]
LossFn = Callable[[Any, Batch, jax.Array | None], Sums]
AfterUpdate = Callable[[Any, dict[str, jax.Array], jax.Array], tuple[Any, dict[str, jax.Array]]]
Gradients = tuple[Any, tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


def make_train_step(
        loss_fn: LossFn, optimizer: optax.GradientTransformation, accumulation: int = 1,
        gradient_dtype: str | None = None, after_update: AfterUpdate | None = None
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes a jitted training step ``step(state, batch) -> (state, metrics)``.

    The step donates the old state, which cannot be used afterwards. The gradient is that of (sum of
    losses) / (sum of weights) over the whole batch, also if it is accumulated over microbatches. If
    the loss, the gradient or a new weight is not finite, the update is skipped: the weights and the
    optimizer state do not change, and the state counts the skipped update.

    Args:
      loss_fn: a function ``(params, batch, key) -> (sum of losses, sum of weights)``. It may return
        a dict of further sums as a third item, such as that of the accuracy; the metrics contain
        them divided by the sum of weights. If the function reads weights that are not trained, such
        as a frozen base model, bind them with ``jax.tree_util.Partial``: they then become inputs of
        the program, while those of a closure would become constants in it.
      optimizer: an optax transformation.
      accumulation: number of microbatches. It must divide the batch size; with ``gradient_dtype``,
        it must divide the number of rows on each device.
      gradient_dtype: the dtype in which devices sum their gradients, once per step. It needs a mesh
        in which only the axis ``data`` is larger than 1. With ``None``, the compiler inserts the
        sums after each matrix product, in the dtype of the product. Dropout uses different random
        numbers with this setting.
      after_update: a function ``(params, means, weight) -> (params, means)`` that changes the new
        weights further, for example by a constraint, and may change the metrics. ``means`` are the
        further sums of ``loss_fn`` divided by ``weight``, the sum of weights. Its arrays need not
        be scalars, if the returned ones are.

    Returns:
      The step. Its metrics are ``loss`` (before the update, in nats), ``grad_norm`` (before
      clipping), ``skipped``, ``skipped_in_a_row`` and the means of the further sums of ``loss_fn``.
    """
    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: Batch, loss_fn: LossFn) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        gradients = functools.partial(_gradients, accumulation=accumulation)
        if gradient_dtype is not None and is_sharded():
            gradients = _on_each_device(gradients, gradient_dtype)
        grads, (loss, weight, others) = gradients(loss_fn, state.params, batch, key)
        scale = 1.0 / jnp.where(weight == 0.0, 1.0, weight)
        loss, means = jax.tree.map(lambda total: total * scale, (loss, others))
        grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if after_update is not None:
            params, means = after_update(params, means, weight)
        # Finite gradients can still give non-finite weights, such as with a huge learning rate.
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss) & jnp.isfinite(_norm(params))
        params, opt_state = _choose(finite, (params, opt_state), (state.params, state.opt_state))
        state = TrainState(params=params, opt_state=opt_state, step=state.step + 1, key=state.key,
                           skipped=state.skipped + ~finite,
                           skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1))
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:  # without a constraint, the compiler may choose other shardings; step 2 would recompile
            state = jax.lax.with_sharding_constraint(state, shardings(state, cast(Mesh, mesh)))
        return state, means | {"loss": loss, "grad_norm": grad_norm, "skipped": state.skipped,
                               "skipped_in_a_row": state.skipped_in_a_row}

    step: Any = functools.partial(train_step, loss_fn=as_pytree(loss_fn))
    step.lower = functools.partial(train_step.lower, loss_fn=as_pytree(loss_fn))
    return step


def _choose(finite: jax.Array, new: Any, old: Any) -> Any:
    """Returns the pytree ``new`` if ``finite`` is true, else ``old``.

    A CPU chooses whole buffers, which saves a pass over all arrays (2 to 3 % of a small step). A
    TPU would need more memory for that (5 % for GPT-2 small), so accelerators select each element.
    """
    return jax.lax.platform_dependent(
        finite, new, old, cpu=lambda finite, new, old: jax.lax.cond(finite, lambda: new, lambda: old),
        default=lambda finite, new, old: jax.tree.map(functools.partial(jnp.where, finite), new, old))


def _norm(params: Any) -> jax.Array:
    """Returns the float32 norm of all weights, which is finite only if every weight is finite."""
    return jnp.sqrt(sum((jnp.square(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(params)),
                        start=jnp.zeros(())))


def _gradients(loss_fn: LossFn, params: Any, batch: Batch, key: jax.Array, accumulation: int) -> Gradients:
    """Returns the gradient of the sum of losses, and all sums of the loss function."""
    def sums(params: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, dict]]:
        loss, weight, *others = _sums(loss_fn, params, batch, key)
        return loss, (loss, weight, others[0] if others else {})

    gradient = jax.grad(sums, has_aux=True)
    if accumulation == 1:
        return gradient(params, batch, key)
    # Of A microbatches, number i takes the rows i, i + A, ...: each device keeps its own rows.
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: Any, part_and_index: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        part, index = part_and_index
        return jax.tree.map(jnp.add, total, gradient(params, part, jax.random.fold_in(key, index))), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
        gradient, params, jax.tree.map(lambda x: x[0], parts), key))
    return jax.lax.scan(add, zero, (parts, jnp.arange(accumulation)))[0]


def _sums(loss_fn: LossFn, params: Any, batch: Batch, key: jax.Array) -> Sums:
    """Returns the sums of a loss function, which may be a user's, after a check of their form."""
    try:
        sums = loss_fn(params, batch, key)
    except KeyError as error:
        raise ValueError(f"the loss finds nothing named {', '.join(map(repr, error.args))}; a batch of this run has "
                         f"the arrays {', '.join(sorted(batch))}") from error
    if not isinstance(sums, tuple) or len(sums) not in (2, 3) or any(jnp.ndim(total) for total in sums[:2]):
        raise ValueError(f"the loss returns {jax.tree.map(jnp.shape, sums)} (shapes); expected (sum of losses, sum of "
                         "weights), two scalars, and optionally a dict of further sums")
    return sums


def _on_each_device(gradients: Callable[..., Gradients], dtype: str) -> Callable[..., Gradients]:
    """Makes each device compute the gradient of its rows, and sums these in ``dtype``."""
    def local(loss_fn: LossFn, params: Any, batch: Batch, key: jax.Array) -> Gradients:
        grads, sums = gradients(loss_fn, params, batch, jax.random.fold_in(key, jax.lax.axis_index("data")))
        total = jax.lax.psum((jax.tree.map(lambda g: g.astype(dtype), grads), sums), "data")
        return jax.tree.map(lambda g, summed: summed.astype(g.dtype), grads, total[0]), total[1]

    replicated, rows = PartitionSpec(), PartitionSpec("data")
    # With check_vma=True, JAX would sum the gradients earlier, in their own dtype.
    return jax.shard_map(local, in_specs=(replicated, replicated, rows, replicated), out_specs=replicated,
                         check_vma=False)


def make_eval_step(loss_fn: LossFn) -> Callable[[Any, Batch], Sums]:
    """Makes a jitted evaluation step, which runs a loss function without dropout.

    Args:
      loss_fn: a loss function, as for ``make_train_step``.

    Returns:
      A function ``step(params, batch)`` that returns what ``loss_fn`` returns: the sum of losses,
      the sum of weights, and the dict of further sums, if there is one.
    """
    eval_step = jax.jit(lambda params, batch, loss_fn: loss_fn(params, batch, None))
    return functools.partial(eval_step, loss_fn=as_pytree(loss_fn))
