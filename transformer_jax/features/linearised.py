"""A decoder whose attention patterns and norms are frozen, so that every logit is a linear function
of what embeddings, feed-forward layers and biases add to the residual stream."""

from __future__ import annotations

from typing import cast

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
    for owner in (*blocks, model):
        for name, part in list(vars(owner).items()):
            if isinstance(part, Norm):
                setattr(owner, name, FrozenNorm(part))
    return model


def linearised(model: Decoder, tokens_BT: jax.Array, added_LTD: jax.Array, embedded_TD: jax.Array,
               position: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Runs a frozen model on one text.

    Only three things have a gradient: what is added to the feed-forward outputs and to the
    embeddings, and the biases of the model. It flows through frozen attention and norms, and never
    through a feed-forward layer.

    Args:
      model: A model that ``frozen`` made.
      tokens_BT: The tokens ``[1, T]``.
      added_LTD: Added to the outputs of the feed-forward layers; zeros.
      embedded_TD: Added to the stream that enters the first layer; zeros.
      position: The position of the logits.

    Returns:
      The inputs of the feed-forward layers ``[L, T, D]``, and the logits ``[V]`` at the position.
    """
    def intervene(site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        if site in ("queries", "keys", "attention_bias"):
            return jax.lax.stop_gradient(value)
        if site == "mlp_output":
            return jax.lax.stop_gradient(value) + added_LTD[layer]
        if site == "residual":
            return jnp.where(jnp.asarray(layer) == 0, jax.lax.stop_gradient(value) + embedded_TD, value)
        return value

    output = cast(Output, model(tokens_BT, intervene=intervene))
    return output.trace["mlp_input"][:, 0], output.logits[0, position]


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
    paths, structure = jax.tree_util.tree_flatten_with_path(model)
    leaves = [leaf for _, leaf in paths]
    places = [place for place, (path, _) in enumerate(paths) if "bias" in jax.tree_util.keystr(path)]

    def run(added_LTD: jax.Array, embedded_TD: jax.Array, biases: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
        changed = list(leaves)
        for place, bias in zip(places, biases, strict=True):
            changed[place] = bias
        return linearised(jax.tree.unflatten(structure, changed), tokens_BT, added_LTD, embedded_TD, position)

    biases = [leaves[place] for place in places]
    zeros_LTD = jnp.zeros(of_inputs_CLTD.shape[1:])
    pull = jax.vjp(run, zeros_LTD, zeros_LTD[0], biases)[1]
    added, embedded, of_biases = jax.vmap(pull)((of_inputs_CLTD, of_logits_CV))
    return added, embedded, sum((jnp.tensordot(gradient, bias, bias.ndim) for gradient, bias in
                                 zip(of_biases, biases, strict=True)), start=jnp.zeros(len(of_logits_CV)))
