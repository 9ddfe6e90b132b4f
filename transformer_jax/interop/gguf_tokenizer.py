"""Make a tokenizer from the metadata of a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.interop.setting import shown

# How texts are split before their bytes are merged, by the name in the metadata. GPT-2 uses the
# pattern that is part of the byte-level pre-tokenizer.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"gpt-2": None, "qwen2": rf"{_CONTRACTIONS}\p{{N}}{_REST}",
             "llama-bpe": rf"{_CONTRACTIONS}\p{{N}}{{1,3}}{_REST}"}
_CONTROL, _USER_DEFINED = 3, 4
_ROLES = {"bos_token_id": "bos", "eos_token_id": "eos", "padding_token_id": "pad", "unknown_token_id": "unk"}


def tokenizer_of(metadata: Mapping[str, Any]) -> tuple[HuggingFaceTokenizer | None, str]:
    """Makes the tokenizer that the metadata describes.

    Args:
      metadata: the metadata of a GGUF file.

    Returns:
      The tokenizer and an empty text, or ``None`` and the reason.
    """
    entries = {name.removeprefix("tokenizer.ggml."): value for name, value in metadata.items()
               if name.startswith("tokenizer.ggml.")}
    if not entries:
        return None, "the file has none"
    kind, split = entries.get("model"), entries.get("pre", "gpt-2")
    if kind != "gpt2":
        return None, (f"tokenizer.ggml.model={shown(kind)} is not supported, only 'gpt2' (bytes and merges); load the "
                      "tokenizer from the Hugging Face files of the model")
    if split not in _PATTERNS:
        return None, f"tokenizer.ggml.pre={shown(split)} is not supported; expected one of {', '.join(_PATTERNS)}"
    tokens, merges = entries.get("tokens", []), entries.get("merges", [])
    if not _are_strings(tokens) or not _are_strings(merges) or not tokens:
        return None, "tokenizer.ggml.tokens and tokenizer.ggml.merges must be lists of strings"
    types = entries.get("token_type", [])
    added = [{"id": number, "content": token, "special": kind == _CONTROL, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False}
             for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
             if kind in (_CONTROL, _USER_DEFINED)]
    bytes_of = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    pattern = _PATTERNS[split]
    steps = [] if pattern is None else [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]
    description = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, bytes_of | {"use_regex": pattern is None}]},
        "post_processor": None, "decoder": bytes_of | {"use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}}
    ids = {role: entries[name] for name, role in _ROLES.items() if isinstance(entries.get(name), int)}
    try:
        return HuggingFaceTokenizer.make(json.dumps(description), {"tokenizer_class": "PreTrainedTokenizerFast"},
                                         ids), ""
    except (ImportError, ValueError) as error:
        return None, str(error)


def _are_strings(values: Any) -> bool:
    """Returns True for a list of strings."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
