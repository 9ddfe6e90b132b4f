"""Language modelling: a decoder learns the next token of a text."""

from __future__ import annotations

import math
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import numpy as np
from tqdm import tqdm

from transformer_jax.config import DataConfig
from transformer_jax.data import (
    TokenFile,
    Tokenizer,
    Windows,
    agreement_corpus,
    evaluation_batches,
    read_documents,
    read_tfds,
)
from transformer_jax.data.text import check_texts
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.decoder import Decoder
from transformer_jax.tasks.base import Task
from transformer_jax.tasks.inputs import tokenizer_of
from transformer_jax.tasks.mixtures import for_each_corpus, mixed, read_corpora, texts_of
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.step import Batch, Sums, make_eval_step

_AGREEMENT_CORPUS = {"num_train": 30_000, "num_held_out": 2_000, "seed": 0}


def read_corpus(config: DataConfig) -> Iterable[str]:
    """Reads the documents that a config names.

    Args:
      config: The data settings, in which one of ``path``, ``tfds`` and ``generated`` is set.

    Returns:
      The documents.

    Raises:
      ValueError: If the settings name no source of documents, or more than one, or generate pairs.
    """
    if sum(where is not None for where in (config.path, config.tfds, config.generated)) != 1 or (
            config.generated == "dates"):
        raise ValueError("set exactly one source of training data: --config.data.path=FILE (text, glob or JSONL), "
                         "--config.data.mixture=((NAME,FILE,WEIGHT),...), --config.data.tfds=NAME, or "
                         "--config.data.generated=agreement")
    if config.generated is not None:
        return agreement_corpus(**_AGREEMENT_CORPUS)[0]
    if config.tfds is not None:
        return read_tfds(config.tfds, key=config.text_key)
    return read_documents(cast(str, config.path), key=config.text_key)


def read_held_out(config: DataConfig, *, data_is_given: bool) -> Iterable[str] | None:
    """Reads the documents that a config names for validation.

    Args:
      config: The data settings.
      data_is_given: Whether the caller passed the training documents. The held-out sentences of a
        generated corpus are then not used.

    Returns:
      The documents. ``None`` if the config names none, so that a part of the corpus is held out.

    Raises:
      ValueError: If generated sentences, which have their own held-out part, come with
        ``validation_path``.
    """
    is_generated = config.generated is not None and not data_is_given
    if is_generated and config.validation_path is not None:
        raise ValueError("data.validation_path can only be used with data.path or data.tfds, because generated "
                         "sentences have their own held-out part; leave it out")
    if is_generated:
        return agreement_corpus(**_AGREEMENT_CORPUS)[1]
    return None if config.validation_path is None else read_documents(config.validation_path, key=config.text_key)


