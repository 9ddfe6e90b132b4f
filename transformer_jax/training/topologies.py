"""The devices of TPUs that are not here, for which libtpu compiles (extra ``tpu-aot``)."""

from __future__ import annotations

import functools
import os

import jax


@functools.cache
def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology, none of which needs to be here.

    Args:
      topology: such as ``"v5e:2x4"``, as libtpu calls it.

    Raises:
      ImportError: without libtpu.
    """
    import libtpu  # noqa: F401  jax's own error does not name it

    # Nothing here is asked of a cloud's metadata server.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
                        ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
