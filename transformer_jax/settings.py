"""What frozen dataclasses of settings share: checks, JSON values and back, what differs."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: ``; did you mean 'x'?``, or nothing where
    none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(config: Any, field: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError, with the nearest choice, for a field that is none of them."""
    value = getattr(config, field)
    if value not in choices:
        raise ValueError(f"{field}={value!r} is not one of {', '.join(choices)}{nearest(str(value), choices)}")


def check_positive(config: Any, *fields: str) -> None:
    """Raises ValueError for a field that is no positive integer."""
    for field in fields:
        value = getattr(config, field)
        integer = isinstance(value, int) and not isinstance(value, bool)
        require(integer and value > 0, f"{field}={value!r} must be a positive integer")


def check_field_names(cls: type, names: Iterable[str]) -> None:
    """Raises ValueError, with the nearest known name, for a name that is no field of the
    dataclass."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            hint = nearest(name, known) or f"; it has {', '.join(known)}"
            raise ValueError(f"{cls.__name__} has no field {name!r}{hint}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as nested dicts of JSON values."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: Mapping[str, Any]) -> Any:
    """The inverse of :func:`to_dict`; unknown names and wrong types raise ValueError."""
    check_field_names(cls, values)
    hints = typing.get_type_hints(cls)
    return cls(**{name: _coerce(f"{cls.__name__}.{name}", hints[name], value) for name, value in values.items()})


def _coerce(name: str, hint: Any, value: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is tuple:  # a list where it comes from JSON
            if isinstance(value, (list, tuple)):
                return tuple(_coerce(name, typing.get_args(option)[0], item) for item in value)
            continue
        if isinstance(option, type) and dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_dict(option, value)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{name}={value!r}: expected {expected}, got {type(value).__name__}")


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The fields in which two configs differ, as ``name: old -> new``."""
    found = []
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(a):
            found += differences(a, b, f"{prefix}{field.name}.")
        elif a != b:
            found.append(f"{prefix}{field.name}: {a!r} -> {b!r}")
    return found
