"""Interventions: what a model's call takes as ``intervene``, as pytrees.

An :class:`Edit` is an argument like any other,
``tj.forward(model, tokens, intervene=ablate_head(3, 5))``: which layer, head and position is
traced, so that a sweep over them compiles once. ``tj.forward`` and ``tj.trace`` refuse an edit of
what is not there; in a program of your own, whose indices are traced, it changes nothing.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from transformer_jax.inspection.parts import check_kind, kind_of, site, stack_of, trace_of
from transformer_jax.models.functional import Model
from transformer_jax.models.output import Index, PairTrace, Trace, resolve
from transformer_jax.nn.sites import Intervene

_SITES_OF_HEADS = ("head_output", "queries", "keys", "values")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """A change of what one site computes in some layers.

    Attributes:
      site: where, see :meth:`transformer_jax.Decoder.__call__`.
      change: a pure function of the value and of the arguments.
      layers: one layer or several.
      arguments: the other arguments of ``change`` by name; those called ``heads``, ``positions``,
        ``queries`` and ``keys`` are indices.
    """

    site: str = dataclasses.field(metadata={"static": True})
    change: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    layers: jax.Array | np.ndarray
    arguments: dict[str, Any]

    def __call__(self, site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        """The value, changed where this edit is meant."""
        if site != self.site:
            return value
        meant = (jnp.asarray(self.layers) == layer).any()
        return jnp.where(meant, self.change(value, **self.arguments), value).astype(value.dtype)

    def check(self, model: Model, tokens: tuple[jax.Array, ...]) -> None:
        """Raises ValueError for a layer, head or token that there is not, or a site that the model
        does not have."""
        kind = kind_of(self.site)
        check_kind(model, kind)
        resolve("layers", self.layers, stack_of(model, kind).num_layers)
        num_queries, num_keys = (tokens[0 if of_source else -1].shape[1]
                                 for of_source in (kind == "encoder", kind != "self"))
        of_keys = self.site.endswith(("keys", "values"))
        num_kv_heads = model.config.num_kv_heads or model.config.num_heads
        num_heads = num_kv_heads if of_keys else model.config.num_heads
        for name, size in (("heads", num_heads), ("positions", num_keys if of_keys else num_queries),
                           ("queries", num_queries), ("keys", num_keys)):
            resolve(name, self.arguments.get(name), size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edits:
    """Several interventions, each of which sees what the ones before it left."""

    edits: tuple[Intervene, ...]

    def __call__(self, site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        """The value after all of them."""
        for edit in self.edits:
            value = edit(site, layer, value)
        return value

    def check(self, model: Model, tokens: tuple[jax.Array, ...]) -> None:
        """Raises ValueError where one of them does."""
        for edit in self.edits:
            if isinstance(edit, Edit | Edits):
                edit.check(model, tokens)


def together(*edits: Intervene) -> Edits:
    """Several interventions as one, applied in this order."""
    # A function is part of the program, and no argument of it.
    return Edits(tuple(jax.tree_util.Partial(edit) if isinstance(edit, types.FunctionType) else edit for edit in edits))


def ablate_head(layer: jax.Array | int, head: jax.Array | int, how: str = "zero", *,
                reference: Trace | PairTrace | None = None, valid_BT: jax.Array | None = None,
                kind: str = "self") -> Edit:
    """Takes from one head what it says about this text.

    Source: Michel et al. (2019) for zero; Wang et al. (2022), section 2.1, for mean and resample.

    Args:
      layer: its layer.
      head: its number.
      how: ``"zero"``: the head's output becomes 0; ``"mean"``: its mean in the reference, over rows
        and positions; ``"resample"``: that of the reference, row by row and position by position.
      reference: the trace of other texts; for ``"resample"`` of the same shape.
      valid_BT: the tokens of the reference that the mean is over, where it has padding.
      kind: ``"self"``, or in an encoder-decoder ``"encoder"`` or ``"cross"``.

    Raises:
      ValueError: for another ``how``, or a reference that is missing.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"how={how!r} is not one of 'zero', 'mean', 'resample'")
    if (how == "zero") != (reference is None):
        raise ValueError(f"how={how!r} " + ("takes no reference" if how == "zero" else
                                            "needs reference=..., the trace of other texts"))
    if reference is None:
        replacement = jnp.float32(0.0)
    else:
        outputs_BTNH = trace_of(reference, kind).layers.head_output[layer]
        replacement = outputs_BTNH
        if how == "mean":
            weights_BT = jnp.ones(outputs_BTNH.shape[:2]) if valid_BT is None else jnp.asarray(valid_BT)
            replacement = jnp.einsum("BTNH,BT->NH", outputs_BTNH, weights_BT.astype(outputs_BTNH.dtype))
            replacement /= weights_BT.sum()
    return patch(site(kind, "head_output"), layer, replacement, heads=head)


