"""A training run in a workdir: one config, one text, one process at a time, resumed by the same command."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax.config import DataConfig, ExperimentConfig, differences, from_dict, to_dict
from transformer_jax.data import Tokenizer, make_batches
from transformer_jax.data.windows import BatchSource
from transformer_jax.models.functional import count_parameters, make_model
from transformer_jax.sharding import make_mesh
from transformer_jax.training.bundle import TOKENIZER_FILE
from transformer_jax.training.loop import fit
from transformer_jax.training.state import TrainState
from transformer_jax.training.step import LossFn, make_eval_step

_RECORD = "run.json"

# Fields that may change from one start of a run to the next: they do not change what is computed.
_FREE = ("log_every", "checkpoint.", "eval.", "sample.", "mesh.", "data.cache_dir", "model.unroll", "model.remat")


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model learns, and from what.

    Attributes:
      train: the examples.
      contents: names that change with the content of the data, by which a resumed run knows its own.
      summary: the data in a few words.
      loss_fn: ``(model, batch, key) -> (sum of losses, sum of weights)``.
      evaluate: the validation loss of some weights.
      sample: shows on the terminal what the weights can do at a step.
      transform: applied to every training batch with a generator of random numbers.
    """

    train: BatchSource
    contents: list[str]
    summary: str
    loss_fn: LossFn
    evaluate: Callable[[Any], float]
    sample: Callable[[Any, int], None]
    transform: Callable[[Mapping[str, np.ndarray], np.random.Generator], Mapping[str, np.ndarray]] | None = None


def run(config: ExperimentConfig, workdir: str | pathlib.Path, texts: Iterable[str],
        make_task: Callable[[ExperimentConfig, Tokenizer, pathlib.Path], Task]) -> TrainState:
    """Trains, or resumes.

    Args:
      config: decides everything.
      workdir: belongs to this config and data from the first start on.
      texts: what a tokenizer is trained on.
      make_task: called with the config, the size of its vocabulary filled in, the tokenizer, and where to keep data.

    Raises:
      ValueError: for bad settings or text, or a workdir that belongs to another config.
      Interrupted: after a signal, once saved.
    """
    workdir = pathlib.Path(workdir)
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with _only_one(workdir):
        begun = _begun(workdir, config)
        tokenizer = _make_tokenizer(config.data, texts) if begun is None else Tokenizer.load(workdir / TOKENIZER_FILE)
        record = {"config": to_dict(config)}
        config = config.replace(model=config.model.replace(vocab_size=_vocab_size(config, tokenizer)))
        task = make_task(config, tokenizer, pathlib.Path(config.data.cache_dir or workdir / "data"))
        record["contents"] = task.contents
        if begun is not None and begun["contents"] != task.contents:
            raise ValueError(f"the text is not the one that the run in {workdir} began with; use another --workdir, "
                             "or the same text to resume")
        batches = make_batches(task.train, batch_size=config.batch_size, seed=config.seed,
                               process_index=jax.process_index(), process_count=jax.process_count(),
                               transform=task.transform)
        # Only now, with nothing left to go wrong, does the workdir belong to this run.
        _write(workdir / TOKENIZER_FILE, tokenizer.to_bytes())
        _write(workdir / _RECORD, json.dumps(record, indent=1).encode())
        print(f"{task.summary}, {tokenizer.vocab_size} pieces, {count_parameters(config.model):,} parameters, "
              f"{mesh.size} {jax.default_backend()} device(s)")
        return fit(config, workdir, make_params=lambda key: make_model(config.model, key=key), loss_fn=task.loss_fn,
                   batches=batches, mesh=mesh, files={TOKENIZER_FILE: tokenizer.to_bytes()}, evaluate=task.evaluate,
                   sample=task.sample)


def mean_loss(loss_fn: LossFn, batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
              max_batches: int | None = None) -> Callable[[Any], float]:
    """A function from weights to the mean loss over all batches, or the first ones."""
    eval_step = make_eval_step(loss_fn)

    def evaluate(params: Any) -> float:
        sums = [tuple(map(float, eval_step(params, batch))) for batch in itertools.islice(batches(), max_batches)]
        total, weight = map(sum, zip(*sums, strict=True))
        return total / weight

    return evaluate


def _make_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    settings = config.tokenizer
    if settings.path is not None:
        return Tokenizer.load(settings.path)
    return Tokenizer.train(texts, kind=settings.kind, vocab_size=settings.vocab_size,
                           min_frequency=settings.min_frequency)


def _vocab_size(config: ExperimentConfig, tokenizer: Tokenizer) -> int:
    """The model's: the tokenizer's; an encoder, which never draws a token, may have room for more."""
    given = config.model.vocab_size
    if given is None or given == tokenizer.vocab_size:
        return tokenizer.vocab_size
    if config.model.family != "encoder" or given < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size={given}, but the tokenizer has {tokenizer.vocab_size} pieces; leave "
                         "model.vocab_size out")
    return given


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
