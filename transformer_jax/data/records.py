"""Reads the objects of JSON files. The content of a file, not its name, decides how it is read."""

import itertools
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformer_jax.data.files import first_character, is_named_json, read_lines
from transformer_jax.json_files import check_shape, parse_json

_MOST_KEYS_SHOWN = 20
_LIST_START = re.compile(r"\s*\[\s*\{")  # a text may begin with a bracket, too


def read_records(path: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the objects of a JSON file.

    Args:
      path: A file with one object on each line (``.jsonl``, ``.ndjson``) or with a list of objects
        (``.json``). The content decides which of them it is, and whether it is compressed with
        gzip. Blank lines are skipped.

    Yields:
      The place of the object, for error messages, and the object.

    Raises:
      ValueError: If the file does not exist, is not a JSON file or is not UTF-8, or if an entry is
        bad JSON or not an object. The message gives the number of the line or of the object in the
        list.
    """
    path = Path(path)
    if not is_named_json(path) and first_character(path) not in ("{", "["):
        raise ValueError(f"{str(path)!r} is neither a .jsonl file (one object on each line) nor a .json "
                         "file (a list of objects)")
    for where, value in read_values(path):
        check_shape(value, where, dict[str, Any])
        yield where, value


def read_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields the place and the value of each entry of a JSON file: the entries of a list, the value
    on each line, or the single value of the whole file. The errors are those of
    ``read_records``."""
    if _is_one_value(path):
        values: Any = parse_json("".join(read_lines(path)), path, object)
        if not values:
            raise ValueError(f"{path} has only {values}; expected JSON objects")
        if isinstance(values, dict):
            yield str(path), values
            return
        for number, value in enumerate(values, start=1):
            yield f"{path}, object {number}", value
        return
    found = False
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            found = True
            yield f"{path}, line {number}", parse_json(line.rstrip("\r\n"), path, object, line=number)
    if not found:
        raise ValueError(f"{path} has nothing but blank lines; expected JSON objects")


def first_object(path: Path) -> dict[str, Any] | None:
    """Returns the first object of a file if its first two lines (or its only line) are JSON
    objects, or if the file is a JSON list of objects. Returns None for any other file."""
    if first_character(path) == "[":
        return _first_of_list(path)
    if first_character(path) != "{":
        return None
    lines = list(itertools.islice(read_lines(path), 2))
    return parse_json(lines[0], path, dict[str, Any]) if all(_is_object(path, line) for line in lines) else None


def _first_of_list(path: Path) -> dict[str, Any] | None:
    """Returns the first object of a file that is a JSON list of objects, or else None."""
    start = "".join(itertools.islice(read_lines(path), 2))
    if not _LIST_START.match(start):
        return None
    try:
        return parse_json("".join(read_lines(path)), path, list[dict[str, Any]])[0]
    except ValueError:
        return None


def found_keys(record: Mapping[str, Any]) -> str:
    """Describes the keys of an object for an error message."""
    keys = sorted(map(str, record))
    more = f" and {len(keys) - _MOST_KEYS_SHOWN} more" if len(keys) > _MOST_KEYS_SHOWN else ""
    return f"found the keys {keys[:_MOST_KEYS_SHOWN]}{more}"


def text_of(record: Mapping[str, Any], key: str) -> str:
    """Returns the text under a key. Raises ValueError if there is none."""
    if not isinstance(record.get(key), str):
        found = f"it is a {type(record[key]).__name__}" if key in record else found_keys(record)
        raise ValueError(f"no text under the key {key!r}; {found}")
    return record[key]


def texts_of(record: Mapping[str, Any], key: str) -> list[str]:
    """Returns the list of texts under a key. Raises ValueError if there is none or if it is
    empty."""
    values = record.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        found = f"it is {reprlib.repr(values)}" if key in record else found_keys(record)
        raise ValueError(f"no list of texts under the key {key!r}; {found}")
    return values


def _is_one_value(path: Path) -> bool:
    """Tells whether the whole file is one JSON value, instead of one value on each line."""
    character = first_character(path)
    first_line = next(read_lines(path))
    return character == "[" or (character == "{" and bool(first_line.strip()) and not _is_object(path, first_line))


def _is_object(path: Path, line: str) -> bool:
    """Tells whether a line is a JSON object."""
    try:
        parse_json(line, path, dict[str, Any])
    except ValueError:
        return False
    return True