def knock_out_edge(layer: jax.Array | int, head: Index, query: Index, key: Index, *, kind: str = "self") -> Edit:
    """Keeps a query from attending to a key; the weights of its other keys grow to sum to one.

    Source: Geva et al. (2023), section 5, attention knockout.

    Args:
      layer: the layer, or several.
      head: one head or several, ``None`` for all.
      query: one position or several, ``None`` for all; negative ones count from the end.
      key: likewise; every query is kept from every key.
      kind: ``"self"``, or in an encoder-decoder ``"encoder"`` or ``"cross"``.
    """
    return Edit(site(kind, "attention_bias"), _forbid, _layers(layer),
                {"heads": _index(head), "queries": _index(query), "keys": _index(key)})


def patch(site: str, layer: jax.Array | int, value: jax.Array, *, positions: Index = None,
          heads: Index = None) -> Edit:
    """Puts in place what another forward pass computed, or anything else.

    Source: Vig et al. (2020); Meng et al. (2022), section 2.1.

    Args:
      site: such as ``"residual"``, ``"attention_output"``, ``"neurons"`` or ``"head_output"``;
        docs/notation.md lists all. ``"final"`` is of the last layer.
      layer: the layer, or several.
      value: what broadcasts to the site's value: ``[B, T, D]``, of ``"head_output"``
        ``[B, T, N, H]``.
      positions: one token or several, ``None`` for all; negative ones count from the end.
      heads: likewise, of ``"head_output"``, ``"queries"``, ``"keys"`` and ``"values"``.

    Raises:
      ValueError: for a site that there is not, or heads at one that has none.
    """
    kind_of(site)
    if heads is not None and not site.endswith(_SITES_OF_HEADS):
        raise ValueError(f"heads={heads} are of the sites {', '.join(_SITES_OF_HEADS)}, not of {site!r}")
    return Edit(site, _replace, _layers(layer), {"new": value, "positions": _index(positions), "heads": _index(heads)})


def steer(layer: jax.Array | int, direction_D: jax.Array, scale: jax.Array | float = 1.0, *,
          positions: Index = None, site: str = "residual") -> Edit:
    """Adds ``scale`` times a direction to the residual stream that enters a layer.

    Source: Turner et al. (2023), activation addition.

    Args:
      layer: the layer, or several.
      direction_D: the direction, or one a position ``[T, D]``.
      scale: its factor.
      positions: one token or several, ``None`` for all; negative ones count from the end.
      site: where, if not at ``"residual"``.

    Raises:
      ValueError: for a site that there is not.
    """
    kind_of(site)
    return Edit(site, _add, _layers(layer), {"direction_D": direction_D, "scale": scale,
                                             "positions": _index(positions)})


def _index(wanted: Index) -> jax.Array | np.ndarray | None:
    """One leaf of one type, so that a sweep over them is one program."""
    return wanted if wanted is None or isinstance(wanted, jax.Array) else np.asarray(wanted, np.int32)


def _layers(layer: jax.Array | int) -> jax.Array | np.ndarray:
    layers = layer if isinstance(layer, jax.Array) else np.asarray(layer, np.int32)
    if not isinstance(layers, Tracer) and (layers < 0).any():
        raise ValueError(f"layer={layer}: an edit does not know how many layers there are; count them from 0")
    return layers


def _replace(value: jax.Array, new: jax.Array, positions: Index, heads: Index) -> jax.Array:
    chosen = _chosen("positions", positions, value.shape[1]).reshape(-1, *[1] * (value.ndim - 2))
    if heads is not None:
        chosen = chosen & _chosen("heads", heads, value.shape[2])[:, None]
    return jnp.where(chosen, new, value)


def _add(value: jax.Array, direction_D: jax.Array, scale: jax.Array, positions: Index) -> jax.Array:
    return value + _chosen("positions", positions, value.shape[1])[:, None] * scale * direction_D


def _forbid(value: jax.Array, heads: Index, queries: Index, keys: Index) -> jax.Array:
    N, T, S = value.shape[1:]  # the bias
    return jnp.where(_chosen("heads", heads, N)[:, None, None] & _chosen("queries", queries, T)[:, None]
                     & _chosen("keys", keys, S), -jnp.inf, value)


def _chosen(name: str, wanted: Index, size: int) -> jax.Array:
    """Booleans ``[size]``."""
    return (jnp.arange(size)[:, None] == resolve(name, wanted, size)[0]).any(-1)
