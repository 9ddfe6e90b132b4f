"""Sentence embeddings: an encoder learns vectors that are close for the two texts of a pair."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from transformer_jax.data import Pairs, Tokenizer, read_pairs
from transformer_jax.data.pair_rows import PairRows
from transformer_jax.decoding.embed import embed
from transformer_jax.models.encoder import Encoder
from transformer_jax.settings import require
from transformer_jax.tasks.base import Task
from transformer_jax.tasks.inputs import split, tokenizer_of
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.tasks.translation import read_translation_data
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.contrastive import contrastive_loss
from transformer_jax.training.step import Batch, Sums


class SentenceEmbedding(Task):
    """Contrastive learning of sentence embeddings on pairs of texts, such as translations or
    questions with their answers. The other pairs of a batch are the negative examples.

    Source: van den Oord et al. (2018); Reimers and Gurevych (2019), Sentence-BERT.
    """

    name = "embed"
    family = "encoder"

    def read(self, data: Iterable[tuple[str, str]] | None = None,
             held_out: Iterable[tuple[str, str]] | None = None) -> tuple[Pairs, Pairs]:
        """Reads the training pairs and the held-out pairs, in the forms that ``translation`` reads.

        Args:
          data: Pairs of texts. ``None`` means the data that the config names.
          held_out: Pairs to evaluate on. ``None`` means the last part of ``data``.

        Returns:
          The training pairs and the held-out pairs.

        Raises:
          ValueError: If no data is given, or an example is not a pair of texts.
        """
        if data is None:
            return read_translation_data(self.config.data)
        pairs = list(Pairs(list(data)))
        if held_out is not None:
            return Pairs(pairs), Pairs(list(held_out))
        train, rest = split(pairs, self.config.data.validation_fraction, "pairs")
        return Pairs(train), Pairs(rest)

    def texts(self, examples: Pairs) -> list[str]:
        """Returns both texts of every pair."""
        return [text for pair in examples for text in pair]

    def prepare(self, examples: Pairs, held_out: Pairs, tokenizer: Tokenizer, cache_dir: pathlib.Path) -> TaskData:
        """Tokenizes the pairs. It stores nothing in ``cache_dir``, because this takes only
        seconds."""
        width = getattr(self.config.model, "model_dim", None)
        for dim in self.config.contrastive.dims:
            require(width is None or dim < width, f"contrastive.dims has {dim}, but the vectors of the model have only "
                    f"{width} numbers; set smaller widths")
        train, validation = (PairRows.build(part, tokenizer, "masked", self.config.row_length)
                             for part in (examples, held_out))
        return TaskData(train=train, contents=[train.digest, validation.digest],
                        summary=f"{len(train):,} pairs of texts, {len(validation):,} held out",
                        evaluation_batches=validation.batches)

    def loss(self, model: Encoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the InfoNCE loss of the pairs, in nats, see ``contrastive_losses``."""
        return contrastive_loss(self.config.contrastive)(model, batch, key)

    def measure(self, bundle: Bundle, data: str | Iterable[tuple[str, str]] | None = None, *,
                batch_size: int = 32) -> dict[str, float]:
        """Measures how well the first text of a pair finds the second one among all second texts.

        Args:
          bundle: A trained encoder with its tokenizer.
          data: Pairs, or a path in the same form as ``config.data.path``. ``None`` means the
            held-out part of the training data.
          batch_size: The number of texts that the model reads at a time.

        Returns:
          ``top1``, the fraction of the texts whose nearest vector is the right one; ``mrr``, the
          mean reciprocal rank of the right one; and ``pairs``, the number of pairs. With
          ``contrastive.dims`` also ``top1_DIM`` for each width.

        Raises:
          ValueError: If the data cannot be read.
        """
        settings = self.config.data
        if isinstance(data, (str, pathlib.Path)):
            pairs: Any = read_pairs(str(data), source=settings.source, target=settings.target)
        else:
            pairs = self.read()[1] if data is None else Pairs(list(data))
        tokenizer, pooling = tokenizer_of(bundle), self.config.contrastive.pooling
        sides = []
        for texts in zip(*pairs, strict=True):
            parts = [embed(bundle.model, list(texts[start:start + batch_size]), tokenizer=tokenizer, pooling=pooling)
                     for start in range(0, len(texts), batch_size)]
            sides.append(np.concatenate(parts))
        ranks = _ranks(*sides)
        shorter = {f"top1_{dim}": float((_ranks(*(side[:, :dim] for side in sides)) == 1).mean())
                   for dim in self.config.contrastive.dims}
        return {"top1": float((ranks == 1).mean()), "mrr": float((1 / ranks).mean()), **shorter, "pairs": len(ranks)}

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of full rows."""
        rows = jax.ShapeDtypeStruct((batch_size, 2, self.config.row_length), np.int32)
        return {"tokens": rows, "segment_ids": rows}

    def next_command(self, workdir: str) -> str:
        """Returns the command that measures the embeddings."""
        return f"transformer-jax evaluate --workdir={workdir}"


def _ranks(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    """Returns the rank, from 1, of the cosine with the right row of ``b`` for each row of ``a``."""
    a_ND, b_ND = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6) for x in (a_ND, b_ND))
    scores_NN = a_ND @ b_ND.T
    return 1 + (scores_NN > np.diagonal(scores_NN)[:, None]).sum(1)
