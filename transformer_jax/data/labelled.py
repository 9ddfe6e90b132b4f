"""Texts and words with labels: reading, and the split into training and held-out examples."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from transformer_jax.data.files import is_named_json, read_lines
from transformer_jax.data.records import found_keys, read_records, text_of
from transformer_jax.json_files import located
from transformer_jax.settings import shown

Labelled = TypeVar("Labelled", "LabelledText", "LabelledWords")


@dataclasses.dataclass(frozen=True)
class LabelledText:
    """A text and its class.

    Attributes:
      text: The text.
      label: The name of the class.

    Raises:
      ValueError: If the text or the label is not a string, or is empty.
    """

    text: str
    label: str

    def __post_init__(self):
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"the text is {shown(self.text)}; expected a string that is not blank")
        object.__setattr__(self, "label", _label(self.label))

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, in a tuple."""
        return (self.text,)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label, in a tuple."""
        return (self.label,)


@dataclasses.dataclass(frozen=True)
class LabelledWords:
    """The words of a text, each with a label.

    Attributes:
      words: The words. The text is these words with spaces between them.
      labels: The label of each word.

    Raises:
      ValueError: If there is no word, a word is blank, or there are not as many labels as words.
    """

    words: tuple[str, ...]
    labels: tuple[str, ...]

    def __post_init__(self):
        for name in ("words", "labels"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"the {name} are {shown(value)}; expected a list")
        object.__setattr__(self, "words", tuple(self.words))
        object.__setattr__(self, "labels", tuple(map(_label, self.labels)))
        if not self.words or not all(isinstance(word, str) and word.strip() for word in self.words):
            raise ValueError(f"the words are {shown(self.words)}; expected at least one, and none that is blank")
        if len(self.words) != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels for {len(self.words)} words; expected one label for each word")

    @property
    def texts(self) -> tuple[str, ...]:
        """The text, in a tuple."""
        return (" ".join(self.words),)


def read_labelled_texts(path: str | Path, *, text_key: str = "text", label_key: str = "label") -> list[LabelledText]:
    """Reads texts with labels.

    Args:
      path: A file with one JSON object on each line, or with a list of objects, possibly compressed
        with gzip.
      text_key: The key of the text.
      label_key: The key of the label, which is a string or a whole number.

    Returns:
      One example for each object.

    Raises:
      ValueError: If an object has no text or no label. The message gives the file and the number of
        the line or object.
    """
    examples = []
    for where, record in read_records(path):
        with located(where):
            examples.append(labelled_text_of(record, text_key, label_key))
    return examples


def labelled_text_of(example: Any, text_key: str = "text", label_key: str = "label") -> LabelledText:
    """Converts an object of a file, a pair (text, label) or a ``LabelledText`` to a
    ``LabelledText``. Raises ValueError if this is not possible."""
    if isinstance(example, LabelledText):
        return example
    if isinstance(example, Mapping):
        return LabelledText(text_of(example, text_key), _of(example, label_key))
    if not isinstance(example, Sequence) or isinstance(example, str) or len(example) != 2:
        raise ValueError(f"{shown(example)} is not a text with its label; expected (text, label), or a dict like the "
                         "lines of a file")
    return LabelledText(*example)


def read_labelled_words(path: str | Path, *, text_key: str = "words",
                        label_key: str = "labels") -> list[LabelledWords]:
    """Reads texts whose words have labels.

    Args:
      path: A JSON file, as for ``read_labelled_texts``, or a text file in the format of CoNLL: a
        word and its label on each line, in the first and the last column, and a blank line between
        two texts. Lines that start with ``-DOCSTART-`` are skipped.
      text_key: The key of the list of words in JSON objects. A string is split at white space.
      label_key: The key of the list of labels.

    Returns:
      One example for each text.

    Raises:
      ValueError: If an object or a line is not valid. The message gives the file and the number of
        the line or object.
    """
    path = Path(path)
    examples = []
    for where, record in read_records(path) if is_named_json(path) else _columns(path):
        with located(where):
            examples.append(labelled_words_of(record, *((text_key, label_key) if is_named_json(path) else ())))
    if not examples:
        raise ValueError(f"{path} has no words; expected a word and its label on each line")
    return examples


def labelled_words_of(example: Any, text_key: str = "words", label_key: str = "labels") -> LabelledWords:
    """Converts an object of a file, a pair (words, labels) or a ``LabelledWords`` to a
    ``LabelledWords``. Raises ValueError if this is not possible."""
    if isinstance(example, LabelledWords):
        return example
    if isinstance(example, Mapping):
        words = _of(example, text_key)
        return LabelledWords(tuple(words.split()) if isinstance(words, str) else words, _of(example, label_key))
    if not isinstance(example, Sequence) or isinstance(example, str) or len(example) != 2:
        raise ValueError(f"{shown(example)} is not a list of words with their labels; expected (words, labels), or a "
                         "dict like the lines of a file")
    return LabelledWords(*example)


def _columns(path: Path) -> Iterator[tuple[str, tuple[list[str], list[str]]]]:
    """Yields the place, the words and the labels of each text of a file in columns."""
    numbered = enumerate(read_lines(path), start=1)
    kept = ((number, line.split()) for number, line in numbered if not line.startswith("-DOCSTART-"))
    for has_words, group in itertools.groupby(kept, key=lambda entry: bool(entry[1])):
        if not has_words:
            continue
        lines = list(group)
        for number, columns in lines:
            if len(columns) < 2:
                raise ValueError(f"{path}, line {number}: {columns[0]!r} has no label; expected a word and its label")
        yield f"{path}, line {lines[0][0]}", ([each[0] for _, each in lines], [each[-1] for _, each in lines])


def label_names(examples: Sequence[Labelled]) -> tuple[str, ...]:
    """Returns the labels that occur in examples, in alphabetical order."""
    return tuple(sorted({label for example in examples for label in example.labels}))


def split_by_label(examples: Sequence[LabelledText],
                   fraction: float) -> tuple[list[LabelledText], list[LabelledText]]:
    """Splits texts into a training part and a held-out part with the same shares of all labels.

    Args:
      examples: The examples, in any order.
      fraction: The fraction of the examples of each label that is held out, the last ones.

    Returns:
      The training examples and the held-out examples, each in the given order.

    Raises:
      ValueError: If one of the two parts would be empty.
    """
    counts: dict[str, int] = {}
    for example in examples:
        counts[example.label] = counts.get(example.label, 0) + 1
    left = {label: count - int(count * fraction) for label, count in counts.items()}
    train, held_out = [], []
    for example in examples:
        left[example.label] -= 1
        (train if left[example.label] >= 0 else held_out).append(example)
    if not train or not held_out:
        raise ValueError(f"data.validation_fraction={fraction} of {len(examples)} examples of {len(counts)} labels "
                         "leaves a part empty; set data.validation_path, or another fraction")
    return train, held_out


def _label(value: Any) -> str:
    """Returns a label as a string; raises ValueError if it is not a string or a whole number."""
    if isinstance(value, bool) or not isinstance(value, str | int | np.integer) or value == "":
        raise ValueError(f"the label is {shown(value)}; expected a string that is not empty, or a whole number")
    return str(value)


def _of(record: Mapping[str, Any], key: str) -> Any:
    """Returns the value under a key. Raises ValueError if there is none."""
    if key not in record:
        raise ValueError(f"no label or words under the key {key!r}; {found_keys(record)}")
    return record[key]
