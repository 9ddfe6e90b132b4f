"""Objects from JSON and JSONL files."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformer_jax.data.pairs import read_lines


def read_records(path: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields where each object of a file stands, for error messages, and the object.

    Args:
        path: A `.jsonl` file, an object a line, or a `.json` file, a list of objects; either may be
          compressed (`.gz`).

    Raises:
        ValueError: no such file, another kind of file, text that is not UTF-8, bad JSON or what is
            no object, with the number of the line or of the object in the list.
    """
    path = Path(path)
    kind = next((suffix for suffix in path.suffixes if suffix in (".json", ".jsonl")), None)
    if kind is None:
        raise ValueError(f"{str(path)!r} is neither a .jsonl file (an object a line) nor a .json file (a list of them)")
    for where, record in _of_lines(path) if kind == ".jsonl" else _of_list(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where} is a {type(record).__name__}; expected a JSON object")
        yield where, record


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the place in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def text_of(record: Mapping[str, Any], key: str) -> str:
    """Returns the text under a key; ValueError when there is none."""
    if not isinstance(record.get(key), str):
        found = f"it is a {type(record[key]).__name__}" if key in record else f"found the keys {sorted(record)}"
        raise ValueError(f"no text under the key {key!r}; {found}")
    return record[key]


def texts_of(record: Mapping[str, Any], key: str) -> list[str]:
    """Returns the list of texts under a key; ValueError when there is none, or an empty one."""
    values = record.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        found = f"it is {values!r}" if key in record else f"found the keys {sorted(record)}"
        raise ValueError(f"no list of texts under the key {key!r}; {found}")
    return values


def _of_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_lines(path), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            raise ValueError(f"{where} is blank; expected a JSON object")
        try:
            yield where, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error


def _of_list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads("".join(read_lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(records, list) or not records:
        raise ValueError(f"{path} holds no list of JSON objects, or an empty one")
    return ((f"{path}, object {number}", record) for number, record in enumerate(records, start=1))
