"""Train several models of one shape in one program.

The models are called members. They differ in their seeds, and in numbers of the optimizer. Every
array of their state has a leading axis of members, and ``jax.vmap`` applies the usual training step
to all of them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from transformer_jax.config import ExperimentConfig, OptimConfig
from transformer_jax.sharding import batch_sharding
from transformer_jax.training.loop import TrainStep
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import TrainState, as_pytree, make_state, options_of_init
from transformer_jax.training.step import AfterUpdate, Batch, LossFn, make_train_step

# For each optimizer, its settings that may differ between members: numbers that are operands of the
# program. Other settings, such as the number of warmup steps, change the program itself.
_ALL = ("peak_lr", "end_lr", "weight_decay", "clip_norm")
TRACEABLE = {"adamw": (*_ALL, "beta1", "beta2", "epsilon"), "muon": (*_ALL, "muon_lr", "beta1", "beta2", "epsilon"),
             "lion": (*_ALL, "beta1", "beta2"), "sgd": (*_ALL, "beta1"), "adafactor": _ALL}


def with_traced(config: OptimConfig, values: Mapping[str, jax.Array]) -> OptimConfig:
    """Replaces settings by arrays, inside a compiled function.

    Args:
      config: the settings of the optimizer.
      values: scalars by the names of their settings, as ``TRACEABLE`` lists them.

    Returns:
      A copy. Its values are not checked, because their values are not known while the program is
      compiled; check the numbers before.
    """
    changed = copy.copy(config)
    for name, value in values.items():
        object.__setattr__(changed, name, value)
    return changed


def init_members(make_params: Callable[[jax.Array], Any], config: ExperimentConfig, seeds: Sequence[int],
                 mesh: Mesh) -> TrainState:
    """Creates the states of all members at step 0, each with the weights of a run of its seed.

    Args:
      make_params: a function that makes the weights of one member from a PRNG key.
      config: the config that the members share.
      seeds: the seed of each member.
      mesh: the devices, over which the members are sharded.

    Returns:
      A state in which every array has a leading axis of M members.
    """
    make = jax.jit(_for_each_key(config), out_shardings=batch_sharding(mesh), compiler_options=options_of_init())
    return make(as_pytree(make_params), _keys(seeds))


def _for_each_key(config: ExperimentConfig) -> Callable[..., TrainState]:
    """Returns a function that creates a state for each of several keys."""
    return jax.vmap(functools.partial(make_state, make_optimizer(config.optim, config.steps)), in_axes=(None, 0))


def _keys(seeds: Sequence[int]) -> jax.Array:
    """Returns the PRNG keys of runs with these seeds, ``[M]``."""
    return jnp.stack([jax.random.key(seed) for seed in seeds])


def abstract_members(make_params: Callable[[jax.Array], Any], config: ExperimentConfig, seeds: Sequence[int],
                     mesh: Mesh) -> TrainState:
    """Returns the shapes and the sharding of the state that ``init_members`` creates.

    Args:
      make_params: as for ``init_members``.
      config: the config that the members share.
      seeds: the seed of each member.
      mesh: the devices.

    Returns:
      A state of ``jax.ShapeDtypeStruct``, into which a checkpoint is restored.
    """
    shapes = jax.eval_shape(lambda: _for_each_key(config)(make_params, _keys(seeds)))
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=batch_sharding(mesh)),
                        shapes)


def make_members_step(loss_fn: LossFn, config: ExperimentConfig, values: Mapping[str, np.ndarray], mesh: Mesh,
                      after_update: AfterUpdate | None = None) -> TrainStep:
    """Makes a jitted training step of all members: ``make_train_step`` under ``jax.vmap``.

    An update that is not finite is skipped for its member alone.

    Args:
      loss_fn: the loss of one member, as for ``make_train_step``.
      config: the config that the members share.
      values: for each setting of the optimizer that differs, its value for each of the M members.
      mesh: the devices, over which the members are sharded.
      after_update: as for ``make_train_step``.

    Returns:
      A function ``step(state, batch) -> (state, metrics)``. State, batch and metrics have a leading
      axis of M members. The old state is donated.
    """
    def member(state: TrainState, batch: Batch, values: Mapping[str, jax.Array],
               loss_fn: LossFn) -> tuple[TrainState, dict[str, jax.Array]]:
        optimizer = make_optimizer(with_traced(config.optim, values), config.steps)
        return make_train_step(loss_fn, optimizer, config.optim.accumulation, after_update=after_update)(state, batch)

    sharding = batch_sharding(mesh)
    step = jax.jit(jax.vmap(member, in_axes=(0, 0, 0, None)), donate_argnums=0, out_shardings=sharding)
    arrays = jax.device_put({name: np.asarray(numbers, np.float32) for name, numbers in values.items()}, sharding)
    loss = as_pytree(loss_fn)
    return lambda state, batch: step(state, batch, arrays, loss)


class MemberBatches:
    """The batches of all members ``[M, B, ...]``: those that a run with the member's seed gets.

    Args:
      make: a function that makes the iterator over the batches of a seed, with ``get_state`` and
        ``set_state``.
      seeds: the seed of each member. Members with the same seed share an iterator.
    """

    def __init__(self, make: Callable[[int], Any], seeds: Sequence[int]):
        self._iterators = {seed: make(seed) for seed in dict.fromkeys(seeds)}
        self._seeds = tuple(seeds)

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        return self

    def __next__(self) -> Mapping[str, np.ndarray]:
        batches = {seed: next(iterator) for seed, iterator in self._iterators.items()}
        return {name: np.stack([batches[seed][name] for seed in self._seeds]) for name in batches[self._seeds[0]]}

    def get_state(self) -> list[Any]:
        """Returns the positions of all iterators, which can be stored as JSON."""
        return [iterator.get_state() for iterator in self._iterators.values()]

    def set_state(self, states: list[Any]) -> None:
        """Continues from positions that ``get_state`` returned."""
        for iterator, state in zip(self._iterators.values(), states, strict=True):
            iterator.set_state(state)


def member_of(tree: Any, index: int) -> Any:
    """Returns one member of a pytree whose arrays have a leading axis of members.

    Args:
      tree: the pytree, such as the trained parameters.
      index: the number of the member, from 0.

    Returns:
      The pytree of this member.
    """
    return jax.tree.map(lambda leaf: leaf[index], tree)
