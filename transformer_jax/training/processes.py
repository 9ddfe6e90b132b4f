"""What several processes of one run do differently from one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer_jax.config import MeshConfig
from transformer_jax.sharding import make_mesh


def is_first() -> bool:
    """Whether this process prints and writes for all."""
    return jax.process_index() == 0


def agreed(flag: bool) -> bool:
    """Whether the flag is up in any process; all must ask at the same step."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(flag)).any())


@contextlib.contextmanager
def first_before_others(name: str) -> Iterator[None]:
    """Lets the first process go through a block, which leaves files for the others, before they
    do."""
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
    """``show(params, *arguments)``, which prints; of several processes by the first alone, on one
    of its devices."""
    if jax.process_count() == 1:
        show(params, *arguments)
        return
    whole = jax.jit(lambda params: params, out_shardings=NamedSharding(mesh, PartitionSpec()))(params)
    if is_first():
        with jax.set_mesh(make_mesh(MeshConfig(), jax.local_devices()[:1])):
            show(jax.tree.map(lambda leaf: leaf.addressable_data(0), whole), *arguments)
