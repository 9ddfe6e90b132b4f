"""The names under which a trace is read: ``"layers.3.head_output"``, those of the sites of
interventions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax

from transformer_jax.nn.sites import PREFIXES
from transformer_jax.settings import nearest

if TYPE_CHECKING:
    from transformer_jax.models.output import Trace

_READ = ("residual", "queries", "keys", "values", "head_output", "attention_output", "neurons", "mlp_output")
_COMPUTED = ("scores", "pattern")  # from queries and keys, when they are asked for


def site_shapes(trace: Trace, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """The sites of one kind of attention that a trace holds, with the shape of one layer; ``final``
    is one of them."""
    found = {name: getattr(trace.layers, name) for name in _READ}
    shapes = {name: tuple(value.shape[1:]) for name, value in found.items() if value is not None}
    if prefix == PREFIXES["cross"]:  # the stream that enters it belongs to the decoder's layer, under another name
        del shapes["residual"]
    B, T, N, _ = shapes["queries"]
    for name in _COMPUTED:
        shapes[name] = (B, N, T, shapes["keys"][1])
    if trace.layers.bias is not None:
        shapes["attention_bias"] = tuple(trace.layers.bias.shape[1:])
    if trace.final is not None:
        shapes["final"] = tuple(trace.final.shape)
    return {prefix + name: shape for name, shape in shapes.items()}


def names(parts: dict[str, Trace]) -> dict[str, tuple[int, ...]]:
    """Every name that the traces of these kinds of attention know, with the shape of its value."""
    found = {}
    for kind, trace in parts.items():
        for site, shape in site_shapes(trace, PREFIXES[kind]).items():
            if site.endswith("final"):
                found[site] = shape
            else:
                found |= {f"layers.{layer}.{site}": shape for layer in range(trace.queries.shape[0])}
    return found


def read(parts: dict[str, Trace], name: str) -> jax.Array:
    """The value of a name: of one layer, or of all, ``[L, ...]``, for the name of a site alone.

    Raises:
      KeyError: for a name that there is not, with the nearest one.
    """
    *layer, site = name.split(".")
    for kind, trace in parts.items():
        if site not in site_shapes(trace, PREFIXES[kind]):
            continue
        if site.endswith("final") and not layer:
            return trace.final
        own = site.removeprefix(PREFIXES[kind])
        if not layer:
            return _value(trace, own, None)
        L = trace.queries.shape[0]
        if len(layer) == 2 and layer[0] == "layers" and layer[1].removeprefix("-").isdigit() and -L <= int(
                layer[1]) < L and not site.endswith("final"):
            return _value(trace, own, int(layer[1]))
    known = names(parts)
    sites = {site for kind, trace in parts.items() for site in site_shapes(trace, PREFIXES[kind])}
    hint = nearest(name, [*known, *sites]) or "; trace.names() lists what there is"
    raise KeyError(f"the trace has no {name!r}{hint}")


def _value(trace: Trace, site: str, layer: int | None) -> jax.Array:
    if site == "scores":
        return trace.scores(layers=layer)
    if site == "pattern":
        return trace.attention(layers=layer)
    value = trace.layers.bias if site == "attention_bias" else getattr(trace.layers, site)
    return value if layer is None else value[layer]


def table(parts: dict[str, Trace], title: str) -> str:
    """What a trace holds, one site a line, for people."""
    lines = [title]
    for kind, trace in parts.items():
        last = trace.queries.shape[0] - 1
        for site, shape in site_shapes(trace, PREFIXES[kind]).items():
            name = site if site.endswith("final") else f"layers.0..{last}.{site}"
            lines.append(f"  {name:<36}{list(shape)}")
    return "\n".join(lines)
