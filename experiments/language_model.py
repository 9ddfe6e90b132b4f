"""Language modelling on text: tokenizer, token files, batches and the training loop, wired together."""

from __future__ import annotations

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from transformer_jax.config import DataConfig, ExperimentConfig, differences, from_dict, to_dict
from transformer_jax.data import (
    TokenFile,
    Tokenizer,
    Windows,
    evaluation_batches,
    make_batches,
    read_documents,
    read_tfds,
)
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.decoder import Decoder, count_parameters
from transformer_jax.sharding import make_mesh
from transformer_jax.training.bundle import TOKENIZER_FILE
from transformer_jax.training.loop import fit
from transformer_jax.training.state import TrainState
from transformer_jax.training.step import LossFn, make_eval_step, next_token_loss

# Fields that may change from one start of a run to the next: they do not change what is computed.
_FREE = ("log_every", "checkpoint.", "eval.", "sample.", "mesh.", "data.cache_dir", "model.unroll", "model.remat")


def corpus(config: DataConfig) -> Iterable[str]:
    """The documents that a config names."""
    if config.tfds is not None:
        return read_tfds(config.tfds, key=config.text_key)
    return read_documents(config.path, key=config.text_key)


def run(config: ExperimentConfig, workdir: str | pathlib.Path, documents: Iterable[str],
        held_out: Iterable[str] | None = None) -> TrainState:
    """Trains on documents, or resumes, in one workdir.

    Raises:
      ValueError: for bad settings or text, or a workdir that belongs to another config.
      Interrupted: after a signal, once saved.
    """
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    with _only_one(workdir):
        _check_same(workdir / "config.json", config)
        tokenizer = _tokenizer(config.data, workdir / TOKENIZER_FILE, documents)
        if config.model.vocab_size not in (None, tokenizer.vocab_size):
            raise ValueError(f"model.vocab_size={config.model.vocab_size}, but the tokenizer has "
                             f"{tokenizer.vocab_size} pieces; leave model.vocab_size out")
        config = config.replace(model=config.model.replace(vocab_size=tokenizer.vocab_size))
        train, validation = splits(config, documents, held_out, tokenizer, workdir / "data")
        mesh = make_mesh(config.mesh)
        batches = make_batches(train, batch_size=config.batch_size, seed=config.seed,
                               process_index=jax.process_index(), process_count=jax.process_count())
        loss_fn = next_token_loss(config.loss)
        print(f"{len(train.tokens):,} tokens to train on, {len(validation.tokens):,} held out, {tokenizer.vocab_size} "
              f"pieces, {count_parameters(config.model):,} parameters, {mesh.size} {jax.default_backend()} device(s)")

        def sample(model: Decoder, step: int) -> None:
            settings = Sampling(temperature=config.sample.temperature, top_k=config.sample.top_k)
            result = generate(model, config.sample.prompt, tokenizer=tokenizer, key=jax.random.key(config.seed),
                              max_new_tokens=config.sample.max_new_tokens, sampling=settings, slide=True)
            print(f"--- step {step} ---\n{config.sample.prompt}{result.texts[0]}\n", flush=True)

        return fit(config, workdir, make_params=lambda key: Decoder(config.model, key=key), loss_fn=loss_fn,
                   batches=batches, mesh=mesh, files={TOKENIZER_FILE: tokenizer.to_bytes()},
                   evaluate=evaluator(validation, loss_fn, config), sample=sample)


def evaluator(validation: Windows, loss_fn: LossFn, config: ExperimentConfig) -> Callable[[Any], float]:
    """A function from weights to the mean validation loss, in nats per token."""
    eval_step = make_eval_step(loss_fn)

    def evaluate(params: Any) -> float:
        total = weight = 0.0
        for index, batch in enumerate(evaluation_batches(validation, config.eval.batch_size)):
            if index == config.eval.max_batches:
                break
            batch_total, batch_weight = eval_step(params, batch)
            total, weight = total + float(batch_total), weight + float(batch_weight)
        return total / weight

    return evaluate


def splits(config: ExperimentConfig, documents: Iterable[str], held_out: Iterable[str] | None, tokenizer: Tokenizer,
           cache_dir: pathlib.Path) -> tuple[Windows, Windows]:
    """Training and validation windows of ``model.max_len`` tokens."""
    cache_dir = cache_dir if config.data.cache_dir is None else pathlib.Path(config.data.cache_dir)
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


def _tokenizer(config: DataConfig, path: pathlib.Path, documents: Iterable[str]) -> Tokenizer:
    if path.exists():
        return Tokenizer.load(path)
    if config.tokenizer.path is not None:
        tokenizer = Tokenizer.load(config.tokenizer.path)
    else:
        tokenizer = Tokenizer.train(documents, kind=config.tokenizer.kind, vocab_size=config.tokenizer.vocab_size)
    tokenizer.save(path)
    return tokenizer


def _check_same(path: pathlib.Path, config: ExperimentConfig) -> None:
    """A workdir belongs to one config; only what changes no result may differ."""
    if path.exists():
        old = from_dict(ExperimentConfig, json.loads(path.read_text()))
        changed = [line for line in differences(old, config) if not line.startswith(_FREE)]
        if changed:
            raise ValueError(f"{path.parent} holds a run with another config ({'; '.join(changed)}); "
                             "use another --workdir, or the same settings to resume")
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(to_dict(config), indent=1))
    partial.replace(path)


@contextlib.contextmanager
def _only_one(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the workdir: two runs in it would write over each other."""
    with (workdir / ".lock").open("w") as lock:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run is using {workdir}") from None
        yield
