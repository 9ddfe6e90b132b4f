"""Documents from text files, JSONL files and TFDS data sets."""

import dataclasses
import glob
import json
import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from absl import logging

from transformer_jax.data.sentencepiece_training import END_OF_TEXT

_SEPARATOR = END_OF_TEXT.encode()
BOM = b"\xef\xbb\xbf"


def read_documents(path: str | Path, *, key: str = "text") -> "TextFiles":
    """Finds the files of a corpus and returns their documents, read afresh by every iteration.

    A `.jsonl` file has a document a line. Any other file is UTF-8 text, in which lines that are
    exactly `<|endoftext|>` part documents; they belong to none. A byte order mark at the start of a
    file is left out and line ends are kept, CRLF too; both are logged. One document at a time is
    held in memory.

    Args:
        path: A file, a directory (its files, hidden ones apart, not those of its subdirectories) or
            a glob pattern, in which `**` matches any depth. Files are read in the order of their
            names.
        key: The key of the text in a JSONL object.

    Raises:
        ValueError: no such file; and while iterating, with the file's name and the byte offset or
            line number: an empty file, text that is not UTF-8, a NUL, a blank line or bad JSON in
            JSONL, a missing key.
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


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """The documents of files, in order; each iteration reads the files again."""

    files: tuple[Path, ...]
    key: str = "text"
    _reported: set[tuple[Path, str]] = dataclasses.field(default_factory=set, repr=False, compare=False)

    def __iter__(self) -> Iterator[str]:
        for file in self.files:
            if file.stat().st_size == 0:
                raise ValueError(f"{file} is empty; expected UTF-8 text")
            with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                start = len(BOM) if data[: len(BOM)] == BOM else 0
                if start:
                    self._report(file, "starts with a byte order mark; it is left out")
                if start == len(data):
                    raise ValueError(f"{file} is empty but for a byte order mark; expected UTF-8 text")
                yield from (self._jsonl if file.suffix == ".jsonl" else self._text)(file, data, start)

    def _text(self, file: Path, data: mmap.mmap, start: int) -> Iterator[str]:
        num_documents = 0
        for begin, end in _between_separators(data, start):
            if begin < end:
                num_documents += 1
                yield self._decode(file, data[begin:end], begin)
        if not num_documents:
            raise ValueError(f"{file} holds nothing but {END_OF_TEXT} lines; expected text between them")

    def _jsonl(self, file: Path, data: mmap.mmap, start: int) -> Iterator[str]:
        data.seek(start)
        for number, line in enumerate(iter(data.readline, b""), start=1):
            where = f"{file}, line {number}"
            content = self._decode(file, line, data.tell() - len(line))
            if not content.strip():
                raise ValueError(f"{where} is blank; expected a JSON object with the key {self.key!r}")
            try:
                record = json.loads(content)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(record, dict) or not isinstance(record.get(self.key), str):
                found = f"the keys {sorted(record)}" if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{where} has no text under the key {self.key!r}; found {found}")
            text = record[self.key]
            check_characters(text, where)
            yield text

    def _decode(self, file: Path, data: bytes, offset: int) -> str:
        text = decode_utf8(file, data, offset)
        if b"\r\n" in data:
            self._report(file, "has lines that end in CRLF; they are kept as they are")
        return text

    def _report(self, file: Path, what: str) -> None:
        if (file, what) not in self._reported:
            self._reported.add((file, what))
            logging.warning("%s %s", file, what)


def decode_utf8(file: Path, data: bytes, offset: int) -> str:
    """Returns the text of bytes that lie at an offset of a file; ValueError says where it is not
    UTF-8 or has a NUL."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: byte offset {offset + error.start}: {error.reason}") from error
    if (nul := data.find(b"\0")) >= 0:
        raise ValueError(f"{file} has a NUL character at byte offset {offset + nul}; is it a text file?")
    return text


def _between_separators(data: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Yields the byte ranges between the lines that are exactly the separator."""
    begin = search = start
    while (found := data.find(_SEPARATOR, search)) >= 0:
        search = found + len(_SEPARATOR)
        line_end = next((end for end in (b"\n", b"\r\n") if data[search : search + len(end)] == end), None)
        if (found == start or data[found - 1 : found] == b"\n") and (line_end or search == len(data)):
            yield begin, found
            begin = search = search + len(line_end or b"")
    yield begin, len(data)


def check_characters(text: str, where: str) -> None:
    """Raises ValueError for a NUL or half a surrogate pair, which JSON can spell, in a text."""
    if "\0" in text:
        raise ValueError(f"{where} has a NUL character at character {text.index(chr(0))} of its text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a surrogate pair at character {error.start} of its text") from error


@dataclasses.dataclass(frozen=True)
class TfdsDocuments:
    """The documents of a TFDS split, one an example; each iteration reads the data source again."""

    source: Sequence[Mapping[str, Any]]
    name: str
    key: str = "text"

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self.source)):
            yield tfds_text(self.source[index], self.key, f"TFDS data set {self.name!r}, example {index}")


def tfds_text(example: object, key: str, where: str) -> str:
    """Returns the text of a feature of a TFDS example; ValueError says where there is none."""
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
    """Returns the documents of a TFDS data set, through `tfds.data_source` and so without
    TensorFlow.

    Args:
        name: The data set's name, such as "tiny_shakespeare".
        split: A split or a slice of one, such as "train" or "train[:10%]".
        data_dir: Where data sets lie; TFDS's own default when None. One that is not there is
          downloaded and prepared.
        key: The feature that holds the text.

    Raises:
        ImportError: tensorflow_datasets is not installed.
        ValueError: the data set is unknown, cannot be prepared, is in a format without random
            access, or has no such split; and while iterating, an example without UTF-8 text under
            the key.
    """
    return TfdsDocuments(tfds_source(name, split, data_dir), name, key)


def tfds_source(name: str, split: str, data_dir: str | Path | None) -> Sequence[Mapping[str, Any]]:
    """Returns a TFDS split with random access; errors are those of `read_tfds`."""
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
