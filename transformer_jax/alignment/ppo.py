"""Policy gradients with a clipped ratio: PPO with a critic, GRPO with groups of responses instead
of one.

Both are losses for :func:`make_train_step` over batches of :class:`Experience`. The critic of PPO
is a head on the policy's own hidden states. There is no dropout: the ratio compares one function
before and after an update.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer_jax.alignment.rollout import chosen, read_responses
from transformer_jax.config import ReinforcementConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.nn.layers import ScalarHead
from transformer_jax.training.step import Batch, LossFn, Sums


def with_value_head(model: Decoder, *, key: jax.Array) -> Decoder:
    """The decoder with a new value head, if it has none yet."""
    if model.value_head is not None:
        return model
    config = model.config.replace(use_value_head=True)
    result = jax.eval_shape(lambda key: Decoder(config, key=key), key)
    result.value_head = None
    result = jax.tree.unflatten(jax.tree.structure(result), jax.tree.leaves(model))
    result.value_head = ScalarHead(config, key=key)
    return result


def clipped_policy_loss(log_ratios: jax.Array, advantages: jax.Array, clip: float) -> jax.Array:
    """Minus the advantage times the ratio, from which nothing is gained beyond 1 +- ``clip``.

    Source: Schulman et al. (2017), equation 7.

    Args:
      log_ratios: log of the probability of each token now over that when it was drawn.
      advantages: of each token.
      clip: epsilon.
    """
    ratios = jnp.exp(log_ratios)
    return -jnp.minimum(ratios * advantages, jnp.clip(ratios, 1.0 - clip, 1.0 + clip) * advantages)


def clipped_value_loss(values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float) -> jax.Array:
    """Half the squared error, of the value or of the value within ``clip`` of the old one,
    whichever is more wrong."""
    near = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum((values - returns)**2, (near - returns)**2)


def kl_estimate(log_ratios: jax.Array) -> jax.Array:
    """An estimate of KL(p || q) from log(q / p) of what was drawn from p: unbiased, and never
    negative.

    Source: Schulman (2020), "Approximating KL divergence", estimator k3.
    """
    return jnp.expm1(log_ratios) - log_ratios


def ppo_loss(config: ReinforcementConfig) -> LossFn:
    """The clipped policy and value losses and an entropy bonus, over all tokens of the responses.

    Batches have ``tokens`` and ``segment_ids`` ``[B, T]``, and ``mask``, ``logprobs``,
    ``advantages``, ``values`` and ``returns`` ``[B, R]``; the responses are the last R places.
    """
    def loss_fn(model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        del key
        losses, _, values_BR = _losses(model, batch, config)
        losses["value_loss"] = clipped_value_loss(values_BR, batch["values"], batch["returns"], config.value_clip)
        total = losses["policy_loss"] + config.value_coefficient * losses["value_loss"]
        return _sums(total - config.entropy_coefficient * losses["entropy"], losses, batch["mask"])

    return loss_fn


def grpo_loss(config: ReinforcementConfig) -> LossFn:
    """The clipped policy loss, the KL to the reference and an entropy bonus, over all tokens of the
    responses.

    Batches are those of :func:`ppo_loss` with ``reference_logprobs`` and ``kl_coefficients``
    instead of values and returns. Every token counts the same, whatever the length of its response
    (Yu et al., 2025, DAPO, section 3.3).

    Source: Shao et al. (2024), DeepSeekMath, equations 3 and 4.
    """
    def loss_fn(model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        del key
        losses, logprobs_BR, _ = _losses(model, batch, config)
        losses["reference_kl"] = kl_estimate(batch["reference_logprobs"] - logprobs_BR)
        total = losses["policy_loss"] + batch["kl_coefficients"] * losses["reference_kl"]
        return _sums(total - config.entropy_coefficient * losses["entropy"], losses, batch["mask"])

    return loss_fn


def _losses(model: Decoder, batch: Batch, config: ReinforcementConfig) -> tuple[dict, jax.Array, jax.Array]:
    """What both have in common, token by token; the log-probabilities now; the values now."""
    prompt_len = batch["tokens"].shape[1] - batch["mask"].shape[1]
    log_p_BRV, values_BR = read_responses(model, batch["tokens"], batch["segment_ids"], prompt_len)
    logprobs_BR = chosen(log_p_BRV, batch["tokens"][:, prompt_len:])
    log_ratios_BR = jnp.where(batch["mask"], logprobs_BR - batch["logprobs"], 0.0)
    if not config.entropy_coefficient:  # only measured: its gradient would be a pass over [B, R, V] for nothing
        log_p_BRV = jax.lax.stop_gradient(log_p_BRV)
    losses = {"policy_loss": clipped_policy_loss(log_ratios_BR, batch["advantages"], config.clip),
              "entropy": -(jnp.exp(log_p_BRV) * log_p_BRV).sum(-1),
              "clip_fraction": jnp.abs(jnp.expm1(log_ratios_BR)) > config.clip,
              "step_kl": kl_estimate(log_ratios_BR)}
    return losses, logprobs_BR, values_BR


def _sums(total_BR: jax.Array, losses: dict[str, jax.Array], mask_BR: jax.Array) -> Sums:
    sums = {name: jnp.where(mask_BR, x_BR, 0.0).sum() for name, x_BR in losses.items()}
    return jnp.where(mask_BR, total_BR, 0.0).sum(), mask_BR.sum().astype(jnp.float32), sums
