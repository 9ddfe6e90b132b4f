"""The gradient of a number with respect to intermediate values of a forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.functional import checked_options
from transformer_jax.models.texts import Text, as_arrays
from transformer_jax.nn.sites import SITES, check_site, check_site_of_model


def site_gradients(model: Decoder | Encoder | EncoderDecoder, *tokens: Text | None,
                   metric: Callable[[jax.Array], jax.Array], sites: Sequence[str], tokenizer: Any = None,
                   **options: Any) -> dict[str, jax.Array]:
    """Computes the gradient of a number with respect to sites of the forward pass, in every layer
    at once.

    It takes one forward and one backward pass, whatever the number of sites and layers.

    Args:
      model: the model.
      *tokens: the tokens of the model's call, in any form that ``transformer_jax.forward`` takes.
      metric: a function from logits ``[B, T, V]`` to one number, such as ``lambda logits: logits[0,
        -1, 3]``. A second call with the same function does not compile again.
      sites: names of intervention sites, such as ``"neurons"``; see docs/notation.md.
      tokenizer: the model's tokenizer; needed for strings.
      **options: further arguments of the model's call, as in ``transformer_jax.forward``.

    Returns:
      For each site, the gradient ``[L, ...]`` in all layers. ``"final"`` belongs to no layer, so
      its gradient has no layer axis.

    Raises:
      ValueError: for a site that the model does not have, and for the same reasons as
        ``transformer_jax.forward``.
    """
    for site in sites:
        check_site(site)
        check_site_of_model(site, model.config)
        if site.endswith("experts"):
            raise ValueError(f"sites={tuple(sites)}: the site {site!r} holds the indices of experts, which have no "
                             "gradient; use router_logits or router_probabilities")
        if SITES[site] not in model.stacks():
            raise ValueError(f"sites={tuple(sites)}: the model has no site {site!r}, because it has no "
                             f"{SITES[site]!r} attention")
    arrays, segments = as_arrays(model, tokens, tokenizer)
    checked = checked_options(model, arrays, segments | options)
    return site_gradients_in_jit(model, arrays, checked, metric, tuple(sites))


@functools.partial(jax.jit, static_argnums=(3, 4))
def site_gradients_in_jit(model: Decoder | Encoder | EncoderDecoder, tokens: tuple[jax.Array, ...],
                          options: dict[str, Any], metric: Callable[[jax.Array], jax.Array],
                          sites: tuple[str, ...]) -> dict[str, jax.Array]:
    """Compiled part of ``site_gradients``, which does not check its arguments."""
    other_options = {name: value for name, value in options.items() if name != "intervene"}
    given_intervene = options.get("intervene") or (lambda site, layer, value: value)
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def record_shape(site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        shapes[str(site)] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        return given_intervene(site, layer, value)

    jax.eval_shape(lambda: model(*tokens, intervene=record_shape, **other_options).logits)
    layers = {site: () if site.endswith("final") else (model.stacks()[SITES[site]].num_layers,) for site in sites}
    zeros = {site: jnp.zeros((*layers[site], *shapes[site].shape), shapes[site].dtype) for site in sites}

    def metric_with_offsets(offsets: dict[str, jax.Array]) -> jax.Array:
        def add_offset(site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
            value = given_intervene(site, layer, value)
            if str(site) not in offsets:
                return value
            return value + (offsets[str(site)][layer] if layers[str(site)] else offsets[str(site)])

        return metric(model(*tokens, intervene=add_offset, **other_options).logits)

    return jax.grad(metric_with_offsets)(zeros)
