"""Reads documents from text files, JSON files and TFDS data sets."""

import dataclasses
import glob
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from absl import logging

from transformer_jax.data.files import (
    BOM,
    check_characters,
    decode_utf8,
    is_named_json,
    mapped,
    name_without_compression,
)
from transformer_jax.data.records import first_object, found_keys, read_values
from transformer_jax.data.sentencepiece_training import END_OF_TEXT
from transformer_jax.json_files import check_shape

_SEPARATOR = END_OF_TEXT.encode()
_LINE_ENDS = (b"\n", b"\r\n", b"\r")


def read_documents(path: str | Path, *, key: str = "text") -> "TextFiles":
    """Finds the files of a corpus and returns their documents.

    A file named ``.jsonl`` or ``.ndjson`` has one document on each line. A file named ``.json`` has
    a list of documents, or one on each line. A file with any other name is read as JSON if its
    first lines, or the entries of its list, are JSON objects with the key. All other files are
    UTF-8 text, in which lines that are exactly ``<|endoftext|>`` separate documents. The names may
    be in upper case, and the files may be compressed with gzip.

    A byte order mark at the start of a file is removed. Line endings are kept, also CRLF. Both are
    logged. Only one document at a time is held in memory, except for a ``.json`` list.

    Args:
      path: A file, a directory (hidden files and subdirectories are ignored) or a glob pattern, in
        which ``**`` matches any depth. Files are read in the order of their names.
      key: The key of the text in a JSON object.

    Returns:
      The documents. Every iteration reads the files again.

    Raises:
      ValueError: If there is no such file. Also, during the iteration, if a file is empty or not
        text (a table, an archive, UTF-16), or if a document is not UTF-8, has a NUL character, is
        bad JSON, or lacks the key. The message gives the file and the byte
        offset or line number.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
    elif path.exists():
        files = [path]
    else:
        files = [Path(file) for file in glob.glob(str(path), recursive=True) if Path(file).is_file()]
    if not files:
        raise ValueError(f"no text file at {str(path)!r}: expected a file, a directory with files or a glob pattern")
    return TextFiles(tuple(sorted(files)), key)


def check_texts(texts: Iterable[str], what: str = "text") -> list[str]:
    """Checks a list of texts.

    Args:
      texts: The texts.
      what: The name of an entry for error messages.

    Returns:
      The texts as a list.

    Raises:
      ValueError: If ``texts`` is empty or is a single text, or if an entry is not a text. The
        message gives the number of the entry, counted from 1.
    """
    if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable):
        raise ValueError(f"expected a list of {what}s, not a {type(texts).__name__}")
    texts = list(texts)
    if not texts:
        raise ValueError(f"there is no {what}: the list is empty")
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise ValueError(f"{what} {number} of {len(texts):,} is of type {type(text).__name__}; expected a string")
    return texts


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """The documents of files, in order. Each iteration reads the files again.

    Attributes:
      files: The files.
      key: The key of the text in JSON objects.
    """

    files: tuple[Path, ...]
    key: str = "text"
    _reported: set[tuple[Path, str]] = dataclasses.field(default_factory=set, repr=False, compare=False)

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            yield from self._objects(file) if self._holds_json(file) else self._text(file)

    def _holds_json(self, file: Path) -> bool:
        """Tells whether a file is read as JSON. Raises ValueError for a CSV or TSV file."""
        if is_named_json(file):
            return True
        if name_without_compression(file).endswith((".csv", ".tsv")):
            raise ValueError(f"{file} is named like a table, not like a text: write its texts as JSON "
                             f'lines, {{"{self.key}": "..."}}, or as plain text in a .txt file')
        record = first_object(file)
        if record is None:
            return False
        has_text = isinstance(record.get(self.key), str)
        self._report(file, f"begins with JSON objects, {found_keys(record)}; it is read as " + (
            "JSON" if has_text else f"plain text, since they have no text under the key {self.key!r}"))
        return has_text

    def _text(self, file: Path) -> Iterator[str]:
        """Yields the documents of a text file."""
        with mapped(file) as data:
            start = len(BOM) if data[: len(BOM)] == BOM else 0
            if start:
                self._report(file, "starts with a byte order mark, which is removed")
            num_documents = 0
            for begin, end in _between_separators(data, start):
                if begin < end:
                    num_documents += 1
                    yield self._decode(file, data[begin:end], begin)
            if not num_documents:
                raise ValueError(f"{file} holds nothing but {END_OF_TEXT} lines; expected text between them")

    def _objects(self, file: Path) -> Iterator[str]:
        """Yields the documents of a JSON file."""
        for where, value in read_values(file):
            if not isinstance(value, str):  # a list may hold texts instead of objects
                check_shape(value, where, dict[str, Any])
                if not isinstance(value.get(self.key), str):
                    raise ValueError(f"{where} has no text under the key {self.key!r}; {found_keys(value)}")
                value = value[self.key]
            check_characters(value, where)
            yield value

    def _decode(self, file: Path, data: bytes, offset: int) -> str:
        """Decodes a document."""
        text = decode_utf8(file, data, offset)
        if b"\r\n" in data:
            self._report(file, "has lines that end in CRLF; they are kept as they are")
        return text

    def _report(self, file: Path, what: str) -> None:
        """Logs a fact about a file, once."""
        if (file, what) not in self._reported:
            self._reported.add((file, what))
            logging.warning("%s %s", file, what)


def _between_separators(data: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Yields the byte ranges between the lines that are exactly the separator."""
    begin = search = start
    while (found := data.find(_SEPARATOR, search)) >= 0:
        search = found + len(_SEPARATOR)
        line_end = next((end for end in _LINE_ENDS if data[search : search + len(end)] == end), None)
        if (found == start or data[found - 1 : found] in _LINE_ENDS) and (line_end or search == len(data)):
            yield begin, found
            begin = search = search + len(line_end or b"")
    yield begin, len(data)


