"""Policy gradients with a clipped probability ratio: the losses of PPO and GRPO.

PPO estimates advantages with a critic; GRPO compares groups of responses to the same prompt
instead. Both are loss functions for ``make_train_step``, over batches of ``Experience``. The critic
of PPO is a value head on the policy's own hidden states. Both run the policy without dropout,
because the ratio must compare the same function before and after an update.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from transformer_jax.alignment.rollouts import chosen, read_responses
from transformer_jax.config import ReinforcementConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.output import Trace
from transformer_jax.nn.layers import ScalarHead
from transformer_jax.training.router_losses import with_router_losses
from transformer_jax.training.step import Batch, LossFn, Sums


def with_value_head(model: Decoder, *, key: jax.Array) -> Decoder:
    """Adds a value head to a decoder that has none.

    Args:
      model: the decoder.
      key: PRNG key for the weights of the value head.

    Returns:
      A decoder with the same weights and a new value head; ``model`` itself if it already has one.
    """
    if model.value_head is not None:
        return model
    config = model.config.replace(use_value_head=True)
    result = jax.eval_shape(lambda key: Decoder(config, key=key), key)
    result.value_head = None
    result = jax.tree.unflatten(jax.tree.structure(result), jax.tree.leaves(model))
    result.value_head = ScalarHead(config, key=key)
    return result


def clipped_policy_loss(log_ratios: Float[Array, "*shape"], advantages: Float[Array, "*shape"],
                        clip: float) -> Float[Array, "*shape"]:
    """Computes the clipped policy loss of PPO.

    The loss is minus the advantage times the probability ratio. Clipping removes the gain from
    moving the ratio further than ``clip`` from 1.

    Source: Schulman et al. (2017), equation 7.

    Args:
      log_ratios: log probability of each token under the current policy, minus that under the
        policy that sampled it, in nats.
      advantages: the advantage of each token; same shape.
      clip: the largest useful distance of the ratio from 1, epsilon in the paper.

    Returns:
      The loss of each token; same shape.
    """
    ratios = jnp.exp(log_ratios)
    return -jnp.minimum(ratios * advantages, jnp.clip(ratios, 1.0 - clip, 1.0 + clip) * advantages)


def clipped_value_loss(values: Float[Array, "*shape"], old_values: Float[Array, "*shape"],
                       returns: Float[Array, "*shape"], clip: float) -> Float[Array, "*shape"]:
    """Computes the clipped value loss of PPO.

    It is the larger of two errors: half the squared error of the value, and half the squared error
    of the value clipped to within ``clip`` of the old value.

    Args:
      values: the critic's current value of each token.
      old_values: the critic's values when the tokens were sampled; same shape.
      returns: the returns that the values should predict; same shape.
      clip: the largest change of a value that is taken into account.

    Returns:
      The loss of each token; same shape.
    """
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum((values - returns)**2, (clipped - returns)**2)


def kl_estimate(log_ratios: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Estimates the KL divergence KL(p || q) from samples of p; unbiased and never negative.

    Source: Schulman (2020), "Approximating KL divergence", estimator k3.

    Args:
      log_ratios: log(q / p) of each sample, in nats.

    Returns:
      The estimate for each sample, in nats; same shape.
    """
    return jnp.expm1(log_ratios) - log_ratios


