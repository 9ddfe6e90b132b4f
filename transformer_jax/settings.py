"""Functions for frozen dataclasses of settings: checks, conversion from and to JSON, comparison."""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message if the condition is false."""
    if not condition:
        raise ValueError(message)


def shown(value: Any) -> str:
    """Returns the ``repr`` of a value for an error message: on one line, and not longer than 80
    characters."""
    try:
        text = " ".join(repr(value).split())
    except RecursionError:
        text = f"a {type(value).__name__} that is nested too deep"
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_text(text: Any) -> None:
    """Checks that a text can be encoded.

    Args:
      text: The text.

    Raises:
      ValueError: If it is not a string, or has half a surrogate pair.
    """
    check_type("a text", text, str, "a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has half a surrogate pair at character {error.start}, which is not a character; "
                         "remove it, for example with text.encode('utf-8', 'ignore').decode()") from None


def check_type(name: str, value: Any, kinds: type | tuple[type, ...], expected: str) -> None:
    """Checks the type of an argument.

    Args:
      name: The name of the argument, for the message.
      value: The argument.
      kinds: The type or types that are allowed.
      expected: What to pass, in words.

    Raises:
      ValueError: If the argument has another type.
    """
    require(isinstance(value, kinds), f"{name} is of type {type(value).__name__}; expected {expected}")


def checked_path(name: str, value: Any) -> pathlib.Path:
    """Returns an argument that names a file or directory as a path.

    Args:
      name: The name of the argument, for the message.
      value: The argument.

    Returns:
      The path.

    Raises:
      ValueError: If the argument is not a path, is empty (which would mean the current directory),
        or has a NUL character.
    """
    check_type(name, value, (str, os.PathLike), "a path")
    text = os.fspath(value)
    check_type(name, text, str, "a path of characters, and not of bytes")
    require(text.strip() != "", f"{name} is an empty string, which would mean the current directory; name a directory, "
            "or write '.'")
    require("\0" not in text, f"{name}={text!r} has a NUL character, which no path has")
    return pathlib.Path(text)


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggests a known name for an unknown one, as the end of an error message.

    Args:
      name: The unknown name.
      known: The known names.

    Returns:
      ``; did you mean 'x'?``, or an empty text if no known name is similar.
    """
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(config: Any, field: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError if a field's value is not one of the choices.

    Args:
      config: The dataclass.
      field: The name of the field.
      choices: The allowed values. The message suggests the nearest one.
    """
    value = getattr(config, field)
    if value not in choices:
        raise ValueError(f"{field}={value!r} is not one of {', '.join(choices)}{nearest(str(value), choices)}")


def check_field_names(cls: type, names: Iterable[str]) -> None:
    """Raises ValueError if a name is not a field of a dataclass.

    Args:
      cls: The dataclass.
      names: The names to check. The message suggests the nearest field.
    """
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f"; it has {', '.join(known)}"
            raise ValueError(f"{cls.__name__} has no field {name!r}{hint}")


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a config to nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """Converts nested dicts of JSON values to a config, which is the inverse of ``to_dict``.

    Args:
      cls: The dataclass.
      values: The values of its fields. Missing fields have their default.

    Returns:
      The config.

    Raises:
      ValueError: A name is unknown, or a value has the wrong type.
      TypeError: A field of the dataclass has an annotation that this function does not support.
    """
    require(isinstance(values, Mapping), f"expected the fields of a {cls.__name__}, got {values!r:.60}")
    cls = class_for(cls, values)
    check_field_names(cls, values)
    hints = typing.get_type_hints(cls)
    return cls(**{name: _coerce(f"{cls.__name__}.{name}", hints[name], value) for name, value in values.items()})


def _coerce(name: str, hint: Any, value: Any) -> Any:
    """Converts a JSON value to the type of a field."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if is_union else (hint,)
    if value is None and type(None) in options:
        return None
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise ValueError(f"{name} is a whole number of {value.bit_length()} bits; expected one of 64 bits")
    for option in options:
        if typing.get_origin(option) is tuple:  # JSON has lists instead of tuples
            if isinstance(value, (list, tuple)):
                kind = typing.get_args(option)[0]
                return tuple(_coerce(name, kind, _with_names(name, kind, item)) for item in value)
            continue
        if not isinstance(option, type) or typing.get_origin(option) is not None:
            raise TypeError(f"the field {name} has the annotation {hint}, which settings cannot read: use int, float, "
                            "bool, str, a dataclass, a tuple of one of these types, or a union of one of these with "
                            "None")
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_dict(option, value)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{name}={value!r}: expected {expected}, got {type(value).__name__}")


def class_for(cls: type, values: Any) -> type:
    """Returns the dataclass that holds these values of a field.

    Args:
      cls: The annotated dataclass. If it has a class method ``class_for``, as the config of a model
        has, the method chooses the class by the values.
      values: The values of the dataclass's fields; anything else chooses ``cls`` itself.

    Returns:
      The dataclass.

    Raises:
      ValueError: The method finds no class for the values.
    """
    choose = getattr(cls, "class_for", None)
    return cls if choose is None or not hasattr(values, "get") else choose(values)


def _with_names(name: str, kind: Any, item: Any) -> Any:
    """Converts a sequence to a dict of the fields of a dataclass, in their order; other items
    stay."""
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind) or isinstance(item, (kind, Mapping)):
        return item
    names = [field.name for field in dataclasses.fields(kind)]
    require(isinstance(item, (list, tuple)) and len(item) <= len(names),
            f"{name} has the entry {item!r}; expected ({', '.join(names)})")
    return dict(zip(names, item, strict=False))


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Lists the fields in which two configs differ.

    Args:
      old: A config.
      new: Another config of the same dataclass. A nested config may be of another class; then only
        the fields that both have are compared.
      prefix: What to write before the names of the fields.

    Returns:
      A text ``name: old -> new`` for each such field.
    """
    found = []
    common = {field.name for field in dataclasses.fields(new)}
    for field in dataclasses.fields(old):
        if field.name not in common:  # the configs are those of two families of models
            continue
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            found += differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            found.append(f"{prefix}{field.name}: {a!r} -> {b!r}")
    return found
