"""Steering vectors from examples, and how a model responds to doses of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from transformer_jax.inspection.causal import Metric
from transformer_jax.inspection.interventions import steer
from transformer_jax.inspection.parts import LanguageModel, Tokens, checked_tokens, kind_of, stack_of
from transformer_jax.models.output import resolve


@dataclasses.dataclass(frozen=True)
class DoseResponse:
    """How a metric depends on the dose of a steering vector.

    Attributes:
      doses: the factors of the vector, ``[doses]``.
      response: the metric at each dose, ``[doses]``.
      random: the metric for random vectors of the same length, ``[draws, doses]``.
    """

    doses: Float[np.ndarray, " doses"]
    response: Float[np.ndarray, " doses"]
    random: Float[np.ndarray, "draws doses"]


def mean_difference(positive_ND: Float[Array | np.ndarray, "N D"],
                    negative_MD: Float[Array | np.ndarray, "M D"]) -> Float[np.ndarray, " D"]:
    """Computes the difference of the means of two sets of activations, a steering vector.

    Source: Marks and Tegmark (2023), section 5; Rimsky et al. (2023).

    Args:
      positive_ND: the activations of texts that have a property.
      negative_MD: those of texts that do not have it.

    Returns:
      The vector, float32 ``[D]``.
    """
    return np.asarray(positive_ND, np.float32).mean(0) - np.asarray(negative_MD, np.float32).mean(0)


def dose_response(model: LanguageModel, tokens: Tokens, metric: Metric, *, layer: int,
                  direction_D: Float[Array | np.ndarray, " D"], doses: Sequence[float] | np.ndarray,
                  site: str = "residual", draws: int = 5, seed: int = 0,
                  **options: jax.Array | np.ndarray) -> DoseResponse:
    """Measures a metric while a vector is added to a site, for several doses of it, and for random
    vectors of the same length.

    Args:
      model: the model.
      tokens: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
      metric: a function from logits to one number.
      layer: the layer, counted from 0.
      direction_D: the vector, such as ``mean_difference`` returns.
      doses: the factors of the vector.
      site: the site whose value is changed.
      draws: the number of random vectors.
      seed: the seed of the random vectors.
      **options: further array arguments of the model.

    Returns:
      The metric for each dose. All doses share one compiled program.

    Raises:
      ValueError: if the site or the layer does not exist, or if the vector is not ``[D]``.
    """
    kind = kind_of(site)
    tokens = checked_tokens(model, tokens, kind)
    resolve("layers", layer, stack_of(model, kind).num_layers)
    direction = np.asarray(direction_D, np.float32)
    if direction.ndim != 1:
        raise ValueError(f"direction_D has shape {direction.shape}; expected one vector [D]")
    noise = np.random.default_rng(seed).normal(size=(draws, direction.size)).astype(np.float32)
    noise *= np.linalg.norm(direction) / np.linalg.norm(noise, axis=-1, keepdims=True)
    amounts = np.asarray(doses, np.float32)
    responses = np.asarray(_responses(model, tokens, options, np.int32(layer), np.stack([direction, *noise]), amounts,
                                      metric, site))
    return DoseResponse(amounts, responses[0], responses[1:])


@functools.partial(jax.jit, static_argnums=(6, 7))
def _responses(model, tokens, options, layer, directions, doses, metric, site) -> jax.Array:
    """Compiled part of ``dose_response``."""

    def respond(direction_and_dose: tuple[jax.Array, jax.Array]) -> jax.Array:
        direction_D, dose = direction_and_dose
        return metric(model(*tokens, **options, intervene=steer(layer, direction_D, dose, site=site)).logits)

    pairs = jnp.repeat(directions, len(doses), 0), jnp.tile(doses, len(directions))
    return jax.lax.map(respond, pairs).reshape(len(directions), len(doses))
