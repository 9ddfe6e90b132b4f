"""The settings of word vectors."""

from __future__ import annotations

import dataclasses

from transformer_jax.config.families import ModelSettings
from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_choice, require


@dataclasses.dataclass(frozen=True)
class WordVectorConfig(ModelSettings):
    """The settings of word vectors (Mikolov et al., 2013).

    Attributes:
      family: ``word_vectors``.
      vocab_size: Number of token ids. It may be ``None`` only until the tokenizer is known.
      max_len: The number of words in a row that training reads; no window crosses the end of a row.
      num_layers: 1, because there is a single layer of vectors.
      method: ``skip_gram`` (each word near another one predicts it) or ``cbow`` (the mean of the
        words nearby predicts the word between them).
      model_dim: The length of a vector.
      window: The largest distance between two words that are near each other. For each word, the
        distance is drawn from 1 to this number.
      negatives: The number of random words, for each pair of words, that the model learns to tell
        from the true one.
      subsample: Words whose frequency is above this fraction are left out at random, the more
        frequent ones more often. 0 keeps all words.
      min_count: Words that occur less often in the training text are left out.
    """

    family: str = "word_vectors"
    vocab_size: int | None = None
    max_len: int = 512
    num_layers: int = 1
    method: str = "skip_gram"
    model_dim: int = 100
    window: int = 5
    negatives: int = 5
    subsample: float = 1e-3
    min_count: int = 5

    def __post_init__(self):
        check_fields(self)
        check_choice(self, "family", ("word_vectors",))
        check_choice(self, "method", ("skip_gram", "cbow"))
        require(self.num_layers == 1, f"num_layers={self.num_layers}, but word vectors have a single layer; leave it "
                "out")
