"""The basic modules: linear maps, normalization and dropout."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from transformer_jax.config import ModelConfig
from transformer_jax.ops.dropout import drop
from transformer_jax.ops.linear import linear
from transformer_jax.sharding import as_rows, gather_weight

# The names under which activations are saved for the gradient: remat="dots" saves the outputs of
# linear maps; remat="offload" moves them and the inputs of layers to the host's memory.
LINEAR_OUTPUT, LAYER_INPUT = "linear output", "layer input"


def parameter(value: jax.Array, axes: tuple[str | None, ...], rate: float = 1.0) -> nnx.Param:
    """Makes a parameter that stores the logical names of its axes (see ``sharding.RULES``), and the
    factor of its learning rate if that is not 1."""
    return nnx.Param(value, axes=axes) if rate == 1.0 else nnx.Param(value, axes=axes, rate=rate)


def table(config: ModelConfig, key: jax.Array, rows: int, axis: str | None) -> nnx.Param:
    """Makes a random embedding table.

    Args:
      config: The model's config.
      key: The PRNG key of the values.
      rows: The number of rows.
      axis: The logical name of the axis of rows.

    Returns:
      A parameter ``[rows, D]``.
    """
    std = config.init_std
    if config.scale_embeddings or std is None:
        std = 1 / math.sqrt(config.model_dim)
    values = std * jax.random.normal(key, (rows, config.model_dim))
    return parameter(values.astype(config.param_dtype), (axis, "embed"))


def recompute_in_backward(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Makes the gradient of a function recompute intermediate values instead of saving them.

    It is used for normalization, whose float32 arrays would be half of what a bfloat16 training
    step saves of a layer, for activations, and for the cast and gathered copies of weights. Values
    that the gradient does not need, such as a matrix product, are not recomputed.

    Args:
      f: A function of arrays.

    Returns:
      The same function. Its gradient saves only the arguments.
    """
    return jax.checkpoint(f, prevent_cse=False)


class Linear(nnx.Module):
    """A linear map of the last axis: ``x @ kernel + bias`` with a kernel ``[in, out]``.

    The kernel starts random, with standard deviation ``scale`` times ``config.init_std``; with
    ``config.mup`` the initial values and the learning rate also depend on the width. There is
    a bias if ``has_bias`` is true, or if it is ``None`` and the config has ``use_bias``.

    Attributes:
      kernel: The weights ``[in, out]``.
      bias: The bias ``[out]``, or ``None``.
      precision: The precision of the matrix product.
    """

    def __init__(self, in_dim: int, out_dim: int, axes: tuple[str | None, str | None], config: ModelConfig, *,
                 key: jax.Array, scale: float = 1.0, has_bias: bool | None = None):
        std = math.sqrt(2 / (in_dim + out_dim)) if config.init_std is None else config.init_std
        mup = config.mup
        if mup is not None:
            std /= math.sqrt(mup.width(config))
        rates = [1.0 if mup is None else mup.rate(config, own) for own in (axes, axes[1:])]
        kernel = scale * std * jax.random.normal(key, (in_dim, out_dim))
        self.precision = config.precision
        self.kernel = parameter(kernel.astype(config.param_dtype), axes, rates[0])
        has_bias = config.use_bias if has_bias is None else has_bias
        self.bias = parameter(jnp.zeros(out_dim, config.param_dtype), axes[1:], rates[1]) if has_bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Applies the map to ``[..., in]`` and returns ``[..., out]``."""
        # All tokens are rows of one matrix. With two leading axes, the gradient of the kernel would
        # contract both and miss XLA:CPU's fast path, which doubles the time.
        rows = checkpoint_name(recompute_in_backward(self._product)(as_rows(x), self.kernel[...]), LINEAR_OUTPUT)
        if self.bias is not None:
            rows = rows + gather_weight(self.bias[...].astype(x.dtype), self.bias.axes)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    def _product(self, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        """Casts and gathers the kernel, and multiplies the rows with it."""
        kernel = gather_weight(kernel.astype(rows.dtype), self.kernel.axes)
        return linear(rows, kernel, self.precision)


def joined(*linears: Linear) -> Linear:
    """Makes one linear map whose output is the concatenated output of several.

    Args:
      *linears: Linear maps with the same input, all with a bias or all without.

    Returns:
      A new linear map.
    """
    result = jax.tree.map(lambda x: x, linears[0])
    result.kernel = parameter(jnp.concatenate([linear.kernel[...] for linear in linears], axis=1), (None, None))
    if result.bias is not None:
        biases = [linear.bias[...] for linear in linears if linear.bias is not None]
        result.bias = parameter(jnp.concatenate(biases), (None,))
    return result


class ScalarHead(nnx.Module):
    """A linear map from a hidden state to one number, such as a reward or a value."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        kernel = jax.random.normal(key, (config.model_dim,)) / config.model_dim
        rate = 1.0 if config.mup is None else 1.0 / config.mup.width(config)
        self.kernel = parameter(kernel.astype(config.param_dtype), ("embed",), rate)
        self.bias = parameter(jnp.zeros((), config.param_dtype), ())

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, ...]:
        """Applies the map to hidden states ``[..., D]`` and returns float32 ``[...]``."""
        kernel_D, bias = self.kernel[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (hidden.astype(jnp.float32) * kernel_D).sum(-1) + bias


class Norm(nnx.Module):
    """LayerNorm (Ba et al., 2016) or RMSNorm (Zhang and Sennrich, 2019) over the last axis.

    It computes in float32 and returns the type of its input. With ``rmsnorm_one_plus`` the stored
    scale is the difference of the factor from 1, so that weight decay pulls the factor to 1.
    """

    def __init__(self, dim: int, config: ModelConfig, kind: str | None = None, epsilon: float | None = None):
        self.kind = config.norm if kind is None else kind
        self.epsilon = config.norm_epsilon if epsilon is None else epsilon
        plain = self.kind == "layernorm_without_weights"
        start = jnp.zeros if self.kind == "rmsnorm_one_plus" else jnp.ones
        self.scale = None if plain else parameter(start(dim, config.param_dtype), (None,))
        has_bias = self.kind == "layernorm" and (config.use_bias if config.use_norm_bias is None
                                                 else config.use_norm_bias)
        self.bias = parameter(jnp.zeros(dim, config.param_dtype), (None,)) if has_bias else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalizes ``[..., D]``."""
        return recompute_in_backward(self._normalize)(x)

    @property
    def subtracts_mean(self) -> bool:
        """Whether the norm subtracts the mean (LayerNorm)."""
        return not self.kind.startswith("rmsnorm")

    def factor(self) -> jax.Array | None:
        """Computes what the normalized values are multiplied with.

        Returns:
          float32 ``[D]``; ``None`` for a norm without weights.
        """
        if self.scale is None:
            return None
        scale_D = self.scale[...].astype(jnp.float32)
        return 1.0 + scale_D if self.kind == "rmsnorm_one_plus" else scale_D

    def _normalize(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.subtracts_mean:
            x32 = x32 - x32.mean(-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        if (factor_D := self.factor()) is not None:
            x32 = x32 * factor_D
        if self.bias is not None:
            x32 = x32 + self.bias[...].astype(jnp.float32)
        return x32.astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability ``rate`` and scales the other entries up.

    Args:
      x: Any array.
      rate: The probability, in ``[0, 1)``.
      key: The PRNG key. ``None`` switches dropout off.

    Returns:
      An array of the shape and type of ``x``.
    """
    if key is None or rate == 0.0:
        return x
    return drop(x, rate, key)
