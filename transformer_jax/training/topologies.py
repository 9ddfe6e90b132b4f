"""Descriptions of TPUs, with which libtpu compiles without a TPU (needs the extra ``tpu-aot``)."""

from __future__ import annotations

import functools
import os
from typing import Any


@functools.cache
def devices_of(topology: str) -> list[Any]:
    """Returns the devices of a TPU topology, which this machine need not have.

    Args:
      topology: the name that libtpu uses, such as ``"v5e:2x4"``.

    Returns:
      The devices, for which programs can be compiled but not run.

    Raises:
      ImportError: if libtpu is not installed.
    """
    import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]  the error of jax does not name the package

    # These settings keep libtpu from asking the metadata server of a cloud.
    for name, value in (("TPU_SKIP_MDS_QUERY", "1"), ("TPU_ACCELERATOR_TYPE", "v5litepod-8"),
                        ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
