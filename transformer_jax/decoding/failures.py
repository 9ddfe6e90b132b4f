"""The error for results that are not finite, which sampling would otherwise silently turn into
tokens."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def not_finite(model: Any, what: str) -> ValueError:
    """Makes the error for a result that is NaN or infinite; it names the first weights that are not
    finite.

    Args:
      model: the model that computed the result.
      what: the beginning of the message: what is not finite, and where, with "is" or "are".
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not jnp.isfinite(leaf).all():
            name = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            return ValueError(f"{what} NaN or infinite, because weights of the model are: {name}. Load an earlier "
                              "checkpoint, or train with a lower learning rate")
    return ValueError(f"{what} NaN or infinite, though all weights of the model are finite: values became too large "
                      "during the forward pass, or an intervention set them")


def draw_failure(model: Any, logprob: float, where: str) -> ValueError:
    """Makes the error for a token that could not be drawn.

    Args:
      model: the model that computed the logits.
      logprob: what the compiled loop returned as log-probability: NaN or plus infinity.
      where: which token it is, such as ``"new token 3 of row 0"``.
    """
    if math.isnan(logprob):
        return not_finite(model, f"the logits for {where} are")
    return ValueError(f"the sampling rules leave nothing to draw for {where}: all logits are minus infinity, or one is "
                      "NaN or plus infinity; a rule must leave each row a finite logit")
