"""Tokenizers, readers of data files, and batches."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.data.agreement import (
        AGREEMENT_FAMILIES,
        AgreementSentence,
        agreement_contrasts,
        agreement_corpus,
        generate_agreement,
    )
    from transformer_jax.data.cleaning import Cleaning, clean_corpus
    from transformer_jax.data.cleaning_report import CleaningReport
    from transformer_jax.data.conversations import (
        Conversation,
        Message,
        encode_conversation,
        encode_prompt,
    )
    from transformer_jax.data.dates import dates_corpus, generate_dates
    from transformer_jax.data.deduplication import Deduplicated, Duplicate, deduplicate
    from transformer_jax.data.forms import read_demonstrations
    from transformer_jax.data.labelled import LabelledText, LabelledWords, read_labelled_texts, read_labelled_words
    from transformer_jax.data.labelled_rows import LabelledRows
    from transformer_jax.data.lines import LineRows, split_lines, text_lines
    from transformer_jax.data.masking import Masking, masked_evaluation_batches
    from transformer_jax.data.mixture import Mixture
    from transformer_jax.data.packed_conversations import PackedConversations
    from transformer_jax.data.packed_pairs import PackedPairs, pair_evaluation_batches
    from transformer_jax.data.packing import pack
    from transformer_jax.data.pairs import Pairs, read_pairs, read_tfds_pairs
    from transformer_jax.data.preferences import Comparison, read_comparisons, read_prompts
    from transformer_jax.data.quality import QualityClassifier
    from transformer_jax.data.text import read_documents, read_tfds
    from transformer_jax.data.token_file import TokenFile
    from transformer_jax.data.tokenizer import Tokenizer
    from transformer_jax.data.tokens import StreamDecoder, TextTokenizer
    from transformer_jax.data.windows import Windows, evaluation_batches, make_batches
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "AGREEMENT_FAMILIES", "AgreementSentence", "Cleaning", "CleaningReport", "Comparison", "Conversation",
    "Deduplicated", "Duplicate", "LabelledRows", "LabelledText", "LabelledWords", "LineRows", "Masking", "Message",
    "Mixture", "PackedConversations", "PackedPairs", "Pairs", "QualityClassifier", "StreamDecoder", "TextTokenizer",
    "TokenFile", "Tokenizer", "Windows", "agreement_contrasts", "agreement_corpus", "clean_corpus", "dates_corpus",
    "deduplicate", "encode_conversation", "encode_prompt", "evaluation_batches", "generate_agreement",
    "generate_dates", "make_batches", "masked_evaluation_batches", "pack", "pair_evaluation_batches",
    "read_comparisons", "read_demonstrations", "read_documents", "read_labelled_texts", "read_labelled_words",
    "read_pairs", "read_prompts", "read_tfds", "read_tfds_pairs", "split_lines", "text_lines",
]
