"""Load models from GGUF files, the format of llama.cpp.

The metadata is translated to the settings of a Hugging Face ``config.json``, and the names of the
tensors to those of Hugging Face, so that the tables of the families read both formats.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from transformer_jax.interop.checking import check_sizes, stored_dtype, with_stored_ties
from transformer_jax.interop.family import Family
from transformer_jax.interop.gguf_file import GgufTensor, read_gguf
from transformer_jax.interop.gguf_tokenizer import tokenizer_of
from transformer_jax.interop.gpt2 import GPT2
from transformer_jax.interop.huggingface import read_model
from transformer_jax.interop.llama import LLAMA, QWEN2
from transformer_jax.interop.setting import shown
from transformer_jax.interop.tensors import TensorFiles
from transformer_jax.settings import checked_path
from transformer_jax.training.bundle import Bundle

_SIZES = {"block_count": "num_hidden_layers", "embedding_length": "hidden_size", "context_length":
          "max_position_embeddings", "feed_forward_length": "intermediate_size", "attention.head_count":
          "num_attention_heads", "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
          "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
_GPT2_SIZES = {"block_count": "n_layer", "embedding_length": "n_embd", "context_length": "n_positions",
               "feed_forward_length": "n_inner", "attention.head_count": "n_head",
               "attention.layer_norm_epsilon": "layer_norm_epsilon"}
_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_GPT2_NAMES = {
    "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
    "output": "lm_head", "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}


@dataclasses.dataclass(frozen=True)
class _Architecture:
    """What a GGUF file of an architecture has in place of a Hugging Face directory.

    Attributes:
      family: the family whose tables describe the settings and the tensors.
      sizes: from the names in the metadata, after the name of the architecture, to those in
        ``config.json``.
      names: from the parts of the names of tensors to those of Hugging Face.
      layer: the prefix of the tensors of a layer.
      has_pairs: True if the rows of queries and keys are stored in pairs of rotated channels.
    """

    family: Family
    sizes: Mapping[str, str]
    names: Mapping[str, str]
    layer: str
    has_pairs: bool = False


# GPT-2's tensors are [out, in] in GGUF, as those of all other families.
_GPT2 = dataclasses.replace(GPT2, weights=tuple(
    dataclasses.replace(weight, transposed=weight.ours.endswith(".kernel")) for weight in GPT2.weights))
_ARCHITECTURES = {
    "llama": _Architecture(LLAMA, _SIZES, _LLAMA_NAMES, "model.layers", has_pairs=True),
    "qwen2": _Architecture(QWEN2, _SIZES, _LLAMA_NAMES, "model.layers"),
    "gpt2": _Architecture(_GPT2, _GPT2_SIZES, _GPT2_NAMES, "transformer.h"),
}
# Metadata that changes what a model computes, and the values that change nothing.
_UNSUPPORTED = {"expert_count": (0,), "rope.scaling.type": ("none",), "attention.sliding_window": (0,)}


def from_gguf(path: str | pathlib.Path, *, dtype: str | None = None, mesh: Mesh | None = None) -> Bundle:
    """Loads a model, its config and its tokenizer from a GGUF file.

    Quantised tensors are converted to float32, exactly as llama.cpp defines them. To decode with
    small weights, quantise the loaded model: ``tj.prepare_for_decoding(model, weights="int8")``.

    Args:
      path: a GGUF file with a model of the architecture ``llama`` (Mistral too), ``qwen2`` or
        ``gpt2``, whose tensors are F32, F16, BF16, Q8_0, Q4_0, Q4_K or Q6_K.
      dtype: the dtype of the parameters and of the computation, such as ``"bfloat16"``; ``None``
        for that of the stored tensors, or float32 if they are quantised or have several.
      mesh: the mesh over which the parameters are sharded; ``None`` to put the model on the first
        device.

    Returns:
      A bundle with the model, its config, and the tokenizer, which is ``None`` with a warning if
      this library cannot make it from the metadata.

    Raises:
      ValueError: if the file is damaged, if its architecture or the format of its tensors is not
        supported, or if our config cannot express its metadata.
    """
    path = checked_path("path", path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    metadata, stored = read_gguf(path)
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise ValueError(f"{path} has a model of the architecture {shown(name)}; expected one of "
                         f"{', '.join(_ARCHITECTURES)}")
    architecture = _ARCHITECTURES[name]
    family, settings = architecture.family, _settings(path, name, architecture, metadata, stored)
    try:
        config = family.read_config(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {family.in_their_words(str(error))}") from error
    if architecture.has_pairs:
        stored = [_without_pairs(tensor, settings) for tensor in stored]
    files = TensorFiles.of(stored, _renamed(architecture))
    check_sizes(family, config, files, path)
    config = with_stored_ties(family, config, files, path, settings)
    dtype = dtype or stored_dtype(files, path)
    config = config.replace(dtype=dtype, param_dtype=dtype)
    tokenizer, reason = tokenizer_of(metadata)
    if tokenizer is None:
        warnings.warn(f"{path} is loaded without a tokenizer: {reason}", stacklevel=2)
    return Bundle(model=read_model(family, config, files, path, mesh, settings), tokenizer=tokenizer, config=config)


def _settings(path: pathlib.Path, name: str, architecture: _Architecture, metadata: Mapping[str, Any],
              tensors: list[GgufTensor]) -> dict[str, Any]:
    """Translates the metadata to the settings of a ``config.json``."""
    for key, neutral in _UNSUPPORTED.items():
        value = metadata.get(f"{name}.{key}", neutral[0])
        if value not in neutral:
            raise ValueError(f"{path} has {name}.{key}={shown(value)}, which is not supported")
    settings = {theirs: metadata[f"{name}.{ours}"] for ours, theirs in architecture.sizes.items()
                if f"{name}.{ours}" in metadata}
    if f"{name}.context_length" not in metadata:
        raise ValueError(f"{path} has no {name}.context_length, the longest text in tokens")
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError(f"{path} has no tensor token_embd.weight, the table of tokens")
    heads, dim = settings.get("num_attention_heads"), settings.get("hidden_size")
    rotated = metadata.get(f"{name}.rope.dimension_count")
    if rotated is not None and isinstance(heads, int) and isinstance(dim, int) and heads:
        size = settings.get("head_dim", dim // heads)
        if rotated != size:
            raise ValueError(f"{path} has {name}.rope.dimension_count={shown(rotated)}; expected {shown(size)}, all "
                             "channels of a head")
    biases = {"attention_bias": "blk.0.attn_q.bias" in shapes} if name == "llama" else {}
    return settings | biases | {"model_type": architecture.family.model_type,
                                "vocab_size": shapes["token_embd.weight"][0],
                                "tie_word_embeddings": "output.weight" not in shapes}


def _renamed(architecture: _Architecture) -> Callable[[str], str]:
    """Returns a function from the name of a tensor in GGUF to that of Hugging Face."""
    def renamed(name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in architecture.names:
            return name
        layer = "" if match[1] is None else f"{architecture.layer}.{match[1]}."
        return f"{layer}{architecture.names[match[2]]}.{match[3]}"

    return renamed


def _without_pairs(tensor: GgufTensor, settings: Mapping[str, Any]) -> GgufTensor:
    """Gives queries and keys the order of Hugging Face: GGUF has the two channels that a rotation
    mixes next to each other, and Hugging Face has them half a head apart."""
    kind = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(weight|bias)", tensor.name)
    if kind is None:
        return tensor
    heads = settings["num_attention_heads"]
    heads = heads if kind[1] == "q" else settings.get("num_key_value_heads", heads)
    size = tensor.shape[0]
    if not isinstance(heads, int) or heads < 1 or size % (2 * heads):
        return tensor  # check_tensors names the wrong shape
    order = np.arange(size).reshape(heads, size // heads // 2, 2).swapaxes(1, 2).ravel()
    return dataclasses.replace(tensor, order=order)
