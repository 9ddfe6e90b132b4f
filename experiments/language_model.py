"""Language modelling on text: a decoder learns the next token."""

from __future__ import annotations

import functools
import math
import pathlib
import tempfile
from collections.abc import Iterable

import jax
import numpy as np
from tqdm import tqdm

from experiments import runs
from transformer_jax.config import DataConfig, ExperimentConfig
from transformer_jax.data import TokenFile, Tokenizer, Windows, evaluation_batches, read_documents, read_tfds
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.decoder import Decoder
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.state import TrainState
from transformer_jax.training.step import make_eval_step


def train(config: ExperimentConfig, workdir: str | pathlib.Path) -> TrainState:
    """Trains on the text that the config names, or resumes; errors are those of :func:`experiments.runs.run`."""
    held_out = None if config.data.validation_path is None else read_documents(
        config.data.validation_path, key=config.data.text_key)
    return run(config, workdir, corpus(config.data), held_out)


def corpus(config: DataConfig) -> Iterable[str]:
    """The documents that a config names."""
    if (config.path is None) == (config.tfds is None) or config.generated is not None:
        raise ValueError("say what to train on: --config.data.path=FILE (text, glob or JSONL), or "
                         "--config.data.tfds=NAME")
    if config.tfds is not None:
        return read_tfds(config.tfds, key=config.text_key)
    return read_documents(config.path, key=config.text_key)


def run(config: ExperimentConfig, workdir: str | pathlib.Path, documents: Iterable[str],
        held_out: Iterable[str] | None = None) -> TrainState:
    """Trains on documents, validating on a part of them or on those held out."""
    return runs.run(config, workdir, documents, functools.partial(_task, documents, held_out))


def evaluate(bundle: Bundle, data: str, batch_size: int) -> None:
    """Prints loss, perplexity and bits per byte on a text."""
    documents = read_documents(data)
    with tempfile.TemporaryDirectory() as directory:
        file = TokenFile.build(documents, bundle.tokenizer, directory)
        length = min(bundle.config.max_len, len(file.tokens) - 1)
        windows = Windows(file.tokens, length, end_of_text_id=file.end_of_text_id if file.num_documents > 1 else None)
        eval_step = make_eval_step(next_token_loss())
        total = weight = 0.0
        batches = math.ceil((len(file.tokens) - 1) / (length * batch_size))
        for batch in tqdm(evaluation_batches(windows, batch_size), total=batches, unit="batch"):
            batch_total, batch_weight = eval_step(bundle.model, batch)
            total, weight = total + float(batch_total), weight + float(batch_weight)
        unknown = int((file.tokens == bundle.tokenizer.unk_id).sum())
    if unknown:
        print(f"{unknown:,} tokens stand for characters that the model has never seen: bits per byte leave out what "
              "these are")
    loss = total / weight
    print(f"step {bundle.step}, {int(weight):,} tokens, {file.num_bytes:,} bytes, windows of {length}")
    print(f"loss {loss:.4f} nats per token, perplexity {math.exp(loss):.3f}, "
          f"{total / math.log(2) / file.num_bytes:.4f} bits per byte")


def _task(documents: Iterable[str], held_out: Iterable[str] | None, config: ExperimentConfig, tokenizer: Tokenizer,
          cache_dir: pathlib.Path) -> runs.Task:
    sampling = Sampling(temperature=config.sample.temperature, top_k=config.sample.top_k)
    _check_prompt(config, tokenizer)
    train, validation = splits(config, documents, held_out, tokenizer, cache_dir)

    def sample(model: Decoder, step: int) -> None:
        result = generate(model, config.sample.prompt, tokenizer=tokenizer, key=jax.random.key(config.seed),
                          max_new_tokens=config.sample.max_new_tokens, sampling=sampling, slide=True)
        tqdm.write(f"--- step {step} ---\n{config.sample.prompt}{result.texts[0]}\n")

    return runs.Task(
        train=train, contents=[pathlib.Path(windows.tokens.filename).name for windows in (train, validation)],
        summary=f"{len(train.tokens):,} tokens to train on, {len(validation.tokens):,} held out",
        loss_fn=next_token_loss(config.loss), sample=sample, held_out=validation,
        evaluate=runs.mean_loss(next_token_loss(), lambda: evaluation_batches(validation, config.eval.batch_size),
                                config.eval.max_batches))


def splits(config: ExperimentConfig, documents: Iterable[str], held_out: Iterable[str] | None, tokenizer: Tokenizer,
           cache_dir: pathlib.Path) -> tuple[Windows, Windows]:
    """Training and validation windows of ``model.max_len`` tokens."""
    file = TokenFile.build(documents, tokenizer, cache_dir)
    if held_out is None:
        train, validation = file.split(config.data.validation_fraction)
        num_documents = file.num_documents
    else:
        other = TokenFile.build(held_out, tokenizer, cache_dir)
        train, validation = file.tokens, other.tokens
        num_documents = max(file.num_documents, other.num_documents)

    def windows(tokens: np.ndarray) -> Windows:
        return Windows(tokens, config.model.max_len,
                       end_of_text_id=file.end_of_text_id if num_documents > 1 else None)

    return windows(train), windows(validation)


def _check_prompt(config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode(config.sample.prompt))
    if config.sample.every and length >= config.model.max_len:
        raise ValueError(f"sample.prompt has {length} tokens, which leaves no room in the context of "
                         f"model.max_len={config.model.max_len}; shorten it")
