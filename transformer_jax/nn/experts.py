"""A mixture of experts: the router and the experts that take the place of a feed-forward layer."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from transformer_jax.config import ExpertConfig, ModelConfig
from transformer_jax.config.choices import GATED
from transformer_jax.nn.layers import LINEAR_OUTPUT, Linear, Norm, parameter
from transformer_jax.nn.mlp import FeedForward, activated, feed_forward
from transformer_jax.nn.sites import Sites
from transformer_jax.ops.experts import ExpertKernels, apply_experts
from transformer_jax.ops.routing import choose_experts, expert_weights, router_probabilities

if TYPE_CHECKING:
    from transformer_jax.nn.blocks import LayerTrace


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """The experts of each token, and how the router chose them.

    Attributes:
      logits: The router's logits, float32 ``[B, T, E]``.
      probabilities: The probability of each expert, float32 ``[B, T, E]``.
      experts: The chosen experts, int32 ``[B, T, k]``.
      weights: The weights of their outputs, float32 ``[B, T, k]``.
    """

    logits: jax.Array
    probabilities: jax.Array
    experts: jax.Array
    weights: jax.Array


class Experts(nnx.Module):
    """A mixture of experts, see ``transformer_jax.config.ExpertConfig``.

    Attributes:
      router: The linear map from a token to the logits of the experts.
      up: The first matrix of each expert ``[E, D, F]``.
      gate: The matrix of the gate ``[E, D, F]``; ``None`` if the activation has no gate.
      down: The last matrix of each expert ``[E, F, D]``.
      up_bias: The bias of ``up`` ``[E, F]``; ``None`` if the experts have no biases, like the next
        two.
      gate_bias: The bias of ``gate`` ``[E, F]``.
      down_bias: The bias of ``down`` ``[E, D]``.
      shared: The experts that process every token, as one feed-forward layer, or ``None``.
      choice_bias: The bias of the choice ``[E]``, or ``None``.
    """

    def __init__(self, config: ModelConfig, moe: ExpertConfig, *, key: jax.Array, output_scale: float):
        router_key, up_key, gate_key, down_key, shared_key = jax.random.split(key, 5)
        D, E, F = config.model_dim, moe.num_experts, moe.width(config)
        gated, has_bias = config.activation in GATED, moe.has_bias(config)
        std = math.sqrt(2 / (D + F)) if config.init_std is None else config.init_std

        def kernels(key: jax.Array, shape: tuple[int, ...], axes: tuple[str, ...], scale: float = 1.0) -> nnx.Param:
            return parameter((scale * std * jax.random.normal(key, shape)).astype(config.param_dtype), axes)

        def biases(width: int, axis: str | None) -> nnx.Param | None:
            return parameter(jnp.zeros((E, width), config.param_dtype), ("experts", axis)) if has_bias else None

        self.config, self.moe = config, moe
        self.router = Linear(D, E, ("embed", None), config, key=router_key, has_bias=has_bias)
        self.up = kernels(up_key, (E, D, F), ("experts", "embed", "mlp"))
        self.gate = kernels(gate_key, (E, D, F), ("experts", "embed", "mlp")) if gated else None
        self.down = kernels(down_key, (E, F, D), ("experts", "mlp", "embed"), output_scale)
        self.up_bias, self.down_bias = biases(F, "mlp"), biases(D, None)
        self.gate_bias = biases(F, "mlp") if gated else None
        self.shared = (FeedForward(config.replace(mlp_dim=moe.shared_experts * F), key=shared_key,
                                   output_scale=output_scale) if moe.shared_experts else None)
        self.choice_bias = parameter(jnp.zeros(E), (None,)) if moe.use_choice_bias else None

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> jax.Array:
        """Applies the layer to ``[B, T, D]`` and returns what it adds to the residual stream."""
        return self.merge(x_BTD, self.route(x_BTD, Sites(None, 0)))

    def route(self, x_BTD: Float[Array, "B T D"], sites: Sites) -> Routing:
        """Chooses the experts of each token, and calls the intervention at the router's sites.

        Args:
          x_BTD: The input of the layer ``[B, T, D]``.
          sites: The sites of this layer, ``Sites(intervene, layer)``.

        Returns:
          The choice.
        """
        logits_BTE = sites("router_logits", self.router(x_BTD.astype(jnp.float32)))
        probabilities_BTE = sites("router_probabilities", router_probabilities(logits_BTE, self.moe))
        bias_E = None if self.choice_bias is None else self.choice_bias[...].astype(jnp.float32)
        experts_BTk = sites("experts", choose_experts(probabilities_BTE, self.moe, bias_E))
        return Routing(logits_BTE, probabilities_BTE, experts_BTk,
                       expert_weights(probabilities_BTE, experts_BTk, self.moe))

    def merge(self, x_BTD: Float[Array, "B T D"], routing: Routing) -> jax.Array:
        """Applies the chosen experts and the shared ones.

        Args:
          x_BTD: The input of the layer ``[B, T, D]``.
          routing: The experts of each token, as ``route`` returns them.

        Returns:
          The output of the layer ``[B, T, D]``.
        """
        gate, up_bias, gate_bias, down_bias = (None if weight is None else weight[...] for weight in (
            self.gate, self.up_bias, self.gate_bias, self.down_bias))
        kernels = ExpertKernels(self.up[...], gate, self.down[...], up_bias, gate_bias, down_bias)
        y_BTD = apply_experts(x_BTD, routing.experts, routing.weights, kernels,
                              functools.partial(activated, self.config), precision=self.config.precision,
                              product_name=LINEAR_OUTPUT)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)


def make_feed_forward(config: ModelConfig, *, key: jax.Array, output_scale: float) -> FeedForward | Experts:
    """Makes the feed-forward layer of a block: a mixture of experts if the config has one.

    Args:
      config: The model's config.
      key: The PRNG key of the initial weights.
      output_scale: The scale of the initial weights of the last matrix.

    Returns:
      The layer.
    """
    if config.moe is None:
        return FeedForward(config, key=key, output_scale=output_scale)
    return Experts(config, config.moe, key=key, output_scale=output_scale)


def with_feed_forward(trace: LayerTrace, mlp: Any, read_BTD: Float[Array, "B T D"], sites: Sites,
                      output_norm: Norm | None = None) -> LayerTrace:
    """Applies a feed-forward layer or a mixture of experts, and calls the intervention at its
    sites.

    Args:
      trace: The trace of attention.
      mlp: A module, see ``feed_forward``. A module with a method ``route`` is a mixture of experts.
      read_BTD: The input of the layer ``[B, T, D]``.
      sites: The sites of this layer, ``Sites(intervene, layer)``.
      output_norm: A norm of what the layer adds to the residual stream, or ``None``.

    Returns:
      The trace with ``mlp_input``, with ``mlp_output``, which the caller must add to the stream, and
      with either ``neurons`` or the values of the router.
    """
    read_BTD = sites("mlp_input", read_BTD)
    trace = dataclasses.replace(trace, mlp_input=read_BTD)
    if not hasattr(mlp, "route"):
        output_BTD, neurons_BTF = feed_forward(mlp, read_BTD, sites, output_norm)
        return dataclasses.replace(trace, mlp_output=output_BTD, neurons=neurons_BTF)
    routing = mlp.route(read_BTD, sites)
    output_BTD = mlp.merge(read_BTD, routing)
    output_BTD = output_BTD if output_norm is None else output_norm(output_BTD)
    return dataclasses.replace(
        trace, mlp_output=sites("mlp_output", output_BTD), router_logits=routing.logits,
        router_probabilities=routing.probabilities, experts=routing.experts)
