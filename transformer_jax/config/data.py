"""Where text comes from, and how it becomes ids."""

from __future__ import annotations

import dataclasses

from transformer_jax.settings import check_choice, check_positive, require


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes ids.

    Attributes:
      kind: ``char``, ``word``, ``bpe`` or ``unigram`` (SentencePiece); ignored when ``path`` is
        given.
      vocab_size: pieces to learn, special tokens included; ``None`` for ``char`` keeps every
        character.
      path: a trained SentencePiece model to use instead of training one.
      min_frequency: drop learned ``bpe`` pieces that occur less often in the text; above 1
        ``vocab_size`` is an upper limit.
      chat: add the role tokens that conversations need, ``<|system|>``, ``<|user|>`` and
        ``<|assistant|>``.
    """

    kind: str = "char"
    vocab_size: int | None = None
    path: str | None = None
    min_frequency: int = 1
    chat: bool = False

    def __post_init__(self):
        check_choice(self, "kind", ("char", "word", "bpe", "unigram"))
        check_positive(self, "min_frequency")
        require(self.min_frequency == 1 or self.kind == "bpe",
                 f"data.tokenizer.min_frequency={self.min_frequency} is for kind 'bpe', not {self.kind!r}")
        require(self.vocab_size is not None or self.path is not None or self.kind == "char",
                 f"data.tokenizer.kind={self.kind!r} needs data.tokenizer.vocab_size")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text comes from: exactly one of ``path``, ``tfds`` (a data set's name) and
    ``generated``.

    Attributes:
      path: a text file, a glob or JSONL; for pairs of sentences ``"SOURCE,TARGET"`` (two aligned
        files) or a TSV file.
      tfds: the name of a TensorFlow Datasets set.
      text_key: of JSONL, the key of the text.
      generated: ``"dates"``: dates in words and their ISO form, made up as needed.
      source: where in the data the source sentences are: the column of a TSV file, the language of
        a TFDS set.
      target: likewise.
      mask_probability: fraction of the tokens to predict in masked language modelling.
      mask_whole_words: mask words rather than tokens.
      validation_fraction: the last part of the tokens, held out.
      validation_path: a file to validate on instead; then nothing is held out of ``path``.
      cache_dir: where token files live; ``None``: inside the workdir.
    """

    path: str | None = None
    tfds: str | None = None
    generated: str | None = None
    source: str | None = None
    target: str | None = None
    text_key: str = "text"
    validation_path: str | None = None
    validation_fraction: float = 0.1
    mask_probability: float = 0.15
    mask_whole_words: bool = False
    cache_dir: str | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self):
        require(0.0 < self.validation_fraction < 1.0,
                 f"data.validation_fraction={self.validation_fraction} must be in (0, 1)")
        require(0.0 < self.mask_probability < 1.0, f"data.mask_probability={self.mask_probability} must be in (0, 1)")
        require(self.generated in (None, "dates"), f"data.generated={self.generated!r} is not 'dates'")
