"""Language models in which a cross-layer transcoder takes the place of all feed-forward layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.features.cross_layer import CrossLayerTranscoder, in_own_units
from transformer_jax.inspection.parts import LanguageModel, check_kind, kind_of, stack_of
from transformer_jax.nn.stack import Stack


class FeedForwardOfFeatures(nnx.Module):
    """The feed-forward layer of one layer: its features, and what is written to its output.

    Attributes:
      transcoder: The cross-layer transcoder, without scales.
      layer: The number of the layer.
      written_BTE: What the features of earlier layers write to this layer, with the bias.
    """

    def __init__(self, transcoder: CrossLayerTranscoder, layer: int, written_BTE: jax.Array):
        self.transcoder, self.layer = transcoder, layer
        self.written_BTE = nnx.Variable(written_BTE, axes=())

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Computes the output of the layer from the features of this layer and of earlier ones."""
        own_BTE = self.write(x_BTD)[..., 0, :]
        return (self.written_BTE[...] + own_BTE).astype(x_BTD.dtype)

    def write(self, x_BTD: jax.Array) -> jax.Array:
        """Computes what the features of this layer write to this layer and those after it
        ``[B, T, K, E]``."""
        features = self.transcoder.encode_layer(self.layer, x_BTD.reshape(-1, x_BTD.shape[-1]))
        written = self.transcoder.write_from(self.layer, features)
        return written.reshape(*x_BTD.shape[:-1], *written.shape[1:])


class CrossLayerStack(Stack):
    """A stack of layers whose feed-forward layers are one cross-layer transcoder.

    Attributes:
      transcoder: The cross-layer transcoder, without scales.
    """

    def __init__(self, stack: Stack, transcoder: CrossLayerTranscoder):
        self.config, self.num_layers = stack.config, stack.num_layers
        self.blocks, self.relative = stack.blocks, nnx.data(stack.relative)
        self.dense_blocks = nnx.data(stack.dense_blocks)
        self.transcoder = transcoder

    def _layers(self, x_BTD, context, cache, key, intervene):
        """Applies all layers one after another, and passes on what features write to later
        ones."""
        if cache is not None:
            raise ValueError("a model with a cross-layer transcoder reads whole texts and has no cache; generate with "
                             "the original model")
        traces = []
        shape = (*x_BTD.shape[:2], self.transcoder.config.out_dim)
        written = [jnp.broadcast_to(bias_E, shape) for bias_E in self.transcoder.decoder_bias[...]]
        for layer in range(self.num_layers):
            block = self.block_of(layer)
            # The transcoder computes what is added to the stream, so a norm of it is left out.
            block.mlp, block.mlp_output_norm = FeedForwardOfFeatures(self.transcoder, layer, written[layer]), None
            x_BTD, trace, _ = block(x_BTD, context.of_layer(layer), layer, key=key, intervene=intervene)
            traces.append(trace)
            added = block.mlp.write(trace.mlp_input)
            for target in range(layer + 1, self.num_layers):
                written[target] = written[target] + added[..., target - layer, :]
        return x_BTD, jax.tree.map(lambda *each: jnp.stack(each), *traces), None


def with_cross_layer(model: LanguageModel, transcoder: CrossLayerTranscoder) -> LanguageModel:
    """Puts a cross-layer transcoder in the place of all feed-forward layers.

    Args:
      model: The language model.
      transcoder: Its cross-layer transcoder.

    Returns:
      A language model of the same kind, which reads whole texts.

    Raises:
      ValueError: If the transcoder is not that of the feed-forward layers of this model.
    """
    config = transcoder.config
    kind = kind_of(config.site)
    check_kind(model, kind)
    stack = stack_of(model, kind)
    if not config.site.endswith("mlp_input") or config.target != config.site.replace("input", "output"):
        raise ValueError(f"a cross-layer transcoder from {config.site!r} to {config.target!r} is not that of "
                         'feed-forward layers, such as from "mlp_input" to "mlp_output"')
    if (config.num_layers, config.input_dim) != (stack.num_layers, stack.config.model_dim):
        raise ValueError(f"the cross-layer transcoder has {config.num_layers} layers of {config.input_dim} values, but "
                         f"the model has {stack.num_layers} of {stack.config.model_dim}")
    model = jax.tree.map(lambda leaf: leaf, model)
    for name, part in list(vars(model).items()):
        if part is stack_of(model, kind):
            setattr(model, name, CrossLayerStack(part, in_own_units(transcoder)))
            break
    return model
