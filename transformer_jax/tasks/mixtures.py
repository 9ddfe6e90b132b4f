"""Several corpora with names and weights: reading them, and the training data made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

from transformer_jax.config import DataConfig, ExperimentConfig
from transformer_jax.data import Mixture, read_documents
from transformer_jax.data.mixture import TextsOfCorpora, check_names
from transformer_jax.data.text import check_texts
from transformer_jax.json_files import located
from transformer_jax.tasks.task_data import TaskData

Value = TypeVar("Value")
Result = TypeVar("Result")


def read_corpora(config: DataConfig, data: Any = None) -> dict[str, Iterable[str]] | None:
    """Reads the documents of each corpus of a mixture.

    Args:
      config: The data settings.
      data: The texts of each corpus by its name. If the config has a mixture too, the names must be
        the same. ``None`` means the paths in ``config.mixture``.

    Returns:
      The documents of each corpus by its name, in the order of ``config.mixture`` if it is given.
      ``None`` if the data is not a mixture.

    Raises:
      ValueError: If a corpus has no path, an entry is not a text, or a name is missing or unknown.
    """
    if data is None and config.mixture:
        for corpus in config.mixture:
            if corpus.path is None:
                raise ValueError(f"the corpus {corpus.name!r} of data.mixture has no path; set one, or pass the texts "
                                 "of each corpus, as in tj.train(config, data={name: texts})")
        return {corpus.name: read_documents(cast(str, corpus.path), key=config.text_key) for corpus in config.mixture}
    if not isinstance(data, Mapping):
        if config.mixture:
            raise ValueError(f"data.mixture names {len(config.mixture)} corpora, but data is not a dict of their "
                             "texts; pass data={name: texts}, or set data.mixture to ()")
        return None
    if not data:
        raise ValueError("data is an empty dict; expected the texts of each corpus by its name")
    names = [corpus.name for corpus in config.mixture] or list(data)
    check_names(data, names)
    corpora = {}
    for name in names:
        with located(f"corpus {name!r}"):
            corpora[name] = check_texts(data[name])
    return corpora


def for_each_corpus(convert: Callable[[Value], Result], corpora: Mapping[str, Value]) -> dict[str, Result]:
    """Converts every corpus; an error names the corpus.

    Args:
      convert: A function of one corpus.
      corpora: The corpora by name.

    Returns:
      The results by the name of the corpus.

    Raises:
      ValueError: If ``convert`` raises one.
    """
    results = {}
    for name, corpus in corpora.items():
        with located(f"corpus {name!r}"):
            results[name] = convert(corpus)
    return results


def texts_of(examples: Any) -> Iterable[str]:
    """Returns the texts that a tokenizer is trained on: those of every corpus, each once.

    Args:
      examples: The texts, or the texts of each corpus by its name.

    Returns:
      The texts, which can be iterated more than once.
    """
    return TextsOfCorpora(examples) if isinstance(examples, Mapping) else examples


def mixed(corpora: Mapping[str, TaskData], config: ExperimentConfig) -> TaskData:
    """Makes the training data of a mixture.

    Args:
      corpora: The training data of each corpus by its name.
      config: The config of the run. If it has no mixture, each corpus gets the weight of its rows.

    Returns:
      The training data, whose rows are drawn with the weights.
    """
    weights = {corpus.name: corpus.weight for corpus in config.data.mixture} or None
    train = Mixture({name: cast(Any, part.train) for name, part in corpora.items()}, weights)
    held_out = Mixture({name: cast(Any, part.held_out) for name, part in corpora.items()}, train.shares)
    first = next(iter(corpora.values()))
    num_tokens = [sum(part.num_tokens for part in mixture.parts.values()) for mixture in (train, held_out)]
    return dataclasses.replace(
        first, train=train, held_out=held_out, evaluation_batches=None, corpora=corpora,
        contents=[content for part in corpora.values() for content in part.contents],
        summary=f"{train.table(config.steps * config.batch_size)}\n{len(corpora)} corpora, {num_tokens[0]:,} tokens to "
                f"train on, {num_tokens[1]:,} held out")
