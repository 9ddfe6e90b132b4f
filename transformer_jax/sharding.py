"""Device meshes, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer_jax.config import MeshConfig

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}


def make_mesh(config: MeshConfig = MeshConfig(), devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor`` over all devices, or over those given.

    Raises:
      ValueError: when the axes do not multiply out to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    data = len(devices) // (config.fsdp * config.tensor) if config.data is None else config.data
    if data * config.fsdp * config.tensor != len(devices):
        raise ValueError(f"mesh data={config.data} x fsdp={config.fsdp} x tensor={config.tensor} does not multiply out "
                         f"to the {len(devices)} devices here; change mesh.data, mesh.fsdp or mesh.tensor")
    return jax.make_mesh((data, config.fsdp, config.tensor), ("data", "fsdp", "tensor"),
                         axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(*axes: str | None) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf: by the logical axes of parameters (and of what mirrors them), else replicated.

    Args:
      tree: a pytree of arrays or shapes; ``nnx.Variable`` nodes carry ``axes``, and a leading axis beyond
        those named is that of stacked layers.
      mesh: from :func:`make_mesh`.
    """
    def of_node(node: Any) -> Any:
        if not isinstance(node, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        leaves = jax.tree.leaves(node)
        if not leaves:  # masked out by the optimizer
            return node
        value, axes = leaves[0], node.axes
        if value.ndim == len(axes) + 1:
            axes = ("layers", *axes)
        fits = value.ndim == len(axes)  # Adafactor's factored moments have fewer axes than their parameter
        spec = _divisible(partition_spec(*axes), value.shape, mesh) if fits else PartitionSpec()
        return node.replace(NamedSharding(mesh, spec))

    return jax.tree.map(of_node, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Drops mesh axes that do not divide the array, as a vocabulary of 50,257 over 2 devices."""
    return PartitionSpec(*(axis if axis is None or size % _axis_size(axis, mesh) == 0 else None
                           for axis, size in zip(spec, shape, strict=True)))


def _axis_size(axis: str | tuple[str, ...], mesh: Mesh) -> int:
    names = (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are divided over the axes ``data`` and ``fsdp``."""
    return NamedSharding(mesh, partition_spec("batch"))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler the logical axes of an activation; nothing outside a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _divisible(partition_spec(*axes), x.shape, mesh))
