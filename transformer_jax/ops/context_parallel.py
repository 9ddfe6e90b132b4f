"""Context parallelism: attention on a mesh that shards the tokens of a row.

Each device holds some queries, and gathers the keys and values of all tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import sharded_axes


def context_parallel(local: Callable[..., jax.Array], q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
                     mask: AttentionMask | None, bias: Any, key: jax.Array | None,
                     sinks_N: jax.Array | None = None) -> jax.Array:
    """Computes attention with queries that are sharded over the mesh axis ``sequence``.

    Each device computes attention for its shard of rows, heads and queries, with all keys. Dropout
    draws other numbers than on one device.

    Args:
      local: ``local(q, k, v, mask, bias, key, sinks)`` computes attention on one device.
      q_BTNH: Queries. The mesh axis ``sequence`` must divide T.
      k_BSKH: Keys.
      v_BSKH: Values.
      mask: An ``AttentionMask`` or ``None``.
      bias: An array with four axes, a ``PositionBias``, or ``None``.
      key: The PRNG key of the dropout. ``None`` switches dropout off.
      sinks_N: The sink of each head, or ``None``.

    Returns:
      ``[B, T, N, H]``, sharded like the queries.
    """
    (B, T, N, _), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    same_heads = sharded_axes(N, "heads") == sharded_axes(K, "kv_heads")
    axes = {"B": sharded_axes(B, "batch"), "T": sharded_axes(T, "sequence"),
            "N": sharded_axes(N, "heads") if same_heads else None}

    def spec(x: jax.Array, letters: Any) -> PartitionSpec:
        return PartitionSpec(*(None if size == 1 else axes.get(letter)
                               for size, letter in zip(x.shape, letters, strict=True)))

    def specs(structure: Any) -> Any:
        if structure is None or isinstance(structure, jax.Array):
            return structure if structure is None else spec(structure, "BNTS")
        return dataclasses.replace(structure, **{
            name: _specs(spec, value, letters) for name, value, letters in _arrays(structure)})

    def on_device(q_BTNH, k_BSKH, v_BSKH, mask, bias, key, sinks_N):
        index = jax.lax.axis_index(axes["T"])
        if keys_are_sharded:
            k_BSKH, v_BSKH = (jax.lax.all_gather(x, axes["T"], axis=1, tiled=True) for x in (k_BSKH, v_BSKH))
        start = index * q_BTNH.shape[1]
        mask, bias = _with_query_offset(mask, start), _with_query_offset(bias, start)
        if key is not None:
            for name in jax.sharding.get_abstract_mesh().axis_names:
                key = jax.random.fold_in(key, jax.lax.axis_index(name))
        return local(q_BTNH, k_BSKH, v_BSKH, mask, bias, key, sinks_N)

    if bias is not None and not isinstance(bias, jax.Array) and not _declares_axes(bias):
        bias = bias.materialize(T, S)
    mask, bias = _with_query_offset(mask, 0), _with_query_offset(bias, 0)
    keys_are_sharded = sharded_axes(S, "sequence") is not None
    q_spec = PartitionSpec(axes["B"], axes["T"], axes["N"], None)
    k_spec = PartitionSpec(axes["B"], axes["T"] if keys_are_sharded else None, axes["N"], None)
    return jax.shard_map(on_device, in_specs=(q_spec, k_spec, k_spec, specs(mask), specs(bias),
                                              None if key is None else PartitionSpec(),
                                              None if sinks_N is None else PartitionSpec(axes["N"])),
                         out_specs=q_spec, check_vma=False)(q_BTNH, k_BSKH, v_BSKH, mask, bias, key, sinks_N)


def _arrays(structure: Any) -> list[tuple[str, Any, Any]]:
    """Lists the name, value and declared axes of each field that holds arrays.

    The axes are ``None`` if they are not declared. A single number needs no declaration.
    """
    found = []
    for field in dataclasses.fields(structure):
        value = getattr(structure, field.name)
        if not field.metadata.get("static") and value is not None:
            is_number = not isinstance(value, tuple) and np.ndim(value) == 0
            found.append((field.name, value, field.metadata.get("axes", "" if is_number else None)))
    return found


def _specs(spec: Callable[[jax.Array, Any], PartitionSpec], value: Any, letters: str | tuple[str, ...]) -> Any:
    """Returns the partition of an array, of a tuple of arrays, or of a tuple of such tuples.

    The letters name the axes of the array, or of each array of a tuple.
    """
    if not isinstance(value, tuple):
        return spec(value, letters)
    if not value or isinstance(value[0], tuple):
        return tuple(_specs(spec, part, letters) for part in value)
    return tuple(spec(part, axes) for part, axes in zip(value, letters, strict=True))


def _declares_axes(bias: Any) -> bool:
    """Whether each device can materialize its own part of a bias, see
    ``transformer_jax.ops.positions.PositionBias``."""
    return (dataclasses.is_dataclass(bias) and hasattr(bias, "query_start")
            and all(letters is not None for _, _, letters in _arrays(bias)))


def _with_query_offset(structure: Any, offset: jax.Array | int) -> Any:
    """Adds an offset to the index of the first query of a mask or bias."""
    if not hasattr(structure, "query_start"):
        return structure
    start = 0 if structure.query_start is None else structure.query_start
    return dataclasses.replace(structure, query_start=jnp.asarray(start + offset))
