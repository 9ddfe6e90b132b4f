"""Aligned sentences from text files, TSV files and TFDS translation sets."""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from transformer_jax.data.text import BOM, decode_utf8, tfds_source, tfds_text


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs (source, target) of sentences, without white space at their ends and without pairs with
    an empty side.

    Args:
        raw: The pairs as they are stored, a list for instance; every iteration reads them afresh.

    Raises:
        ValueError: `raw` is an iterator; and when the pairs are counted, none is left.
    """

    raw: Iterable[tuple[str, str]]

    def __post_init__(self):
        if isinstance(self.raw, Iterator):
            raise ValueError("pairs are read twice: give a list or another re-iterable, not an iterator")

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return (pair for pair in map(_stripped, self.raw) if all(pair))

    def __len__(self) -> int:
        return self.num_read - self.num_empty

    @property
    def num_read(self) -> int:
        """How many pairs there are, those with an empty side included."""
        return self.content["read"]

    @property
    def num_empty(self) -> int:
        """How many pairs are left out because a side is empty."""
        return self.content["empty"]

    def report(self) -> str:
        """Returns one line on what was read."""
        return f"{self.num_read:,} pairs read, {self.num_empty:,} of them left out for an empty side"

    @functools.cached_property
    def content(self) -> dict:
        """The counts, and what tells these pairs from others: the SHA-256 of those that are not
        left out."""
        digest, num_read, num_empty = hashlib.sha256(), 0, 0
        for pair in map(_stripped, self.raw):
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


def read_pairs(path: str, *, source: str | None = None, target: str | None = None) -> Pairs:
    """Reads aligned sentences from files of UTF-8 text once through, to check and count them, and
    returns them.

    Lines end with a line feed and nothing else, as sentence pairs are aligned by it; a byte order
    mark at the start of a file is left out. A file whose name ends in `.gz` is decompressed, and
    byte offsets count what was in it.

    Args:
        path: "SOURCE_FILE,TARGET_FILE", of which the lines with the same number belong together; or
            a TSV file, with a pair a line and no quoting.
        source: The source's column in the TSV file, counted from "0"; "0" when None.
        target: The target's column; "1" when None.

    Raises:
        ValueError: no such file, too many of them, or columns given for two files; and with file
            and place: files with different numbers of lines, an empty file, text that is not UTF-8,
            a NUL, a line without the columns; a broken gzip file; no pair left.
    """
    if Path(path).is_file():
        raw = _Tsv(Path(path), _column("source", source or "0"), _column("target", target or "1"))
    elif path.count(",") == 1:
        if source is not None or target is not None:
            raise ValueError(f"{source=} and {target=} are columns of a TSV file, but {path!r} names two files")
        raw = _AlignedFiles(*map(Path, path.split(",")))
    elif "," in path:
        raise ValueError(f"{path!r} names {path.count(',') + 1} files; expected SOURCE_FILE,TARGET_FILE or a TSV file")
    else:
        raise ValueError(f"no file at {path!r}; expected SOURCE_FILE,TARGET_FILE or a TSV file")
    pairs = Pairs(raw)
    logging.info("%s: %s", path, pairs.report())
    return pairs


def read_tfds_pairs(name: str, split: str, *, source: str, target: str, data_dir: str | Path | None = None) -> Pairs:
    """Returns the pairs of a TFDS translation set, through `tfds.data_source` and so without
    TensorFlow.

    Args:
        name: The data set's name, such as "wmt14_translate/de-en".
        split: A split or a slice of one, such as "train" or "train[:10%]".
        source: The language to translate from, as the data set names it, such as "en".
        target: The language to translate into, such as "de".
        data_dir: Where data sets lie; TFDS's own default when None. One that is not there is
          downloaded and prepared.

    Raises:
        ImportError: tensorflow_datasets is not installed.
        ValueError: the data set is unknown, cannot be prepared, is in a format without random
            access, or has no such split; and when the pairs are read or counted, an example without
            UTF-8 text in one of the languages.
    """
    return Pairs(_TfdsPairs(tfds_source(name, split, data_dir), name, source, target))


@dataclasses.dataclass(frozen=True)
class _AlignedFiles:
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
class _TfdsPairs:
    examples: Sequence[Mapping[str, Any]]
    name: str
    source: str
    target: str

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for index in range(len(self.examples)):
            example, where = self.examples[index], f"TFDS data set {self.name!r}, example {index}"
            yield tfds_text(example, self.source, where), tfds_text(example, self.target, where)


def _stripped(pair: tuple[str, str]) -> tuple[str, str]:
    source, target = pair
    return source.strip(), target.strip()


def _column(side: str, number: str) -> int:
    if not number.isdecimal():
        raise ValueError(f"{side}={number!r} is no column of a TSV file; expected a number, counted from 0")
    return int(number)


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a file, each with its line end; what ends a line and the errors are
    `read_pairs`'s."""
    if not path.is_file():
        raise ValueError(f"no file at {str(path)!r}")
    offset = 0
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
        try:
            for line in stream:
                begin = len(BOM) if not offset and line.startswith(BOM) else 0
                if begin:
                    _warn_of_byte_order_mark(path)
                yield decode_utf8(path, line[begin:], offset + begin)
                offset += len(line)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} cannot be decompressed: {error}") from error
    if not offset:
        raise ValueError(f"{path} is empty; expected UTF-8 text")


@functools.cache  # a file is read more than once
def _warn_of_byte_order_mark(path: Path) -> None:
    logging.warning("%s starts with a byte order mark; it is left out", path)
