"""Reads JSON files and checks their content. An error names the file, the line and what was
expected there."""

import contextlib
import json
import math
import pathlib
import re
import types
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from transformer_jax.files import read_file

T = TypeVar("T")

_MOST_NESTED = 100
# Checking every number takes longer, so it is done only for JSON that matches this pattern.
_MAY_BE_TOO_LARGE = re.compile(r"\d{300}|[eE]\+?\d{3}")
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = {dict: "a JSON object", list: "a list", str: "text", bool: "true or false", int: "a whole number",
          float: "a number", type(None): "null"}


def read_json(path: str | pathlib.Path, shape: type[T]) -> T:
    """Reads a JSON file and checks the types of its values.

    Args:
      path: The path of the file, which must be UTF-8.
      shape: The type that the file must hold: ``dict[str, int]``, ``list[str]``, ``float | None``,
        or a ``TypedDict`` for an object with known keys. An object may have more keys.

    Returns:
      The value, which has this type.

    Raises:
      OSError: The file cannot be read.
      ValueError: The file is not UTF-8 or not JSON, is nested too deep, has text that is not valid
        Unicode, or has a value of another type. The message names the path and the place.
    """
    content = read_file(path)
    value = parse_json(content, path, shape)
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):x}"
            raise ValueError(f"{path} holds half a surrogate pair, {half}, which is no character") from None
    return value


def parse_json(content: bytes | str, path: str | pathlib.Path, shape: type[T], *, line: int | None = None) -> T:
    """Parses and checks JSON that was read from a file, like ``read_json``.

    Args:
      content: The JSON.
      path: The path of the file, for error messages.
      shape: The type that the JSON must hold.
      line: The number of the line, if the content is one line of the file.

    Returns:
      The value, which has this type.

    Raises:
      ValueError: The content is not UTF-8 or not JSON, is nested too deep, or has a value of
        another type.
    """
    where = str(path) if line is None else f"{path}, line {line}"
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8: byte offset {error.start}: {error.reason}") from None
    if not text.strip():
        raise ValueError(f"{where} is {'empty' if line is None else 'blank'}; expected {_described(shape)}")
    is_checked = _MAY_BE_TOO_LARGE.search(text) is not None
    try:
        value = json.loads(text, parse_int=_whole if is_checked else None, parse_float=_finite if is_checked else None)
    except json.JSONDecodeError as error:
        at = f"{path}, line {(line or 1) + error.lineno - 1}"
        raise ValueError(f"{at} is not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from None
    except RecursionError:
        raise ValueError(_too_deep(where)) from None
    except ValueError as error:
        raise ValueError(f"{where} {error}") from None
    if _is_too_deep(value):
        raise ValueError(_too_deep(where))
    return check_shape(value, where, shape)


def read_json_lines(path: str | pathlib.Path, shape: type[T], *, numbers: Sequence[str] = ()) -> list[T]:
    """Reads a file to which a program appends one JSON value per line.

    If the program was killed while it wrote, the last line is incomplete and is skipped. Any other
    damaged line is skipped too, with a warning that names it.

    Args:
      path: The path of the file.
      shape: The type of each line, as in ``read_json``.
      numbers: The keys under which each line must have a number.

    Returns:
      The values of the lines that are not damaged.

    Raises:
      OSError: The file cannot be read.
    """
    *lines, cut = read_file(path).split(b"\n")
    found, damaged = [], []
    for number, line in enumerate([*lines, cut], start=1):
        try:
            value = parse_json(line, path, shape, line=number)
            for key in numbers:
                if not isinstance(value, Mapping) or not _fits(value.get(key), float):
                    raise ValueError(f"{path}, line {number} has no number under the key {key!r}")
        except ValueError as error:
            if number <= len(lines):
                damaged.append(str(error))
        else:
            found.append(value)
    if damaged:
        more = f"; and {len(damaged) - 3} more lines" if len(damaged) > 3 else ""
        warnings.warn(f"damaged lines are left out: {'; '.join(damaged[:3])}{more}", stacklevel=2)
    return found


def check_shape(value: Any, where: str, shape: type[T]) -> T:
    """Checks the type of a JSON value.

    Args:
      value: The value.
      where: The file that it came from, for the error message.
      shape: The expected type, as in ``read_json``.

    Returns:
      The same value.

    Raises:
      ValueError: The value, or a part of it, has another type.
    """
    wrong = _difference(value, shape, "")
    if wrong is not None:
        raise ValueError(f"{where}{wrong}")
    return value


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Puts the name of the place in front of the message of a ValueError.

    Args:
      where: The place, such as a file and a line.

    Yields:
      Nothing.

    Raises:
      ValueError: The original error, with the place.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _difference(value: Any, shape: Any, at: str) -> str | None:
    """Describes why a value does not have a type; ``None`` if it has.

    The text continues an error message that starts with the name of the file.
    """
    if not _fits(value, shape):
        return f"{at and f': {at}'} is {_shown(value)}; expected {_described(shape)}"
    if isinstance(shape, types.UnionType):
        differences = [_difference(value, option, at) for option in typing.get_args(shape) if _fits(value, option)]
        return None if None in differences else differences[0]
    arguments = typing.get_args(shape)
    if isinstance(value, dict) and (arguments or typing.is_typeddict(shape)):
        if typing.is_typeddict(shape):
            missing = sorted(shape.__required_keys__ - value.keys())
            if missing:
                return f"{at and f': {at}'} has no {missing[0]!r}; found the keys {sorted(value)}"
            inside = {key: hint for key, hint in typing.get_type_hints(shape).items() if key in value}
        else:
            inside = dict.fromkeys(value, arguments[1])
        parts = ((value[key], hint, f"{at}.{key}" if at else key) for key, hint in inside.items())
    elif isinstance(value, list) and arguments:
        parts = ((item, arguments[0], f"{at}[{index}]") for index, item in enumerate(value))
    else:
        return None
    return next((wrong for part in parts if (wrong := _difference(*part)) is not None), None)


def _fits(value: Any, shape: Any) -> bool:
    """Whether a value has a type, without a check of the values inside of it."""
    if isinstance(shape, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(shape))
    kind = _kind(shape)
    if kind in (object, Any):
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _kind(shape: Any) -> Any:
    """Returns the Python type of the values that a type annotation describes."""
    if typing.is_typeddict(shape):
        return dict
    return type(None) if shape is None else typing.get_origin(shape) or shape


def _described(shape: Any) -> str:
    """Describes an expected type in words."""
    options = typing.get_args(shape) if isinstance(shape, types.UnionType) else (shape,)
    return " or ".join(_KINDS.get(_kind(option), "a JSON value") for option in options)


def _shown(value: Any) -> str:
    """Writes a value for an error message."""
    if isinstance(value, (dict, list)):
        return _KINDS[type(value)]
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _whole(text: str) -> int:
    """Parses an integer, with a limit on its size."""
    _finite(text)
    return int(text)


def _finite(text: str) -> float:
    """Parses a number; ValueError if it is too large for a float."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"holds the number {text[:20]}..., which is too large for a 64-bit float")
    return number


def _too_deep(where: str) -> str:
    """Returns the error message for JSON that is nested too deep."""
    return f"{where} has lists or objects nested more than {_MOST_NESTED} deep; files of this kind do not need that"


def _is_too_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than ``_MOST_NESTED`` deep."""
    level = [value]
    for _ in range(_MOST_NESTED + 1):
        level = [item for part in level if isinstance(part, (dict, list))
                 for item in (part.values() if isinstance(part, dict) else part) if isinstance(item, (dict, list))]
        if not level:
            return False
    return True
