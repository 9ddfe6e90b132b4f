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
from transformer_jax.decoding.fill_mask import check_masked, fill_mask
from transformer_jax.models.encoder import Encoder
from transformer_jax.ops.losses import cross_entropy
from transformer_jax.tasks.base import Task, TaskData
from transformer_jax.tasks.language_model import read_corpus
from transformer_jax.tasks.masked_guesses import NUM_GUESSES, bigram_guesses, unigram_guesses
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import masked_logits, masked_token_loss
from transformer_jax.training.step import Batch, Sums


class MaskedLanguageModel(Task):
    """Lines of text, several to a row; the loss is that of the masked tokens (Devlin et al.,
    2019)."""

    name = "masked_language_model"
    family = "encoder"

    def read(self, data: Iterable[str] | None = None,
             held_out: Iterable[str] | None = None) -> tuple[list[str], list[str]]:
        """The lines to train on, and those held out."""
        settings = self.config.data
        if self.config.sample.every and MASK not in self.config.sample.prompt:
            raise ValueError(f"sample.prompt={self.config.sample.prompt!r} has no {MASK} to fill in; set one, or "
                             "sample.every=0")
        documents = read_corpus(settings) if data is None else list(data)
        if held_out is None and settings.validation_path is None:
            return split_lines(documents, settings.validation_fraction)
        if held_out is None:
            held_out = read_documents(settings.validation_path, key=settings.text_key)
        return text_lines(documents), text_lines(held_out)

    def prepare(self, examples: list[str], held_out: list[str], tokenizer: Tokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Tokenizes the lines; nothing is kept in ``cache_dir``, since a book takes a second."""
        self._check_prompt(tokenizer)
        max_len = self.config.model.max_len
        train, validation = (LineRows.build(part, tokenizer, max_len) for part in (examples, held_out))
        masking = self._masking(tokenizer)
        return TaskData(
            train=train, contents=[train.digest, validation.digest], held_out=validation, transform=masking,
            summary=f"{len(examples):,} lines in {len(train):,} rows to train on, {len(held_out):,} lines held out",
            evaluation_batches=lambda size: masked_evaluation_batches(validation, masking, size), shown=tokenizer)

    def loss(self, model: Encoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """The cross entropy of the masked tokens, in nats."""
        return masked_token_loss(self.config.loss)(model, batch, key)

    def evaluation_loss(self, model: Encoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Without label smoothing and z-loss."""
        return masked_token_loss()(model, batch, key)

    def show(self, model: Encoder, step: int, data: TaskData) -> str:
        """The most probable tokens for the masks of ``sample.prompt``."""
        masks = fill_mask(model, self.config.sample.prompt, tokenizer=data.shown)[0]
        return "\n".join(f"{candidate.text}  ({candidate.probability:.3f})" for mask in masks for candidate in mask)

    def measure(self, bundle: Bundle, data: str | Iterable[str] | None = None, *, batch_size: int = 32,
                **options: Any) -> dict[str, float]:
        """The loss and the accuracy at masked tokens, beside what counting tokens and pairs of
        tokens achieves.

        Args:
          bundle: a trained encoder of a run, whose training text the counts are taken from.
          data: a path or documents to measure on; ``None``: the part that its run held out.
          batch_size: rows at a time.

        Returns:
          ``loss`` in nats a masked token, ``perplexity``, ``tokens`` (masked), ``lines``, and
          ``model_top1``, ``model_top5``, ``unigram_top1`` ... in [0, 1].

        Raises:
          ValueError: for a model that comes without the config of its training.
        """
        if bundle.experiment is None:
            raise ValueError("this model comes without the config of its training: its text is not known")
        tokenizer, max_len = bundle.tokenizer, bundle.config.max_len
        lines, held_out = self.read()
        if data is not None:
            is_path = isinstance(data, (str, pathlib.Path))
            held_out = text_lines(read_documents(data, key=self.config.data.text_key) if is_path else list(data))
        train, validation = (LineRows.build(part, tokenizer, max_len) for part in (lines, held_out))
        masking = self._masking(tokenizer)
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
        """What was read, the loss, and a line of accuracies for the model and for each way of
        counting."""
        accuracies = [f"{name:8} top-1 {measured[f'{name}_top1']:6.2%}  "
                      f"top-{NUM_GUESSES} {measured[f'{name}_top{NUM_GUESSES}']:6.2%}"
                      for name in ("model", "unigram", "bigram")]
        return "\n".join([f"step {bundle.step}, {measured['lines']:,} lines, {measured['tokens']:,} masked tokens",
                          f"loss {measured['loss']:.4f} nats per masked token, perplexity "
                          f"{measured['perplexity']:.2f}", *accuracies])

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Full rows, with a fixed number of masked positions each."""
        T = self.config.model.max_len
        P = math.ceil(self.config.data.mask_probability * T)
        fields = {"tokens": (T, np.int32), "segment_ids": (T, np.int32), "masked_positions": (P, np.int32),
                  "masked_targets": (P, np.int32), "masked_weights": (P, np.float32)}
        return {name: jax.ShapeDtypeStruct((batch_size, length), dtype) for name, (length, dtype) in fields.items()}

    def next_command(self, workdir: str) -> str:
        """Fill in masks."""
        return f'transformer-jax fill-mask --workdir={workdir} --text="... <mask> ..."'

    def _masking(self, tokenizer: Tokenizer) -> Masking:
        return Masking.of(tokenizer, self.config.data.mask_probability, self.config.data.mask_whole_words)

    def _check_prompt(self, tokenizer: Tokenizer) -> None:
        sample, max_len = self.config.sample, self.config.model.max_len
        if not sample.every:
            return
        check_masked(sample.prompt, tokenizer)
        if (length := len(tokenizer.encode_masked(sample.prompt))) > max_len:
            raise ValueError(f"sample.prompt has {length} tokens, which is more than the context of "
                             f"model.max_len={max_len}; shorten it")


def _loss_and_hits(model: Encoder, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    logits_BPV, targets_BP, weights_BP = masked_logits(model, batch), batch["masked_targets"], batch["masked_weights"]
    best_BPK = jax.lax.top_k(logits_BPV, NUM_GUESSES)[1] == targets_BP[..., None]
    found = best_BPK * weights_BP[..., None]
    return (cross_entropy(logits_BPV, targets_BP) * weights_BP).sum(), jnp.stack([found[..., 0].sum(), found.sum()])
