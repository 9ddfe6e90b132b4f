"""The sites of a forward pass: the names of intermediate values that can be read and changed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from transformer_jax.settings import nearest

Intervene = Callable[[str, jax.Array | int, jax.Array], jax.Array]

_LARGEST_SEARCHED_COLLECTION = 10_000
_ATTENTION_SITES = ("queries", "keys", "values", "attention_bias", "head_output", "attention_output")
ROUTER_SITES = ("router_logits", "router_probabilities", "experts")
_LAYER_SITES = ("residual", *_ATTENTION_SITES, "residual_middle", "mlp_input", "neurons", *ROUTER_SITES, "mlp_output",
                "final")

# In an encoder-decoder, these prefixes name the sites of the encoder and of cross-attention.
PREFIXES = {"self": "", "encoder": "encoder_", "cross": "cross_"}

# Every site, with the kind of attention to whose layers it belongs.
SITES: dict[str, str] = {PREFIXES[kind] + name: kind
                         for kind, names in (("self", _LAYER_SITES), ("encoder", _LAYER_SITES),
                                             ("cross", _ATTENTION_SITES)) for name in names}


def register_site(name: str) -> None:
    """Registers a site that a custom block calls, so that interventions can name it.

    Args:
      name: The name of the site. In an encoder, its name has the prefix ``encoder_``.
    """
    SITES[name], SITES[f"encoder_{name}"] = "self", "encoder"


def check_site(site: str) -> None:
    """Checks the name of a site.

    Args:
      site: The name.

    Raises:
      ValueError: There is no such site. The message suggests the nearest name.
    """
    if site not in SITES:
        raise ValueError(f"site={site!r} is not one of {', '.join(SITES)}{nearest(site, SITES)}; a custom "
                         "block adds its sites with transformer_jax.nn.sites.register_site")


def check_site_of_model(site: str, config: Any, layers: Collection[int] | None = None) -> None:
    """Checks that the layers of a model have a site.

    Args:
      site: The name, which is known.
      config: The config of the model.
      layers: The layers that must have the site. ``None``: one of them is enough.

    Raises:
      ValueError: The site is that of a router and the layers have no experts, or the other way
        round; or it is between attention and the feed-forward layer, which are side by side.
    """
    moe, name = getattr(config, "moe", None), site.removeprefix(PREFIXES["encoder"])
    if name == "residual_middle" and getattr(config, "residual", "sequential") != "sequential":
        raise ValueError(f"the model has no site {site!r}, because attention and the feed-forward layer read the same "
                         f"stream (config.residual={config.residual!r})")
    if name not in (*ROUTER_SITES, "neurons"):
        return
    experts = set() if moe is None else set(moe.layers(config))
    if not experts and name in ROUTER_SITES:
        raise ValueError(f"the model has no site {site!r}, because it has no mixture of experts (config.moe)")
    if len(experts) == config.num_layers and name == "neurons":
        raise ValueError(f"the model has no site {site!r}, because its feed-forward layers are mixtures of experts; "
                         f"their sites are {', '.join(ROUTER_SITES)} and mlp_output")
    having = experts if name in ROUTER_SITES else set(range(config.num_layers)) - experts
    lacking = [] if moe is None or layers is None else sorted(set(layers) - having)
    if lacking:
        kind = "a dense feed-forward layer" if name in ROUTER_SITES else "a mixture of experts"
        raise ValueError(f"layer {lacking[0]} has no site {site!r}, because it has {kind}; the layers with this site "
                         f"are {', '.join(map(str, sorted(having)))}")


class Site(str):
    """The name of a site, as it is passed to an intervention.

    Comparing it with an unknown name raises ValueError. Otherwise a mistyped name in a user's
    intervention would never match, and the intervention would do nothing.
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
    """Passes the intermediate values of one layer to an intervention.

    Attributes:
      intervene: The intervention, a function of ``(site, layer, value)`` that returns the new
        value. ``None`` leaves every value unchanged.
      layer: The index of the layer. It is traced if a scan applies the layers.
    """

    intervene: Intervene | None
    layer: jax.Array | int

    def __call__(self, site: str, value: jax.Array) -> jax.Array:
        """Calls the intervention.

        Args:
          site: The name of the site.
          value: The intermediate value.

        Returns:
          The value that the intervention returns.

        Raises:
          ValueError: The intervention uses a traced layer or value in Python's ``if``, converts it
            to a number or NumPy array, stores it outside of the function, or returns a value of
            another shape.
        """
        if self.intervene is None:
            return value
        before = stored_tracers(self.intervene)
        try:
            result = self.intervene(Site(site), self.layer, value)
        except jax.errors.TracerBoolConversionError as error:
            raise ValueError(
                "an intervention uses a layer or a value in `if`, but they have no numbers while the program is "
                "compiled (one program computes all layers); instead of `if layer == 1: value = new` write "
                "`value = jnp.where(layer == 1, new, value)`; an `if` about the site is allowed") from error
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError,
                jax.errors.TracerIntegerConversionError) as error:
            raise ValueError(
                "an intervention converts a layer or a value to a Python number, an index or a NumPy array, but they "
                "have no numbers while the program is compiled; compute with jnp instead, and read values from the "
                f"trace: `tj.trace(model, tokens, intervene=...)[{str(site)!r}]`") from error
        if result is None or jnp.shape(result) != value.shape:
            given = "None" if result is None else f"an array of shape {jnp.shape(result)}"
            raise ValueError(f"an intervention returns {given} at the site {str(site)!r} in place of a value of shape "
                             f"{value.shape}; return a value of the same shape, and at all other sites the value "
                             "itself")
        if stored_tracers(self.intervene) - before:
            raise ValueError(
                "an intervention stores a value outside of itself (by `append`, `nonlocal` or an attribute), but the "
                "value has no numbers while the program is compiled and cannot be read afterwards; return the value, "
                f"and read it from the trace: `tj.trace(model, tokens, intervene=...)[{str(site)!r}]`, whose `names()` "
                "lists all values")
        return result


