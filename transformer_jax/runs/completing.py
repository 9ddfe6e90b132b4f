"""Completion and checks of a config before a run: the tokenizer and the config of the model, which
depends on the tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

from jax.sharding import Mesh

from transformer_jax.config import DataConfig, ExperimentConfig, ModelConfig, ModelSettings, TokenizerConfig
from transformer_jax.config.classifier import CLASSIFIERS
from transformer_jax.data import Tokenizer
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.settings import differences, require
from transformer_jax.sharding import num_batch_shards
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
    return config.replace(family=given.family, **head), head


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
