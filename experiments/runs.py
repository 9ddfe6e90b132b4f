"""A training run in a workdir: one config, one text, one run at a time, resumed by the same command."""

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

from transformer_jax.config import DataConfig, ExperimentConfig, ModelConfig, TokenizerConfig
from transformer_jax.data import Tokenizer, make_batches
from transformer_jax.data.huggingface_tokenizer import tokenizer_from_bytes
from transformer_jax.data.windows import BatchSource
from transformer_jax.models.functional import count_parameters
from transformer_jax.runtime import keep_freed_memory
from transformer_jax.settings import differences, from_dict, to_dict
from transformer_jax.sharding import data_share, make_mesh
from transformer_jax.training.bundle import TOKENIZER_FILE, Bundle, save
from transformer_jax.training.checkpoint import tree_digest
from transformer_jax.training.learner import make_learner
from transformer_jax.training.loop import fit
from transformer_jax.training.metrics import MetricsWriter
from transformer_jax.training.processes import first_before_others, is_first
from transformer_jax.training.state import TrainState
from transformer_jax.training.step import LossFn, make_eval_step

_RECORD = "run.json"

# Fields that may change from one start of a run to the next: they do not change what is computed.
_FREE = ("log_every", "checkpoint.", "eval.", "sample.", "metrics.", "mesh.", "data.cache_dir", "model.unroll",
         "model.remat", "loss.most_logits")

# Of a model's config what a run that starts from a trained model sets anew.
_TUNABLE = ("dropout", "attention_dropout")


@dataclasses.dataclass(frozen=True)
class Task:
    """What a model learns, and from what.

    Attributes:
      train: the examples; or, with ``follow``, the batches themselves.
      contents: names that change with the content of the data, by which a resumed run knows its own.
      summary: the data in a few words.
      loss_fn: ``(model, batch, key) -> (sum of losses, sum of weights)``, see :func:`make_train_step`.
      evaluate: the validation loss of a model, or a dict of what to log, ``validation_loss`` among it.
      sample: shows on the terminal what the weights can do at a step.
      transform: applied to every training batch with a generator of random numbers.
      held_out: examples to watch attention on.
      follow: for batches that depend on the model, see :func:`fit`.
    """

    train: BatchSource | Iterator[dict[str, np.ndarray]]
    contents: list[str]
    summary: str
    loss_fn: LossFn
    evaluate: Callable[[Any], float | dict[str, float]]
    sample: Callable[[Any, int], None]
    transform: Callable[[Mapping[str, np.ndarray], np.random.Generator], Mapping[str, np.ndarray]] | None = None
    held_out: BatchSource | None = None
    follow: Callable[[Any, dict[str, jax.Array] | None], dict[str, float]] | None = None


def run(config: ExperimentConfig, workdir: str | pathlib.Path, texts: Iterable[str],
        make_task: Callable[[ExperimentConfig, Tokenizer, pathlib.Path], Task],
        base: Bundle | None = None) -> TrainState:
    """Trains, or resumes.

    Args:
      config: decides everything.
      workdir: belongs to this config and data from the first start on.
      texts: what a tokenizer is trained on.
      make_task: called with the config, its model filled in, the tokenizer, and where to keep data.
      base: the model to start from, with its tokenizer; ``None``: random weights, and a tokenizer as configured.

    Raises:
      ValueError: for bad settings or text, or a workdir that belongs to another config.
      Interrupted: after a signal, once saved.
    """
    keep_freed_memory()
    workdir = pathlib.Path(workdir)
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    with _only_one(workdir), contextlib.ExitStack() as preparing:
        preparing.enter_context(first_before_others("prepared"))
        begun = _begun(workdir, config)
        record = {"config": to_dict(config)}
        if base is not None:
            tokenizer = base.tokenizer
        elif begun is not None:
            tokenizer = tokenizer_from_bytes((workdir / TOKENIZER_FILE).read_bytes())
        else:
            tokenizer = _make_tokenizer(config.data, texts)
        config = config.replace(model=_model_config(config, tokenizer) if base is None else _tuned(config, base))
        task = make_task(config, tokenizer, pathlib.Path(config.data.cache_dir or workdir / "data"))
        record["contents"] = task.contents if base is None else [*task.contents, tree_digest(base.model)]
        if begun is not None and begun["contents"] != record["contents"]:
            what = "text" if base is None or begun["contents"][:-1] != task.contents else "model to start from"
            raise ValueError(f"the {what} is not the one that the run in {workdir} began with; use another --workdir, "
                             f"or the same {what} to resume")
        if task.follow is not None and jax.process_count() > 1:
            raise ValueError(f"reinforcement learning runs in one process, and here are {jax.process_count()}")
        share, num_shares = data_share(mesh)
        batches = task.train if task.follow is not None else make_batches(
            task.train, batch_size=config.batch_size, seed=config.seed, process_index=share, process_count=num_shares,
            transform=task.transform)
        watch = _make_watch(config, task)
        learner = make_learner(config.model, config.lora, None if base is None else base.model, mesh)
        # Only now, with nothing left to go wrong, does the workdir belong to this run.
        if is_first():
            if config.lora.rank and not (workdir / "base").exists():
                save(workdir / "base", base)
            _write(workdir / TOKENIZER_FILE, tokenizer.to_bytes())
            _write(workdir / _RECORD, json.dumps(record, indent=1).encode())
            shapes = jax.eval_shape(learner.make_params, jax.random.key(0))
            counts = (sum(leaf.size for leaf in jax.tree.leaves(shapes)), count_parameters(config.model))
            print(f"{task.summary}, {tokenizer.vocab_size} pieces, "
                  f"{' of '.join(dict.fromkeys(map('{:,}'.format, counts)))} parameters, "
                  f"{mesh.size} {jax.default_backend()} device(s)")
        preparing.close()
        return fit(config, workdir, make_params=learner.make_params, loss_fn=learner.to_loss(task.loss_fn),
                   batches=batches, mesh=mesh, files={TOKENIZER_FILE: tokenizer.to_bytes(), **learner.files},
                   evaluate=lambda params: task.evaluate(learner.to_model(params)),
                   sample=lambda params, step: task.sample(learner.to_model(params), step),
                   watch=watch and (lambda params, step, metrics: watch(learner.to_model(params), step, metrics)),
                   follow=task.follow and (lambda params, metrics: task.follow(learner.to_model(params), metrics)))