def ppo_loss(config: ReinforcementConfig, excluded_V: Bool[np.ndarray, " V"] | None = None) -> LossFn:
    """Makes the PPO loss: the clipped policy loss, the clipped value loss and an entropy bonus.

    Args:
      config: the clipping ranges and the weights of the parts of the loss.
      excluded_V: True for the tokens that the policy never samples, bool ``[V]``; ``None`` if it
        may sample every token.

    Returns:
      A loss function for ``make_train_step``, which sums over all tokens of the responses. Its
      batches have ``tokens`` and ``segment_ids`` ``[B, T]``, and ``mask``, ``logprobs``,
      ``advantages``, ``values`` and ``returns`` ``[B, R]``. The responses are the last R of the T
      positions.
    """
    def loss_fn(model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        losses, _, values_BR, trace = _losses(model, batch, config, excluded_V)
        losses["value_loss"] = clipped_value_loss(values_BR, batch["values"], batch["returns"], config.value_clip)
        total = losses["policy_loss"] + config.value_coefficient * losses["value_loss"]
        sums = _sums(total - config.entropy_coefficient * losses["entropy"], losses, batch["mask"])
        return with_router_losses(sums, model.config, trace, batch["segment_ids"], key)

    return loss_fn


def grpo_loss(config: ReinforcementConfig, excluded_V: Bool[np.ndarray, " V"] | None = None) -> LossFn:
    """Makes the GRPO loss: the clipped policy loss, a KL penalty and an entropy bonus.

    Every token has the same weight, whatever the length of its response (Yu et al., 2025, DAPO,
    section 3.3).

    Source: Shao et al. (2024), DeepSeekMath, equations 3 and 4.

    Args:
      config: the clipping range and the weight of the entropy bonus.
      excluded_V: True for the tokens that the policy never samples, bool ``[V]``; ``None`` if it
        may sample every token.

    Returns:
      A loss function for ``make_train_step``. Its batches are those of ``ppo_loss``, with
      ``reference_logprobs`` and ``kl_coefficients`` ``[B, R]`` instead of ``values`` and
      ``returns``.
    """
    def loss_fn(model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        losses, logprobs_BR, _, trace = _losses(model, batch, config, excluded_V)
        losses["reference_kl"] = kl_estimate(batch["reference_logprobs"] - logprobs_BR)
        total = losses["policy_loss"] + batch["kl_coefficients"] * losses["reference_kl"]
        sums = _sums(total - config.entropy_coefficient * losses["entropy"], losses, batch["mask"])
        return with_router_losses(sums, model.config, trace, batch["segment_ids"], key)

    return loss_fn


def _losses(model: Decoder, batch: Batch, config: ReinforcementConfig,
            excluded_V: np.ndarray | None) -> tuple[dict[str, jax.Array], jax.Array, jax.Array, Trace]:
    """Returns the losses and metrics of each token that PPO and GRPO share, the current log
    probabilities and values of the tokens, and the trace of the forward pass."""
    prompt_len = batch["tokens"].shape[1] - batch["mask"].shape[1]
    log_p_BRV, values_BR, trace = read_responses(model, batch["tokens"], batch["segment_ids"], prompt_len, excluded_V)
    logprobs_BR = chosen(log_p_BRV, batch["tokens"][:, prompt_len:])
    log_ratios_BR = jnp.where(batch["mask"], logprobs_BR - batch["logprobs"], 0.0)
    if not config.entropy_coefficient:  # then entropy is only a metric: its gradient [B, R, V] is not needed
        log_p_BRV = jax.lax.stop_gradient(log_p_BRV)
    losses = {"policy_loss": clipped_policy_loss(log_ratios_BR, batch["advantages"], config.clip),
              "entropy": -(jnp.exp(log_p_BRV) * log_p_BRV).sum(-1),
              "clip_fraction": jnp.abs(jnp.expm1(log_ratios_BR)) > config.clip,
              "step_kl": kl_estimate(log_ratios_BR)}
    return losses, logprobs_BR, values_BR, trace


def _sums(total_BR: jax.Array, losses: dict[str, jax.Array], mask_BR: jax.Array) -> Sums:
    """Returns the sums over the tokens of the responses, as ``make_train_step`` expects them."""
    sums = {name: jnp.where(mask_BR, x_BR, 0.0).sum() for name, x_BR in losses.items()}
    return jnp.where(mask_BR, total_BR, 0.0).sum(), mask_BR.sum().astype(jnp.float32), sums
