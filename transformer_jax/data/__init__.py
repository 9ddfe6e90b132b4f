"""Tokenizers, corpora and batches."""

from transformer_jax.data.text import read_documents, read_tfds
from transformer_jax.data.token_file import TokenFile
from transformer_jax.data.tokenizer import StreamDecoder, Tokenizer
from transformer_jax.data.windows import Windows, evaluation_batches, make_batches

__all__ = [
    "StreamDecoder",
    "TokenFile",
    "Tokenizer",
    "Windows",
    "evaluation_batches",
    "make_batches",
    "read_documents",
    "read_tfds",
]
