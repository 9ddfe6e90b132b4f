"""The state of training: one pytree, made sharded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from transformer_jax.sharding import shardings


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that the next step depends on, except the data.

    Attributes:
      params: the model itself, or any pytree of weights.
      opt_state: of the optimizer.
      step: updates tried so far.
      key: PRNG key of the run; a step uses ``fold_in(key, step)``, so it never changes.
      skipped: updates skipped because a gradient was not finite.
      skipped_in_a_row: those skipped since the last good one.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def init_state(make_params: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, key: jax.Array,
               mesh: Mesh | None = None) -> TrainState:
    """A fresh state; with a mesh, every array is created on the devices that hold it.

    Args:
      make_params: makes the weights from a key, as ``lambda key: Decoder(config, key=key)``.
        Weights to begin with are arguments of a ``jax.tree_util.Partial``, as
        ``Partial(lambda model, key: model, model)``, and are copied.
      optimizer: an optax transformation.
      key: PRNG key of the run.
      mesh: where the state lives; ``None``: the default device.
    """
    make_params = as_pytree(make_params)
    out_shardings = None if mesh is None else shardings(jax.eval_shape(functools.partial(_make, optimizer), make_params,
                                                                       key), mesh)
    # It runs once: on a CPU, compile it quickly rather than well.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    make = jax.jit(functools.partial(_make, optimizer), out_shardings=out_shardings, compiler_options=options)
    return make(make_params, key)


def abstract_state(make_params: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation,
                   mesh: Mesh | None = None) -> TrainState:
    """The shapes and shardings of :func:`init_state`, without allocating: what a checkpoint is
    restored into."""
    # The key is made inside: the devices of the mesh may be those of a topology, on which nothing
    # runs.
    shapes = jax.eval_shape(lambda: _make(optimizer, make_params, jax.random.key(0)))
    if mesh is None:
        return shapes
    return jax.tree.map(lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
                        shapes, shardings(shapes, mesh))


def as_pytree(function: Callable) -> jax.tree_util.Partial:
    """A function as an argument of a jitted one: arrays bound by a ``Partial`` are traced, not part
    of the program."""
    # A Partial of a Partial would hide the arrays of the inner one.
    return function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)


def _make(optimizer: optax.GradientTransformation, make_params: Callable[[jax.Array], Any],
          key: jax.Array) -> TrainState:
    params_key, run_key = jax.random.split(key)
    params = jax.tree.map(jnp.copy, make_params(params_key))  # else weights to begin with would be donated to a step
    return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.zeros((), jnp.int32), key=run_key,
                      skipped=jnp.zeros((), jnp.int32), skipped_in_a_row=jnp.zeros((), jnp.int32))
