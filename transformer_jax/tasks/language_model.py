"""Language modelling: a decoder learns the next token of a text."""

from __future__ import annotations

import math
import pathlib
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from transformer_jax.config import DataConfig
from transformer_jax.data import TokenFile, Tokenizer, Windows, evaluation_batches, read_documents, read_tfds
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.decoder import Decoder
from transformer_jax.tasks.base import Task, TaskData
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.step import Batch, Sums, make_eval_step


def read_corpus(config: DataConfig) -> Iterable[str]:
    """The documents that a config names.

    Raises:
      ValueError: for settings that name none, or several sources.
    """
    if (config.path is None) == (config.tfds is None) or config.generated is not None:
        raise ValueError("say what to train on: --config.data.path=FILE (text, glob or JSONL), or "
                         "--config.data.tfds=NAME")
    if config.tfds is not None:
        return read_tfds(config.tfds, key=config.text_key)
    return read_documents(config.path, key=config.text_key)


class LanguageModel(Task):
    """Documents, cut into windows of ``model.max_len`` tokens; the loss is that of every next
    token."""

    name = "language_model"
    family = "decoder"

    def read(self, data: Iterable[str] | None = None,
             held_out: Iterable[str] | None = None) -> tuple[Iterable[str], Iterable[str] | None]:
        """The documents, and those to validate on; ``None``: a part of the tokens is held out
        instead."""
        settings = self.config.data
        documents = read_corpus(settings) if data is None else list(data)
        if held_out is None and settings.validation_path is not None:
            held_out = read_documents(settings.validation_path, key=settings.text_key)
        return documents, held_out

    def prepare(self, examples: Iterable[str], held_out: Iterable[str] | None, tokenizer: Tokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Writes the tokens to a file in ``cache_dir``, once, and cuts them into windows."""
        self._check_prompt(tokenizer)
        self._sampling()  # raises ValueError before anything is trained
        train, validation = self._windows(examples, held_out, tokenizer, cache_dir)
        return TaskData(
            train=train, contents=[pathlib.Path(windows.tokens.filename).name for windows in (train, validation)],
            summary=f"{len(train.tokens):,} tokens to train on, {len(validation.tokens):,} held out",
            held_out=validation, evaluation_batches=lambda size: evaluation_batches(validation, size), shown=tokenizer)

    def loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """The cross entropy of the next tokens, in nats."""
        return next_token_loss(self.config.loss)(model, batch, key)

    def evaluation_loss(self, model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Without label smoothing and z-loss."""
        return next_token_loss()(model, batch, key)

    def show(self, model: Decoder, step: int, data: TaskData) -> str:
        """A continuation of ``sample.prompt``."""
        sample = self.config.sample
        result = generate(model, sample.prompt, tokenizer=data.shown, key=jax.random.key(self.config.seed),
                          max_new_tokens=sample.max_new_tokens, slide=True, sampling=self._sampling())
        return f"{sample.prompt}{result.texts[0]}"

    def measure(self, bundle: Bundle, data: str | Iterable[str] | None = None, *, batch_size: int = 32,
                **options: Any) -> dict[str, float]:
        """Loss in nats a token, perplexity, and bits per byte of a text.

        Args:
          bundle: a trained decoder with its tokenizer.
          data: a path as ``config.data.path``, or documents.
          batch_size: windows at a time.

        Returns:
          ``loss``, ``perplexity``, ``bits_per_byte``, ``tokens``, ``bytes``, ``window`` (tokens)
          and ``unknown``: how many tokens stand for characters that the model has never seen, of
          which bits per byte say nothing.

        Raises:
          ValueError: without data.
        """
        if data is None:
            raise ValueError("data is missing: say what to measure on, --data=FILE or a list of texts")
        documents = read_documents(data) if isinstance(data, (str, pathlib.Path)) else list(data)
        with tempfile.TemporaryDirectory() as directory:
            file = TokenFile.build(documents, bundle.tokenizer, directory)
            length = min(bundle.config.max_len, len(file.tokens) - 1)
            windows = Windows(file.tokens, length,
                              end_of_text_id=file.end_of_text_id if file.num_documents > 1 else None)
            eval_step = make_eval_step(next_token_loss())
            total = weight = 0.0
            batches = math.ceil((len(file.tokens) - 1) / (length * batch_size))
            for batch in tqdm(evaluation_batches(windows, batch_size), total=batches, unit="batch"):
                batch_total, batch_weight = eval_step(bundle.model, batch)
                total, weight = total + float(batch_total), weight + float(batch_weight)
            unknown = int((file.tokens == bundle.tokenizer.unk_id).sum())
        return {"loss": total / weight, "perplexity": math.exp(total / weight),
                "bits_per_byte": total / math.log(2) / file.num_bytes, "tokens": int(weight), "bytes": file.num_bytes,
                "window": length, "unknown": unknown}

    def report(self, bundle: Bundle, measured: Mapping[str, Any], **options: Any) -> str:
        """Three lines: what was read, the loss, and a warning where characters are unknown."""
        lines = [f"step {bundle.step}, {measured['tokens']:,} tokens, {measured['bytes']:,} bytes, windows of "
                 f"{measured['window']}",
                 f"loss {measured['loss']:.4f} nats per token, perplexity {measured['perplexity']:.3f}, "
                 f"{measured['bits_per_byte']:.4f} bits per byte"]
        if measured["unknown"]:
            lines.insert(0, f"{measured['unknown']:,} tokens stand for characters that the model has never seen: bits "
                            "per byte leave out what these are")
        return "\n".join(lines)

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Rows of ``model.max_len`` tokens of packed documents."""
        shape = jax.ShapeDtypeStruct((batch_size, self.config.model.max_len), np.int32)
        return dict.fromkeys(("tokens", "targets", "segment_ids"), shape)

    def _windows(self, documents: Iterable[str], held_out: Iterable[str] | None, tokenizer: Tokenizer,
                 cache_dir: pathlib.Path) -> tuple[Windows, Windows]:
        file = TokenFile.build(documents, tokenizer, cache_dir)
        if held_out is None:
            train, validation = file.split(self.config.data.validation_fraction)
            num_documents = file.num_documents
        else:
            other = TokenFile.build(held_out, tokenizer, cache_dir)
            train, validation = file.tokens, other.tokens
            num_documents = max(file.num_documents, other.num_documents)
        end_of_text_id = file.end_of_text_id if num_documents > 1 else None
        return tuple(Windows(tokens, self.config.model.max_len, end_of_text_id=end_of_text_id)
                     for tokens in (train, validation))

    def _sampling(self) -> Sampling:
        return Sampling(temperature=self.config.sample.temperature, top_k=self.config.sample.top_k)

    def _check_prompt(self, tokenizer: Tokenizer) -> None:
        length, max_len = len(tokenizer.encode(self.config.sample.prompt)), self.config.model.max_len
        if self.config.sample.every and length >= max_len:
            raise ValueError(f"sample.prompt has {length} tokens, which leaves no room in the context of "
                             f"model.max_len={max_len}; shorten it")
