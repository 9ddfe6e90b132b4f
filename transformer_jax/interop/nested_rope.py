"""Rotary positions that differ between layers with and without a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_jax.config import ModelConfig, RopeScaling
from transformer_jax.interop.layer_kinds import FULL, SLIDING, layers_of
from transformer_jax.interop.rope_scaling import read_scaling, write_scaling
from transformer_jax.interop.setting import Settings, shown, typed


def read_nested_rope(settings: Settings, bases: Mapping[str, float],
                     names: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Reads the base and the scaling of each kind of layer.

    Args:
      settings: the content of ``config.json``. transformers 5 writes one object for each kind into
        ``rope_parameters``; earlier versions write bases, and ``rope_scaling`` for layers without a
        window.
      bases: the base of each kind if the settings do not tell.
      names: the name of the base of each kind in files of earlier versions.

    Returns:
      For each kind, the fields ``rope_base`` and ``rope_scaling``.

    Raises:
      ValueError: if our config cannot express the settings.
    """
    new, old = settings.get("rope_parameters") or {}, settings.get("rope_scaling") or {}
    for name, value in (("rope_parameters", new), ("rope_scaling", old)):
        if not isinstance(value, dict):
            raise ValueError(f"{name}={shown(value)}: expected an object")
    found = {}
    for kind in (FULL, SLIDING):
        rope, name = new.get(kind), f"rope_parameters.{kind}"
        if rope is None:
            rope, name = (old if kind == FULL else {}), "rope_scaling"
        if not isinstance(rope, dict):
            raise ValueError(f"{name}={shown(rope)}: expected an object")
        base = (typed(rope, "rope_theta", float, 0.0) if rope.get("rope_theta") is not None
                else typed(settings, names[kind], float, bases[kind]))
        found[kind] = {"rope_base": base, "rope_scaling": read_scaling(rope, name, settings)}
    return found


def write_nested_rope(config: ModelConfig, bases: Mapping[str, float], names: Mapping[str, str]) -> dict[str, Any]:
    """Converts the rotary settings of both kinds of layers back, the inverse of
    ``read_nested_rope``.

    Args:
      config: our config.
      bases: the base of a kind that the config has no layer of.
      names: the name of the base of each kind in files of earlier versions.

    Returns:
      The settings, in the form of transformers 5 and in that of earlier versions.
    """
    layers = layers_of(config)
    found: dict[str, Any] = {}
    for kind in (FULL, SLIDING):
        layer = next((layer for layer in layers if (layer.sliding_window is None) == (kind == FULL)), None)
        scaling = RopeScaling() if layer is None else layer.rope_scaling
        found[kind] = write_scaling(scaling) | {"rope_theta": bases[kind] if layer is None else layer.rope_base}
    old = {key: value for key, value in found[FULL].items() if key != "rope_theta"}
    return {"rope_parameters": found, "rope_scaling": None if old["rope_type"] == "default" else old,
            **{names[kind]: found[kind]["rope_theta"] for kind in (SLIDING, FULL)}}
