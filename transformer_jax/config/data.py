"""Settings of the source of the text and of the tokenizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from transformer_jax.config.ranges import check_fields
from transformer_jax.settings import check_choice, require


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Settings of the tokenizer.

    Attributes:
      kind: The kind of SentencePiece model: ``char``, ``word``, ``bpe`` or ``unigram``. It is
        ignored if ``path`` is given.
      vocab_size: Number of tokens to learn, special tokens included. ``None`` is allowed for
        ``char`` and ``word`` only and keeps every character or word.
      path: A trained SentencePiece model to use instead of training one.
      min_frequency: ``bpe`` pieces that occur less often than this in the text are removed. With a
        value above 1, ``vocab_size`` is an upper limit.
      chat: Whether to add the role tokens that conversations need: ``<|system|>``, ``<|user|>`` and
        ``<|assistant|>``.
    """

    kind: str = "char"
    vocab_size: int | None = None
    path: str | None = None
    min_frequency: int = 1
    chat: bool = False

    def __post_init__(self):
        check_fields(self)
        check_choice(self, "kind", ("char", "word", "bpe", "unigram"))
        require(self.min_frequency == 1 or self.kind == "bpe",
                 f"data.tokenizer.min_frequency={self.min_frequency} is for kind 'bpe', not {self.kind!r}")
        require(self.vocab_size is not None or self.path is not None or self.kind in ("char", "word"),
                 f"data.tokenizer.kind={self.kind!r} needs data.tokenizer.vocab_size")


@dataclasses.dataclass(frozen=True)
class CorpusConfig:
    """One corpus of a mixture.

    Attributes:
      name: The name of the corpus, which ends the names of its metrics, such as
        ``validation_loss_novels``.
      path: A text file, a glob pattern or a JSON file, as in ``data.path``. ``None`` if the texts
        are passed to ``tj.train``.
      weight: The share of the training rows that come from this corpus. The weights of a mixture
        are divided by their sum.
    """

    name: str
    path: str | None = None
    weight: float = 1.0

    def __post_init__(self):
        check_fields(self)
        require(re.fullmatch(r"[A-Za-z0-9_-]+", self.name) is not None,
                f"data.mixture: the name {self.name!r} of a corpus must have letters, digits, '_' and '-' only")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Settings of the data. Exactly one of ``path``, ``mixture``, ``tfds`` and ``generated`` names
    the source.

    Attributes:
      path: A text file, a glob pattern, or a JSON file (one object on each line, or one list of
        objects). Files may be compressed with gzip. For pairs of sentences: ``"SOURCE,TARGET"``
        (two aligned files), a TSV file or a JSON file.
      mixture: Several corpora, each with its name, its path and the weight with which it is drawn,
        as in ``(("novels", "novels/*.txt", 0.6), ("reviews", "reviews.jsonl", 0.4))``. Only
        language modelling and masked language modelling can read a mixture.
      tfds: The name of a data set in TensorFlow Datasets (TFDS).
      generated: ``"dates"`` generates dates in words and their ISO form, for translation;
        ``"agreement"`` generates Portuguese sentences, for language models.
      source: Where the source sentences are: the column of a TSV file, the key in JSON objects, or
        the language of a TFDS data set.
      target: Where the target sentences are, in the same way.
      text_key: The key of the text in JSON objects.
      label_key: The key of the label in JSON objects, for classification.
      validation_path: A file to validate on. If it is given, nothing is held out of ``path``.
      validation_fraction: The fraction of the tokens, at the end, that is held out for validation.
      max_len: The length of the rows of a batch, in tokens, if the model can read more than that.
        ``None`` uses ``model.max_len``.
      mask_probability: The fraction of the tokens to predict in masked language modelling.
      mask_whole_words: Whether to mask whole words instead of single tokens.
      cache_dir: The directory for the files of token ids. ``None`` puts them inside the workdir.
      tokenizer: Settings of the tokenizer.
    """

    path: str | None = None
    mixture: tuple[CorpusConfig, ...] = ()
    tfds: str | None = None
    generated: str | None = None
    source: str | None = None
    target: str | None = None
    text_key: str = "text"
    label_key: str = "label"
    validation_path: str | None = None
    validation_fraction: float = 0.1
    max_len: int | None = None
    mask_probability: float = 0.15
    mask_whole_words: bool = False
    cache_dir: str | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()

    def __post_init__(self):
        check_fields(self)
        require(self.generated in (None, "dates", "agreement"),
                f"data.generated={self.generated!r} must be None, 'dates' or 'agreement'")
        object.__setattr__(self, "mixture", tuple(map(_corpus, self.mixture)))
        if not self.mixture:
            return
        names = [corpus.name for corpus in self.mixture]
        repeated = [name for name in names if names.count(name) > 1]
        require(not repeated, f"data.mixture has the name {''.join(repeated[:1])!r} twice; give every corpus its own "
                              "name")
        for field in ("path", "tfds", "generated", "validation_path"):
            require(getattr(self, field) is None,
                    f"data.{field}={getattr(self, field)!r} cannot be used together with data.mixture, where each "
                    f"corpus has its own path and holds out its last part; set one of them to None")


def _corpus(entry: object) -> CorpusConfig:
    """Converts an entry of a mixture, which may be a sequence of a name, a path and a weight."""
    if isinstance(entry, CorpusConfig):
        return entry
    require(isinstance(entry, Sequence) and not isinstance(entry, str) and 1 <= len(entry) <= 3,
            f"data.mixture: {entry!r} is not a corpus; expected (name, path, weight), such as "
            "('novels', 'novels/*.txt', 0.6)")
    return CorpusConfig(*entry)  # pyright: ignore[reportGeneralTypeIssues]
