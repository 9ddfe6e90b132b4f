"""The state of training as one pytree, which is created with its shardings."""

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
      opt_state: the state of the optimizer.
      step: number of updates so far, including skipped ones; int32.
      key: PRNG key of the run. It never changes, because each step uses ``fold_in(key, step)``.
      skipped: number of updates that were skipped because the loss, a gradient or a new weight was
        not finite; int32.
      skipped_in_a_row: number of updates skipped since the last update that was made; int32.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def init_state(make_params: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation, key: jax.Array,
               mesh: Mesh | None = None) -> TrainState:
    """Creates the state at the beginning of a run.

    With a mesh, every array is created directly on the devices that hold its shards.

    Args:
      make_params: a function that makes the weights from a PRNG key, such as
        ``lambda key: Decoder(config, key=key)``. To start from existing weights, bind them with
        ``jax.tree_util.Partial``, as in ``Partial(lambda model, key: model, model)``; they are
        copied.
      optimizer: an optax transformation.
      key: PRNG key of the run.
      mesh: the devices that hold the state; ``None`` for the default device.

    Returns:
      The state at step 0.
    """
    make_params = as_pytree(make_params)
    make = functools.partial(make_state, optimizer)
    out_shardings = None if mesh is None else shardings(jax.eval_shape(make, make_params, key), mesh)
    return jax.jit(make, out_shardings=out_shardings, compiler_options=options_of_init())(make_params, key)


def options_of_init() -> dict[str, bool | str | int | float] | None:
    """Returns the compiler options of a program that creates a state. It runs only once, so that on
    a CPU less optimisation saves more time than it costs."""
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None


def abstract_state(make_params: Callable[[jax.Array], Any], optimizer: optax.GradientTransformation,
                   mesh: Mesh | None = None) -> TrainState:
    """Returns the shapes and shardings of the state that ``init_state`` creates, without arrays.

    A checkpoint is restored into this structure.

    Args:
      make_params: as for ``init_state``.
      optimizer: an optax transformation.
      mesh: the devices that will hold the state; ``None`` for the default device.

    Returns:
      A state of ``jax.ShapeDtypeStruct``.
    """
    # The key is made inside eval_shape, because the mesh may describe devices that do not exist
    # here, so that nothing can run on them.
    shapes = jax.eval_shape(lambda: make_state(optimizer, make_params, jax.random.key(0)))
    if mesh is None:
        return shapes
    return jax.tree.map(lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
                        shapes, shardings(shapes, mesh))


def as_pytree(function: Callable) -> jax.tree_util.Partial:
    """Wraps a function as a pytree, so that it can be an argument of a jitted function.

    Arrays that are bound by a ``Partial`` then become inputs of the program instead of constants in
    it.
    """
    # A Partial is returned unchanged, because a Partial around it would hide its arrays.
    return function if isinstance(function, jax.tree_util.Partial) else jax.tree_util.Partial(function)


def make_state(optimizer: optax.GradientTransformation, make_params: Callable[[jax.Array], Any],
               key: jax.Array) -> TrainState:
    """Creates the state at step 0; to be called inside a compiled function.

    Args:
      optimizer: an optax transformation.
      make_params: as for ``init_state``.
      key: PRNG key of the run.

    Returns:
      The state.
    """
    params_key, run_key = jax.random.split(key)
    # Without the copy, the first step would donate the buffers of the caller's weights.
    params = jax.tree.map(jnp.copy, make_params(params_key))
    return TrainState(params=params, opt_state=optimizer.init(params), step=jnp.zeros((), jnp.int32), key=run_key,
                      skipped=jnp.zeros((), jnp.int32), skipped_in_a_row=jnp.zeros((), jnp.int32))
