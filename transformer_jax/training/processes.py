"""Helper functions for runs with several processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer_jax.config import MeshConfig
from transformer_jax.sharding import AXES, make_mesh


def is_first() -> bool:
    """Returns True in the process that prints and writes files for all processes."""
    return jax.process_index() == 0


def agreed(flag: bool) -> bool:
    """Returns True if the flag is True in any process; all must call it at the same step."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


def check_mesh(mesh: Any) -> None:
    """Checks that an object is a mesh with all axes that arrays are sharded over.

    Args:
      mesh: the object.

    Raises:
      ValueError: if it is not a ``jax.sharding.Mesh``, or an axis is missing.
    """
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh is of type {type(mesh).__name__}; expected a jax.sharding.Mesh; make one with "
                         "tj.sharding.make_mesh(tj.config.MeshConfig(fsdp=2))")
    if missing := [axis for axis in AXES if axis not in mesh.axis_names]:
        raise ValueError(f"the mesh has the axes {', '.join(map(str, mesh.axis_names))}, but lacks "
                         f"{', '.join(missing)}; expected {', '.join(AXES)}, where unused axes have size 1. Make such "
                         "a mesh with tj.sharding.make_mesh(tj.config.MeshConfig(...), devices)")


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Makes the other processes wait until the first process has executed a block.

    Use it for a block in which the first process writes files that the others then read.

    Args:
      name: a name for the block, which must be the same in all processes.

    Yields:
      Nothing.
    """
    if jax.process_count() == 1:
        yield
        return
    from jax.experimental import multihost_utils

    if not is_first():
        multihost_utils.sync_global_devices(name)
    yield
    if is_first():
        multihost_utils.sync_global_devices(name)


def on_one_device(show: Callable[..., None], params: Any, mesh: Mesh, *arguments: Any) -> None:
    """Calls ``show(params, *arguments)``; in a run of several processes, only on the first device.

    Args:
      show: a function that prints something about the weights.
      params: the weights, sharded over ``mesh``. If there are several processes, all weights are
        first copied to every device.
      mesh: the devices of the run.
      *arguments: further arguments of ``show``.
    """
    if jax.process_count() == 1:
        show(params, *arguments)
        return
    replicated = jax.jit(lambda params: params, out_shardings=NamedSharding(mesh, PartitionSpec()))(params)
    if is_first():
        with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
            show(jax.tree.map(lambda leaf: leaf.addressable_data(0), replicated), *arguments)