def stored_tracers(intervene: Any, depth: int = 4) -> set[int]:
    """Finds the traced values that a function can reach.

    It searches the variables of enclosing functions, the global variables that the function names,
    and the object whose method it is.

    Args:
      intervene: The function, or any object that it can reach.
      depth: How many references to follow.

    Returns:
      The identities (``id``) of the traced values.
    """
    if isinstance(intervene, Tracer):
        return {id(intervene)}
    if depth == 0 or isinstance(intervene, (jax.Array, np.ndarray, types.ModuleType, type, str, nnx.Module)):
        return set()
    if isinstance(intervene, types.FunctionType):
        reached: list[Any] = [*_enclosed(intervene), *(
            intervene.__globals__[name] for name in intervene.__code__.co_names if name in intervene.__globals__)]
    elif isinstance(intervene, types.MethodType):
        reached = [intervene.__self__, intervene.__func__]
    elif isinstance(intervene, functools.partial):
        reached = [intervene.func, *intervene.args, *intervene.keywords.values()]
    elif isinstance(intervene, Collection):
        # A large collection, such as a vocabulary, is not searched: it would take long, and
        # interventions do not store values in one.
        few = intervene if len(intervene) < _LARGEST_SEARCHED_COLLECTION else ()
        reached = list(few.values()) if isinstance(few, Mapping) else list(few)
    else:
        call = getattr(type(intervene), "__call__", None)  # noqa: B004
        reached = [call if isinstance(call, types.FunctionType) else None, *getattr(intervene, "__dict__", {}).values()]
    return set().union(*(stored_tracers(part, depth - 1) for part in reached if part is not None))


def _enclosed(function: types.FunctionType) -> Iterator[Any]:
    """Yields the variables of enclosing functions that a function uses."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that is not set yet
            yield cell.cell_contents


def encoder_sites(intervene: Intervene | None) -> Intervene | None:
    """Adds the prefix ``encoder_`` to the sites that an intervention receives from an encoder.

    Args:
      intervene: The intervention, or ``None``.

    Returns:
      The intervention for the encoder of an encoder-decoder.
    """
    if intervene is None:
        return None
    return lambda site, layer, value: intervene(Site(PREFIXES["encoder"] + site), layer, value)
