"""Language models in which features take the place of activations, and edits of single features."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.features.autoencoder import SparseAutoencoder
from transformer_jax.features.cross_layer import CrossLayerTranscoder
from transformer_jax.features.cross_layer_splicing import with_cross_layer
from transformer_jax.inspection.interventions import Edits, together
from transformer_jax.inspection.parts import LanguageModel, check_kind, kind_of, stack_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Splice:
    """An intervention that replaces an activation by what an autoencoder makes of it.

    Attributes:
      site: The name of the site, without its layer.
      layer: The layer.
      autoencoder: The autoencoder.
    """

    site: str = dataclasses.field(metadata={"static": True})
    layer: jax.Array
    autoencoder: SparseAutoencoder

    def __call__(self, site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        """Returns the reconstruction at this site and layer, else the value itself."""
        if site != self.site:
            return value
        rows = self.autoencoder(value.reshape(*value.shape[:2], -1)).reshape(value.shape)
        return jnp.where(self.layer == layer, rows.astype(value.dtype), value)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FeatureEdit:
    """An intervention that sets one feature of an activation and leaves the rest as it is,
    including the part that the features do not explain.

    Attributes:
      site: The name of the site, without its layer.
      layer: The layer.
      autoencoder: The autoencoder of this site.
      feature: The number of the feature.
      value: Its new value.
    """

    site: str = dataclasses.field(metadata={"static": True})
    layer: jax.Array
    autoencoder: SparseAutoencoder
    feature: jax.Array
    value: jax.Array

    def __call__(self, site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        """Returns the edited activation at this site and layer, else the value itself."""
        if site != self.site:
            return value
        model = self.autoencoder
        rows = value.reshape(*value.shape[:2], -1)
        change = self.value - model.encode(rows)[..., self.feature]
        edited = rows + change[..., None] * model.decoder[...][self.feature] / model.config.out_scale
        return jnp.where(self.layer == layer, edited.reshape(value.shape).astype(value.dtype), value)


class TranscodedFeedForward(nnx.Module):
    """The feed-forward layers of a model, of which transcoders replace some.

    Attributes:
      original: The feed-forward layers.
      transcoder: The transcoders, stacked over the layers.
      is_replaced: True for the layers that a transcoder replaces.
    """

    def __init__(self, original: Any, transcoder: SparseAutoencoder, is_replaced: jax.Array):
        self.original, self.transcoder = original, transcoder
        self.is_replaced = nnx.Variable(is_replaced, axes=())

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Applies the transcoder of the layer if there is one, else the feed-forward layer."""
        return jax.lax.cond(self.is_replaced[...], lambda: self.transcoder(x_BTD).astype(x_BTD.dtype),
                            lambda: self.original(x_BTD))


def site_and_layer(name: str, model: LanguageModel) -> tuple[str, int]:
    """Splits a name such as ``"layers.3.mlp_output"``.

    Args:
      name: The name of an activation.
      model: The language model that has it.

    Returns:
      The site, and the number of the layer; for ``"final"`` the last layer.

    Raises:
      ValueError: If the name has no layer, or the model has no such site.
    """
    *layer, site = name.split(".")
    kind = kind_of(site)
    check_kind(model, kind)
    count = stack_of(model, kind).num_layers
    if site.endswith("final") and not layer:
        return site, count - 1
    if len(layer) != 2 or not layer[1].isdigit() or int(layer[1]) >= count:
        raise ValueError(f"{name!r} is not an activation of one layer of this model, such as "
                         f"\"layers.{count - 1}.mlp_output\"")
    return site, int(layer[1])


def splice(model: LanguageModel, autoencoder: SparseAutoencoder) -> Splice:
    """Makes an intervention that replaces an activation by its reconstruction.

    Args:
      model: The language model.
      autoencoder: An autoencoder; ``spliced`` takes transcoders too.

    Returns:
      The intervention, for ``tj.forward(model, tokens, intervene=...)``.

    Raises:
      ValueError: If the language model has no such activation, or a transcoder is given.
    """
    if autoencoder.config.is_transcoder:
        raise ValueError("this is a transcoder, which reads another activation than it computes; use "
                         "tj.features.spliced(model, [transcoder])")
    site, layer = site_and_layer(autoencoder.config.site, model)
    return Splice(site, jnp.asarray(layer), autoencoder)


def set_feature(model: LanguageModel, autoencoder: SparseAutoencoder, feature: int,
                value: float | jax.Array) -> FeatureEdit:
    """Makes an intervention that sets one feature, for all tokens.

    Args:
      model: The language model.
      autoencoder: An autoencoder.
      feature: The number of the feature.
      value: Its new value; 0 removes the feature.

    Returns:
      The intervention.

    Raises:
      ValueError: If the feature does not exist, the language model has no such activation, or a
        transcoder is given.
    """
    if not 0 <= feature < autoencoder.config.num_features:
        raise ValueError(f"feature={feature} is not from 0 to {autoencoder.config.num_features - 1}")
    place = splice(model, autoencoder)
    return FeatureEdit(place.site, place.layer, autoencoder, jnp.asarray(feature), jnp.asarray(value, jnp.float32))


