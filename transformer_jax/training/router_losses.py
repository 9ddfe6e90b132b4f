"""The losses that balance a mixture of experts during training, and the metrics of its balance."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from transformer_jax.config import ExpertConfig, ModelSettings
from transformer_jax.models.output import Trace
from transformer_jax.nn.blocks import LayerTrace
from transformer_jax.ops.routing import balance_loss, expert_loads, router_z_loss
from transformer_jax.training.step import Sums


def with_router_losses(sums: Sums, config: ModelSettings, trace: Trace, segment_ids_BT: jax.Array | None,
                       key: jax.Array | None) -> Sums:
    """Adds the losses of the router in training, if the model has a mixture of experts.

    Args:
      sums: The sum of losses, the sum of weights, and optionally further sums.
      config: The config of the model.
      trace: The trace of the forward pass.
      segment_ids_BT: 0 for padding, which does not count. ``None``: there is no padding.
      key: The PRNG key of the loss function; ``None`` means evaluation.

    Returns:
      The sums, see ``add_router_losses``; unchanged in evaluation and without experts.
    """
    moe = getattr(config, "moe", None)
    return sums if moe is None or key is None else add_router_losses(sums, moe, trace.layers, segment_ids_BT)


def add_router_losses(sums: Sums, moe: ExpertConfig, layers: LayerTrace, segment_ids_BT: jax.Array | None) -> Sums:
    """Adds the losses of the router to those of the tokens.

    The losses are means over tokens and over the layers that have experts. They are multiplied by
    the sum of weights, because the training step divides all sums by it.

    Args:
      sums: The sum of losses, the sum of weights, and optionally further sums.
      moe: The weights of the two losses.
      layers: The trace of all layers, which holds the choices of the router of those with experts.
      segment_ids_BT: 0 for padding, which does not count. ``None``: there is no padding.

    Returns:
      The sums. The further sums contain ``balance_loss`` and ``router_z_loss`` before they are
      weighted, and ``expert_load_max`` and ``expert_load_min``: the number of tokens of the busiest
      and of the least busy expert of a layer, divided by the number with an equal load.
    """
    loss, weight, *others = sums
    valid = None if segment_ids_BT is None else segment_ids_BT != 0

    def of_layer(layer: tuple[jax.Array, jax.Array, jax.Array]) -> dict[str, jax.Array]:
        logits_BTE, probabilities_BTE, experts_BTk = layer
        loads_E = expert_loads(experts_BTk, moe.num_experts, valid) * moe.num_experts / moe.experts_per_token
        return {"balance_loss": balance_loss(probabilities_BTE, experts_BTk, valid),
                "router_z_loss": router_z_loss(logits_BTE, valid),
                "expert_load_max": loads_E.max(), "expert_load_min": loads_E.min()}

    found = jax.vmap(of_layer)(cast(tuple[jax.Array, jax.Array, jax.Array], (
        layers.router_logits, layers.router_probabilities, layers.experts)))
    means = jax.tree.map(jnp.mean, found)
    loss = loss + weight * (moe.balance_loss * means["balance_loss"] + moe.z_loss * means["router_z_loss"])
    return loss, weight, (others[0] if others else {}) | {name: weight * mean for name, mean in means.items()}
