"""The models on the road to the Transformer, on the same tokenizers, data, training and
decoding."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.baselines.analogies import analogy_accuracy, most_similar, unit_vectors, word_ids
    from transformer_jax.baselines.cooccurrence import Cooccurrences, count_cooccurrences, matrix_bytes
    from transformer_jax.baselines.elmo import Elmo
    from transformer_jax.baselines.gradients import gradient_by_distance
    from transformer_jax.baselines.next_token_tables import NextToken, next_token_table, next_tokens, plot_next_tokens
    from transformer_jax.baselines.ngram_counts import NgramCounts, count_ngrams
    from transformer_jax.baselines.ngram_files import load_ngrams, save_ngrams
    from transformer_jax.baselines.ngram_sampling import generate_ngrams
    from transformer_jax.baselines.ngrams import NgramModel
    from transformer_jax.baselines.recurrent import RecurrentModel
    from transformer_jax.baselines.recurrent_pairs import RecurrentPairs
    from transformer_jax.baselines.smoothing import Smoothing
    from transformer_jax.baselines.word_vectors import WordVectors
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "Cooccurrences", "Elmo", "NextToken", "NgramCounts", "NgramModel", "RecurrentModel", "RecurrentPairs", "Smoothing",
    "WordVectors", "analogy_accuracy", "count_cooccurrences", "count_ngrams", "generate_ngrams", "gradient_by_distance",
    "load_ngrams", "matrix_bytes", "most_similar", "next_token_table", "next_tokens", "plot_next_tokens",
    "save_ngrams", "unit_vectors", "word_ids",
]
