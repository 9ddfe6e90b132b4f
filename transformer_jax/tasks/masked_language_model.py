"""Masked language modelling: an encoder learns to restore masked tokens of lines of text."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from transformer_jax.data import (
    LineRows,
    Masking,
    Tokenizer,
    masked_evaluation_batches,
    read_documents,
    split_lines,
    text_lines,
)
from transformer_jax.data.sentencepiece_training import MASK
from transformer_jax.data.text import check_texts
from transformer_jax.decoding.fill_mask import check_masked, fill_mask
from transformer_jax.models.encoder import Encoder
from transformer_jax.ops.losses import cross_entropy
from transformer_jax.tasks.base import Task
from transformer_jax.tasks.inputs import tokenizer_of
from transformer_jax.tasks.language_model import read_corpus, read_held_out
from transformer_jax.tasks.masked_guesses import NUM_GUESSES, bigram_guesses, unigram_guesses
from transformer_jax.tasks.mixtures import for_each_corpus, mixed, read_corpora, texts_of
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import masked_logits, masked_token_loss
from transformer_jax.training.step import Batch, Sums


class MaskedLanguageModel(Task):
    """Masked language modelling on lines of text, with several lines in a row. The loss is the
    cross entropy of the masked tokens (Devlin et al., 2019)."""

    name = "masked_language_model"
    family = "encoder"
    mixes_corpora = True

    def read(self, data: Iterable[str] | Mapping[str, Iterable[str]] | None = None,
             held_out: Iterable[str] | None = None) -> tuple[Any, Any]:
        """Reads the training lines and the held-out lines.

        Args:
          data: Texts, or a dict with the texts of each corpus. ``None`` means the data that the
            config names.
          held_out: Texts to evaluate on. ``None`` means ``config.data.validation_path`` or, if that
            is not set either, the last part of the training text.

        Returns:
          The training lines and the held-out lines, each a dict if there are several corpora.

        Raises:
          ValueError: If no data is given, an example is not a string, or ``sample.prompt`` has no
            mask.
        """
        settings = self.config.data
        if self.config.sample.every and MASK not in self.config.sample.prompt:
            raise ValueError(f"sample.prompt={self.config.sample.prompt!r} has no {MASK} to fill in; set a prompt with "
                             f"{MASK}, or sample.every=0")
        corpora = read_corpora(settings, data)
        if corpora is not None:
            if held_out is not None:
                raise ValueError("held_out cannot be used with several corpora, each of which holds out its last part")
            parts = for_each_corpus(lambda texts: split_lines(texts, settings.validation_fraction), corpora)
            return {name: part[0] for name, part in parts.items()}, {name: part[1] for name, part in parts.items()}
        documents = read_corpus(settings) if data is None else check_texts(data)
        if held_out is None:
            held_out = read_held_out(settings, data_is_given=data is not None)
        if held_out is None:
            return split_lines(documents, settings.validation_fraction)
        return text_lines(documents), text_lines(check_texts(held_out))

    def texts(self, examples: list[str] | Mapping[str, list[str]]) -> Iterable[str]:
        """Returns the lines, of all corpora if there are several."""
        return texts_of(examples)

    def prepare(self, examples: list[str] | Mapping[str, list[str]], held_out: Any, tokenizer: Tokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Tokenizes the lines. It stores nothing in ``cache_dir``, because a whole book takes only
        about a second."""
        self._check_prompt(tokenizer)
        if not isinstance(examples, Mapping):
            return self._data(examples, held_out, tokenizer)
        pairs = {name: (lines, held_out[name]) for name, lines in examples.items()}
        return mixed(for_each_corpus(lambda pair: self._data(*pair, tokenizer), pairs), self.config)

    def _data(self, examples: list[str], held_out: list[str], tokenizer: Tokenizer) -> TaskData:
        train, validation = (LineRows.build(part, tokenizer, self.config.row_length) for part in (examples, held_out))
        masking = self._masking(tokenizer)
        return TaskData(
            train=train, contents=[train.digest, validation.digest], held_out=validation, transform=masking,
            summary=f"{len(examples):,} lines in {len(train):,} rows to train on, {len(held_out):,} lines held out",
            evaluation_batches=lambda size: masked_evaluation_batches(validation, masking, size), shown=tokenizer)

    def loss(self, model: Encoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the cross entropy of the masked tokens, in nats."""
        return masked_token_loss(self.config.loss)(model, batch, key)

    def evaluation_loss(self, model: Encoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the same loss without label smoothing and z-loss."""
        return masked_token_loss()(model, batch, key)

    def show(self, model: Encoder, step: int, data: TaskData) -> str:
        """Returns the most probable tokens for each mask of ``sample.prompt``."""
        masks = fill_mask(model, self.config.sample.prompt, tokenizer=data.shown)[0]
        return "\n".join(f"{candidate.text}  ({candidate.probability:.3f})" for mask in masks for candidate in mask)

    def measure(self, bundle: Bundle, data: str | Iterable[str] | None = None, *,
                batch_size: int = 32) -> dict[str, float]:
        """Measures the loss and the accuracy at masked tokens, and the accuracy of two baselines
        that count tokens and pairs of tokens in the training text.

        Args:
          bundle: A trained encoder.
          data: A path or documents to measure on. ``None`` means the held-out part of the training
            data.
          batch_size: The number of rows in a batch.

        Returns:
          ``loss`` (nats per masked token), ``perplexity``, ``tokens`` (the number of masked
          tokens), ``lines``, and the accuracies ``model_top1`` and ``model_top5``, which are in
          [0, 1]. If the config of the training names the training text, also those of the
          baselines: ``unigram_top1``, ``unigram_top5``, ``bigram_top1`` and ``bigram_top5``.

        Raises:
          ValueError: If no data is given, and the training text is unknown.
        """
        tokenizer, max_len = tokenizer_of(bundle), bundle.config.max_len
        held_out = self._measured_lines(data)
        validation, masking = LineRows.build(held_out, tokenizer, max_len), self._masking(tokenizer)
        guesses: dict[str, Any] = {}
        if self._names_its_text:
            train = LineRows.build(list(texts_of(self.read()[0])), tokenizer, max_len)
            guesses = {"unigram": unigram_guesses(train, tokenizer), "bigram": bigram_guesses(train, tokenizer)}
        measure = jax.jit(_loss_and_hits)
        total = weight = 0.0
        hits = {name: np.zeros(2) for name in ("model", *guesses)}
        batches = masked_evaluation_batches(validation, masking, batch_size)
        for batch in tqdm(batches, total=-(-len(validation) // batch_size), unit="batch"):
            loss, model_hits = measure(bundle.model, batch)
            total, weight = total + float(loss), weight + float(batch["masked_weights"].sum())
            hits["model"] += np.asarray(model_hits)
            for name, guess in guesses.items():
                found = (guess(batch) == batch["masked_targets"][..., None]) * batch["masked_weights"][..., None]
                hits[name] += found[..., 0].sum(), found.sum()
        accuracies = {f"{name}_top{most}": float(count / weight)
                      for name, counts in hits.items() for most, count in zip((1, NUM_GUESSES), counts, strict=True)}
        return {"loss": total / weight, "perplexity": math.exp(total / weight), "tokens": int(weight),
                "lines": len(held_out), **accuracies}

    def report(self, bundle: Bundle, measured: Mapping[str, Any], **options: Any) -> str:
        """Formats the counts, the loss, and one line of accuracies for the model and for each
        baseline."""
        accuracies = [f"{name:8} top-1 {measured[f'{name}_top1']:6.2%}  "
                      f"top-{NUM_GUESSES} {measured[f'{name}_top{NUM_GUESSES}']:6.2%}"
                      for name in ("model", "unigram", "bigram") if f"{name}_top1" in measured]
        return "\n".join([f"step {bundle.step}, {measured['lines']:,} lines, {measured['tokens']:,} masked tokens",
                          f"loss {measured['loss']:.4f} nats per masked token, perplexity "
                          f"{measured['perplexity']:.2f}", *accuracies])

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of full rows, each with the same number of masked positions."""
        T = self.config.row_length
        P = math.ceil(self.config.data.mask_probability * T)
        fields = {"tokens": (T, np.int32), "segment_ids": (T, np.int32), "masked_positions": (P, np.int32),
                  "masked_targets": (P, np.int32), "masked_weights": (P, np.float32)}
        return {name: jax.ShapeDtypeStruct((batch_size, length), dtype) for name, (length, dtype) in fields.items()}

    def next_command(self, workdir: str) -> str:
        """Returns the command that fills in masks with the trained model."""
        return f'transformer-jax fill-mask --workdir={workdir} --text="... <mask> ..."'

    @property
    def _names_its_text(self) -> bool:
        """True if the settings say where the training text is; a caller may have passed it
        instead."""
        data = self.config.data
        return bool(data.path or data.mixture or data.tfds or data.generated)

    def _measured_lines(self, data: str | Iterable[str] | None) -> list[str]:
        """Returns the lines of a path or of documents, or without them the held-out lines."""
        if data is None and not self._names_its_text:
            raise ValueError("the training text of the model is unknown, so no part of it can be held out; pass the "
                             "text to measure on (data=, or --data=FILE)")
        if data is None:
            return list(texts_of(self.read()[1]))
        is_path = isinstance(data, (str, pathlib.Path))
        return text_lines(read_documents(data, key=self.config.data.text_key) if is_path else check_texts(data))

    def _masking(self, tokenizer: Tokenizer) -> Masking:
        return Masking.of(tokenizer, self.config.data.mask_probability, self.config.data.mask_whole_words)

    def _check_prompt(self, tokenizer: Tokenizer) -> None:
        sample, max_len = self.config.sample, self.config.model.max_len
        if not sample.every:
            return
        check_masked(sample.prompt, tokenizer)
        if (length := len(tokenizer.encode_masked(sample.prompt))) > max_len:
            raise ValueError(f"sample.prompt has {length} tokens, but the model reads at most model.max_len={max_len} "
                             "tokens; use a shorter prompt")


def _loss_and_hits(model: Encoder, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of the losses, and the number of correct tokens among the best 1 and the best
    5 predictions, ``[2]``."""
    logits_BPV, targets_BP, weights_BP = masked_logits(model, batch), batch["masked_targets"], batch["masked_weights"]
    best_BPK = jax.lax.top_k(logits_BPV, NUM_GUESSES)[1] == targets_BP[..., None]
    found = best_BPK * weights_BP[..., None]
    return (cross_entropy(logits_BPV, targets_BP) * weights_BP).sum(), jnp.stack([found[..., 0].sum(), found.sum()])
