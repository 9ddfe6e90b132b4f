"""The feed-forward layer of a transformer block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from transformer_jax.config import ModelConfig
from transformer_jax.config.choices import GATED
from transformer_jax.nn.layers import Linear, Norm, recompute_in_backward
from transformer_jax.nn.sites import Sites
from transformer_jax.ops.linear import gelu, relu_squared

ACTIVATIONS = {"relu": jax.nn.relu, "relu_squared": relu_squared, "silu": jax.nn.silu, "gelu": gelu,
               "gelu_tanh": jax.nn.gelu, "swiglu": jax.nn.silu, "geglu": jax.nn.gelu, "geglu_erf": gelu,
               "swiglu_plus_one": lambda x: x * jax.nn.sigmoid(1.702 * x)}


def activated(config: ModelConfig, up: Float[Array, "... F"],
              gate: Float[Array, "... F"] | None) -> Float[Array, "... F"]:
    """Computes neurons from the projections of a feed-forward layer or an expert.

    Args:
      config: The model's config.
      up: The up projection ``[..., F]``.
      gate: The gate ``[..., F]``; ``None`` if the activation has none.

    Returns:
      The neurons ``[..., F]``.
    """
    activate, most = recompute_in_backward(ACTIVATIONS[config.activation]), config.limits.neurons
    if gate is None:
        return activate(up)
    if most is not None:
        gate, up = jnp.minimum(gate, most), jnp.clip(up, -most, most)
    return activate(gate) * (up + 1 if config.activation == "swiglu_plus_one" else up)


class FeedForward(nnx.Module):
    """The feed-forward layer: two linear maps with an activation between them.

    SwiGLU and GEGLU have a third linear map for the gate (Shazeer, 2020).
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array, output_scale: float):
        up_key, gate_key, down_key = jax.random.split(key, 3)
        D, F = config.model_dim, config.mlp_dim
        self.config = config
        self.up = Linear(D, F, ("embed", "mlp"), config, key=up_key, has_bias=config.use_mlp_bias)
        gated = config.activation in GATED
        self.gate = (Linear(D, F, ("embed", "mlp"), config, key=gate_key, has_bias=config.use_mlp_bias)
                     if gated else None)
        self.down = Linear(F, D, ("mlp", "embed"), config, key=down_key, scale=output_scale,
                           has_bias=config.use_mlp_bias)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the layer to ``[B, T, D]`` and returns what it adds to the residual stream."""
        return self.merge(self.neurons(x_BTD))

    def neurons(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Computes the neurons: the values after the activation and, if there is one, the gate.

        Args:
          x_BTD: The input of the layer ``[B, T, D]``.

        Returns:
          The neurons ``[B, T, F]``.
        """
        return activated(self.config, self.up(x_BTD), None if self.gate is None else self.gate(x_BTD))

    def merge(self, neurons_BTF: Float[Array, "B T F"]) -> Float[Array, "B T D"]:
        """Computes what the neurons add to the residual stream.

        Args:
          neurons_BTF: The neurons ``[B, T, F]``.

        Returns:
          The output of the layer ``[B, T, D]``.
        """
        return self.down(neurons_BTF)


def feed_forward(mlp: Any, read_BTD: Float[Array, "B T D"], sites: Sites,
                 output_norm: Norm | None = None) -> tuple[jax.Array, jax.Array | None]:
    """Applies a feed-forward layer, and calls the intervention at its sites.

    Args:
      mlp: A ``FeedForward`` or a custom layer. A layer without the methods ``neurons`` and
        ``merge`` is called directly, and its neurons cannot be read.
      read_BTD: The input of the layer ``[B, T, D]``.
      sites: The sites of this layer, ``Sites(intervene, layer)``.
      output_norm: A norm of what the layer adds to the residual stream, or ``None``.

    Returns:
      What the layer adds to the residual stream ``[B, T, D]``, and its neurons ``[B, T, F]`` or
      ``None``.
    """
    neurons_BTF = sites("neurons", mlp.neurons(read_BTD)) if hasattr(mlp, "neurons") else None
    output_BTD = mlp(read_BTD) if neurons_BTF is None else mlp.merge(neurons_BTF)
    return sites("mlp_output", output_BTD if output_norm is None else output_norm(output_BTD)), neurons_BTF
