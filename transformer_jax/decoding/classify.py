"""Labels of texts and of words, by a classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from transformer_jax.data.evaluation import fixed_batches
from transformer_jax.data.labelled_rows import cut, first_tokens
from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.decoding.batch import check_family, pad_right, vocab_size_of, whole_number
from transformer_jax.decoding.failures import not_finite
from transformer_jax.models.classifier import Classifier
from transformer_jax.models.functional import check_tokens
from transformer_jax.models.texts import as_list, check_tokenizer, read_text, text_form
from transformer_jax.settings import shown


@dataclasses.dataclass(frozen=True)
class Classification:
    """The label of a text.

    Attributes:
      label: The most probable label.
      probability: Its probability under the model.
      probabilities: The probability of every label, by its name.
    """

    label: str
    probability: float
    probabilities: dict[str, float]


@dataclasses.dataclass(frozen=True)
class LabelledWord(Classification):
    """The label of a word of a text, which is that of its first token.

    Attributes:
      word: The word.
      start: The index of its first character in the text.
      stop: The index after its last character.
    """

    word: str
    start: int
    stop: int


def classify(bundle: Any, texts: str | Sequence[str], *, batch_size: int = 32) -> list[Classification]:
    """Classifies texts.

    A text that is longer than the model's context is cut, as in training.

    Args:
      bundle: a classifier of texts with its tokenizer: a bundle, as ``tj.load``, ``tj.train`` and
        ``tj.from_huggingface`` return it.
      texts: one text or several.
      batch_size: the number of texts that the model reads at a time.

    Returns:
      The label of each text, with the probabilities of all labels.

    Raises:
      ValueError: if there is no text, one is not a string or is empty, the model is not a
        classifier of texts, or the bundle has no tokenizer.
    """
    model, tokenizer, given = _checked("classify", bundle, texts, "classifier")
    rows = [cut(read_text(model, text, tokenizer), model.config.max_len) for text in given]
    return [_named(model, probabilities_C) for probabilities_C in _probabilities(model, rows, batch_size)]


def classify_tokens(bundle: Any, texts: str | Sequence[str] | Sequence[Sequence[str]], *,
                    batch_size: int = 32) -> list[list[LabelledWord]]:
    """Gives a label to each word of texts.

    Args:
      bundle: a classifier of tokens with its tokenizer, see ``classify``.
      texts: one text or several. A text is a string, which is split at white space, or a list of
        words.
      batch_size: the number of texts that the model reads at a time.

    Returns:
      For each text, one entry for each word. A word that the tokenizer leaves out has no entry. The
      places of words count characters of the text, or of the words with spaces between them.

    Raises:
      ValueError: if there is no text, one is empty or longer than the model's context, the model is
        not a classifier of tokens, or the bundle has no tokenizer.
    """
    given: Any = texts if isinstance(texts, str) else [
        text if isinstance(text, str) else " ".join(text) for text in as_list("classify_tokens", texts)]
    model, tokenizer, given = _checked("classify_tokens", bundle, given, "token_classifier")
    form = text_form(model)
    # Words are separated by one space, as in training; the places in the given text are found afterwards.
    split = [text.split() for text in given]
    rows = [read_text(model, " ".join(words), tokenizer) for words in split]
    found = _probabilities(model, rows, batch_size)
    labelled = []
    for text, words, probabilities_TC in zip(given, split, found, strict=True):
        start, entries = 0, []
        for word, place in zip(words, first_tokens(words, tokenizer.spans(" ".join(words), form)), strict=True):
            start = text.index(word, start)
            if place is not None:
                named = _named(model, probabilities_TC[place])
                entries.append(LabelledWord(named.label, named.probability, named.probabilities, word, start,
                                            start + len(word)))
            start += len(word)
        labelled.append(entries)
    return labelled


def _checked(function: str, bundle: Any, texts: Any, role: str) -> tuple[Classifier, TextTokenizer, list[str]]:
    """Returns the classifier, its tokenizer and a list of texts, after checks of all three."""
    if not hasattr(bundle, "model") or not hasattr(bundle, "tokenizer"):
        raise ValueError(f"{function} was given an object of type {type(bundle).__name__}; expected a tj.Bundle, as "
                         "tj.load, tj.train and tj.from_huggingface return it")
    if getattr(bundle.model, "config", None) is not None and bundle.model.config.role != role:
        raise ValueError(f"{function} needs a {role.replace('_', ' ')}, but the model is of family "
                         f"{bundle.model.config.family!r}; train one with the task {function!r}")
    model: Classifier = check_family(function, bundle.model, role)
    if bundle.tokenizer is None:
        raise ValueError("the model has no tokenizer, so it cannot read texts; load a model that is stored with its "
                         "tokenizer")
    check_tokenizer(bundle.tokenizer)
    given = as_list(function, texts)
    for text in given:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{function} was given {shown(text)}; expected a text that is not blank")
    if not given:
        raise ValueError(f"{function} was given an empty list; expected at least one text")
    return model, bundle.tokenizer, given


def _probabilities(model: Classifier, rows: Sequence[Sequence[int]], batch_size: int) -> np.ndarray:
    """Returns the probabilities of the labels of each row, or of each of its tokens."""
    batch_size = min(whole_number("batch_size", batch_size), len(rows))
    check_tokens(np.concatenate(rows), vocab_size_of(model))
    tokens_NT, segment_ids_NT = pad_right(rows, model.config.max_len)
    parts = [np.asarray(_softmax(model, batch["tokens"], batch["segment_ids"])) for batch in fixed_batches(
        len(rows), batch_size, lambda part: {"tokens": tokens_NT[part.start:part.stop],
                                             "segment_ids": segment_ids_NT[part.start:part.stop]})]
    found = np.concatenate(parts)[:len(rows)]
    if not np.isfinite(found).all():
        raise not_finite(model, "the probabilities of the labels are")
    return found


@jax.jit
def _softmax(model: Classifier, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Returns the probabilities of the labels, float32 ``[B, labels]`` or ``[B, T, labels]``."""
    return jax.nn.softmax(model(tokens_BT, segment_ids_BT=segment_ids_BT).logits, axis=-1)


def _named(model: Classifier, probabilities_C: np.ndarray) -> Classification:
    """Returns the most probable label with the probabilities of all labels."""
    names, best = model.config.classifier.labels, int(probabilities_C.argmax())
    probabilities = dict(zip(names, probabilities_C.tolist(), strict=True))
    return Classification(names[best], probabilities[names[best]], probabilities)
