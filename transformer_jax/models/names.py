"""The names by which a trace is read, such as ``"layers.3.head_output"``; interventions use the
same names of sites."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import jax

from transformer_jax.nn.sites import PREFIXES, ROUTER_SITES
from transformer_jax.settings import nearest

if TYPE_CHECKING:
    from transformer_jax.models.output import Trace

_STORED = ("residual", "queries", "keys", "values", "head_output", "attention_output", "residual_middle", "mlp_input",
           "neurons",           "router_logits", "router_probabilities", "experts", "mlp_output")
_COMPUTED = ("scores", "pattern")  # not stored: computed from queries and keys on request


def site_shapes(trace: Trace, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """Returns the sites that the trace of one kind of attention holds, with the shape of their
    value in one layer.

    ``final``, which belongs to no layer, is one of them.
    """
    found = {name: getattr(trace.layers, name) for name in _STORED}
    shapes = {name: tuple(value.shape[1:]) for name, value in found.items() if value is not None}
    # The trace of self attention already has the residual stream of each decoder layer.
    if prefix == PREFIXES["cross"]:
        del shapes["residual"]
    B, T, N, _ = shapes["queries"]
    for name in _COMPUTED:
        shapes[name] = (B, N, T, shapes["keys"][1])
    if trace.layers.bias is not None:
        shapes["attention_bias"] = tuple(trace.layers.bias.shape[1:])
    if trace.final is not None:
        shapes["final"] = tuple(trace.final.shape)
    return {prefix + name: shape for name, shape in shapes.items()}


def layers_with(trace: Trace, site: str) -> tuple[int, ...]:
    """Returns the layers that have a value of a site."""
    every, experts = tuple(range(trace.queries.shape[0])), trace.expert_layers
    if experts and site in ROUTER_SITES:
        return experts
    return tuple(layer for layer in every if layer not in experts) if experts and site == "neurons" else every


def names(parts: dict[str, Trace]) -> dict[str, tuple[int, ...]]:
    """Returns every name by which these traces can be read, with the shape of its value."""
    found = {}
    for kind, trace in parts.items():
        for site, shape in site_shapes(trace, PREFIXES[kind]).items():
            if site.endswith("final"):
                found[site] = shape
            else:
                found |= {f"layers.{layer}.{site}": shape
                          for layer in layers_with(trace, site.removeprefix(PREFIXES[kind]))}
    return found


def read(parts: dict[str, Trace], name: str) -> jax.Array:
    """Returns the value of a name: the value in one layer, or ``[L, ...]`` for the name of a site
    alone.

    Raises:
      KeyError: if the traces have no such name; the message suggests the nearest one.
    """
    *layer, site = name.split(".")
    for kind, trace in parts.items():
        if site not in site_shapes(trace, PREFIXES[kind]):
            continue
        if site.endswith("final") and not layer:
            return cast(jax.Array, trace.final)
        name_in_trace = site.removeprefix(PREFIXES[kind])
        if not layer:
            return _value(trace, name_in_trace, None)
        L = trace.queries.shape[0]
        if len(layer) == 2 and layer[0] == "layers" and layer[1].removeprefix("-").isdigit() and -L <= int(
                layer[1]) < L and not site.endswith("final"):
            layers = layers_with(trace, name_in_trace)
            if (index := range(L)[int(layer[1])]) in layers:
                return _value(trace, name_in_trace, layers.index(index))
    known = names(parts)
    sites = {site for kind, trace in parts.items() for site in site_shapes(trace, PREFIXES[kind])}
    hint = nearest(name, [*known, *sites]) or "; trace.names() lists all names"
    raise KeyError(f"the trace has no value named {name!r}{hint}")


def _value(trace: Trace, site: str, layer: int | None) -> jax.Array:
    """Returns the value of a site in one layer, or in all layers if ``layer`` is ``None``."""
    if site == "scores":
        return trace.scores(layers=layer)
    if site == "pattern":
        return trace.attention(layers=layer)
    value: jax.Array = getattr(trace.layers, "bias" if site == "attention_bias" else site)
    return value if layer is None else value[layer]


def table(parts: dict[str, Trace], title: str) -> str:
    """Returns a table, for printing, of the sites in the traces and their shapes, one site a
    line."""
    lines = [title]
    for kind, trace in parts.items():
        for site, shape in site_shapes(trace, PREFIXES[kind]).items():
            first, *_, last = (layers := layers_with(trace, site.removeprefix(PREFIXES[kind]))) * 2
            several = f"{first}..{last}" if 1 < len(layers) == last - first + 1 else ",".join(map(str, layers))
            name = site if site.endswith("final") else f"layers.{several}.{site}"
            lines.append(f"  {name:<36}{list(shape)}")
    return "\n".join(lines)
