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
from jax.sharding import Mesh
from tqdm import tqdm

from transformer_jax.config import DataConfig, EvalConfig, ExperimentConfig, differences, from_dict, to_dict
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
from transformer_jax.training.step import make_eval_step, next_token_loss

_RECORD = "run.json"

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
    sampling = Sampling(temperature=config.sample.temperature, top_k=config.sample.top_k)
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with _only_one(workdir):
        begun = _begun(workdir, config)
        tokenizer = _make_tokenizer(config.data, documents) if begun is None else Tokenizer.load(
            workdir / TOKENIZER_FILE)
        if config.model.vocab_size not in (None, tokenizer.vocab_size):
            raise ValueError(f"model.vocab_size={config.model.vocab_size}, but the tokenizer has "
                             f"{tokenizer.vocab_size} pieces; leave model.vocab_size out")
        record = {"config": to_dict(config)}
        config = config.replace(model=config.model.replace(vocab_size=tokenizer.vocab_size))
        _check_prompt(config, tokenizer)
        train, validation = splits(config, documents, held_out, tokenizer, workdir / "data")
        batches = make_batches(train, batch_size=config.batch_size, seed=config.seed,
                               process_index=jax.process_index(), process_count=jax.process_count())
        record["tokens"] = [pathlib.Path(windows.tokens.filename).name for windows in (train, validation)]
        if begun is not None and begun["tokens"] != record["tokens"]:
            raise ValueError(f"the text is not the one that the run in {workdir} began with; use another --workdir, "
                             "or the same text to resume")
        # Only now, with nothing left to go wrong, does the workdir belong to this run.
        _write(workdir / TOKENIZER_FILE, tokenizer.to_bytes())
        _write(workdir / _RECORD, json.dumps(record, indent=1).encode())
        loss_fn = next_token_loss(config.loss)
        print(f"{len(train.tokens):,} tokens to train on, {len(validation.tokens):,} held out, {tokenizer.vocab_size} "
              f"pieces, {count_parameters(config.model):,} parameters, {mesh.size} {jax.default_backend()} device(s)")

        def sample(model: Decoder, step: int) -> None:
            result = generate(model, config.sample.prompt, tokenizer=tokenizer, key=jax.random.key(config.seed),
                              max_new_tokens=config.sample.max_new_tokens, sampling=sampling, slide=True)
            tqdm.write(f"--- step {step} ---\n{config.sample.prompt}{result.texts[0]}\n")

        return fit(config, workdir, make_params=lambda key: Decoder(config.model, key=key), loss_fn=loss_fn,
                   batches=batches, mesh=mesh, files={TOKENIZER_FILE: tokenizer.to_bytes()},
                   evaluate=evaluator(validation, config.eval), sample=sample)


def evaluator(validation: Windows, config: EvalConfig) -> Callable[[Any], float]:
    """A function from weights to the mean validation loss, in nats per token, without smoothing or z-loss."""
    eval_step = make_eval_step(next_token_loss())

    def evaluate(params: Any) -> float:
        total = weight = 0.0
        for index, batch in enumerate(evaluation_batches(validation, config.batch_size)):
            if index == config.max_batches:
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


def _make_tokenizer(config: DataConfig, documents: Iterable[str]) -> Tokenizer:
    if config.tokenizer.path is not None:
        return Tokenizer.load(config.tokenizer.path)
    return Tokenizer.train(documents, kind=config.tokenizer.kind, vocab_size=config.tokenizer.vocab_size)


def _begun(workdir: pathlib.Path, config: ExperimentConfig) -> dict[str, Any] | None:
    """The record of the run that the workdir belongs to; only what changes no result may differ from its config."""
    if not (workdir / _RECORD).exists():
        return None
    record = json.loads((workdir / _RECORD).read_bytes())
    old = from_dict(ExperimentConfig, record["config"])
    changed = [line for line in differences(old, config) if not line.startswith(_FREE)]
    if changed:
        raise ValueError(f"{workdir} holds a run with another config ({'; '.join(changed)}); "
                         "use another --workdir, or the same settings to resume")
    return record


def _check_batch(config: ExperimentConfig, mesh: Mesh) -> None:
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % shares:
        raise ValueError(f"batch_size={config.batch_size} does not divide among the {shares} devices of mesh.data "
                         "x mesh.fsdp")


def _check_prompt(config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode(config.sample.prompt))
    if config.sample.every and length >= config.model.max_len:
        raise ValueError(f"sample.prompt has {length} tokens, which leaves no room in the context of "
                         f"model.max_len={config.model.max_len}; shorten it")


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes a file that is seen whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
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