class LanguageModel(Task):
    """Language modelling on documents, which are cut into windows of ``data.max_len`` tokens (by
    default ``model.max_len``). The loss is the cross entropy of every next token."""

    name = "language_model"
    family = "decoder"
    mixes_corpora = True

    def read(self, data: Iterable[str] | Mapping[str, Iterable[str]] | None = None,
             held_out: Iterable[str] | None = None) -> tuple[Any, Iterable[str] | None]:
        """Reads the training documents and the held-out documents.

        Args:
          data: The documents, or a dict with the documents of each corpus. ``None`` means the data
            that the config names.
          held_out: The documents to validate on. ``None`` means ``config.data.validation_path``.

        Returns:
          The training documents, and the held-out documents. The former are a dict if there are
          several corpora. The latter are ``None`` if neither the caller nor the config names any;
          ``prepare`` then holds out a part of the tokens (of every corpus).

        Raises:
          ValueError: If no data is given, or an example is not a string.
        """
        corpora = read_corpora(self.config.data, data)
        if corpora is not None:
            if held_out is not None:
                raise ValueError("held_out cannot be used with several corpora, each of which holds out its last part")
            return corpora, None
        documents = read_corpus(self.config.data) if data is None else check_texts(data)
        if held_out is None:
            return documents, read_held_out(self.config.data, data_is_given=data is not None)
        return documents, check_texts(held_out)

    def texts(self, examples: Iterable[str] | Mapping[str, Iterable[str]]) -> Iterable[str]:
        """Returns the documents, of all corpora if there are several."""
        return texts_of(examples)

    def prepare(self, examples: Iterable[str] | Mapping[str, Iterable[str]], held_out: Iterable[str] | None,
                tokenizer: Tokenizer, cache_dir: pathlib.Path) -> TaskData:
        """Writes the tokens of each corpus to a file in ``cache_dir``, unless the file exists, and
        cuts them into windows."""
        self._check_prompt(tokenizer)
        self._sampling()  # invalid sampling settings raise ValueError here, before training starts
        if not isinstance(examples, Mapping):
            return self._data(*self._windows(examples, held_out, tokenizer, cache_dir), tokenizer)
        # All corpora have segment ids, so that their rows fit into one batch.
        return mixed(for_each_corpus(lambda documents: self._data(*self._windows(
            documents, None, tokenizer, cache_dir, has_segments=True), tokenizer), examples), self.config)

    def _data(self, train: Windows, validation: Windows, tokenizer: Tokenizer) -> TaskData:
        return TaskData(
            train=train,
            contents=[pathlib.Path(cast(np.memmap, part.tokens).filename or "").name for part in (train, validation)],
            summary=f"{len(train.tokens):,} tokens to train on, {len(validation.tokens):,} held out",
            held_out=validation, evaluation_batches=lambda size: evaluation_batches(validation, size), shown=tokenizer)

    def loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the cross entropy of the next tokens, in nats."""
        return next_token_loss(self.config.loss)(model, batch, key)

    def evaluation_loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the same loss without label smoothing and z-loss."""
        return next_token_loss()(model, batch, key)

    def show(self, model: Decoder, step: int, data: TaskData) -> str:
        """Generates a continuation of ``sample.prompt``."""
        sample = self.config.sample
        result = generate(model, sample.prompt, tokenizer=data.shown, key=jax.random.key(self.config.seed),
                          max_new_tokens=sample.max_new_tokens, slide=True, sampling=self._sampling())
        return sample.prompt + "".join(result.texts or [])

    def measure(self, bundle: Bundle, data: str | Iterable[str] | None = None, *,
                batch_size: int = 32) -> dict[str, float]:
        """Measures the loss, the perplexity and the bits per byte of a text.

        Args:
          bundle: A trained decoder with its tokenizer.
          data: A path, in the same form as ``config.data.path``, or a list of documents.
          batch_size: The number of windows in a batch.

        Returns:
          ``loss`` (nats per token), ``perplexity``, ``bits_per_byte``, ``tokens``, ``bytes``,
          ``window`` (the length of a window in tokens) and ``unknown``: the number of tokens that
          replace characters outside the vocabulary. The bits per byte do not include the cost of
          these characters.

        Raises:
          ValueError: If no data is given.
        """
        if data is None:
            raise ValueError("no data to measure on is given; pass --data=FILE, or in Python a path or a list of texts")
        documents = read_documents(data) if isinstance(data, (str, pathlib.Path)) else check_texts(data)
        tokenizer = tokenizer_of(bundle)
        with tempfile.TemporaryDirectory() as directory:
            file = TokenFile.build(documents, tokenizer, directory)
            length = min(bundle.config.max_len, len(file.tokens) - 1)
            windows = Windows(file.tokens, length,
                              end_of_text_id=file.end_of_text_id if file.num_documents > 1 else None)
            eval_step = make_eval_step(next_token_loss())
            total = weight = 0.0
            batches = math.ceil((len(file.tokens) - 1) / (length * batch_size))
            for batch in tqdm(evaluation_batches(windows, batch_size), total=batches, unit="batch"):
                batch_total, batch_weight, *_ = eval_step(bundle.model, cast(Batch, batch))
                total, weight = total + float(batch_total), weight + float(batch_weight)
            unknown = int((file.tokens == tokenizer.unk_id).sum())
        return {"loss": total / weight, "perplexity": math.exp(total / weight),
                "bits_per_byte": total / math.log(2) / file.num_bytes, "tokens": int(weight), "bytes": file.num_bytes,
                "window": length, "unknown": unknown}

    def report(self, bundle: Bundle, measured: Mapping[str, Any], **options: Any) -> str:
        """Formats the counts and the loss, with a warning first if there are unknown characters."""
        lines = [f"step {bundle.step}, {measured['tokens']:,} tokens, {measured['bytes']:,} bytes, windows of "
                 f"{measured['window']}",
                 f"loss {measured['loss']:.4f} nats per token, perplexity {measured['perplexity']:.3f}, "
                 f"{measured['bits_per_byte']:.4f} bits per byte"]
        if measured["unknown"]:
            lines.insert(0, f"{measured['unknown']:,} tokens replace characters that are not in the vocabulary; the "
                            "bits per byte do not include the cost of these characters")
        return "\n".join(lines)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of rows of ``config.row_length`` tokens."""
        shape = jax.ShapeDtypeStruct((batch_size, self.config.row_length), np.int32)
        return dict.fromkeys(("tokens", "targets", "segment_ids"), shape)

    def _windows(self, documents: Iterable[str], held_out: Iterable[str] | None, tokenizer: Tokenizer,
                 cache_dir: pathlib.Path, has_segments: bool = False) -> tuple[Windows, Windows]:
        """Tokenizes the documents and returns the training windows and the held-out windows."""
        file = TokenFile.build(documents, tokenizer, cache_dir)
        if held_out is None:
            train, validation = file.split(self.config.data.validation_fraction)
            num_documents = file.num_documents
        else:
            other = TokenFile.build(held_out, tokenizer, cache_dir)
            train, validation = file.tokens, other.tokens
            num_documents = max(file.num_documents, other.num_documents)
        end_of_text_id = file.end_of_text_id if num_documents > 1 or has_segments else None
        return (Windows(train, self.config.row_length, end_of_text_id=end_of_text_id),
                Windows(validation, self.config.row_length, end_of_text_id=end_of_text_id))

    def _sampling(self) -> Sampling:
        return Sampling(temperature=self.config.sample.temperature, top_k=self.config.sample.top_k)

    def _check_prompt(self, tokenizer: Tokenizer) -> None:
        length, max_len = len(tokenizer.encode_prompt(self.config.sample.prompt)), self.config.model.max_len
        if self.config.sample.every and length >= max_len:
            raise ValueError(f"sample.prompt has {length} tokens, so that no token can be added within "
                             f"model.max_len={max_len}; use a shorter prompt")
