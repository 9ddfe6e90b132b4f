"""Tokenizers, corpora and batches."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.data.conversations import (
        Conversation,
        Message,
        encode_conversation,
        encode_prompt,
        read_demonstrations,
    )
    from transformer_jax.data.dates import dates_corpus, generate_dates
    from transformer_jax.data.lines import LineRows, split_lines, text_lines
    from transformer_jax.data.masking import Masking, masked_evaluation_batches
    from transformer_jax.data.packed_conversations import PackedConversations
    from transformer_jax.data.packed_pairs import PackedPairs, pair_evaluation_batches
    from transformer_jax.data.packing import pack
    from transformer_jax.data.pairs import Pairs, read_pairs, read_tfds_pairs
    from transformer_jax.data.preferences import Comparison, read_comparisons, read_prompts
    from transformer_jax.data.text import read_documents, read_tfds
    from transformer_jax.data.token_file import TokenFile
    from transformer_jax.data.tokenizer import Tokenizer
    from transformer_jax.data.tokens import StreamDecoder, TextTokenizer
    from transformer_jax.data.windows import Windows, evaluation_batches, make_batches
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "Comparison", "Conversation", "LineRows", "Masking", "Message", "PackedConversations", "PackedPairs", "Pairs",
    "StreamDecoder", "TextTokenizer", "TokenFile", "Tokenizer", "Windows", "dates_corpus", "encode_conversation",
    "encode_prompt", "evaluation_batches", "generate_dates", "make_batches", "masked_evaluation_batches", "pack",
    "pair_evaluation_batches", "read_comparisons", "read_demonstrations", "read_documents", "read_pairs",
    "read_prompts", "read_tfds", "read_tfds_pairs", "split_lines", "text_lines",
]
