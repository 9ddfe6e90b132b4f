"""A decoder whose attention patterns and norms are frozen, so that every logit is a linear function
of what embeddings, feed-forward layers and biases add to the residual stream."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.models.decoder import Decoder
from transformer_jax.models.output import Output
from transformer_jax.nn.layers import Norm


class FrozenNorm(nnx.Module):
    """A norm whose scale counts as constant when gradients are taken.

    Attributes:
      norm: The norm.
    """

    def __init__(self, norm: Norm):
        self.norm = norm

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes ``[..., D]`` with the same values as the norm itself."""
        norm = self.norm
        x32 = x.astype(jnp.float32)
        if norm.subtracts_mean:
            x32 = x32 - x32.mean(-1, keepdims=True)
        x32 *= jax.lax.stop_gradient(jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + norm.epsilon))
        if (factor_D := norm.factor()) is not None:
            x32 *= factor_D
        return (x32 if norm.bias is None else x32 + norm.bias[...].astype(jnp.float32)).astype(x.dtype)


def frozen(model: Decoder) -> Decoder:
    """Returns the model with frozen norms.

    Args:
      model: A decoder.

    Returns:
      A model that computes the same numbers, with other gradients.
    """
    model = jax.tree.map(lambda leaf: leaf, model)
    blocks = (model.stack.blocks, model.stack.dense_blocks) if model.stack.is_mixed else (model.stack.blocks,)
    for owner in (*(block.attention for block in blocks if hasattr(block, "attention")), *blocks, model):
        for name, part in list(vars(owner).items()):
            if isinstance(part, Norm):
                setattr(owner, name, FrozenNorm(part))
    return model


