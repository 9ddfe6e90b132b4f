"""Device meshes, and the one table from logical axes to mesh axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from transformer_jax.config import MeshConfig

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "sequence": "sequence",
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    None: None,
}


# From the axis with the least traffic to the one with the most: neighbours in the last have the
# fastest links.
AXES = ("data", "fsdp", "sequence", "tensor")


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp``, ``sequence`` and ``tensor`` over all devices, or
    over those given.

    TPUs of several slices are divided along ``data``: between slices, whose network is slow, only
    gradients travel.

    Raises:
      ValueError: when the axes do not multiply out to the number of devices, or ``data`` not to the
        slices.
    """
    devices = jax.devices() if devices is None else devices
    others = config.fsdp * config.sequence * config.tensor
    data = len(devices) // others if config.data is None else config.data
    if data * others != len(devices):
        raise ValueError(f"mesh data={config.data} x fsdp={config.fsdp} x sequence={config.sequence} x tensor="
                         f"{config.tensor} does not multiply out to the {len(devices)} devices here; change mesh.data, "
                         "mesh.fsdp, mesh.sequence or mesh.tensor")
    shape = (data, config.fsdp, config.sequence, config.tensor)
    axis_types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    if data % slices:
        raise ValueError(f"mesh data={data} is no multiple of the {slices} slices of TPUs here; set mesh.data to one")
    from jax.experimental import mesh_utils

    grid = mesh_utils.create_hybrid_device_mesh((data // slices, *shape[1:]), (slices, 1, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=axis_types)


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process reads, and of how many: devices with the same rows
    read them all.

    Raises:
      ValueError: when the rows of this process do not follow each other in a batch, or overlap with
        another's in part.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows: dict[int, set[int]] = {}
    for index, device in np.ndenumerate(mesh.devices.reshape(shards, -1)):
        rows.setdefault(device.process_index, set()).add(index[0])
    mine = rows[jax.process_index()]
    size = len(mine)
    first = min(mine)
    if any(len(other) != size or min(other) % size or max(other) - min(other) != size - 1 for other in rows.values()):
        raise ValueError("the mesh gives processes rows of a batch that are not in one piece; let mesh.data x "
                         "mesh.fsdp be a multiple or a divisor of the number of processes")
    return first // size, shards // size


def partition_spec(*axes: str | None) -> PartitionSpec:
    """The mesh axes of an array whose axes have these logical names."""
    return PartitionSpec(*(RULES[axis] for axis in axes))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for every leaf: by the logical axes of parameters (and of what mirrors them), else
    replicated.

    Args:
      tree: a pytree of arrays or shapes; ``nnx.Variable`` nodes carry ``axes``, and a leading axis
        beyond those named is that of stacked layers.
      mesh: from :func:`make_mesh`.
    """
    from flax import nnx  # here, since operations on arrays, which need no flax, read the rest of this file

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


def _divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Drops mesh axes that do not divide the array, as a vocabulary of 50,257 over 2 devices."""
    return PartitionSpec(*(axis if axis is None or size % _axis_size(axis, mesh) == 0 else None
                           for axis, size in zip(spec, shape, strict=True)))


def _axis_size(axis: str | tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    names = (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch are divided over the axes ``data`` and ``fsdp``; tokens of a row only once
    they are embedded."""
    return NamedSharding(mesh, partition_spec("batch"))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tells the compiler the logical axes of an activation; nothing outside a mesh, or where a
    device sees its part."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, _divisible(partition_spec(*axes), x.shape, mesh))


def is_divided() -> bool:
    """Whether a mesh divides arrays here: not outside of one, on one device, or where a device sees
    its part."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and not mesh.manual_axes


def gathered(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """A weight as a layer reads it: put together over ``fsdp``, still divided over ``tensor``.

    Said here, because the compiler may otherwise divide the product instead, and send activations
    about. Gradients go back in parts.

    Args:
      weight: already in the type of the product, so that fewer bytes travel.
      axes: the logical names of its axes.
    """
    return _gathered(weight, axes) if is_divided() else weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    return constrain(weight, *(None if axis == "embed" else axis for axis in axes))


_gathered.defvjp(lambda weight, axes: (_gathered(weight, axes), None),
                 lambda axes, _, gradient: (constrain(gradient, *axes),))


def look_up(table_VD: jax.Array, ids_BT: jax.Array, axes: tuple[str | None, str | None]) -> jax.Array:
    """``table_VD[ids_BT]`` of a table in parts, of which no device sees the whole.

    Each device finds the rows it has, of its columns, for the tokens of all that divide the batch
    over ``fsdp``; then columns are exchanged for tokens. A small table, whose rows have no logical
    name, is put together instead.

    Args:
      table_VD: the rows of a vocabulary may be divided over ``tensor``, its columns over ``fsdp``.
      ids_BT: in ``[0, V)``.
      axes: the logical names of the table's axes.

    Returns:
      ``[B, T, D]``, divided as a batch is.
    """
    if not is_divided():
        return table_VD[ids_BT]
    rows, columns = (divided(size, axis) for size, axis in zip(table_VD.shape, axes, strict=True))
    batch, tokens = divided(ids_BT.shape[0], "batch"), divided(ids_BT.shape[1], "sequence")
    if batch is None and columns is not None:  # too few rows to divide
        return gathered(table_VD, axes)[ids_BT]

    def local(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        if axes[0] is None:
            if columns is not None:
                table_VD = jax.lax.all_gather(table_VD, columns, axis=1, tiled=True)
            return table_VD[ids_BT]
        if columns is not None:
            ids_BT = jax.lax.all_gather(ids_BT, columns, axis=0, tiled=True)
        if rows is None:
            x_BTD = table_VD[ids_BT]
        else:
            places_BT = ids_BT - jax.lax.axis_index(rows) * table_VD.shape[0]
            here_BT = (places_BT >= 0) & (places_BT < table_VD.shape[0])
            x_BTD = jax.lax.psum(table_VD[jnp.where(here_BT, places_BT, 0)] * here_BT[..., None], rows)
        if columns is not None:
            x_BTD = jax.lax.all_to_all(x_BTD, columns, split_axis=0, concat_axis=2, tiled=True)
        return x_BTD

    return jax.shard_map(local, in_specs=(PartitionSpec(rows, columns), PartitionSpec(batch, tokens)),
                         out_specs=PartitionSpec(batch, tokens, None))(table_VD, ids_BT)


def as_rows(x: jax.Array) -> jax.Array:
    """``[..., D]`` as ``[M, D]``, which XLA:CPU multiplies fastest.

    Unchanged where a mesh divides the tokens of a row: an axis joined of rows and tokens could not
    stay divided.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.shape.get("sequence", 1) > 1 else x.reshape(-1, x.shape[-1])


def divided(size: int, axis: str | None) -> str | tuple[str, ...] | None:
    """The mesh axes over which an axis of this size is divided; ``None``: over none, or this is one
    device's part."""
    mesh = jax.sharding.get_abstract_mesh()
    spec = None if mesh.empty or mesh.manual_axes else _divisible(partition_spec(axis), (size,), mesh)[0]
    return None if spec is None or _axis_size(spec, mesh) == 1 else spec


def num_parts(size: int, axis: str) -> int:
    """Into how many parts the mesh divides an axis of this size."""
    axes = divided(size, axis)
    return 1 if axes is None else _axis_size(axes, jax.sharding.get_abstract_mesh())
