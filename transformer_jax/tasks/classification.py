"""Classification of texts: an encoder or a decoder with a head learns the labels of texts."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.config import ClassifierConfig, ExperimentConfig, ModelConfig, ModelSettings
from transformer_jax.config.classifier import CLASSIFIERS
from transformer_jax.data import LabelledRows, LabelledText, Tokenizer
from transformer_jax.data.examples import checked_examples
from transformer_jax.data.labelled import label_names, labelled_text_of, read_labelled_texts, split_by_label
from transformer_jax.data.tokens import Form
from transformer_jax.decoding.classify import classify
from transformer_jax.models.classifier import Classifier
from transformer_jax.models.texts import text_form
from transformer_jax.ops.losses import cross_entropy
from transformer_jax.tasks.base import Task
from transformer_jax.tasks.inputs import tokenizer_of
from transformer_jax.tasks.label_scores import label_scores
from transformer_jax.tasks.task_data import TaskData
from transformer_jax.training.bundle import Bundle
from transformer_jax.training.objectives import classification_loss
from transformer_jax.training.step import Batch, Sums, make_eval_step

_NUM_SHOWN = 4


class TextClassification(Task):
    """Classification of texts, one text a row. The loss is the cross entropy of the labels.

    The model is an encoder or a decoder with a new head. It has random weights, or those of a
    trained model that the run starts from (Devlin et al., 2019).

    Attributes:
      examples: The plural noun that messages use for the examples.
      read_file: A function that reads a file of examples, given the two keys of JSON objects.
      read_example: A function that converts one item of a list from the caller to an example.
    """

    name = "classify"
    family = "classifier"
    examples: ClassVar[str] = "texts with labels"
    read_file: ClassVar[Callable[..., list[Any]]] = staticmethod(read_labelled_texts)
    read_example: ClassVar[Callable[..., Any]] = staticmethod(labelled_text_of)

    def __init__(self, config: ExperimentConfig, **options: Any):
        super().__init__(config, **options)
        self._labels: tuple[str, ...] = ()

    def check_family(self, family: str) -> None:
        """Checks that the model is an encoder, a decoder or a classifier of the task's kind."""
        if family not in ("encoder", "decoder"):
            super().check_family(family)

    def start_from(self, base: Bundle) -> Bundle:
        """Makes a classifier that has the weights of the base.

        A base that already is a classifier of this kind and has all labels of the data keeps its
        head, unless the config sets another pooling, activation or dropout. Otherwise the head is
        new.
        """
        self.check_family(base.config.family)
        model: Any = base.model
        given = self.config.model.classifier if isinstance(self.config.model, ModelConfig) else ClassifierConfig()
        labels = self._labels or given.labels
        if isinstance(model, Classifier):
            if set(labels) <= set(model.config.classifier.labels) and dataclasses.replace(
                    given, labels=()) == ClassifierConfig():
                return base
            model = model.trunk
        model = Classifier.of(model, dataclasses.replace(given, labels=labels), of_tokens=self._of_tokens,
                              key=jax.random.key(self.config.seed))
        return Bundle(model=model, tokenizer=base.tokenizer, config=model.config, files=base.files)

    def complete_model(self, model: ModelSettings, examples: Any) -> ModelSettings:
        """Makes the config of a classifier with the labels of the examples, or with two labels if
        there are no examples."""
        if not isinstance(model, ModelConfig):
            raise ValueError(f"the task {self.name!r} is for Transformers, but the model is of family "
                             f"{model.family!r}; change config.task or model.family")
        found = ("0", "1") if examples is None else label_names([*examples[0], *examples[1]])
        labels = model.classifier.labels or found
        family = model.family if model.family in CLASSIFIERS else f"{model.family}_{self.family}"
        return model.replace(family=family, classifier=dataclasses.replace(model.classifier, labels=labels),
                             tie_embeddings=True)

    def read(self, data: Sequence[Any] | None = None,
             held_out: Sequence[Any] | None = None) -> tuple[list[Any], list[Any]]:
        """Reads the training examples and the held-out examples.

        Args:
          data: Examples, or dicts with the fields of a line of the data file. ``None`` means that
            the file ``config.data.path`` is read.
          held_out: Examples to evaluate on, in the same form as ``data``. By default
            ``config.data.validation_path`` or, without it, a part of ``data``.

        Returns:
          The training examples and the held-out examples.

        Raises:
          ValueError: If an example is invalid (the message gives its number), if there are too few
            examples to split or only one label, or if the settings name no data.
        """
        settings = self.config.data
        if data is not None:
            parts = [self._checked(part) for part in (data, held_out) if part is not None]
        elif settings.path is None or settings.tfds is not None or settings.generated is not None:
            raise ValueError("no training data is given; set --config.data.path=FILE, where the file holds "
                             f"{self.examples}")
        else:
            paths = [path for path in (settings.path, settings.validation_path) if path is not None]
            parts = [self._read(path) for path in paths]
        train, held = parts if len(parts) == 2 else self._split(parts[0])
        self._labels = label_names([*train, *held])
        if len(self._labels) < 2:
            raise ValueError(f"all {self.examples} have the label {train[0].labels[0]!r}; expected at least two labels")
        return train, held

    def texts(self, examples: Iterable[Any]) -> Iterable[str]:
        """Returns the texts, without their labels."""
        return (text for example in examples for text in example.texts)

    def prepare(self, examples: Sequence[Any], held_out: Sequence[Any], tokenizer: Tokenizer,
                cache_dir: pathlib.Path) -> TaskData:
        """Tokenizes the examples. It stores nothing in ``cache_dir``, because a file of labels is
        small."""
        config: Any = self.config.model
        form: Form = "masked" if config.family.startswith("encoder") else "prompt"
        labels = config.classifier.labels
        train, validation = (LabelledRows.build(part, labels, tokenizer, form, self.config.row_length)
                             for part in (examples, held_out))
        num_cut = train.num_cut + validation.num_cut
        cut = f", of which {num_cut:,} are cut to {self.config.row_length} tokens" if num_cut else ""
        shown = Bundle(model=None, tokenizer=tokenizer, config=config)  # pyright: ignore[reportArgumentType]
        return TaskData(
            train=train, contents=[train.digest, validation.digest, repr(labels)],
            summary=f"{len(train):,} {self.examples}, {len(validation):,} held out{cut}; labels: {', '.join(labels)}",
            evaluation_batches=validation.batches, shown=(shown, held_out[:_NUM_SHOWN]))

    def loss(self, model: Classifier, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the cross entropy of the labels, in nats."""
        return classification_loss(self.config.loss)(model, batch, key)

    def evaluation_loss(self, model: Classifier, batch: Batch, key: jax.Array | None = None) -> Sums:
        """Computes the same loss without label smoothing and z-loss."""
        return classification_loss()(model, batch, key)

    def evaluate(self, model: Classifier, data: TaskData) -> dict[str, float] | None:
        """Measures the loss, the accuracy and the macro F1 on the held-out examples."""
        settings = self.config.eval
        if data.evaluation_batches is None:
            return None
        found = _measured(model, itertools.islice(data.evaluation_batches(settings.batch_size), settings.max_batches))
        return {f"validation_{name}": found[name] for name in ("loss", "accuracy", "macro_f1")}

    def show(self, model: Classifier, step: int, data: TaskData) -> str | None:
        """Returns the predicted and the true labels of the first held-out texts."""
        bundle, examples = data.shown
        found = classify(dataclasses.replace(bundle, model=model), [example.text for example in examples])
        return "\n".join(f"{each.label} ({each.probability:.2f}), truly {example.label}: {example.text[:80]!r}"
                         for each, example in zip(found, examples, strict=True))

    def measure(self, bundle: Bundle, data: str | Sequence[Any] | None = None, *,
                batch_size: int = 32) -> dict[str, float]:
        """Measures how often the predicted labels are right.

        Args:
          bundle: A trained classifier with its tokenizer.
          data: Examples, or a file of them. ``None`` means the held-out part of the training data.
          batch_size: The number of texts in a batch.

        Returns:
          ``loss`` (nats per label), the scores of ``transformer_jax.tasks.label_scores``, and
          ``labels``, the number of labels that were predicted.

        Raises:
          ValueError: If the file or an example cannot be read or has a label that the model does
            not know, or if the model is not a classifier.
        """
        if not isinstance(bundle.model, Classifier):
            raise ValueError(f"expected a classifier, got a model of family {bundle.config.family!r}; train one with "
                             f"the task {self.name!r}")
        if isinstance(data, (str, pathlib.Path)):
            examples = self._read(data)
        else:
            examples = self.read()[1] if data is None else self._checked(data)
        rows = LabelledRows.build(examples, bundle.config.classifier.labels, tokenizer_of(bundle),
                                  text_form(bundle.model), bundle.config.max_len)
        return _measured(bundle.model, rows.batches(batch_size))

    def report(self, bundle: Bundle, measured: Mapping[str, Any], **options: Any) -> str:
        """Formats the scores, and one line with the F1 of each label."""
        f1 = ", ".join(f"{name.removeprefix('f1_')} {value:.2%}" for name, value in measured.items()
                       if name.startswith("f1_"))
        return (f"step {bundle.step}, {measured['labels']:,} labels\nloss {measured['loss']:.4f} nats per label\n"
                f"accuracy {measured['accuracy']:.2%}, balanced accuracy {measured['balanced_accuracy']:.2%}, macro F1 "
                f"{measured['macro_f1']:.2%}\nF1: {f1}")

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of a batch of full rows."""
        row = jax.ShapeDtypeStruct((batch_size, self.config.row_length), np.int32)
        labels = row.shape if self._of_tokens else (batch_size,)
        return {"tokens": row, "segment_ids": row, "labels": jax.ShapeDtypeStruct(labels, np.int32),
                "weights": jax.ShapeDtypeStruct(labels, np.float32)}

    def next_command(self, workdir: str) -> str:
        """Returns the command that classifies a text with the trained model."""
        return f'transformer-jax classify --workdir={workdir} --text="..."'

    @property
    def _of_tokens(self) -> bool:
        return self.family == "token_classifier"

    def _read(self, path: str | pathlib.Path) -> list[Any]:
        return type(self).read_file(path, text_key=self.config.data.text_key, label_key=self.config.data.label_key)

    def _checked(self, data: Any) -> list[Any]:
        keys = self.config.data.text_key, self.config.data.label_key
        return checked_examples(data, lambda example: type(self).read_example(example, *keys), "example")

    def _split(self, examples: list[LabelledText]) -> tuple[list[LabelledText], list[LabelledText]]:
        return split_by_label(examples, self.config.data.validation_fraction)


def _measured(model: Classifier, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Returns the mean loss, the scores of the predicted labels, and the number of labels."""
    step: Any = make_eval_step(_loss_and_confusion)
    sums = [jax.device_get(step(model, batch)) for batch in batches]
    loss, weight, found = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *sums)
    labels = model.config.classifier.labels
    return {"loss": float(loss / weight), **label_scores(found["confusion"], labels), "labels": int(weight)}


def _loss_and_confusion(model: Classifier, batch: Batch, key: jax.Array | None = None) -> Sums:
    """Returns the sum of the losses, the number of labels, and the confusion matrix: true labels are
    its rows, predicted ones its columns."""
    logits = model(batch["tokens"], segment_ids_BT=batch["segment_ids"], key=key).logits
    labels, weights = batch["labels"], batch["weights"]
    confusion_CC = jnp.zeros((logits.shape[-1],) * 2).at[labels, logits.argmax(-1)].add(weights)
    return (cross_entropy(logits, labels) * weights).sum(), weights.sum(), {"confusion": confusion_CC}
