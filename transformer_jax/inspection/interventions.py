"""Interventions: pytrees to pass to a model as its ``intervene`` argument.

An ``Edit`` is an ordinary argument: ``tj.forward(model, tokens, intervene=ablate_head(3, 5))``. Its
layer, head and positions are traced values, so a sweep over them compiles once. ``tj.forward`` and
``tj.trace`` raise an error for an edit of a layer, head or position that does not exist. In your
own compiled function the indices are traced, and an edit that is out of range has no effect.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Shaped

from transformer_jax.inspection.parts import LanguageModel, check_kind, kind_of, site, stack_of, trace_of
from transformer_jax.models.indices import as_indices
from transformer_jax.models.output import Index, PairTrace, Trace, resolve
from transformer_jax.nn.sites import Intervene, check_site_of_model

Layers = int | np.integer | Sequence[int] | np.ndarray | jax.Array

_SITES_OF_HEADS = ("head_output", "queries", "keys", "values")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Edit:
    """A change to the value that one site computes in some layers.

    Attributes:
      site: the name of the site; ``transformer_jax.Decoder.__call__`` lists them.
      change: a pure function that takes the value and ``arguments`` and returns the new value.
      layers: the index of one layer, or of several.
      arguments: the other arguments of ``change`` by name. Those called ``heads``, ``positions``,
        ``queries`` and ``keys`` are indices.
    """

    site: str = dataclasses.field(metadata={"static": True})
    change: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})
    layers: jax.Array | np.ndarray
    arguments: dict[str, Any]

    def __call__(self, site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        """Returns the changed value at this edit's site and layers, else the value itself."""
        if site != self.site:
            return value
        is_selected = (jnp.asarray(self.layers) == layer).any()
        return jnp.where(is_selected, self.change(value, **self.arguments), value).astype(value.dtype)

    def check(self, model: LanguageModel, tokens: tuple[jax.Array | np.ndarray, ...]) -> None:
        """Raises ValueError if the model does not have the site, layer or heads of this edit, or if
        the tokens do not have its positions."""
        kind = kind_of(self.site)
        check_kind(model, kind)
        layers, _ = resolve("layers", self.layers, stack_of(model, kind).num_layers)
        check_site_of_model(self.site, model.config, layers.tolist() if isinstance(layers, np.ndarray) else None)
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
    """Several interventions, applied one after another to the same value."""

    edits: tuple[Intervene, ...]

    def __call__(self, site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        """Returns the value after all interventions."""
        for edit in self.edits:
            value = edit(site, layer, value)
        return value

    def check(self, model: LanguageModel, tokens: tuple[jax.Array | np.ndarray, ...]) -> None:
        """Raises ValueError if the check of one of the edits does."""
        for edit in self.edits:
            if isinstance(edit, Edit | Edits):
                edit.check(model, tokens)


def together(*edits: Intervene) -> Edits:
    """Combines several interventions into one.

    Args:
      *edits: interventions, which are applied in this order.

    Returns:
      One intervention, which is a pytree.
    """
    # A plain function is not a pytree leaf that jit accepts; Partial makes it static.
    return Edits(tuple(jax.tree_util.Partial(edit) if isinstance(edit, types.FunctionType) else edit for edit in edits))


def ablate_head(layer: Layers, head: Layers, how: str = "zero", *,
                reference: Trace | PairTrace | None = None, valid_BT: Shaped[Array | np.ndarray, "B T"] | None = None,
                kind: str = "self") -> Edit:
    """Replaces the output of one head, to remove its information about this text.

    Source: Michel et al. (2019) for zero; Wang et al. (2022), section 2.1, for mean and resample.

    Args:
      layer: the layer of the head.
      head: the index of the head in its layer.
      how: the replacement. ``"zero"``: 0. ``"mean"``: the head's mean output in the reference, over
        rows and positions. ``"resample"``: the head's output in the reference at the same row and
        position.
      reference: the trace of other texts, for ``"mean"`` and ``"resample"``; for ``"resample"`` it
        has the same shape as the trace of the edited run.
      valid_BT: True for the reference tokens that count in the mean, ``[B, T]``. Pass it if the
        reference has padding.
      kind: the kind of attention: ``"self"``; in an encoder-decoder also ``"encoder"`` or
        ``"cross"``.

    Returns:
      The intervention.

    Raises:
      ValueError: if ``how`` is none of these, if it needs a reference and none is given, or if
        ``"zero"`` is given one.
    """
    if how not in ("zero", "mean", "resample"):
        raise ValueError(f"how={how!r} is not one of 'zero', 'mean', 'resample'")
    if (how == "zero") != (reference is None):
        raise ValueError(f"how={how!r} " + ("takes no reference: leave it out" if how == "zero" else
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


def knock_out_edge(layer: Layers, head: Index, query: Index, key: Index, *, kind: str = "self") -> Edit:
    """Prevents queries from attending to keys; the weights of the other keys still sum to one.

    Source: Geva et al. (2023), section 5, attention knockout.

    Args:
      layer: one layer or several, counted from 0.
      head: one head or several; ``None`` for all.
      query: one position or several; ``None`` for all. Negative positions count from the end.
      key: one position or several, in the same form. No given query attends to any given key.
      kind: the kind of attention: ``"self"``; in an encoder-decoder also ``"encoder"`` or
        ``"cross"``.

    Returns:
      The intervention.
    """
    return Edit(site(kind, "attention_bias"), _forbid, checked_layers(layer),
                {"heads": _index("head", head), "queries": _index("query", query), "keys": _index("key", key)})


def patch(site: str, layer: Layers, value: jax.Array | np.ndarray | float, *, positions: Index = None,
          heads: Index = None) -> Edit:
    """Replaces the value of a site, for example by the value from another forward pass.

    Source: Vig et al. (2020); Meng et al. (2022), section 2.1.

    Args:
      site: the name of the site, such as ``"residual"``, ``"attention_output"``, ``"neurons"`` or
        ``"head_output"``; docs/notation.md lists all sites. ``"final"`` belongs to the last layer.
      layer: one layer or several, counted from 0.
      value: the new value, broadcastable to the site's value: ``[B, T, D]``, or ``[B, T, N, H]``
        for ``"head_output"``.
      positions: one position or several; ``None`` for all. Negative positions count from the end.
      heads: one head or several; ``None`` for all. Only the sites ``"head_output"``, ``"queries"``,
        ``"keys"`` and ``"values"`` have heads.

    Returns:
      The intervention.

    Raises:
      ValueError: if the site does not exist, or if heads are given for a site without heads.
    """
    kind_of(site)
    if heads is not None and not site.endswith(_SITES_OF_HEADS):
        raise ValueError(f"heads={heads}: the site {site!r} has no heads; leave heads out, or choose one of "
                         f"{', '.join(_SITES_OF_HEADS)}")
    return Edit(site, _replace, checked_layers(layer), {"new": value, "positions": _index("positions", positions),
                                                 "heads": _index("heads", heads)})


def steer(layer: Layers, direction_D: Float[Array | np.ndarray, "*T D"] | float, scale: jax.Array | float = 1.0, *,
          positions: Index = None, site: str = "residual") -> Edit:
    """Adds ``scale`` times a direction to the residual stream that enters a layer.

    Source: Turner et al. (2023), activation addition.

    Args:
      layer: one layer or several, counted from 0.
      direction_D: the direction ``[D]``, one direction for each position ``[T, D]``, or one number
        that is added to every entry.
      scale: the factor of the direction.
      positions: one position or several; ``None`` for all. Negative positions count from the end.
      site: the site whose value is changed.

    Returns:
      The intervention.

    Raises:
      ValueError: if the site does not exist.
    """
    kind_of(site)
    return Edit(site, _add, checked_layers(layer), {"direction_D": direction_D, "scale": scale,
                                             "positions": _index("positions", positions)})


def _index(name: str, wanted: Index) -> jax.Array | np.ndarray | None:
    """Converts indices to an int32 array, so that a sweep over them compiles only once."""
    return wanted if wanted is None or isinstance(wanted, Tracer) else as_indices(name, wanted).astype(np.int32)


def checked_layers(layer: Index) -> jax.Array | np.ndarray:
    """Checks the layers of an edit and converts them to an array."""
    layers = _index("layer", layer)
    if layers is None:
        raise ValueError("layer=None; expected one layer or several, such as range(model.config.num_layers)")
    if not isinstance(layers, Tracer) and (layers < 0).any():
        raise ValueError(f"layer={layer}; expected layers counted from 0, because an edit does not know the number of "
                         "layers")
    return layers


def _replace(value: jax.Array, new: jax.Array, positions: Index, heads: Index) -> jax.Array:
    """Replaces the value at the chosen positions and heads."""
    chosen = _chosen("positions", positions, value.shape[1]).reshape(-1, *[1] * (value.ndim - 2))
    if heads is not None:
        chosen = chosen & _chosen("heads", heads, value.shape[2])[:, None]
    return jnp.where(chosen, new, value)


def _add(value: jax.Array, direction_D: jax.Array, scale: jax.Array, positions: Index) -> jax.Array:
    """Adds the scaled direction at the chosen positions."""
    return value + _chosen("positions", positions, value.shape[1])[:, None] * scale * direction_D


def _forbid(value: jax.Array, heads: Index, queries: Index, keys: Index) -> jax.Array:
    """Sets the attention bias of the chosen edges to minus infinity."""
    N, T, S = value.shape[1:]  # the attention bias [B, N, T, S]
    return jnp.where(_chosen("heads", heads, N)[:, None, None] & _chosen("queries", queries, T)[:, None]
                     & _chosen("keys", keys, S), -jnp.inf, value)


def _chosen(name: str, wanted: Index, size: int) -> jax.Array:
    """Returns booleans ``[size]`` that are True at the wanted indices."""
    return (jnp.arange(size)[:, None] == resolve(name, wanted, size)[0]).any(-1)
