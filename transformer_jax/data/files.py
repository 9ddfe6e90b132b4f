"""Reads the data files of users: UTF-8 text or JSON, possibly compressed with gzip. Other kinds of
files are refused."""

import contextlib
import functools
import gzip
import mmap
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from absl import logging

BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_BAD_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
_JSON_NAMES = (".json", ".jsonl", ".ndjson")
_HOW_TO = {
    "UTF-16": "convert it with: iconv -f UTF-16 -t UTF-8",
    "UTF-32": "convert it with: iconv -f UTF-32 -t UTF-8",
    "compressed": "only gzip files are decompressed automatically: decompress it first",
    "table": "write its texts as JSON lines, one object on each line",
    "other": "expected UTF-8 text, or JSON in it",
}
# The first bytes of files that are not UTF-8 text, the name of each kind, and the key of the advice
# in _HOW_TO.
_OTHER_KINDS = (
    (b"\xff\xfe\0\0", "UTF-32 text", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32 text", "UTF-32"),
    (b"\xff\xfe", "UTF-16 text", "UTF-16"), (b"\xfe\xff", "UTF-16 text", "UTF-16"),
    (b"BZh", "a bzip2 file", "compressed"), (b"\xfd7zXZ\0", "an xz file", "compressed"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "compressed"), (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "compressed"),
    (b"PK\x03\x04", "a zip archive (as .docx, .xlsx and .npz files are)", "other"),
    (b"PAR1", "a Parquet table", "table"), (b"ARROW1", "an Arrow table", "table"),
    (b"SQLite format 3\0", "an SQLite data base", "table"), (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "table"),
    (b"%PDF-", "a PDF file", "other"), (b"\x93NUMPY", "a NumPy array", "other"), (b"\x89PNG", "an image", "other"),
    (b"\xff\xd8\xff", "an image", "other"), (b"\x7fELF", "a program", "other"), (_GZIP, "compressed twice", "other"),
)


def name_without_compression(path: Path) -> str:
    """Returns the name of a file in lower case, without ``.gz`` at its end."""
    return path.name.lower().removesuffix(".gz")


def is_named_json(path: Path) -> bool:
    """Tells whether the name of a file ends with ``.json``, ``.jsonl`` or ``.ndjson``, in lower or
    upper case, possibly followed by ``.gz``."""
    return name_without_compression(path).endswith(_JSON_NAMES)


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """Opens a file to read its bytes. A gzip file is decompressed.

    Args:
      path: The file.

    Yields:
      A binary stream.

    Raises:
      ValueError: If the file does not exist, is empty, cannot be decompressed (this may also be
        found while it is read), or if its first bytes are not those of a text.
    """
    if not path.is_file():
        raise ValueError(f"no file at {str(path)!r}")
    with path.open("rb") as raw:
        is_compressed = raw.read(len(_GZIP)) == _GZIP or path.name.lower().endswith(".gz")
        raw.seek(0)
        with cast(BinaryIO, gzip.open(raw)) if is_compressed else contextlib.nullcontext(raw) as stream:
            try:
                _check_start(path, stream.read(16))
                stream.seek(0)
                yield stream
            except _BAD_GZIP as error:
                raise ValueError(f"{path} cannot be decompressed: {error}") from error


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """Maps the bytes of a file into memory.

    A gzip file is first decompressed into a temporary file. The errors are those of ``open_text``.

    Args:
      path: The file.

    Yields:
      The memory map.
    """
    with open_text(path) as stream, contextlib.ExitStack() as stack:
        file = stream
        if isinstance(stream, gzip.GzipFile):
            file = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, file)
            file.flush()
        yield stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_lines(path: Path) -> Iterator[str]:
    """Yields the lines of a file of UTF-8 text, each with its line ending.

    Only a line feed ends a line, except in a file that has none: there a carriage return does, as
    on an old Macintosh. A byte order mark at the start is removed. In a gzip file, the byte offsets
    of error messages refer to the decompressed content.

    Args:
      path: The file.

    Yields:
      One line.

    Raises:
      ValueError: If ``open_text`` refuses the file, or if the text is not UTF-8 or has a NUL
        character.
    """
    with open_text(path) as stream:
        first = stream.readline()
        begin = len(BOM) if first.startswith(BOM) else 0
        if begin:
            _warn_of_byte_order_mark(path)
        text = decode_utf8(path, first[begin:], begin)
        has_line_feed = text.endswith("\n")
        yield from (text,) if has_line_feed or "\r" not in text else re.findall("[^\r]*\r|[^\r]+", text)
        offset = len(first)
        for line in stream:
            yield decode_utf8(path, line, offset)
            offset += len(line)


def first_character(path: Path) -> str:
    """Returns the first character of a file that is not white space: ``{`` or ``[`` in JSON.

    The errors are those of ``open_text``.

    Args:
      path: The file.

    Returns:
      The character, or ``""`` if the file has nothing but white space.
    """
    with open_text(path) as stream:
        while block := stream.read(1 << 12):
            if found := block.removeprefix(BOM).lstrip():
                return chr(found[0])
    return ""


def decode_utf8(file: Path, data: bytes, offset: int) -> str:
    """Decodes bytes of a file.

    Args:
      file: The file, for error messages.
      data: The bytes.
      offset: The offset of the bytes in the file.

    Returns:
      The text.

    Raises:
      ValueError: If the bytes are not UTF-8 or have a NUL character. The message gives the offset.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: byte offset {offset + error.start}: {error.reason}") from error
    if (nul := data.find(b"\0")) >= 0:
        raise ValueError(f"{file} has a NUL character at byte offset {offset + nul}; is it a text file?")
    return text


def check_characters(text: str, where: str) -> None:
    """Raises ValueError if a text has a NUL character or half a surrogate pair, which JSON escapes
    can produce."""
    if "\0" in text:
        raise ValueError(f"{where} has a NUL character at character {text.index(chr(0))} of its text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a surrogate pair at character {error.start} of its text") from error


def _check_start(path: Path, start: bytes) -> None:
    """Raises ValueError if the first bytes of a file show that it is empty or is not text."""
    if not start:
        raise ValueError(f"{path} is empty; expected UTF-8 text")
    if start == BOM:
        raise ValueError(f"{path} is empty except for a byte order mark; expected UTF-8 text")
    for mark, kind, advice in _OTHER_KINDS:
        if start.startswith(mark):
            raise ValueError(f"{path} is {kind}; {_HOW_TO[advice]}")


@functools.cache  # a file is read more than once, but the warning is needed once
def _warn_of_byte_order_mark(path: Path) -> None:
    logging.warning("%s starts with a byte order mark, which is removed", path)
