"""Weights from and to Hugging Face's files: no torch, no pickle."""

from transformer_jax.interop.families import FAMILIES, get_family, register_family
from transformer_jax.interop.family import REQUIRED, Family, Setting
from transformer_jax.interop.huggingface import from_huggingface, to_huggingface
from transformer_jax.interop.mapping import Weight, linear, norm

__all__ = ["FAMILIES", "REQUIRED", "Family", "Setting", "Weight", "from_huggingface", "get_family", "linear", "norm",
           "register_family", "to_huggingface"]