def mean_loss(loss_fn: LossFn, batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
              max_batches: int | None = None) -> Callable[[Any], float | dict[str, float]]:
    """A function from weights to the mean loss over all batches, or the first ones.

    Where the loss function sums more than the loss, the function returns a dict: ``validation_loss``,
    ``validation_accuracy`` ...
    """
    eval_step = make_eval_step(loss_fn)

    def evaluate(params: Any) -> float | dict[str, float]:
        sums = [jax.device_get(eval_step(params, batch)) for batch in itertools.islice(batches(), max_batches)]
        total, weight, *others = jax.tree.map(lambda *parts: sum(map(float, parts)), *sums)
        if not others:
            return total / weight
        return {f"validation_{name}": value / weight for name, value in {"loss": total, **others[0]}.items()}

    return evaluate


def _make_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    settings = config.tokenizer
    if settings.path is not None:
        tokenizer = Tokenizer.load(settings.path)
        if settings.chat:
            _ = tokenizer.role_ids  # ValueError without them
        return tokenizer
    return Tokenizer.train(texts, kind=settings.kind, vocab_size=settings.vocab_size,
                           min_frequency=settings.min_frequency, chat=settings.chat)


def _model_config(config: ExperimentConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The model's vocabulary is the tokenizer's; an encoder, which never draws a token, may have room for more."""
    given = config.model.vocab_size
    if given is None or given == tokenizer.vocab_size:
        return config.model.replace(vocab_size=tokenizer.vocab_size)
    if config.model.family != "encoder" or given < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size={given}, but the tokenizer has {tokenizer.vocab_size} pieces; leave "
                         "model.vocab_size out")
    return config.model


def _tuned(config: ExperimentConfig, base: Bundle) -> ModelConfig:
    """The model is the base, but for its dropout; ValueError for settings of another one."""
    set_here = differences(ModelConfig(), config.model.replace(**{field: getattr(ModelConfig(), field)
                                                                  for field in _TUNABLE}), "model.")
    set_here += differences(TokenizerConfig(), config.data.tokenizer, "data.tokenizer.")
    if set_here:
        raise ValueError(f"model and tokenizer are those of --model; of them a config may set {', '.join(_TUNABLE)} "
                         f"alone, not {'; '.join(set_here)}")
    return base.config.replace(**{field: getattr(config.model, field) for field in _TUNABLE})


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


def _make_watch(config: ExperimentConfig, task: Task) -> Callable[[Any, int, MetricsWriter], None] | None:
    if not config.metrics.attention_every:
        return None
    if task.held_out is None:
        raise ValueError("metrics.attention_every is for language models and translation; leave it out here")
    from experiments.telemetry import watch_attention  # starting takes less time without

    return watch_attention(task.held_out, config.steps)


def _check_batch(config: ExperimentConfig, mesh: Mesh) -> None:
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % shares:
        raise ValueError(f"batch_size={config.batch_size} does not divide among the {shares} devices of mesh.data "
                         "x mesh.fsdp")
    if config.optim.gradient_dtype is not None and config.batch_size // shares % config.optim.accumulation:
        raise ValueError(f"with optim.gradient_dtype the {config.batch_size // shares} rows of a device, which are "
                         f"batch_size={config.batch_size} over {shares} devices, must split into optim.accumulation="
                         f"{config.optim.accumulation} parts")


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
