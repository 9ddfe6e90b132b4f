"""Word vectors: every word learns a vector from the words near it."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.baselines.analogies import analogy_accuracy, most_similar, word_ids
from transformer_jax.baselines.negative_sampling import BLOCK, BLOCKS
from transformer_jax.baselines.word_vectors import WordVectors, batch_loss, make_word_vector_step
from transformer_jax.config.word_vectors import WordVectorConfig
from transformer_jax.data import TokenFile, Tokenizer, read_documents
from transformer_jax.data.text import check_texts
from transformer_jax.data.words import Subsampling, WordRows, Words
from transformer_jax.settings import require
from transformer_jax.tasks.base import Task
from transformer_jax.tasks.language_model import read_corpus
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.loop import TrainStep
from transformer_jax.training.optimizer import make_schedule
from transformer_jax.training.step import Batch, Sums

_MARGIN = 1.03  # more words than expected may be kept; a batch has room for this many times their number
_POWER = 0.75  # of the frequencies with which random words are drawn


class WordVectorLearning(Task):
    """Word vectors by skip-gram or CBOW with negative sampling, on documents whose words are in
    lower case and without punctuation.

    A batch is a number of rows of ``model.max_len`` words. A step makes one update after the other
    with parts of the batch of about 256 words, so a batch may be large.
    """

    name = "word_vectors"
    family = "word_vectors"

    def read(self, data: Iterable[str] | None = None, held_out: Iterable[str] | None = None) -> tuple[Any, Any]:
        """Reads the documents, and the held-out documents if the config or the caller names any."""
        settings = self.config.data
        documents = read_corpus(settings) if data is None else check_texts(data)
        if held_out is not None:
            held_out = check_texts(held_out)
        elif settings.validation_path is not None:
            held_out = read_documents(settings.validation_path, key=settings.text_key)
        return Words(documents), None if held_out is None else Words(held_out)

    def prepare(self, examples: Iterable[str], held_out: Iterable[str] | None, tokenizer: Tokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Counts the words and cuts their stream into rows."""
        self._check_optimizer()
        settings = self._settings
        file = TokenFile.build(examples, tokenizer, cache_dir)
        counts_V = np.bincount(file.tokens, minlength=tokenizer.vocab_size)
        is_kept_V = counts_V >= settings.min_count
        is_kept_V[np.array([tokenizer.end_of_text_id, *tokenizer.special_ids])] = False
        rows = WordRows(file.tokens, is_kept_V, tokenizer.end_of_text_id, settings.max_len)
        counts_V = counts_V * is_kept_V
        noise_V = counts_V ** _POWER
        self._cumulative_V = jnp.asarray(np.cumsum(noise_V / noise_V.sum()), jnp.float32)
        keep_V = keep_probabilities(counts_V, settings.subsample)
        transform = self._subsampling(float((counts_V * keep_V).sum() / counts_V.sum()), keep_V)
        contents = [pathlib.Path(cast(np.memmap, file.tokens).filename or "").name]
        evaluation = None
        if held_out is not None:
            other = TokenFile.build(held_out, tokenizer, cache_dir)
            contents.append(pathlib.Path(cast(np.memmap, other.tokens).filename or "").name)
            held_out_rows = WordRows(other.tokens, is_kept_V, tokenizer.end_of_text_id, settings.max_len)
            evaluation = lambda size: self._evaluation_batches(held_out_rows, transform)
        num_words = int(counts_V.sum())
        return TaskData(
            train=rows, contents=contents, evaluation_batches=evaluation, transform=transform, shown=tokenizer,
            summary=f"{num_words:,} words of {int(is_kept_V.sum()):,} kinds to train on, one epoch is "
                    f"{math.ceil(len(rows) / self.config.batch_size):,} steps")

    def train_step(self) -> TrainStep:
        """Returns the step that updates only the vectors of the words of a batch."""
        return make_word_vector_step(self._cumulative_V, make_schedule(self.config.optim, self.config.steps))

    def loss(self, model: WordVectors, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the loss of negative sampling, in nats, and the number of pairs of words."""
        return batch_loss(model, batch, self._cumulative_V, jax.random.key(0) if key is None else key)

    def forward(self, model: WordVectors, batch: Batch, key: jax.Array | None = None) -> jax.Array:
        """Returns the vectors of the words of a batch."""
        del key
        return model(batch["tokens"])

    def show(self, model: Any, step: int, data: TaskData) -> str | None:
        """Lists the nearest words of each word of ``sample.prompt`` that has a vector."""
        bundle = Bundle(model=model, tokenizer=data.shown, config=self.config.model)
        lines = [f"{word}: {', '.join(near for near, _ in most_similar(bundle, [word], top=8))}"
                 for word in self.config.sample.prompt.split() if word_ids(bundle, [word])[0] is not None]
        return "\n".join(lines) or None

    def measure(self, bundle: Bundle, data: Any = None, *, batch_size: int = 32) -> dict[str, float]:
        """Measures the accuracy at analogies such as "king is to queen as man is to woman".

        Args:
          bundle: The word vectors with their tokenizer.
          data: The path of a file of analogies in the format of ``questions-words.txt``.
          batch_size: Not used.

        Returns:
          ``accuracy``, ``questions`` (those whose four words are known) and ``skipped``.

        Raises:
          ValueError: If no file is given, or it has no analogies.
        """
        if data is None:
            raise ValueError("no analogies are given; pass --data=questions-words.txt, or in Python its path")
        return analogy_accuracy(bundle, data)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch from which no word is left out."""
        num_steps = math.ceil(batch_size * self.config.model.max_len / (BLOCK * BLOCKS))
        return dict.fromkeys(("tokens", "segment_ids"), jax.ShapeDtypeStruct((BLOCK * BLOCKS, num_steps), np.int32))

    def next_command(self, workdir: str) -> str:
        """Returns a command that measures the vectors."""
        return f"transformer-jax evaluate --workdir={workdir} --data=questions-words.txt"

    @property
    def _settings(self) -> WordVectorConfig:
        return cast(WordVectorConfig, self.config.model)

    def _check_optimizer(self) -> None:
        """Raises ValueError for settings that the training step does not follow."""
        optim = self.config.optim
        for field, value in {"name": "sgd", "beta1": 0.0, "weight_decay": 0.0, "clip_norm": None, "accumulation": 1,
                             "gradient_dtype": None}.items():
            found = getattr(optim, field)
            require(found == value, f"optim.{field}={found!r}, but word vectors are trained by plain gradient descent; "
                    f"set optim.{field}={value!r}, as the recipe word_vectors does")

    def _subsampling(self, kept: float, keep_V: np.ndarray) -> Subsampling:
        """Returns the transformation of batches, with room for the words that are expected."""
        size = self.config.batch_size
        num_words = min(kept * _MARGIN, 1.0) * size * self._settings.max_len
        return Subsampling(keep_V.astype(np.float32), math.ceil(num_words / (BLOCK * BLOCKS)), BLOCKS, BLOCK, size)

    def _evaluation_batches(self, rows: WordRows, transform: Subsampling) -> Iterator[Mapping[str, np.ndarray]]:
        """Yields the held-out rows in order; the same words are left out each time."""
        size = self.config.batch_size
        for start in range(0, len(rows), size):
            batch = rows[np.arange(start, min(start + size, len(rows)))]
            missing = size - len(batch["tokens"])
            padded = {name: np.pad(values, ((0, missing), (0, 0))) for name, values in batch.items()}
            found = transform(padded, np.random.default_rng(start))
            yield found


def keep_probabilities(counts_V: np.ndarray, threshold: float) -> np.ndarray:
    """Computes the probability with which each word is kept, as word2vec computes it.

    Args:
      counts_V: The number of times that each word occurs.
      threshold: Words whose frequency is above this fraction are left out at random; 0 keeps all.

    Returns:
      The probabilities.
    """
    if not threshold:
        return np.ones(len(counts_V))
    ratio_V = threshold * counts_V.sum() / np.maximum(counts_V, 1)
    return np.minimum(np.sqrt(ratio_V) + ratio_V, 1.0)
