"""The smallest modules: a linear map, one to a single number, a norm, dropout."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from transformer_jax.config import ModelConfig
from transformer_jax.ops.dropout import drop
from transformer_jax.ops.linear import linear
from transformer_jax.sharding import as_rows, gathered

# What remat="dots" saves; with remat="offload" it waits in the host's memory, and so does what
# enters a layer.
LINEAR_OUTPUT, LAYER_INPUT = "linear output", "layer input"


def parameter(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter that carries the logical names of its axes (see ``sharding.RULES``)."""
    return nnx.Param(value, axes=axes)


def recomputed(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function whose gradient keeps its arguments alone and computes what it needs of the steps
    between again.

    For norms, whose float32 arrays are half of what a bfloat16 step would remember of a layer, for
    activations, and for the cast and gathered copies of weights. What a gradient does not need,
    such as a product, is not repeated.
    """
    return jax.checkpoint(f, prevent_cse=False)


class Linear(nnx.Module):
    """``x @ kernel + bias`` over the last axis, kernel ``[in, out]``.

    The kernel starts with standard deviation ``config.init_std`` times ``scale``. There is a bias
    where ``has_bias`` says so, or else the config's ``use_bias``.

    Attributes:
      transposed: whether the kernel is held as ``[out, in]``, see :func:`for_single_tokens`.
    """

    def __init__(self, in_dim: int, out_dim: int, axes: tuple[str, str], config: ModelConfig, *, key: jax.Array,
                 scale: float = 1.0, has_bias: bool | None = None):
        std = math.sqrt(2 / (in_dim + out_dim)) if config.init_std is None else config.init_std
        kernel = scale * std * jax.random.normal(key, (in_dim, out_dim))
        self.transposed = False
        self.precision = config.precision
        self.kernel = parameter(kernel.astype(config.param_dtype), axes)
        has_bias = config.use_bias if has_bias is None else has_bias
        self.bias = parameter(jnp.zeros(out_dim, config.param_dtype), axes[1:]) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        # As one matrix product over all tokens: with two leading axes the gradient of the kernel
        # contracts both and misses XLA:CPU's fast path (twice the time).
        rows = checkpoint_name(recomputed(self._product)(as_rows(x), self.kernel[...]), LINEAR_OUTPUT)
        if self.bias is not None:
            rows = rows + gathered(self.bias[...].astype(x.dtype), self.bias.axes)
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    def _product(self, rows: jax.Array, kernel: jax.Array) -> jax.Array:
        kernel = gathered(kernel.astype(rows.dtype), self.kernel.axes)
        if self.transposed:
            return jax.lax.dot_general(rows, kernel, (((rows.ndim - 1,), (1,)), ((), ())), precision=self.precision)
        return linear(rows, kernel, self.precision)


def joined(*linears: Linear) -> Linear:
    """One linear map whose output is that of several, side by side."""
    result = jax.tree.map(lambda x: x, linears[0])
    result.kernel = parameter(jnp.concatenate([linear.kernel[...] for linear in linears], axis=1), (None, None))
    if result.bias is not None:
        result.bias = parameter(jnp.concatenate([linear.bias[...] for linear in linears]), (None,))
    return result


def for_single_tokens(linear: Linear) -> Linear:
    """The same map with its kernel transposed: a product with one row then reads memory in
    order."""
    result = jax.tree.map(lambda x: x, linear)
    result.transposed = True
    result.kernel = parameter(linear.kernel[...].T, linear.kernel.axes[::-1])
    return result


class ScalarHead(nnx.Module):
    """A linear map from a hidden state to one number, such as a reward or a value."""

    def __init__(self, config: ModelConfig, *, key: jax.Array):
        kernel = jax.random.normal(key, config.model_dim) / config.model_dim
        self.kernel = parameter(kernel.astype(config.param_dtype), ("embed",))
        self.bias = parameter(jnp.zeros((), config.param_dtype), ())

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """float32 ``[...]`` of ``[..., D]``."""
        kernel_D, bias = self.kernel[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (hidden.astype(jnp.float32) * kernel_D).sum(-1) + bias


class Norm(nnx.Module):
    """LayerNorm (Ba et al., 2016) or RMSNorm (Zhang and Sennrich, 2019) of the last axis, in
    float32."""

    def __init__(self, dim: int, config: ModelConfig, kind: str | None = None):
        self.kind = config.norm if kind is None else kind
        self.epsilon = config.norm_epsilon
        self.scale = parameter(jnp.ones(dim, config.param_dtype), (None,))
        has_bias = self.kind == "layernorm" and config.use_bias
        self.bias = parameter(jnp.zeros(dim, config.param_dtype), (None,)) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return recomputed(self._normalize)(x)

    def _normalize(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        if self.kind == "layernorm":
            x32 = x32 - x32.mean(-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.epsilon)
        x32 = x32 * self.scale[...].astype(jnp.float32)
        if self.bias is not None:
            x32 = x32 + self.bias[...].astype(jnp.float32)
        return x32.astype(x.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries with probability ``rate`` and scales the others up; without a key, the
    identity."""
    if key is None or rate == 0.0:
        return x
    return drop(x, rate, key)
