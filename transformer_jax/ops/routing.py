"""The routing of tokens to experts: probabilities, the choice, weights, and losses that balance the
load."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from transformer_jax.config import ExpertConfig


def router_probabilities(logits: Float[Array, "*tokens E"], config: ExpertConfig) -> Float[Array, "*tokens E"]:
    """Computes the probability that the router gives each expert.

    Args:
      logits: The router's logits, float32 ``[..., E]``.
      config: The field ``scores`` chooses the function.

    Returns:
      Probabilities ``[..., E]``. Those of ``sigmoid`` do not sum to one.
    """
    return jax.nn.softmax(logits) if config.scores == "softmax" else jax.nn.sigmoid(logits)


def choose_experts(probabilities: Float[Array, "*tokens E"], config: ExpertConfig,
                   bias_E: Float[Array, " E"] | None = None) -> Int[Array, "*tokens k"]:
    """Chooses the experts of each token, in descending order of probability.

    Args:
      probabilities: The router's probabilities ``[..., E]``.
      config: The number of experts for each token, and the groups.
      bias_E: What is added to the probabilities before the choice.

    Returns:
      Indices of experts, int32 ``[..., k]``.
    """
    scores = probabilities if bias_E is None else probabilities + bias_E
    if config.groups > 1:
        grouped = scores.reshape(*scores.shape[:-1], config.groups, -1)
        best = jax.lax.top_k(grouped, config.experts_per_group_score)[0]
        groups = jax.lax.top_k(best.sum(-1), config.groups_per_token)[1]
        is_chosen = jax.nn.one_hot(groups, config.groups, dtype=bool).any(-2)
        scores = jnp.where(is_chosen[..., None], grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, config.experts_per_token)[1]


def expert_weights(probabilities: Float[Array, "*tokens E"], experts: Int[Array, "*tokens k"],
                   config: ExpertConfig) -> Float[Array, "*tokens k"]:
    """Computes the weights with which the outputs of the chosen experts are added.

    Args:
      probabilities: The router's probabilities ``[..., E]``.
      experts: The chosen experts ``[..., k]``.
      config: Whether the weights are normalized, and their scale.

    Returns:
      Weights ``[..., k]``.
    """
    weights = jnp.take_along_axis(probabilities, experts, axis=-1)
    if config.normalize_weights:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)  # sigmoids may all underflow to zero
    return weights * config.weight_scale


def expert_loads(experts: Int[Array, "*tokens k"], num_experts: int,
                 valid: Bool[Array, "*tokens"] | None = None) -> Float[Array, " E"]:
    """Computes the share of the tokens that each expert processes.

    Args:
      experts: The chosen experts ``[..., k]``.
      num_experts: E.
      valid: False for padding, which does not count. ``None``: all tokens count.

    Returns:
      For each expert, the number of tokens that chose it, divided by the number of tokens.
    """
    is_chosen = (experts[..., None] == jnp.arange(num_experts)).any(-2)
    return _mean(is_chosen.astype(jnp.float32), valid)


def balance_loss(probabilities: Float[Array, "*tokens E"], experts: Int[Array, "*tokens k"],
                 valid: Bool[Array, "*tokens"] | None = None) -> Float[Array, ""]:
    """Computes the loss that balances the load of the experts.

    It is the number of experts times the sum over experts of load times mean probability. With an
    equal load it is the number of experts per token, which is its least value for probabilities in
    proportion to the load. The gradient flows through the probabilities.

    Source: Fedus et al. (2021), Switch Transformers, section 2.2; the scale is that of
    transformers.

    Args:
      probabilities: The router's probabilities ``[..., E]``.
      experts: The chosen experts ``[..., k]``.
      valid: False for padding, which does not count. ``None``: all tokens count.

    Returns:
      The loss, a scalar.
    """
    num_experts = probabilities.shape[-1]
    shares = probabilities / probabilities.sum(-1, keepdims=True)  # those of sigmoid do not sum to one
    return num_experts * (expert_loads(experts, num_experts, valid) * _mean(shares, valid)).sum()


def router_z_loss(logits: Float[Array, "*tokens E"], valid: Bool[Array, "*tokens"] | None = None) -> Float[Array, ""]:
    """Computes the mean square of the logarithm of the sum of the exponentiated logits, which keeps
    the router's logits small.

    Source: Zoph et al. (2022), ST-MoE, equation 5.

    Args:
      logits: The router's logits ``[..., E]``.
      valid: False for padding, which does not count. ``None``: all tokens count.

    Returns:
      The loss, a scalar.
    """
    return _mean(jnp.square(jax.nn.logsumexp(logits, axis=-1, keepdims=True)), valid)[0]


def _mean(values: jax.Array, valid: jax.Array | None) -> jax.Array:
    """Returns the mean over all tokens that are valid, ``[E]``."""
    values = values.reshape(-1, values.shape[-1])
    if valid is None:
        return values.mean(0)
    weights = valid.reshape(-1, 1).astype(values.dtype)
    return (values * weights).sum(0) / jnp.maximum(weights.sum(), 1.0)
