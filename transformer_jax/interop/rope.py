"""The settings of rotary positions in ``config.json``, which several families of decoders share."""

from __future__ import annotations

import math
from typing import Any

from transformer_jax.config import ModelConfig, RopeLayout
from transformer_jax.interop.rope_scaling import read_scaling, write_scaling
from transformer_jax.interop.setting import Settings, require_settings, shown, typed


def read_rope(settings: Settings, *, fraction: float | None = None, base_name: str = "rope_theta",
              fraction_name: str = "partial_rotary_factor", default_base: float = 10_000.0) -> dict[str, Any]:
    """Reads the base, the scaling and the rotated channels of rotary positions.

    Args:
      settings: the content of ``config.json``.
      fraction: which part of each head is rotated if the settings do not tell; ``None``: a family
        whose models rotate all channels.
      base_name: the name of the base in files of transformers before version 5.
      fraction_name: the name of the fraction in these files.
      default_base: the base if the settings do not tell.

    Returns:
      The fields ``rope_base``, ``rope_scaling`` and ``rope_layout``; with dynamic scaling also
      ``max_len``.

    Raises:
      ValueError: if our config cannot express the settings.
    """
    # transformers 5 writes the dict rope_parameters; earlier versions write rope_scaling and
    # rope_theta.
    name = "rope_parameters" if settings.get("rope_parameters") else "rope_scaling"
    rope = settings.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{name}={shown(rope)}: expected an object")
    base = (typed(rope, "rope_theta", float, 10_000.0) if "rope_theta" in rope
            else typed(settings, base_name, float, default_base))
    layout = RopeLayout()
    if fraction is None:
        require_settings(rope, {"partial_rotary_factor": 1.0})
    else:
        part = (typed(rope, "partial_rotary_factor", float, fraction) if "partial_rotary_factor" in rope
                else typed(settings, fraction_name, float, fraction))
        width = settings["hidden_size"] // max(1, settings["num_attention_heads"])
        rotated = int(width * part)
        if not 0 < part <= 1 or rotated < 2 or rotated % 2:
            raise ValueError(f"{fraction_name}={part} of {width} channels of each head are {rotated}; expected an even "
                             "number of them, at least 2")
        layout = RopeLayout(rotated if rotated < width else None)
    scaling = read_scaling(rope, name, settings)
    # With dynamic scaling, transformers stretches the context by the factor without saying so.
    longer = ({"max_len": round(scaling.factor * scaling.original_max_len)} if scaling.kind == "dynamic" else {})
    return {"rope_base": base, "rope_scaling": scaling, "rope_layout": layout} | longer


def write_rope(config: ModelConfig, *, is_partial: bool = False, base_name: str = "rope_theta",
               fraction_name: str = "partial_rotary_factor") -> dict[str, Any]:
    """Converts the fields of rotary positions back to settings, the inverse of ``read_rope``.

    Args:
      config: our config.
      is_partial: whether models of the family may rotate a part of each head.
      base_name: the name of the base in files of transformers before version 5.
      fraction_name: the name of the fraction in these files.

    Returns:
      The settings, in the form of transformers 5 and in that of earlier versions.

    Raises:
      ValueError: if the family rotates a part of each head, and the width of a head is not that
        which follows from the other sizes.
    """
    rope = write_scaling(config.rope_scaling)
    new = rope | {"rope_theta": config.rope_base}
    settings: dict[str, Any] = {base_name: config.rope_base, "rope_parameters": new,
                                "rope_scaling": None if rope["rope_type"] == "default" else rope}
    if config.rope_scaling.kind == "dynamic":
        settings["max_position_embeddings"] = config.rope_scaling.original_max_len
    if is_partial:
        width = derived_width(config)
        rotated = config.rope_layout.dim or width
        fraction = rotated / width
        if int(width * fraction) < rotated:  # transformers rounds the product down
            fraction = math.nextafter(fraction, 1.0)
        new["partial_rotary_factor"] = settings[fraction_name] = fraction
    return settings


def derived_width(config: ModelConfig) -> int:
    """Returns the width of a head, for families whose ``config.json`` does not contain it.

    Args:
      config: our config.

    Raises:
      ValueError: if it is not the width of the model divided by the number of heads.
    """
    width = config.model_dim // config.num_heads
    if config.head_dim != width:
        raise ValueError(f"head_dim={config.head_dim!r} (expected {width!r})")
    return width