def linearised(model: Decoder, tokens_BT: jax.Array, added_LTD: jax.Array, embedded_TD: jax.Array,
               read_layer: jax.Array | int = -1, heads_LTNH: jax.Array | None = None) -> Output:
    """Runs a frozen model on one text.

    Only three things have a gradient: what is added to the feed-forward outputs and to the
    embeddings, and the biases of the model. It flows through frozen attention and norms, and never
    through a feed-forward layer.

    Args:
      model: A model that ``frozen`` made.
      tokens_BT: The tokens ``[1, T]``.
      added_LTD: Added to the outputs of the feed-forward layers; zeros.
      embedded_TD: Added to the stream that enters the first layer; zeros.
      read_layer: The layer whose queries and keys have a gradient in the trace. Read nothing after
        this layer then.
      heads_LTNH: Added to the outputs of the heads; zeros.

    Returns:
      The output of the model.
    """
    def intervene(site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        if site in ("queries", "keys"):
            return jnp.where(jnp.asarray(layer) == read_layer, value, jax.lax.stop_gradient(value))
        if site == "attention_bias":
            return jax.lax.stop_gradient(value)
        if site == "head_output" and heads_LTNH is not None:
            return value + heads_LTNH[layer]
        if site == "mlp_output":
            return jax.lax.stop_gradient(value) + added_LTD[layer]
        if site == "residual":
            return jnp.where(jnp.asarray(layer) == 0, jax.lax.stop_gradient(value) + embedded_TD, value)
        return value

    return cast(Output, model(tokens_BT, intervene=intervene))


@jax.jit
def pulled_back(model: Decoder, tokens_BT: jax.Array, position: jax.Array, of_inputs_CLTD: jax.Array,
                of_logits_CV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes how several linear functions of a text depend on the parts of the residual stream.

    Args:
      model: A model that ``frozen`` made.
      tokens_BT: The tokens ``[1, T]``.
      position: The position of the logits.
      of_inputs_CLTD: The weights of the functions for the inputs of the feed-forward layers.
      of_logits_CV: Their weights for the logits.

    Returns:
      The gradient with respect to the feed-forward outputs ``[C, L, T, D]`` and to the embeddings
      ``[C, T, D]``; and the part of each function that comes from the biases of the model ``[C]``.
    """
    def read(output: Output) -> tuple[jax.Array, jax.Array]:
        return output.trace["mlp_input"][:, 0], output.logits[0, position]

    pull = _pullback(model, tokens_BT, read)
    return jax.vmap(pull)((of_inputs_CLTD, of_logits_CV))


@jax.jit
def pulled_to_scores(model: Decoder, tokens_BT: jax.Array, layer: jax.Array, head: jax.Array, query: jax.Array,
                     key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes how a query and a key depend on the parts of the residual stream.

    Args:
      model: A model that ``frozen`` made.
      tokens_BT: The tokens ``[1, T]``.
      layer: The layer of the head.
      head: The head.
      query: The position of the query.
      key: The position of the key.

    Returns:
      What ``pulled_back`` returns for 2 * H functions: the H numbers of the query, divided by the
      root of H, and the H numbers of the key.
    """
    config = model.config
    key_head = head // (config.num_heads // config.num_kv_heads)
    scale = 1 / math.sqrt(config.head_dim)

    def read(output: Output) -> jax.Array:
        trace = output.trace
        return jnp.concatenate([trace["queries"][layer, 0, query, head].astype(jnp.float32) * scale,
                                trace["keys"][layer, 0, key, key_head].astype(jnp.float32)])

    pull = _pullback(model, tokens_BT, read, layer)
    # Few functions at a time, so that memory does not depend on the size of the head.
    return jax.lax.map(pull, jnp.eye(2 * config.head_dim), batch_size=min(16, 2 * config.head_dim))


@jax.jit
def pulled_to_heads(model: Decoder, tokens_BT: jax.Array, position: jax.Array, of_inputs_LTD: jax.Array,
                    of_logits_V: jax.Array) -> jax.Array:
    """Computes how a linear function of a text depends on the outputs of all heads.

    Args:
      model: A model that ``frozen`` made.
      tokens_BT: The tokens ``[1, T]``.
      position: The position of the logits.
      of_inputs_LTD: The weights of the function for the inputs of the feed-forward layers.
      of_logits_V: Its weights for the logits.

    Returns:
      The gradient ``[L, T, N, H]``.
    """
    config, T = model.config, tokens_BT.shape[1]
    zeros_LTD = jnp.zeros_like(of_inputs_LTD)

    def value(heads_LTNH: jax.Array) -> jax.Array:
        output = linearised(model, tokens_BT, zeros_LTD, zeros_LTD[0], heads_LTNH=heads_LTNH)
        return jnp.vdot(output.trace["mlp_input"][:, 0], of_inputs_LTD) + output.logits[0, position] @ of_logits_V

    return jax.grad(value)(jnp.zeros((config.num_layers, T, config.num_heads, config.head_dim)))


def _pullback(model: Decoder, tokens_BT: jax.Array, read: Callable[[Output], Any],
              read_layer: jax.Array | int = -1) -> Callable[[Any], tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns the function that maps a cotangent of what ``read`` reads to the gradients with
    respect to the feed-forward outputs and the embeddings, and to the part of the biases."""
    paths, structure = jax.tree_util.tree_flatten_with_path(model)
    leaves = [leaf for _, leaf in paths]
    places = [place for place, (path, _) in enumerate(paths) if "bias" in jax.tree_util.keystr(path)]
    biases = [leaves[place] for place in places]

    def run(added_LTD: jax.Array, embedded_TD: jax.Array, biases: list[jax.Array]) -> Any:
        changed = list(leaves)
        for place, bias in zip(places, biases, strict=True):
            changed[place] = bias
        return read(linearised(jax.tree.unflatten(structure, changed), tokens_BT, added_LTD, embedded_TD, read_layer))

    zeros_LTD = jnp.zeros((model.config.num_layers, tokens_BT.shape[1], model.config.model_dim))
    pull = jax.vjp(run, zeros_LTD, zeros_LTD[0], biases)[1]

    def gradients(cotangent: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        added, embedded, of_biases = pull(cotangent)
        parts = [jnp.vdot(gradient, bias) for gradient, bias in zip(of_biases, biases, strict=True)]
        return added, embedded, sum(parts, start=jnp.zeros(()))

    return gradients
