"""Reads pairs of aligned sentences from text files, TSV files, JSON files and TFDS translation data
sets."""

import dataclasses
import functools
import hashlib
import itertools
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from transformer_jax.data.files import check_characters, is_named_json, name_without_compression, read_lines
from transformer_jax.data.records import first_object, found_keys, read_records
from transformer_jax.data.text import tfds_source, tfds_text


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs (source, target) of sentences.

    White space at the ends of the sentences is removed, and pairs with an empty side are left out.

    Args:
      raw: The pairs as they are stored, for instance a list. Every iteration reads them again.

    Raises:
      ValueError: If ``raw`` is an iterator or a text. Also, when the pairs are read or counted, if
        an entry is not a pair of texts or if no pair is left. The message gives the number of the
        entry, counted from 1.
    """

    raw: Iterable[tuple[str, str]]

    def __post_init__(self):
        if isinstance(self.raw, Iterator):
            raise ValueError("pairs are read twice: pass a list or another iterable, not an iterator")
        if isinstance(self.raw, str | bytes | Mapping) or not isinstance(self.raw, Iterable):
            raise ValueError(f"expected pairs of sentences, such as a list of (source, target), not a "
                             f"{type(self.raw).__name__}; use read_pairs to read a file")

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return (pair for pair in self._stripped() if all(pair))

    def __len__(self) -> int:
        return self.num_read - self.num_empty

    @property
    def num_read(self) -> int:
        """The number of pairs that were read, including those with an empty side."""
        return self.content["read"]

    @property
    def num_empty(self) -> int:
        """The number of pairs that are left out because a side is empty."""
        return self.content["empty"]

    def report(self) -> str:
        """Describes in one line what was read.

        Returns:
          The number of pairs that were read and left out.
        """
        return f"{self.num_read:,} pairs read, {self.num_empty:,} of them left out because a side is empty"

    @functools.cached_property
    def content(self) -> dict:
        """The numbers of pairs, and the SHA-256 digest of those that are not left out, which
        identifies them."""
        digest, num_read, num_empty = hashlib.sha256(), 0, 0
        for pair in self._stripped():
            num_read += 1
            if not all(pair):
                num_empty += 1
                continue
            for text in pair:
                data = text.encode()
                digest.update(len(data).to_bytes(8, "little") + data)
        if num_read == num_empty:
            raise ValueError(f"no pair of sentences: {num_read:,} were read, {num_empty:,} of them with an empty side")
        return {"sha256": digest.hexdigest(), "read": num_read, "empty": num_empty}

    def _stripped(self) -> Iterator[tuple[str, str]]:
        """Yields all pairs, without white space at their ends."""
        for number, pair in enumerate(self.raw, start=1):
            if isinstance(pair, tuple | list) and len(pair) == 2:
                source, target = pair
                if isinstance(source, str) and isinstance(target, str):
                    yield source.strip(), target.strip()
                    continue
            raise ValueError(f"pair {number} is {reprlib.repr(pair)}; expected two strings, a source and a target")


def read_pairs(path: str, *, source: str | None = None, target: str | None = None) -> Pairs:
    """Reads aligned sentences from UTF-8 files.

    The files are read once to check them and to count the pairs. Only a line feed ends a line,
    because the two files are aligned by line feeds. Gzip files are decompressed, and byte offsets
    in error messages refer to the decompressed content.

    Args:
      path: "SOURCE_FILE,TARGET_FILE", in which lines with the same number belong together; or a TSV
        file with one pair on each line and no quoting; or a JSON file with one object on each line
        or a list of objects. A JSON object has both sides, or has them in an object under
        ``translation``.
      source: In a TSV file, the column of the source, counted from "0"; None means "0". In a JSON
        file, the key of the source; None means "source".
      target: The same for the target; None means "1" or "target".

    Returns:
      The pairs. Every iteration reads the files again.

    Raises:
      ValueError: If a file does not exist, if more than two files are given, or if columns are
        given for two files. Also, with the file and the line, if the files have different numbers
        of lines, if a file is empty, is a CSV file or cannot be decompressed, if a text is not
        UTF-8 or has a NUL character, if JSON is not valid, if a line or object lacks a side, or if
        no pair is left.
    """
    path = str(path)
    if Path(path).is_file():
        raw = _pairs_of_file(Path(path), source, target)
    elif path.count(",") == 1:
        if source is not None or target is not None:
            raise ValueError(f"{source=} and {target=} are columns of a TSV file, but {path!r} names two files")
        files = [Path(part) for part in path.split(",")]
        for file in files:
            if is_named_json(file) or name_without_compression(file).endswith((".tsv", ".csv")):
                raise ValueError(f"{str(file)!r} is one of two files of aligned sentences by {path!r}, which hold "
                                 "sentences a line; a TSV file or one of JSON has both sides and is given alone")
        raw = _AlignedFiles(*files)
    elif "," in path:
        raise ValueError(f"{path!r} names {path.count(',') + 1} files; expected SOURCE_FILE,TARGET_FILE or a TSV file")
    else:
        raise ValueError(f"no file at {path!r}; expected SOURCE_FILE,TARGET_FILE or a TSV file")
    pairs = Pairs(raw)
    logging.info("%s: %s", path, pairs.report())
    return pairs


def read_tfds_pairs(name: str, split: str, *, source: str, target: str, data_dir: str | Path | None = None) -> Pairs:
    """Reads the pairs of a TFDS translation data set.

    It uses ``tfds.data_source``, which does not need TensorFlow.

    Args:
      name: The name of the data set, such as "wmt14_translate/de-en".
      split: A split or a slice of a split, such as "train" or "train[:10%]".
      source: The language to translate from, as the data set names it, such as "en".
      target: The language to translate into, such as "de".
      data_dir: The directory of the data sets. None means the default directory of TFDS. A data set
        that is not there is downloaded and prepared.

    Returns:
      The pairs. Every iteration reads the data set again.

    Raises:
      ImportError: If tensorflow_datasets is not installed.
      ValueError: If the data set is unknown, cannot be prepared, has a format without random
        access, or does not have the split. Also, when the pairs are read or counted, if an example
        has no UTF-8 text in one of the languages.
    """
    return Pairs(_TfdsPairs(tfds_source(name, split, data_dir), name, source, target))


def _pairs_of_file(path: Path, source: str | None, target: str | None) -> Iterable[tuple[str, str]]:
    """Returns the reader for a single file, which is a JSON file or a TSV file."""
    if is_named_json(path) or first_object(path) is not None:
        return _JsonPairs(path, source or "source", target or "target")
    if name_without_compression(path).endswith(".csv"):
        raise ValueError(f"{path} is a CSV file by its name, whose quotes would become text: write its pairs as JSON "
                         'lines, {"source": "...", "target": "..."}, or as a TSV file without quotes')
    return _Tsv(path, _column("source", source or "0"), _column("target", target or "1"))


@dataclasses.dataclass(frozen=True)
class _AlignedFiles:
    """The pairs of two files in which lines with the same number belong together."""
    source: Path
    target: Path

    def __iter__(self) -> Iterator[tuple[str, str]]:
        sources, targets = read_lines(self.source), read_lines(self.target)
        for number, (source, target) in enumerate(itertools.zip_longest(sources, targets)):
            if source is None or target is None:
                num_sources = number + (source is not None) + sum(1 for _ in sources)
                num_targets = number + (target is not None) + sum(1 for _ in targets)
                raise ValueError(
                    f"{self.source} has {num_sources:,} lines and {self.target} has {num_targets:,}; expected as many "
                    "of both, a sentence and its translation on lines with the same number"
                )
            yield source, target


@dataclasses.dataclass(frozen=True)
class _Tsv:
    """The pairs of two columns of a TSV file."""
    path: Path
    source: int
    target: int

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for number, line in enumerate(read_lines(self.path), start=1):
            columns = line.split("\t")
            if max(self.source, self.target) >= len(columns):
                raise ValueError(
                    f"{self.path}, line {number} has {len(columns)} tab-separated columns; expected at least "
                    f"{max(self.source, self.target) + 1}, for the source in column {self.source} and the target in "
                    f"column {self.target}, counted from 0"
                )
            yield columns[self.source], columns[self.target]


@dataclasses.dataclass(frozen=True)
class _JsonPairs:
    """The pairs of the objects of a JSON file."""
    path: Path
    source: str
    target: str

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for where, record in read_records(self.path):
            sides = record.get("translation", record)
            sides = sides if isinstance(sides, Mapping) else record
            yield _side(sides, self.source, where), _side(sides, self.target, where)


def _side(sides: Mapping[str, Any], key: str, where: str) -> str:
    """Returns the sentence under a key of a JSON object."""
    text = sides.get(key)
    if not isinstance(text, str):
        raise ValueError(f"{where} has no text under the key {key!r}; {found_keys(sides)}; set data.source "
                         "and data.target to the keys of the sentences")
    check_characters(text, where)
    return text


@dataclasses.dataclass(frozen=True)
class _TfdsPairs:
    """The pairs of a TFDS data set."""
    examples: Sequence[Mapping[str, Any]]
    name: str
    source: str
    target: str

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for index in range(len(self.examples)):
            example, where = self.examples[index], f"TFDS data set {self.name!r}, example {index}"
            yield tfds_text(example, self.source, where), tfds_text(example, self.target, where)


def _column(side: str, number: str) -> int:
    """Converts the number of a column from text."""
    if not number.isdecimal():
        raise ValueError(f"{side}={number!r} is not a column of a TSV file; expected a number, counted from 0")
    return int(number)
