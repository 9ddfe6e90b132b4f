"""The sites of a forward pass: the names under which it can be read and changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from transformer_jax.settings import nearest

Intervene = Callable[[str, jax.Array | int, jax.Array], jax.Array]

_ATTENTION_SITES = ("queries", "keys", "values", "attention_bias", "head_output", "attention_output")
_LAYER_SITES = ("residual", *_ATTENTION_SITES, "neurons", "mlp_output", "final")

# What an encoder-decoder puts before the site of its encoder, and of attention to the source.
PREFIXES = {"self": "", "encoder": "encoder_", "cross": "cross_"}

# Every site, and the kind of attention in whose layers it is.
SITES: dict[str, str] = {PREFIXES[kind] + name: kind
                         for kind, names in (("self", _LAYER_SITES), ("encoder", _LAYER_SITES),
                                             ("cross", _ATTENTION_SITES)) for name in names}


def register_site(name: str) -> None:
    """Adds a site that a block of one's own calls, so that interventions may name it."""
    SITES[name], SITES[f"encoder_{name}"] = "self", "encoder"


def check_site(site: str) -> None:
    """Raises ValueError, with the nearest name, for a site that there is not."""
    if site not in SITES:
        raise ValueError(f"site={site!r} is not one of {', '.join(SITES)}{nearest(site, SITES)}; a block of "
                         "your own adds its sites with transformer_jax.nn.sites.register_site")


class Site(str):
    """The name that an intervention is called with; comparing it with a site that there is not
    raises ValueError.

    A mistyped name in a function of one's own would otherwise never match, and the intervention
    would do nothing.
    """

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        equal = super().__eq__(other)
        if equal is not True and type(other) is str:
            check_site(other)
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other


@dataclasses.dataclass(frozen=True)
class Sites:
    """Where one layer shows its values to an intervention.

    Attributes:
      intervene: the intervention; ``None``: every value stays as it is.
      layer: the number of the layer, traced where layers are scanned.
    """

    intervene: Intervene | None
    layer: jax.Array | int

    def __call__(self, site: str, value: jax.Array) -> jax.Array:
        """The value after the intervention.

        Raises:
          ValueError: for an intervention that asks Python's ``if`` about a traced layer or value.
        """
        if self.intervene is None:
            return value
        try:
            return self.intervene(Site(site), self.layer, value)
        except jax.errors.TracerBoolConversionError as error:
            raise ValueError(
                "an intervention asks `if` about a layer or a value, which have no number yet while the program is "
                "compiled (one program serves all layers); instead of `if layer == 1: value = new` write "
                "`value = jnp.where(layer == 1, new, value)`; `if` about the site is right") from error


def encoder_sites(intervene: Intervene | None) -> Intervene | None:
    """The intervention as an encoder-decoder's encoder calls it: the names of its sites begin with
    ``encoder_``."""
    if intervene is None:
        return None
    return lambda site, layer, value: intervene(Site(PREFIXES["encoder"] + site), layer, value)
