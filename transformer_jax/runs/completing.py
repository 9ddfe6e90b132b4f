"""Completion and checks of the arguments of a run: its config and data, the tokenizer, and the config
of the model, which depends on the tokenizer."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from transformer_jax import recipes
from transformer_jax.config import DataConfig, ExperimentConfig, ModelConfig, ModelSettings, TokenizerConfig
from transformer_jax.config.classifier import CLASSIFIERS
from transformer_jax.data import Tokenizer
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.runs.record import Record, read_record, recorded_config
from transformer_jax.settings import differences, require
from transformer_jax.sharding import num_batch_shards
from transformer_jax.tasks.base import Task
from transformer_jax.training.bundle import Bundle

AnyTokenizer = Tokenizer | HuggingFaceTokenizer

# The fields of a model's config that a run may change when it starts from a trained model.
_TUNABLE = ("dropout", "attention_dropout")


def make_tokenizer(config: DataConfig, texts: Iterable[str]) -> AnyTokenizer:
    """Loads the tokenizer that a config names, or trains one.

    Args:
      config: The data settings.
      texts: The texts to train on, if the config names no file of a tokenizer.

    Returns:
      The tokenizer.

    Raises:
      ValueError: If the file cannot be read, or ``tokenizer.chat`` is set and the tokenizer has no
        tokens for the roles of a conversation.
    """
    settings = config.tokenizer
    if settings.path is not None:
        tokenizer = Tokenizer.load(settings.path)
        if settings.chat:
            _ = tokenizer.role_ids  # raises ValueError if there are none
        return tokenizer
    return Tokenizer.train(texts, kind=settings.kind, vocab_size=settings.vocab_size,
                           min_frequency=settings.min_frequency, chat=settings.chat)


def model_config_for(config: ExperimentConfig, tokenizer: AnyTokenizer) -> ModelSettings:
    """Sets the size of the model's vocabulary from the tokenizer.

    An encoder may have a larger vocabulary than its tokenizer, because it never generates tokens.

    Args:
      config: The config of the run.
      tokenizer: The tokenizer of the run.

    Returns:
      The complete config of the model.

    Raises:
      ValueError: If ``model.vocab_size`` is set and does not fit the tokenizer.
    """
    given = config.model.vocab_size
    if given is None or given == tokenizer.vocab_size:
        return config.model.replace(vocab_size=tokenizer.vocab_size)
    if config.model.role != "encoder" or given < tokenizer.vocab_size:
        raise ValueError(f"model.vocab_size={given}, but the tokenizer has {tokenizer.vocab_size} tokens; leave "
                         "model.vocab_size out")
    return config.model


def model_config_from(config: ExperimentConfig, base: Bundle) -> ModelSettings:
    """Takes the config of the model from the base, with the dropout rates of the run's config.

    The config of the run may leave out the settings of model and tokenizer, or repeat those of the
    base.

    Args:
      config: The config of the run.
      base: The trained model that the run starts from.

    Returns:
      The config of the model.

    Raises:
      ValueError: If the config sets other fields of the model or the tokenizer to new values.
    """
    if config.model == ModelConfig():
        config = config.replace(model=_untuned(base.config))
    elif type(config.model) is not type(base.config):
        raise ValueError(f"model and tokenizer come from --model, which is of family {base.config.family!r}, but "
                         f"model.family={config.model.family!r}; leave the settings of the model out")
    tuned = {field: getattr(config.model, field) for field in _TUNABLE if hasattr(config.model, field)}
    known, head = _without_new_head(base.config, config.model)
    set_here = []
    # The config differs either from the defaults or from the base. The shorter list of differences
    # shows which of the two the user meant.
    set_here += min((differences(other, config.model, "model.") for other in (
        _untuned(known, **tuned, **head), known.replace(**tuned, **head, vocab_size=config.model.vocab_size))), key=len)
    if base.experiment is None or differences(base.experiment.data.tokenizer, config.data.tokenizer):
        set_here += differences(TokenizerConfig(), config.data.tokenizer, "data.tokenizer.")
    if set_here:
        raise ValueError(f"model and tokenizer come from --model; of their settings you may only change "
                         f"{', '.join(tuned)}, not {'; '.join(set_here)}")
    return base.config.replace(**tuned)


def _without_new_head(config: ModelSettings, given: ModelSettings) -> tuple[ModelSettings, dict[str, Any]]:
    """Undoes what a classification task has done to the config of a base: it has added a head with
    the settings ``given.classifier``. Returns the config, and these settings."""
    if not isinstance(given, ModelConfig) or given.family in CLASSIFIERS or config.family not in CLASSIFIERS:
        return config, {}
    head = {"classifier": given.classifier}
    return config.replace(family=config.family.partition("_")[0], **head), head


def _untuned(config: ModelSettings, **tuned: Any) -> ModelSettings:
    """Returns the default config of the class of a config, with some fields set."""
    return type(config)(**tuned)


def check_arguments(*, workdir: Any = None, base: Any = None, tokenizer: Any = None, hooks: Any = (),
                    loggers: Any = (), optimizer: Any = None, held_out: Any = None, task: Any = None,
                    change: Any = False) -> None:
    """Checks the types of the arguments of ``tj.train``, which all have the same names there.

    Raises:
      ValueError: If an argument has a type that ``tj.train`` cannot use.
    """
    def check(holds: bool, name: str, value: Any, expected: str) -> None:
        require(holds, f"{name} is of type {type(value).__name__}; expected {expected}")

    check(workdir is None or isinstance(workdir, (str, os.PathLike)), "workdir", workdir, "a path")
    require(workdir is None or str(workdir).strip() != "", "workdir is an empty string, which would mean the "
            "current directory; name a directory")
    check(base is None or isinstance(base, (Bundle, str, os.PathLike)), "base", base,
          "a tj.Bundle, as tj.load returns it, or the path or id of a model")
    check(tokenizer is None or hasattr(tokenizer, "vocab_size"), "tokenizer", tokenizer, "a tj.Tokenizer")
    check(isinstance(hooks, Sequence), "hooks", hooks, "a list of hooks")
    for hook in hooks:
        check(callable(hook), "a hook", hook, "a function of the loop, hook(loop)")
    check(isinstance(loggers, Sequence), "loggers", loggers, "a list of metric loggers")
    for logger in loggers:
        check(hasattr(logger, "write") and hasattr(logger, "close"), "a logger", logger,
              "one with the methods write(step, values) and close()")
    check(optimizer is None or hasattr(optimizer, "update"), "optimizer", optimizer,
          "an optax.GradientTransformation")
    check(task is None or callable(task), "task", task, "a class of tj.Task, or a function of a config that makes one")
    check(isinstance(change, bool), "change", change, "True or False")
    check(held_out is None or not isinstance(held_out, (str, os.PathLike)), "held_out", held_out,
          "a list of examples; for a file set config.data.validation_path")


def check_batch_size(config: ExperimentConfig, mesh: Mesh) -> None:
    """Checks that a batch can be split evenly over the devices of a mesh.

    Args:
      config: The config of the run.
      mesh: The mesh of devices.

    Raises:
      ValueError: If the number of rows cannot be divided by the number of devices or, with
        ``optim.gradient_dtype``, into ``optim.accumulation`` equal parts on each device.
    """
    num_shards = num_batch_shards(mesh)
    if config.batch_size % num_shards:
        raise ValueError(f"batch_size={config.batch_size} cannot be split evenly over the {num_shards} devices of "
                         f"mesh.data x mesh.fsdp x mesh.expert; choose a multiple of {num_shards}")
    if config.optim.gradient_dtype is not None and config.batch_size // num_shards % config.optim.accumulation:
        raise ValueError(f"with optim.gradient_dtype the {config.batch_size // num_shards} rows of a device, which are "
                         f"batch_size={config.batch_size} over {num_shards} devices, must split into "
                         f"optim.accumulation={config.optim.accumulation} parts")


def config_of_call(config: str | ExperimentConfig | None, steps: int | None,
                   workdir: str | pathlib.Path | None) -> tuple[ExperimentConfig, Record | None]:
    """Returns the config of a call, and the record of the run in the workdir if there is one.

    Args:
      config: A config, the name of a recipe, or ``None`` for the config of the record.
      steps: The number of steps; ``None`` for that of the config.
      workdir: The directory of the run, or ``None``.

    Returns:
      The config and the record.

    Raises:
      ValueError: If there is no config.
    """
    record = None if workdir is None else read_record(workdir)
    if config is None:
        if workdir is None or record is None:
            raise ValueError("config is missing: " + ("pass a tj.ExperimentConfig, or the name of a recipe" if
                             workdir is None else f"there is no run in {workdir} to resume"))
        config = recorded_config(workdir, record)
    elif isinstance(config, str):
        config = recipes.get(config)
    if not isinstance(config, ExperimentConfig):
        raise ValueError(f"config is of type {type(config).__name__}; expected a tj.ExperimentConfig, or the name of a "
                         "recipe")
    return (config if steps is None else config.replace(steps=steps)), record


def check_corpora(task: Task, data: Any) -> None:
    """Raises ValueError if the data is a dict of corpora and the task cannot mix them."""
    if isinstance(data, Mapping) and not task.mixes_corpora:
        raise ValueError(f"data is a dict, but the task {task.name!r} does not mix corpora; expected a list of "
                         "examples, or an iterator of batches, which are dicts")


def with_data(config: ExperimentConfig, data: Any, texts: Sequence[str] | None = None) -> tuple[
        ExperimentConfig, Any, Iterator[Mapping[str, Any]] | None]:
    """Sorts the data of a call by its kind.

    Args:
      config: The config.
      data: A path, which becomes ``config.data.path``; examples; an iterator of batches; or
        ``None``.
      texts: Another name for a list of texts.

    Returns:
      The config, the examples and the iterator of batches; the last two are ``None`` if ``data`` is
      of another kind.

    Raises:
      ValueError: If the data is of none of these kinds.
    """
    if texts is not None:
        if data is not None:
            raise ValueError("data and texts are two names of the same argument; give one of them")
        if isinstance(texts, str):
            raise ValueError("texts is one string; pass a list of strings, or data=PATH to read a file")
        if not isinstance(texts, Iterable):
            raise ValueError(f"texts is of type {type(texts).__name__}; pass a list of strings")
        data = list(texts)
    if isinstance(data, (str, os.PathLike)):
        paths = dataclasses.replace(config.data, path=os.fspath(data), mixture=(), tfds=None, generated=None)
        return config.replace(data=paths), None, None
    # A list of examples has a length. An iterator or a grain data set has none, and yields batches.
    if data is None or hasattr(data, "__len__"):
        return config, data, None
    if not hasattr(data, "__iter__"):  # such as a number or a model
        raise ValueError(f"data is of type {type(data).__name__}; expected a path, a list of examples, or an iterator "
                         "of batches")
    return config, None, iter(data)
