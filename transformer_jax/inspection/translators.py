"""Lenses that translate the residual stream of a layer before they read it: the tuned lens and the
Jacobian lens."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from transformer_jax.inspection.parts import (
    LanguageModel,
    Tokens,
    checked_tokens,
    read_out,
    stack_of,
    stream_of,
    trace_of,
)
from transformer_jax.models.output import PairTrace, Trace
from transformer_jax.nn.layers import parameter


class Translators(nnx.Module):
    """For each layer, an affine map from the residual stream that enters it to the final stream:
    ``x + x @ kernel + bias``, which starts as the identity.

    Source: Belrose et al. (2023), the tuned lens.

    Attributes:
      kernel: the kernels, ``[L, D, D]``.
      bias: the biases, ``[L, D]``.
    """

    def __init__(self, num_layers: int, dim: int):
        """Makes the identity.

        Args:
          num_layers: the number L of layers.
          dim: the dimension D of the residual stream.
        """
        self.kernel = parameter(jnp.zeros((num_layers, dim, dim)), ("layers", "embed", None))
        self.bias = parameter(jnp.zeros((num_layers, dim)), ("layers", "embed"))

    def __call__(self, trace: Trace | PairTrace) -> Trace:
        """Translates the residual stream of a trace.

        Args:
          trace: the trace of a forward pass.

        Returns:
          The trace (of the decoder or the only stack), in which the residual stream of each layer is
          translated. ``logit_lens`` and ``target_logprobs`` read it like any other trace.
        """
        own = trace_of(trace, "self")
        stream = own.layers.residual
        moved = jnp.einsum("LBTD,LDE->LBTE", stream.astype(jnp.float32), self.kernel[...]) + self.bias[:, None, None]
        layers = dataclasses.replace(own.layers, residual=stream + moved.astype(stream.dtype))
        return dataclasses.replace(own, layers=layers)


def translation_losses(model: LanguageModel, translators: Translators, tokens: tuple[jax.Array, ...],
                       **options: jax.Array) -> jax.Array:
    """Computes how far the predictions of each translated layer are from those of the model.

    Args:
      model: the model.
      translators: the maps.
      tokens: the arguments of the model's call.
      **options: further array arguments of the model.

    Returns:
      The Kullback-Leibler divergence in nats, float32 ``[L, B, T]``.
    """
    out = model(*tokens, **options)
    final = jax.nn.log_softmax(out.logits)
    read = read_out(model)

    def of_layer(stream_BTD: jax.Array) -> jax.Array:
        return (jnp.exp(final) * (final - jax.nn.log_softmax(read(stream_BTD)))).sum(-1)

    return jax.lax.map(jax.checkpoint(of_layer), translators(out.trace).layers.residual)


def jacobian_lens(model: LanguageModel, tokens: Tokens, **options: jax.Array | np.ndarray) -> Translators:
    """Computes the mean derivative of the final residual stream with respect to that of each layer.

    The derivative of the sum of the final stream over all positions is averaged over the positions
    of the layer's stream. It takes one backward pass for each of the D dimensions.

    Args:
      model: the model.
      tokens: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
      **options: further array arguments of the model, such as ``segment_ids_BT``.

    Returns:
      The maps, without a bias: a translated stream is the stream times the mean derivative.

    Raises:
      ValueError: if the tokens are not token ids of the model.
    """
    kernel_LDE = _mean_derivatives(model, checked_tokens(model, tokens, "self"), options)
    translators = Translators(kernel_LDE.shape[0], kernel_LDE.shape[1])
    translators.kernel[...] = kernel_LDE - jnp.eye(kernel_LDE.shape[1])
    return translators


@functools.partial(jax.jit)
def _mean_derivatives(model, tokens, options) -> jax.Array:
    """Compiled part of ``jacobian_lens``, ``[L, D, D]``: row d is the effect of dimension d."""
    L, D = stack_of(model, "self").num_layers, model.config.model_dim
    B, T = tokens[-1].shape

    def final(offsets_LBTD: jax.Array) -> jax.Array:
        def add(site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
            return value + offsets_LBTD[layer].astype(value.dtype) if site == "residual" else value

        return stream_of(model(*tokens, **options, intervene=add).trace)

    stream_BTD, pull_back = jax.vjp(final, jnp.zeros((L, B, T, D)))

    def of_dimension(dimension: jax.Array) -> jax.Array:
        cotangent = jnp.zeros_like(stream_BTD).at[..., dimension].set(1.0)
        return pull_back(cotangent)[0].mean((1, 2))

    return jnp.moveaxis(jax.lax.map(of_dimension, jnp.arange(D)), 0, -1)
