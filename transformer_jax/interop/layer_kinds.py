"""Layers that differ, as ``config.json`` describes them: one name of a kind for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformer_jax.config import LayerKind, ModelConfig
from transformer_jax.config.layers import shortest_period
from transformer_jax.interop.setting import Settings, shown, translated

FULL, SLIDING = "full_attention", "sliding_attention"
# The fields that a pattern of layers changes.
OF_LAYERS = ("layer_pattern", "sliding_window", "positions", "rope_base", "rope_scaling", "rope_layout")
_MOST_LAYERS = 10_000  # a file with more cannot have tensors for them, and a list of them would take long


def num_layers(settings: Settings) -> int:
    """Returns the number of layers; raises ValueError if no model has so many."""
    count = settings["num_hidden_layers"]
    if count > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={count}: expected at most {_MOST_LAYERS}")
    return count


def layer_types(settings: Settings, default: Sequence[str]) -> list[str]:
    """Reads the kind of each layer.

    Args:
      settings: the content of ``config.json``.
      default: the kinds of the first layers if the settings do not tell, which repeat until the
        last layer.

    Returns:
      The name of each layer's kind.

    Raises:
      ValueError: if the names are not a list with one for each layer.
    """
    count, names = num_layers(settings), settings.get("layer_types")
    if names is None:
        return [default[layer % len(default)] for layer in range(count)]
    if not isinstance(names, list) or len(names) < count:
        raise ValueError(f"layer_types={shown(names)}: expected a list with the kind of each of the {count} layers")
    return names[:count]


def read_kinds(names: Sequence[str], kinds: Mapping[str, LayerKind]) -> dict[str, Any]:
    """Converts the names of the layers' kinds to fields of our config.

    Args:
      names: the name of each layer's kind.
      kinds: what each name means.

    Returns:
      The field ``layer_pattern``.

    Raises:
      ValueError: if a name is unknown.
    """
    return {"layer_pattern": shortest_period(tuple(translated(name, kinds, "layer_types") for name in names))}


def layers_of(config: ModelConfig) -> list[ModelConfig]:
    """Returns the config of each layer, as if all layers were of its kind."""
    places = config.of_places()
    return [places[layer % len(places)] for layer in range(config.num_layers)]


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """Writes the sliding windows of the layers, in the form of transformers 5.

    Args:
      config: our config.

    Returns:
      The settings ``layer_types`` and ``sliding_window``.
    """
    windows = [layer.sliding_window for layer in layers_of(config)]
    return {"layer_types": [FULL if window is None else SLIDING for window in windows],
            "sliding_window": next((window for window in windows if window is not None), None)}


def with_canonical_layers(config: ModelConfig) -> ModelConfig:
    """Replaces the pattern of the layers by the shortest one that means the same.

    The rotary settings of the config become those of the first layer that rotates without a window,
    and only kinds that rotate in another way have their own.

    Args:
      config: our config.

    Returns:
      The equivalent config; without a pattern if all layers are alike.
    """
    if not config.layer_pattern:
        return config
    layers = layers_of(config)
    rotating = [layer for layer in layers if layer.positions == config.positions] or layers
    usual = next((layer for layer in rotating if layer.sliding_window is None), rotating[0])
    kinds = tuple(replace(
        config.layer_pattern[index % len(config.layer_pattern)],
        rope_base=None if layer.positions == "none" or layer.rope_base == usual.rope_base else layer.rope_base,
        rope_scaling=None if layer.positions == "none" or layer.rope_scaling == usual.rope_scaling
        else layer.rope_scaling) for index, layer in enumerate(layers))
    if len(set(kinds)) == 1:
        return layers[0]
    return replace(config, layer_pattern=shortest_period(kinds), rope_base=usual.rope_base,
                   rope_scaling=usual.rope_scaling)
