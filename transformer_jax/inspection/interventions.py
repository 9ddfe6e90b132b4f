"""Interventions: what a model's call takes as ``intervene``, as pytrees.

An :class:`Edit` is an argument like any other, ``tj.forward(model, tokens, intervene=ablate_head(3, 5))``: which layer,
head and position is traced, so that a sweep over them compiles once. Layers are counted from 0 and must exist: an edit
of a layer that is not there changes nothing, since a layer does not know how many there are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.inspection.parts import Index, resolve, site, trace_of
from transformer_jax.models.output import PairTrace, Trace
from transformer_jax.nn.blocks import Intervene


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """A change of what one site computes in some layers.

    Attributes:
      site: where, see :meth:`transformer_jax.Decoder.__call__`.
      change: a pure function of the value and of the arguments.
      layers: one layer or several.
      arguments: the other arguments of ``change``.
    """

    site: str = dataclasses.field(metadata={"static": True})
    change: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    layers: jax.Array | np.ndarray
    arguments: tuple

    def __call__(self, site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        """The value, changed where this edit is meant."""
        if site != self.site:
            return value
        meant = (jnp.asarray(self.layers) == layer).any()
        return jnp.where(meant, self.change(value, *self.arguments), value).astype(value.dtype)


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


def together(*edits: Intervene) -> Edits:
    """Several interventions as one, applied in this order."""
    return Edits(edits)


def ablate_head(layer: jax.Array | int, head: jax.Array | int, how: str = "zero", *,
                reference: Trace | PairTrace | None = None, valid_BT: jax.Array | None = None,
                kind: str = "self") -> Edit:
    """Takes from one head what it says about this text.

    Source: Michel et al. (2019) for zero; Wang et al. (2022), section 2.1, for mean and resample.

    Args:
      layer: its layer.
      head: its number.
      how: ``"zero"``: the head's output becomes 0; ``"mean"``: its mean in the reference, over rows and positions;
        ``"resample"``: that of the reference, row by row and position by position.
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
    return Edit(site(kind, "attention_bias"), _forbid, _layers(layer), (_index(head), _index(query), _index(key)))


def patch(site: str, layer: jax.Array | int, value: jax.Array, *, positions: Index = None,
          heads: Index = None) -> Edit:
    """Puts in place what another forward pass computed, or anything else.

    Source: Vig et al. (2020); Meng et al. (2022), section 2.1.

    Args:
      site: such as ``"residual"``, ``"attention_output"``, ``"mlp_output"`` or ``"head_output"``.
      layer: the layer, or several.
      value: what broadcasts to the site's value: ``[B, T, D]``, of ``"head_output"`` ``[B, T, N, H]``.
      positions: one token or several, ``None`` for all; negative ones count from the end.
      heads: likewise, of ``"head_output"``.

    Raises:
      ValueError: for heads at a site that has none.
    """
    if heads is not None and not site.endswith("head_output"):
        raise ValueError(f"heads={heads} are of the site 'head_output', not of {site!r}")
    return Edit(site, _replace, _layers(layer), (value, _index(positions), _index(heads)))


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
    """
    return Edit(site, _add, _layers(layer), (direction_D, scale, _index(positions)))


def _index(wanted: Index) -> jax.Array | np.ndarray | None:
    """One leaf of one type, so that a sweep over them is one program."""
    return wanted if wanted is None or isinstance(wanted, jax.Array) else np.asarray(wanted, np.int32)


def _layers(layer: jax.Array | int) -> jax.Array | np.ndarray:
    layer = _index(layer)
    if not isinstance(layer, jax.core.Tracer) and (layer < 0).any():
        raise ValueError(f"layer={layer}: an edit does not know how many layers there are; count them from 0")
    return layer


def _replace(value: jax.Array, new: jax.Array, positions: Index, heads: Index) -> jax.Array:
    chosen = _chosen("positions", positions, value.shape[1]).reshape(-1, *[1] * (value.ndim - 2))
    if heads is not None:
        chosen = chosen & _chosen("heads", heads, value.shape[2])[:, None]
    return jnp.where(chosen, new, value)


def _add(value_BTD: jax.Array, direction_D: jax.Array, scale: jax.Array, positions: Index) -> jax.Array:
    return value_BTD + _chosen("positions", positions, value_BTD.shape[1])[:, None] * scale * direction_D


def _forbid(bias_BNTS: jax.Array, heads: Index, queries: Index, keys: Index) -> jax.Array:
    N, T, S = bias_BNTS.shape[1:]
    return jnp.where(_chosen("heads", heads, N)[:, None, None] & _chosen("queries", queries, T)[:, None]
                     & _chosen("keys", keys, S), -jnp.inf, bias_BNTS)


def _chosen(name: str, wanted: Index, size: int) -> jax.Array:
    """Booleans ``[size]``."""
    return (jnp.arange(size)[:, None] == resolve(name, wanted, size)[0]).any(-1)
