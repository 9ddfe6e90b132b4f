"""The decoder families Phi-3 and SmolLM3: ``Phi3ForCausalLM`` and ``SmolLM3ForCausalLM``.

Phi-3 stores queries, keys and values in one tensor, and the gate and the up projection in another.
In SmolLM3 every fourth layer has no rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from transformer_jax.config import LayerKind, ModelConfig
from transformer_jax.config.layers import shortest_period
from transformer_jax.interop.family import Family, read_banned, write_banned
from transformer_jax.interop.layer_kinds import FULL, SLIDING, layer_types, layers_of, num_layers, write_windows
from transformer_jax.interop.llama import GATED_ACTIVATIONS, WEIGHTS
from transformer_jax.interop.mapping import Weight
from transformer_jax.interop.rope import read_rope, write_rope
from transformer_jax.interop.setting import SIZES, Setting, Settings, require_settings, shown, translated, typed

_BLOCK, _LAYER = "stack.blocks", "model.layers.{layer}"
_SETTINGS = (
    *SIZES,
    Setting("max_len", "max_position_embeddings"),
    Setting("num_kv_heads", "num_key_value_heads", None),
    Setting("activation", "hidden_act", "swiglu", values=GATED_ACTIVATIONS),
    Setting("attention_dropout", "attention_dropout", 0.0),
    Setting("init_std", "initializer_range", 0.02),
)
_IGNORED = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|long_factor|short_factor)",)
_RENAMES = ((r"^(?=(embed_tokens|layers|norm|rotary_emb)\.)", "model."),)
_FIXED = {"family": "decoder", "positions": "rope", "norm": "rmsnorm"}
_JOINED = (".query.", ".key.", ".value.", ".gate.", ".up.")


def _heads(config: ModelConfig) -> tuple[int, ...]:
    """Returns the widths of queries, keys and values, which share a tensor."""
    return tuple(cast(int, config.head_dim) * cast(int, count)
                 for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads))


def _part(ours: str, theirs: str, index: int, count: int,
          widths: Callable[[ModelConfig], tuple[int, ...]] | None) -> Weight:
    """Makes the row of a linear layer without bias that is one part of a tensor."""
    return Weight(f"{_BLOCK}.{ours}.kernel", f"{_LAYER}.{theirs}.weight", transposed=True, part=(index, count),
                  widths=widths)


_PHI3_WEIGHTS = (
    *(row for row in WEIGHTS if not any(name in row.ours for name in _JOINED)),
    *(_part(f"attention.{name}", "self_attn.qkv_proj", index, 3, _heads)
      for index, name in enumerate(("query", "key", "value"))),
    *(_part(f"mlp.{name}", "mlp.gate_up_proj", index, 2, None) for index, name in enumerate(("gate", "up"))),
)


def _read_phi3(settings: Settings) -> dict[str, Any]:
    """Reads the rotary positions and the sliding window."""
    if typed(settings, "embd_pdrop", float, 0.0) != typed(settings, "resid_pdrop", float, 0.0):
        require_settings(settings, {"embd_pdrop": settings.get("resid_pdrop", 0.0)})
    return {**read_rope(settings, fraction=1.0), "use_bias": False,
            "sliding_window": typed(settings, "sliding_window", int | None, None), **read_banned(settings)}


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    """Writes the rotary positions and the sliding window."""
    scaling = config.rope_scaling
    if scaling.kind not in ("none", "longrope"):
        raise ValueError(f"rope_scaling={scaling!r} (expected kind='none' or kind='longrope')")
    settings = {**write_rope(config, is_partial=True), "sliding_window": config.sliding_window}
    if scaling.kind == "longrope":
        settings["original_max_position_embeddings"] = scaling.original_max_len
        if scaling.factor == max(1.0, config.max_len / scaling.original_max_len):  # then files leave it out
            for name in ("rope_parameters", "rope_scaling"):
                del settings[name]["factor"]
    return settings | write_banned(config)


PHI3 = Family(
    "phi3", "Phi3ForCausalLM", _PHI3_WEIGHTS,
    (*_SETTINGS, Setting("norm_epsilon", "rms_norm_eps", 1e-5), Setting("tie_embeddings", "tie_word_embeddings", False),
     Setting("dropout", "resid_pdrop", 0.0, also=("embd_pdrop",))),
    fixed=_FIXED, requires={"attention_bias": False}, read=_read_phi3, write=_write_phi3, ignored=_IGNORED,
    renames=_RENAMES)


def _read_smollm3(settings: Settings) -> dict[str, Any]:
    """Reads the biases, the rotary positions, and which layers have them or a window."""
    count, interval = num_layers(settings), typed(settings, "no_rope_layer_interval", int, 4)
    flags = settings.get("no_rope_layers")
    if flags is None:
        if interval < 1:
            raise ValueError(f"no_rope_layer_interval={interval}: expected at least 1")
        flags = [int((layer + 1) % interval != 0) for layer in range(count)]
    if not isinstance(flags, list) or len(flags) < count:
        raise ValueError(f"no_rope_layers={shown(flags)}: expected a list with 1 or 0 for each of the {count} layers")
    rotates = [translated(flag, {1: True, 0: False}, "no_rope_layers") for flag in flags[:count]]
    has_windows = typed(settings, "use_sliding_window", bool, False)
    window = typed(settings, "sliding_window", int | None, None) if has_windows else None
    default = [SLIDING if window is not None and not rotated else FULL for rotated in rotates]
    windows = [translated(name, {FULL: None, SLIDING: window}, "layer_types")
               for name in layer_types(settings, default)]
    kinds = tuple(map(LayerKind, windows, rotates))
    attention, mlp = typed(settings, "attention_bias", bool, False), typed(settings, "mlp_bias", bool, False)
    return {**read_rope(settings, default_base=2_000_000.0), "layer_pattern": shortest_period(kinds),
            "use_bias": attention, "use_mlp_bias": mlp, **read_banned(settings)}


def _write_smollm3(config: ModelConfig) -> dict[str, Any]:
    """Writes what ``_read_smollm3`` reads."""
    rotates = [int(layer.positions == "rope") for layer in layers_of(config)]
    windows, mlp = write_windows(config), config.use_bias if config.use_mlp_bias is None else config.use_mlp_bias
    return {**write_rope(config), **windows, "use_sliding_window": windows["sliding_window"] is not None,
            "no_rope_layers": rotates, "attention_bias": config.use_bias, "mlp_bias": mlp, **write_banned(config)}


SMOLLM3 = Family(
    "smollm3", "SmolLM3ForCausalLM", WEIGHTS,
    (*_SETTINGS, Setting("norm_epsilon", "rms_norm_eps", 1e-6), Setting("tie_embeddings", "tie_word_embeddings", True)),
    fixed=_FIXED, requires={"partial_rotary_factor": 1.0}, read=_read_smollm3, write=_write_smollm3, ignored=_IGNORED,
    renames=_RENAMES)
