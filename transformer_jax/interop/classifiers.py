"""Classification heads of the families: ``...ForSequenceClassification`` and
``...ForTokenClassification``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformer_jax.config import ClassifierConfig, ModelConfig
from transformer_jax.interop.checking import is_of_head
from transformer_jax.interop.family import Family
from transformer_jax.interop.mapping import Weight, linear
from transformer_jax.interop.setting import ACTIVATIONS, Settings, checked, shown, translated, typed

_MOST_LABELS = 1_000_000  # more names would fill the memory before they can be compared with the tensors
# The names of the poolings in files, and in our config.
POOLINGS = {"cls": "first", "mean": "mean"}


@dataclasses.dataclass(frozen=True)
class Head:
    """A classification head of a family.

    Attributes:
      weights: the rows of the head.
      activation: the activation of its hidden layer; ``none`` if it has none, and ``None`` for the
        activation of the model.
      dropout: the setting that holds the dropout rate before the logits, and its default; ``None``
        if the family has no such setting.
      labels: the labels, for a head that always has the same ones.
      use_norm: whether a norm follows the activation.
      activation_setting: the setting that names the activation if ``activation`` is ``None``.
      pooling_setting: the setting that names the pooling, for a head that has several of them.
    """

    weights: Sequence[Weight]
    activation: str | None = "none"
    dropout: tuple[str, float | None] | None = ("classifier_dropout", None)
    labels: tuple[str, ...] = ()
    use_norm: bool = False
    activation_setting: str = "hidden_act"
    pooling_setting: str | None = None


def with_classifiers(family: Family, *, texts: Head | None = None, tokens: Head | None = None,
                     replaced: Head | None = None) -> Family:
    """Adds the classifiers of texts and of tokens to a family.

    Args:
      family: the family, whose own head is that of language modelling.
      texts: the head that classifies texts; ``None`` for a family without such a head.
      tokens: the head that classifies tokens.
      replaced: the head of ELECTRA that finds replaced tokens.

    Returns:
      The family, with these heads in ``classifiers``.
    """
    heads = [(texts, "ForSequenceClassification", "classifier"), (tokens, "ForTokenClassification", "token_classifier"),
             (replaced, "ForPreTraining", "token_classifier")]
    return dataclasses.replace(family, classifiers=tuple(
        _classifier(family, head, suffix, role) for head, suffix, role in heads if head is not None))


def decoder_classifiers(family: Family, token_head: str = "score") -> Family:
    """Adds the classifiers of a family of decoders: they read the last token of a text.

    Args:
      family: the family.
      token_head: the name of the linear map that classifies tokens.

    Returns:
      The family, with its classifiers.
    """
    return with_classifiers(family, texts=Head(linear("head.output", "score")[:1], dropout=None),
                            tokens=Head(linear("head.output", token_head), dropout=None))


def variant(family: Family, settings: Settings) -> Family:
    """Chooses between a family and its classifiers.

    Args:
      family: the family.
      settings: the content of ``config.json``.

    Returns:
      The classifier that ``architectures`` names, unless it was trained to give several labels to a
      text, or numbers; otherwise the family itself.
    """
    names = settings.get("architectures")
    if settings.get("problem_type") not in (None, "single_label_classification") or not isinstance(names, list):
        return family
    return next((head for head in family.classifiers if head.architecture in names), family)


def _classifier(family: Family, head: Head, suffix: str, role: str) -> Family:
    """Returns the family of the models with one kind of classification head."""
    def read(settings: Settings) -> Mapping[str, Any]:
        fields = dict(family.read(settings))
        rate = None if head.dropout is None else typed(settings, head.dropout[0], float | None, head.dropout[1])
        activation = head.activation
        if activation is None:
            name = head.activation_setting
            activation = translated(settings.get(name, "gelu"), ACTIVATIONS, name)
        pooling = None
        if head.pooling_setting is not None:
            pooling = translated(settings.get(head.pooling_setting, "cls"), POOLINGS, head.pooling_setting)
        own = ClassifierConfig(head.labels or _read_labels(settings), pooling, activation, head.use_norm, rate)
        return {**fields, "classifier": own, **fixed}

    def write(config: ModelConfig) -> Mapping[str, Any]:
        labels = config.classifier.labels
        settings = dict(family.write(config))
        if head.dropout is not None:
            settings[head.dropout[0]] = config.classifier.dropout
        if head.pooling_setting is not None:
            settings[head.pooling_setting] = next(
                (name for name, ours in POOLINGS.items() if ours == config.classifier.pooling), "cls")
        if head.labels:
            return settings
        return {**settings, "id2label": {str(number): label for number, label in enumerate(labels)},
                "label2id": {label: number for number, label in enumerate(labels)}}

    # The trunk of a classifier has no unembedding.
    fixed = {"family": f"{family.fixed['family']}_{role}", "tie_embeddings": True, "use_output_bias": False}
    trunk = tuple(dataclasses.replace(
        row, ours=f"trunk.{row.ours}", also=(), requires=None if row.requires is None else f"trunk.{row.requires}")
        for row in family.weights if not is_of_head(row.ours) and row.ours != "embeddings.output_bias")
    return dataclasses.replace(
        family, architecture=family.body.removesuffix("Model") + suffix, weights=(*trunk, *head.weights),
        settings=tuple(row for row in family.settings if row.ours != "tie_embeddings"),
        fixed={**family.fixed, **fixed}, read=read, write=write,
        # The head may read a tensor that the head of language modelling does not, such as BERT's pooler.
        ignored=tuple(pattern for pattern in family.ignored
                      if not any(re.fullmatch(pattern, row.theirs) for row in head.weights)))


def _read_labels(settings: Settings) -> tuple[str, ...]:
    """Reads the names of the labels, which are ``LABEL_0``, ``LABEL_1`` and so on without
    ``id2label``."""
    names = settings.get("id2label")
    if names is None:
        count = typed(settings, "num_labels", int, 2)
        if not 0 < count <= _MOST_LABELS:
            raise ValueError(f"num_labels={shown(count)}: expected a whole number from 1 to {_MOST_LABELS}")
        return tuple(f"LABEL_{number}" for number in range(count))
    if not isinstance(names, Mapping) or sorted(names, key=_number) != [str(number) for number in range(len(names))]:
        raise ValueError(f"id2label={shown(names)}: expected an object with the keys \"0\", \"1\" and so on")
    return tuple(checked(names[str(number)], str, "a label in id2label") for number in range(len(names)))


def _number(key: str) -> int:
    """Returns the number that a key of ``id2label`` is, or -1."""
    return int(key) if key.isdecimal() else -1
