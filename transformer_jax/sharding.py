"""Device meshes, and the table that maps the logical axes of arrays to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from transformer_jax.config import MeshConfig
from transformer_jax.derivatives import with_gradient
from transformer_jax.settings import check_type, shown

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp", "expert"),
    "sequence": "sequence",
    "layers": None,
    "embed": "fsdp", "latent": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "vocab": "tensor",
    None: None,
}

# The axes are ordered from the least communication to the most, because devices that are neighbours
# on the last axis have the fastest links.
AXES = ("data", "fsdp", "expert", "sequence", "tensor")


def make_mesh(config: MeshConfig = MeshConfig(), devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh with the axes in ``AXES``.

    TPU slices are placed along ``data``, because only gradients are sent over their slow network.

    Args:
      config: The sizes of the axes.
      devices: The devices of the mesh; ``None`` means all devices.

    Returns:
      The mesh.

    Raises:
      ValueError: The product of the sizes is not the number of devices, or ``data`` is not a
        multiple of the number of TPU slices.
    """
    check_type("config", config, MeshConfig, "a tj.config.MeshConfig, such as config.mesh")
    devices = jax.devices() if devices is None else np.ravel(np.asarray(devices, object)).tolist()
    if not devices or not all(hasattr(device, "device_kind") for device in devices):
        raise ValueError(f"devices={shown(devices)} must be a list of devices, at least one, such as jax.devices()")
    others = config.fsdp * config.expert * config.sequence * config.tensor
    data = len(devices) // others if config.data is None else config.data
    if data * others != len(devices):
        axes = " x ".join(f"{axis}={getattr(config, axis)}" for axis in AXES)
        raise ValueError(f"mesh {axes} does not multiply out to the {len(devices)} devices here; change one of them")
    shape = (data, config.fsdp, config.expert, config.sequence, config.tensor)
    axis_types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if slices == 1:
        return jax.make_mesh(shape, AXES, axis_types=axis_types, devices=devices)
    if data % slices:
        raise ValueError(f"mesh data={data} is not a multiple of the {slices} slices of TPUs here; set mesh.data "
                         "to a multiple")
    from jax.experimental import mesh_utils

    grid = mesh_utils.create_hybrid_device_mesh((data // slices, *shape[1:]), (slices, 1, 1, 1, 1), devices)
    return Mesh(grid, AXES, axis_types=axis_types)


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Determines which share of every batch this process must read.

    Processes whose devices hold the same rows read the same share.

    Args:
      mesh: The mesh from ``make_mesh``.

    Returns:
      The index of the share, and the number of shares.

    Raises:
      ValueError: The rows of this process are not consecutive, or overlap only in part with those
        of another process.
    """
    shards = num_batch_shards(mesh)
    rows: dict[int, set[int]] = {}
    for index, device in np.ndenumerate(mesh.devices.reshape(shards, -1)):
        rows.setdefault(device.process_index, set()).add(index[0])
    own_rows = rows[jax.process_index()]
    size = len(own_rows)
    first = min(own_rows)
    if any(len(other) != size or min(other) % size or max(other) - min(other) != size - 1 for other in rows.values()):
        raise ValueError("the mesh gives a process rows of a batch that are not consecutive; choose mesh.data x "
                         "mesh.fsdp as a multiple or a divisor of the number of processes")
    return first // size, shards // size


def num_batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards that a mesh divides the rows of a batch into."""
    return _axis_size(("data", "fsdp", "expert"), mesh)


def partition_spec(*axes: str | None) -> PartitionSpec:
    """Converts the logical name of each axis of an array, or ``None``, to mesh axes.

    Returns:
      The partition of such an array.
    """
    return PartitionSpec(*(RULES[axis] for axis in axes))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Chooses the sharding of every leaf of a pytree.

    Parameters, and optimizer states of the same shape, are sharded by their logical axes. All other
    leaves are replicated.

    Args:
      tree: A pytree of arrays or shapes. Its ``nnx.Variable`` nodes have an attribute ``axes``; one
        additional leading axis is that of stacked layers.
      mesh: The mesh from ``make_mesh``.

    Returns:
      The pytree with a sharding in the place of each leaf.
    """
    from flax import nnx  # not at the top, because transformer_jax.ops uses this file and needs no flax

    def of_node(node: Any) -> Any:
        if not isinstance(node, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        leaves = jax.tree.leaves(node)
        if not leaves:  # the optimizer masks this parameter
            return node
        value, axes = leaves[0], node.axes
        if value.ndim == len(axes) + 1:
            axes = ("layers", *axes)
        fits = value.ndim == len(axes)  # Adafactor's factored moments have fewer axes than their parameter
        spec = _divisible(partition_spec(*axes), value.shape, mesh) if fits else PartitionSpec()
        return node.replace(NamedSharding(mesh, spec))

    return jax.tree.map(of_node, tree, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _divisible(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Drops mesh axes that do not divide an array evenly, such as a vocabulary of 50,257 by 2."""
    return PartitionSpec(*(axis if axis is None or size % _axis_size(axis, mesh) == 0 else None
                           for axis, size in zip(spec, shape, strict=True)))


def _axis_size(axis: str | tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of devices along one or several mesh axes."""
    names = (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows are sharded over the axes ``data``, ``fsdp`` and
    ``expert``.

    The tokens of a row are sharded later, after they are embedded.

    Args:
      mesh: The mesh from ``make_mesh``.

    Returns:
      The sharding of arrays ``[B, ...]``.
    """
    return NamedSharding(mesh, partition_spec("batch"))


def constrain(x: Shaped[Array, ...], *axes: str | None) -> Shaped[Array, ...]:
    """Constrains the sharding of an activation by its logical axes.

    Args:
      x: The activation.
      *axes: The logical name of each of its axes, or ``None``.

    Returns:
      ``x`` with a sharding constraint; ``x`` itself without a mesh or inside ``jax.shard_map``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, _divisible(partition_spec(*axes), x.shape, mesh))


def is_sharded() -> bool:
    """Returns whether the current mesh shards arrays over more than one device.

    It is false without a mesh, on one device, and inside ``jax.shard_map``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and not mesh.manual_axes


def gather_weight(weight: Shaped[Array, ...], axes: tuple[str | None, ...]) -> Shaped[Array, ...]:
    """Gathers a weight over ``fsdp``, while it stays sharded over ``tensor``.

    Without this constraint the compiler may shard the matrix product instead, and send activations
    between devices. The gradient of the weight is sharded again.

    Args:
      weight: The weight, already in the type of the product, so that fewer bytes are sent.
      axes: The logical names of its axes.

    Returns:
      The gathered weight.
    """
    if not is_sharded():
        return weight

    def gather(weight: jax.Array) -> jax.Array:
        return constrain(weight, *(None if RULES[axis] == "fsdp" else axis for axis in axes))

    return with_gradient(gather, lambda args, kept, gradient: (constrain(gradient, *axes),), weight)


def embedding_lookup(table_VD: Shaped[Array, "V D"], ids_BT: Int[Array, "B T"],
                     axes: tuple[str | None, str | None]) -> Shaped[Array, "B T D"]:
    """Computes ``table_VD[ids_BT]`` for a sharded table without gathering the table.

    Each device looks up the tokens of its whole ``fsdp`` group in its own shard of the table. Then
    the devices of the group exchange columns for tokens. A small table, whose rows have no logical
    name, is gathered instead.

    Args:
      table_VD: Its rows may be sharded over ``tensor``, its columns over ``fsdp``.
      ids_BT: Integers ``[B, T]`` in ``[0, V)``.
      axes: The logical names of the table's axes.

    Returns:
      ``[B, T, D]``, sharded like a batch.
    """
    if not is_sharded():
        return table_VD[ids_BT]
    rows, columns = (sharded_axes(size, axis) for size, axis in zip(table_VD.shape, axes, strict=True))
    batch, tokens = sharded_axes(ids_BT.shape[0], "batch"), sharded_axes(ids_BT.shape[1], "sequence")
    if batch is None and columns is not None:  # the batch has too few rows to shard
        return gather_weight(table_VD, axes)[ids_BT]

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
            local_ids_BT = ids_BT - jax.lax.axis_index(rows) * table_VD.shape[0]
            is_local_BT = (local_ids_BT >= 0) & (local_ids_BT < table_VD.shape[0])
            x_BTD = jax.lax.psum(table_VD[jnp.where(is_local_BT, local_ids_BT, 0)] * is_local_BT[..., None], rows)
        if columns is not None:
            x_BTD = jax.lax.all_to_all(x_BTD, columns, split_axis=0, concat_axis=2, tiled=True)
        return x_BTD

    return jax.shard_map(local, in_specs=(PartitionSpec(rows, columns), PartitionSpec(batch, tokens)),
                         out_specs=PartitionSpec(batch, tokens, None))(table_VD, ids_BT)


def as_rows(x: Shaped[Array, "... D"]) -> Shaped[Array, "*rows D"]:
    """Reshapes ``[..., D]`` to ``[M, D]``, which XLA:CPU multiplies fastest.

    Args:
      x: Any array.

    Returns:
      ``[M, D]``; ``x`` itself if the mesh shards the tokens of a row, because the merged axis of
      rows and tokens could not stay sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.shape.get("sequence", 1) > 1 else x.reshape(-1, x.shape[-1])


def sharded_axes(size: int, axis: str | None) -> str | tuple[str, ...] | None:
    """Returns the mesh axes that shard an axis of an array.

    Args:
      size: The size of the axis.
      axis: Its logical name.

    Returns:
      The mesh axes; ``None`` if the axis is not sharded, and inside ``jax.shard_map``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = None if mesh.empty or mesh.manual_axes else _divisible(partition_spec(axis), (size,), mesh)[0]
    return None if spec is None or _axis_size(spec, mesh) == 1 else spec


def num_shards(size: int, axis: str) -> int:
    """Returns the number of shards of an axis with this size and logical name."""
    axes = sharded_axes(size, axis)
    return 1 if axes is None else _axis_size(axes, jax.sharding.get_abstract_mesh())
