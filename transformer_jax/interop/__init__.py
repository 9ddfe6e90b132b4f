"""Weights from and to Hugging Face's files: no torch, no pickle."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.interop.families import FAMILIES, get_family, register_family
    from transformer_jax.interop.family import REQUIRED, Family, Setting
    from transformer_jax.interop.huggingface import from_huggingface, to_huggingface
    from transformer_jax.interop.mapping import Weight, linear, norm
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "FAMILIES", "REQUIRED", "Family", "Setting", "Weight", "from_huggingface", "get_family", "linear", "norm",
    "register_family", "to_huggingface",
]
