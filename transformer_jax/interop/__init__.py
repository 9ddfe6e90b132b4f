"""Load and write models in the Hugging Face format, without PyTorch and without pickle files."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.interop.families import FAMILIES, get_family, register_family
    from transformer_jax.interop.family import Family
    from transformer_jax.interop.gguf import from_gguf
    from transformer_jax.interop.huggingface import from_huggingface, to_huggingface
    from transformer_jax.interop.mapping import Weight, linear, norm
    from transformer_jax.interop.sentence_transformers import to_sentence_transformers
    from transformer_jax.interop.setting import REQUIRED, Setting
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "FAMILIES", "REQUIRED", "Family", "Setting", "Weight", "from_gguf", "from_huggingface", "get_family", "linear",
    "norm", "register_family", "to_huggingface", "to_sentence_transformers",
]
