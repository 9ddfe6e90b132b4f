"""The encoder-decoder families BART, mBART, Marian, Pegasus and M2M100, whose tensors have the same
names. The models of NLLB are of the family M2M100.

BART and Marian apply a norm after each sub-layer, the others before it. BART and mBART have learned
positions (in the encoder and in the decoder, starting at row 2 of a table) and a norm after the
embeddings. The others have sinusoidal positions, with all sines before all cosines; those of M2M100
start after the id of the padding token, and have other frequencies.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from transformer_jax.config import ModelConfig
from transformer_jax.interop.family import Family, read_targets, write_targets
from transformer_jax.interop.mapping import Weight, linear, norm
from transformer_jax.interop.setting import ACTIVATIONS, Setting, Settings, require_settings, typed


def _attention(ours: str, theirs: str) -> tuple[Weight, ...]:
    """Makes the rows for the four linear layers of attention."""
    return (*linear(f"{ours}.query", f"{theirs}.q_proj"), *linear(f"{ours}.key", f"{theirs}.k_proj"),
            *linear(f"{ours}.value", f"{theirs}.v_proj"), *linear(f"{ours}.output", f"{theirs}.out_proj"))


def _side(side: str, embeddings: str) -> tuple[Weight, ...]:
    """Makes the rows for one side, ``"encoder"`` or ``"decoder"``."""
    block, layer = f"{side}.blocks", f"model.{side}.layers.{{layer}}"
    return (
        Weight(f"{embeddings}.position", f"model.{side}.embed_positions.weight"),
        *norm(f"{embeddings}.norm", f"model.{side}.layernorm_embedding"),
        *_attention(f"{block}.attention", f"{layer}.self_attn"),
        *norm(f"{block}.attention_norm", f"{layer}.self_attn_layer_norm"),
        *_attention(f"{block}.cross_attention", f"{layer}.encoder_attn"),
        *norm(f"{block}.cross_norm", f"{layer}.encoder_attn_layer_norm"),
        *linear(f"{block}.mlp.up", f"{layer}.fc1"),
        *linear(f"{block}.mlp.down", f"{layer}.fc2"),
        *norm(f"{block}.mlp_norm", f"{layer}.final_layer_norm"),
        *norm(f"{side}_norm", f"model.{side}.layer_norm"),
    )


_WEIGHTS = (
    Weight("embeddings.token", "model.shared.weight",
           also=("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")),
    *_side("encoder", "embeddings"),
    *_side("decoder", "target_embeddings"),
    # A buffer, which a model without its head does not have; transformers initialises it with
    # zeros.
    Weight("embeddings.output_bias", "final_logits_bias", is_row=True, default=0.0),
    Weight("embeddings.output", "lm_head.weight"),
)

def _settings(vocab_size: int, activation: str = "gelu", scales: bool = False,
              attention_dropout: float = 0.0) -> tuple[Setting, ...]:
    """Makes the settings of a family; the arguments are its defaults if config.json leaves them
    out."""
    return (
        Setting("vocab_size", "vocab_size", vocab_size),
        Setting("max_len", "max_position_embeddings", 1024),
        Setting("num_encoder_layers", "encoder_layers", 12),
        Setting("num_decoder_layers", "decoder_layers", 12),
        Setting("num_heads", "encoder_attention_heads", 16, also=("decoder_attention_heads",)),
        Setting("model_dim", "d_model", 1024),
        Setting("mlp_dim", "encoder_ffn_dim", 4096, also=("decoder_ffn_dim",)),
        Setting("activation", "activation_function", activation, values=ACTIVATIONS),
        Setting("scale_embeddings", "scale_embedding", scales),
        Setting("tie_embeddings", "tie_word_embeddings", True),
        Setting("dropout", "dropout", 0.1),
        Setting("attention_dropout", "attention_dropout", attention_dropout),
        Setting("init_std", "init_std", 0.02),
    )


def _read(vocab_size: int, start: int | None, settings: Settings) -> dict[str, Any]:
    """Reads the start of a target, and checks the settings that both sides share.

    Args:
      vocab_size: the vocabulary size if config.json leaves it out.
      start: the id of the token that starts a target if config.json leaves it out.
      settings: the content of config.json.
    """
    vocab_size = settings.get("vocab_size", vocab_size)
    require_settings(settings, {"decoder_attention_heads": settings.get("encoder_attention_heads", 16),
                                "decoder_ffn_dim": settings.get("encoder_ffn_dim", 4096)})
    targets = typed(settings, "decoder_vocab_size", int | None, None)
    if targets not in (None, vocab_size):
        raise ValueError(f"this {settings['model_type']} model has {vocab_size} tokens for sources and {targets} for "
                         "targets; only models that share one vocabulary are supported")
    starts = {"decoder_start_token_id": start}
    if settings.get("force_bos_token_to_be_generated"):  # the older name in the first files of BART
        starts["forced_bos_token_id"] = settings.get("bos_token_id", 0)
    return read_targets(starts | dict(settings))


def _write(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """Writes the start of a target, and the settings that transformers needs."""
    if not config.tie_embeddings:
        raise ValueError("tie_embeddings=False (expected True)")
    # In Marian, the padding token is also the token that starts a target.
    padding = {"pad_token_id": config.start_ids[0]} if model_type == "marian" and config.start_ids else {}
    return padding | {"is_encoder_decoder": True} | write_targets(config)


def _read_m2m100(settings: Settings) -> dict[str, Any]:
    """Reads the id of the padding token too, after which the positions start."""
    offset = 1 + typed(settings, "pad_token_id", int, 1)
    if offset < 1:
        raise ValueError(f"pad_token_id={offset - 1}: expected 0 or more, because positions start after it")
    return _read(128_112, 2, settings) | {"position_offset": offset}


def _write_m2m100(config: ModelConfig) -> dict[str, Any]:
    """Writes the id of the padding token too."""
    if config.position_offset < 1:
        raise ValueError("position_offset=0 (expected 1 or more)")
    return _write("m2m_100", config) | {"pad_token_id": config.position_offset - 1}


_LEARNED = {"positions": "learned", "position_offset": 2, "use_embedding_norm": True}
_SINUSOIDS = {"positions": "sinusoidal_halves"}
_POSITIONS = r"model\.(encoder|decoder)\.embed_positions\.weight"


def _sinusoids(length: int, dim: int) -> np.ndarray:
    """Computes sinusoidal positions with all sines before all cosines, ``[length, dim]``."""
    angles = np.arange(length)[:, None] / 10_000.0 ** (2 * np.arange(dim // 2) / dim)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _m2m100_sinusoids(length: int, dim: int) -> np.ndarray:
    """Computes the sinusoidal positions of M2M100, ``[length, dim]``, whose row of padding is 0."""
    angles = np.arange(length)[:, None] / 10_000.0 ** (np.arange(dim // 2) / max(dim // 2 - 1, 1))
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    table[1] = 0.0  # published models have this id for padding
    return table


def _requires(norm_position: str, positions: dict[str, Any]) -> dict[str, Any]:
    """Returns the required values of settings in older files, from when one class served all these
    families."""
    return {"share_encoder_decoder_embeddings": True, "is_decoder": False,
            "normalize_before": norm_position == "pre", "add_final_layer_norm": norm_position == "pre",
            "normalize_embedding": positions is _LEARNED, "static_position_embeddings": positions is _SINUSOIDS}


# The last two columns are defaults: the vocabulary size, and the token that starts a target.
BART, MBART, MARIAN, PEGASUS = (
    Family(model_type, architecture, _WEIGHTS, _settings(vocab_size),
           fixed={"family": "encoder_decoder", "norm_position": norm_position, "use_output_bias": True} | positions,
           requires=_requires(norm_position, positions),
           read=functools.partial(_read, vocab_size, start), write=functools.partial(_write, model_type),
           ignored=(r"model\.(encoder|decoder)\.version",),  # in older files
           # Sinusoidal positions are computed, but some files store them too.
           constants={} if positions is _LEARNED else {_POSITIONS: _sinusoids},
           renames=((r"^(?=(shared|encoder|decoder)\.)", "model."),))
    for model_type, architecture, norm_position, positions, vocab_size, start in (
        ("bart", "BartForConditionalGeneration", "post", _LEARNED, 50_265, 2),
        ("mbart", "MBartForConditionalGeneration", "pre", _LEARNED, 50_265, None),
        ("marian", "MarianMTModel", "post", _SINUSOIDS, 58_101, 58_100),
        ("pegasus", "PegasusForConditionalGeneration", "pre", _SINUSOIDS, 50_265, 0)))
M2M100 = Family(
    "m2m_100", "M2M100ForConditionalGeneration", _WEIGHTS, _settings(128_112, "relu", True, 0.1),
    fixed={"family": "encoder_decoder", "norm_position": "pre", "positions": "sinusoidal_fairseq"},
    read=_read_m2m100, write=_write_m2m100, constants={rf"{_POSITIONS}s?": _m2m100_sinusoids},
    renames=((r"^(?=(shared|encoder|decoder)\.)", "model."),))