@dataclasses.dataclass(frozen=True)
class TfdsDocuments:
    """The documents of a TFDS split, one for each example. Each iteration reads the data source
    again.

    Attributes:
      source: The examples.
      name: The name of the data set, for error messages.
      key: The feature that holds the text.
    """

    source: Sequence[Mapping[str, Any]]
    name: str
    key: str = "text"

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self.source)):
            yield tfds_text(self.source[index], self.key, f"TFDS data set {self.name!r}, example {index}")


def tfds_text(example: object, key: str, where: str) -> str:
    """Returns the text of a feature of a TFDS example. Raises ValueError if there is none."""
    if not isinstance(example, dict) or not isinstance(example.get(key), bytes | str):
        found = f"the keys {sorted(example)}" if isinstance(example, dict) else type(example).__name__
        raise ValueError(f"{where} has no text under the key {key!r}; found {found}")
    text = example[key]
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8: byte offset {error.start}: {error.reason}") from error
    check_characters(text, where)
    return text


def read_tfds(name: str, split: str = "train", data_dir: str | Path | None = None, key: str = "text") -> TfdsDocuments:
    """Reads the documents of a TFDS data set.

    It uses ``tfds.data_source``, which does not need TensorFlow.

    Args:
      name: The name of the data set, such as "tiny_shakespeare".
      split: A split or a slice of a split, such as "train" or "train[:10%]".
      data_dir: The directory of the data sets. None means the default directory of TFDS. A data set
        that is not there is downloaded and prepared.
      key: The feature that holds the text.

    Returns:
      The documents. Every iteration reads the data set again.

    Raises:
      ImportError: If tensorflow_datasets is not installed.
      ValueError: If the data set is unknown, cannot be prepared, has a format without random
        access, or does not have the split. Also, during the iteration, if an example has no UTF-8
        text under the key.
    """
    return TfdsDocuments(tfds_source(name, split, data_dir), name, key)


def tfds_source(name: str, split: str, data_dir: str | Path | None) -> Sequence[Mapping[str, Any]]:
    """Returns a TFDS split with random access. The errors are those of ``read_tfds``."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError("reading a TFDS data set needs: pip install tensorflow-datasets") from error
    try:
        return cast(Sequence[Mapping[str, Any]], tfds.data_source(name, split=split, data_dir=data_dir))
    except (tfds.download.DownloadError, ImportError, NotImplementedError, OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        place = data_dir or "TFDS's default data_dir"
        raise ValueError(
            f"TFDS data set {name!r}, split {split!r}, cannot be read or prepared in {place}: {reason}"
        ) from error