def spliced(model: LanguageModel,
            autoencoders: Sequence[SparseAutoencoder | CrossLayerTranscoder]) -> tuple[LanguageModel, Edits]:
    """Puts autoencoders and transcoders into a language model.

    Args:
      model: The language model.
      autoencoders: Autoencoders of any activations, and transcoders from ``mlp_input`` to
        ``mlp_output`` of one layer each. All transcoders have the same settings except for their
        layers. Or one cross-layer transcoder in the place of transcoders.

    Returns:
      A language model whose feed-forward layers are transcoders where these are given; and the
      intervention that puts the autoencoders in place.

    Raises:
      ValueError: If a transcoder is not that of a feed-forward layer, or two have different
        settings.
    """
    cross_layer = [each for each in autoencoders if isinstance(each, CrossLayerTranscoder)]
    others = [each for each in autoencoders if not isinstance(each, CrossLayerTranscoder)]
    transcoders = [each for each in others if each.config.is_transcoder]
    edits = together(*(splice(model, each) for each in others if not each.config.is_transcoder))
    if cross_layer:
        if len(cross_layer) > 1 or transcoders:
            raise ValueError("a cross-layer transcoder takes the place of all feed-forward layers; pass one, and no "
                             "transcoders")
        return with_cross_layer(model, cross_layer[0]), edits
    if transcoders:
        model = _transcoded(model, transcoders)
    return model, edits


def _transcoded(model: LanguageModel, transcoders: Sequence[SparseAutoencoder]) -> LanguageModel:
    """Returns the language model with transcoders as feed-forward layers."""
    places, kinds, prepared = [], set(), []
    common = transcoders[0].config.replace(site="mlp_input", target="mlp_output", scale=1.0, target_scale=1.0)
    for transcoder in transcoders:
        config = transcoder.config
        (source, layer), (target, other) = (site_and_layer(name, model) for name in (config.site, config.targets))
        if layer != other or not source.endswith("mlp_input") or target != source.replace("input", "output"):
            raise ValueError(f"a transcoder from {config.site!r} to {config.targets!r} is not that of a feed-forward "
                             'layer, such as from "layers.0.mlp_input" to "layers.0.mlp_output"')
        folded = in_own_units(transcoder)
        if folded.config.replace(site="mlp_input", target="mlp_output") != common:
            raise ValueError("the transcoders have different settings; pass those of one kind and size only")
        places.append(layer)
        kinds.add(kind_of(source))
        prepared.append(jax.tree.leaves(folded))
    if len(kinds) > 1 or len(set(places)) < len(places):
        raise ValueError("pass one transcoder for each layer, of the encoder or of the decoder only")
    model = jax.tree.map(lambda leaf: leaf, model)
    stack = stack_of(model, kinds.pop())
    if stack.is_mixed:
        raise ValueError("only some layers of this model have experts (config.moe); transcoders can take the place of "
                         "feed-forward layers only if all are alike")
    if model.config.norm_position in ("both", "output"):
        raise ValueError(f"this model has norm_position={model.config.norm_position!r}: it normalizes what a "
                         "feed-forward layer writes, and mlp_output is read after this norm, so a transcoder cannot "
                         "take the place of the layer alone; pass a CrossLayerTranscoder, which replaces the norm too")
    template = SparseAutoencoder(common, key=jax.random.key(0))
    stacked = [jnp.zeros((stack.num_layers, *leaf.shape)).at[jnp.asarray(places)].set(jnp.stack(leaves))
               for leaf, *leaves in zip(jax.tree.leaves(template), *prepared, strict=True)]
    is_replaced = jnp.zeros(stack.num_layers, bool).at[jnp.asarray(places)].set(True)
    stack.blocks.mlp = TranscodedFeedForward(
        stack.blocks.mlp, jax.tree.unflatten(jax.tree.structure(template), stacked), is_replaced)
    return model


def in_own_units(model: SparseAutoencoder) -> SparseAutoencoder:
    """Returns the same model with the scales in its weights. Scales are powers of two, so the
    numbers that it computes are the same.

    Args:
      model: An autoencoder or a transcoder.

    Returns:
      The model with ``scale`` 1.
    """
    config = model.config
    folded = SparseAutoencoder(config.replace(scale=1.0, target_scale=1.0 if config.is_transcoder else None),
                               key=jax.random.key(0))
    folded = jax.tree.unflatten(jax.tree.structure(folded), jax.tree.leaves(model))
    folded.encoder.set_value(model.encoder[...] * config.scale)
    folded.decoder.set_value(model.decoder[...] / config.out_scale)
    folded.decoder_bias.set_value(model.decoder_bias[...] / config.out_scale)
    return folded
