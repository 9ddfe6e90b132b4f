"""Attention where a mesh divides the tokens of a row: each device has some queries, and gathers the
keys of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import divided


def context_parallel(local: Callable[..., jax.Array], q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
                     mask: AttentionMask | None, bias: Any, key: jax.Array | None) -> jax.Array:
    """``local(q, k, v, mask, bias, key)`` on each device, with its rows, heads and queries, and all
    keys.

    Dropout draws other numbers than on one device.

    Args:
      local: attention on arrays.
      q_BTNH: queries; T divides among the devices of the axis ``sequence``.
      k_BSKH: keys.
      v_BSKH: values.
      mask: as structure, or ``None``.
      bias: an array of four axes, a structure, or ``None``.
      key: PRNG key of the dropout.

    Returns:
      ``[B, T, N, H]``, divided as the queries are.
    """
    (B, T, N, _), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    same_heads = divided(N, "heads") == divided(K, "kv_heads")
    axes = {"B": divided(B, "batch"), "T": divided(T, "sequence"), "N": divided(N, "heads") if same_heads else None}

    def spec(x: jax.Array, letters: str) -> PartitionSpec:
        return PartitionSpec(*(None if size == 1 else axes.get(letter)
                               for size, letter in zip(x.shape, letters, strict=True)))

    def specs(structure: Any) -> Any:
        if structure is None or isinstance(structure, jax.Array):
            return structure if structure is None else spec(structure, "BNTS")
        return dataclasses.replace(structure, **{
            name: _specs(spec, value, letters) for name, value, letters in _arrays(structure)})

    def on_device(q_BTNH, k_BSKH, v_BSKH, mask, bias, key):
        index = jax.lax.axis_index(axes["T"])
        if gathers:
            k_BSKH, v_BSKH = (jax.lax.all_gather(x, axes["T"], axis=1, tiled=True) for x in (k_BSKH, v_BSKH))
        start = index * q_BTNH.shape[1]
        mask, bias = _moved(mask, start), _moved(bias, start)
        if key is not None:
            for name in jax.sharding.get_abstract_mesh().axis_names:
                key = jax.random.fold_in(key, jax.lax.axis_index(name))
        return local(q_BTNH, k_BSKH, v_BSKH, mask, bias, key)

    if bias is not None and not isinstance(bias, jax.Array) and not _declares_axes(bias):
        bias = bias.materialize(T, S)
    mask, bias = _moved(mask, 0), _moved(bias, 0)
    gathers = divided(S, "sequence") is not None
    q_spec = PartitionSpec(axes["B"], axes["T"], axes["N"], None)
    k_spec = PartitionSpec(axes["B"], axes["T"] if gathers else None, axes["N"], None)
    return jax.shard_map(on_device, in_specs=(q_spec, k_spec, k_spec, specs(mask), specs(bias),
                                              None if key is None else PartitionSpec()),
                         out_specs=q_spec, check_vma=False)(q_BTNH, k_BSKH, v_BSKH, mask, bias, key)


def _arrays(structure: Any) -> list[tuple[str, Any, Any]]:
    """Name, value and declared axes of each field that holds arrays; the axes are ``None`` where
    not declared."""
    return [(field.name, getattr(structure, field.name),
             "" if field.name == "query_start" else field.metadata.get("axes"))
            for field in dataclasses.fields(structure)
            if not field.metadata.get("static") and getattr(structure, field.name) is not None]


def _specs(spec: Callable[[jax.Array, str], PartitionSpec], value: Any, letters: str | tuple[str, ...]) -> Any:
    """The partition of an array, of a tuple with letters for each array, or of a tuple of such
    tuples."""
    if not isinstance(value, tuple):
        return spec(value, letters)
    if not value or isinstance(value[0], tuple):
        return tuple(_specs(spec, part, letters) for part in value)
    return tuple(spec(part, axes) for part, axes in zip(value, letters, strict=True))


def _declares_axes(bias: Any) -> bool:
    """Whether a bias can stay structure on each device, see
    :class:`transformer_jax.ops.positions.PositionBias`."""
    return (dataclasses.is_dataclass(bias) and hasattr(bias, "query_start")
            and all(letters is not None for _, _, letters in _arrays(bias)))


def _moved(structure: Any, by: jax.Array | int) -> Any:
    """A mask or bias whose first query is so many places later."""
    if not hasattr(structure, "query_start"):
        return structure
    start = 0 if structure.query_start is None else structure.query_start
    return dataclasses.replace(structure, query_start=jnp.asarray(start + by))
