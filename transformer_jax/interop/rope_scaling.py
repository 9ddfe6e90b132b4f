"""How rotary positions are scaled, in the settings of ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformer_jax.config import RopeScaling
from transformer_jax.interop.setting import Settings, checked, shown, translated, typed

_KINDS = {"default": "none", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "llama3",
          "longrope": "longrope", "su": "longrope"}
# The fields of each kind that are stored under another name; all kinds but longrope need a factor.
_LLAMA3 = {"low_freq_factor": "low_frequency_factor", "high_freq_factor": "high_frequency_factor",
           "original_max_position_embeddings": "original_max_len"}
_YARN = {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "truncate": "truncate",
         "attention_factor": "attention_factor", "original_max_position_embeddings": "original_max_len"}
_LONGROPE = {"attention_factor": "attention_factor", "original_max_position_embeddings": "original_max_len",
             "short_factor": "short_factors", "long_factor": "long_factors"}
_NAMES: Mapping[str, Mapping[str, str]] = {"llama3": _LLAMA3, "yarn": _YARN, "longrope": _LONGROPE}
_TYPES = {"original_max_len": int, "truncate": bool, "attention_factor": float | None}


def read_scaling(rope: Settings, name: str, settings: Settings) -> RopeScaling:
    """Reads how the frequencies are scaled.

    Args:
      rope: the settings of rotary positions.
      name: their name in ``config.json``.
      settings: the content of ``config.json``.

    Returns:
      The scaling.

    Raises:
      ValueError: if our config cannot express the settings.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = translated(kind, _KINDS, f"{name}: rope_type")
    if scaling == "none":
        return RopeScaling()
    fields = {ours: _read(rope[theirs], ours, f"{name}.{theirs}") for theirs, ours in _NAMES.get(scaling, {}).items()
              if rope.get(theirs) is not None}
    first = fields.get("original_max_len") or settings.get("original_max_position_embeddings")
    longest = typed(settings, "max_position_embeddings", int, 2048)
    if scaling == "longrope":  # the setting outside has precedence
        first = settings.get("original_max_position_embeddings") or first
    if scaling in ("dynamic", "yarn", "longrope"):
        fields["original_max_len"] = checked(first if first and scaling != "dynamic" else longest, int,
                                             "original_max_position_embeddings")
    factor = rope.get("factor")
    if factor is None and scaling in ("yarn", "longrope"):
        factor = max(1.0, longest / max(1, fields["original_max_len"]))
    if factor is None:
        raise ValueError(f"{name} with rope_type={kind!r} lacks factor")
    fields["factor"] = checked(factor, float, f"{name}.factor")
    scales = [rope.get(key) for key in ("mscale", "mscale_all_dim")]
    if scaling == "yarn" and all(scales) and "attention_factor" not in fields and fields["factor"] > 1:
        above, below = (0.1 * checked(scale, float, f"{name}.mscale") * math.log(fields["factor"]) + 1
                        for scale in scales)
        fields["attention_factor"] = above / below
    return RopeScaling(scaling, **fields)


def _read(value: Any, field: str, name: str) -> Any:
    """Checks the type of a value."""
    if field in ("short_factors", "long_factors"):
        if not isinstance(value, list):
            raise ValueError(f"{name}={shown(value)}: expected a list of numbers")
        return tuple(checked(number, float, name) for number in value)
    return checked(value, _TYPES.get(field, float), name)


def write_scaling(scaling: RopeScaling) -> dict[str, Any]:
    """Converts the scaling back to settings, the inverse of ``read_scaling``.

    Args:
      scaling: the scaling.

    Returns:
      The settings of rotary positions, without their base.
    """
    if scaling.kind == "none":
        return {"rope_type": "default"}
    rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    for theirs, ours in _NAMES.get(scaling.kind, {}).items():
        value = getattr(scaling, ours)
        if value is not None and (ours, value) != ("truncate", True):
            rope[theirs] = list(value) if isinstance(value, tuple) else value
    return rope
