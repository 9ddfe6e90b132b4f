"""Weights from and to Hugging Face's files: no torch, no pickle."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.interop.huggingface import from_huggingface, to_huggingface
    from transformer_jax.interop.mapping import Family, Weight
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "Family", "Weight", "from_huggingface", "to_huggingface",
]
