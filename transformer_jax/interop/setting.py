"""Settings in ``config.json`` files: the field of our config that each one expresses, and checks of
their values, because anybody may have written the file."""

from __future__ import annotations

import dataclasses
import functools
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any

from transformer_jax.config import ModelConfig

Settings = Mapping[str, Any]

REQUIRED = object()
# One table for all families. If several names have the same value, the exporter writes the first.
ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "relu": "relu", "swish": "silu", "silu": "silu",
               "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh"}
# Size fields that may be None in our config.
_SIZES = ("vocab_size", "num_kv_heads", "head_dim", "mlp_dim", "num_encoder_layers", "num_decoder_layers")
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", type(None): "null"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field of our config, and the setting in ``config.json`` that expresses it.

    Attributes:
      ours: the name of the field.
      theirs: the name of the setting.
      default: the value of our field if ``config.json`` leaves the setting out; ``REQUIRED`` if it
        must contain the setting.
      values: a table from values of the setting to values of our field, if they differ. Other
        values are not supported. If several entries have the same value of our field, the exporter
        writes the first.
      also: further settings that the exporter writes with the same value.
    """

    ours: str
    theirs: str
    default: Any = REQUIRED
    values: Mapping[Any, Any] | None = None
    also: tuple[str, ...] = ()

    def read(self, settings: Settings) -> Any:
        """Reads the value of our field from the settings.

        Args:
          settings: the content of ``config.json``.

        Returns:
          The value of our field.

        Raises:
          ValueError: if the value has the wrong type, or if our field cannot express it.
        """
        if self.theirs not in settings:
            return self.default
        if self.values is None:
            expected = _types_of_fields()[self.ours]
            if self.ours in _SIZES and self.default is not None:
                expected = int  # None would mean our default, not that of transformers
            return checked(settings[self.theirs], expected, self.theirs)
        return translated(settings[self.theirs], self.values, self.theirs)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Converts the value of our field to settings.

        Args:
          config: our config.

        Returns:
          The settings for ``config.json``; empty if the setting cannot express the value.
        """
        value = getattr(config, self.ours)
        if self.values is not None:
            names = [theirs for theirs, ours in self.values.items() if ours == value]
            if not names:
                return {}
            value = names[0]
        return dict.fromkeys((self.theirs, *self.also), value)


# The sizes under the names that most families of decoders give them.
SIZES = (
    Setting("vocab_size", "vocab_size"),
    Setting("model_dim", "hidden_size"),
    Setting("mlp_dim", "intermediate_size"),
    Setting("num_layers", "num_hidden_layers"),
    Setting("num_heads", "num_attention_heads"),
)


@functools.cache
def _types_of_fields() -> dict[str, Any]:
    """Returns the type of each field of our config. Python needs a millisecond to evaluate them."""
    return typing.get_type_hints(ModelConfig)


def shown(value: Any) -> str:
    """Formats a value from a file for an error message, and cuts it if it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def checked(value: Any, expected: Any, name: str) -> Any:
    """Checks the type of a value from a file, and converts it to a float if a float is expected.

    Args:
      value: the value that the JSON parser returned.
      expected: a type such as ``int``, or a union such as ``float | None``.
      name: the name of the setting, for the error message.

    Raises:
      ValueError: if the value has another type, or is a number that a float cannot represent.
    """
    options = typing.get_args(expected) if isinstance(expected, types.UnionType) else (expected,)
    if type(value) in options and not isinstance(value, float):
        return value
    # Unlike float(value), this comparison works for whole numbers of any size; for NaN it is False.
    if float in options and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    raise ValueError(f"{name}={shown(value)}: expected {' or '.join(_NAMES[option] for option in options)}")


def typed(settings: Settings, name: str, expected: Any, default: Any) -> Any:
    """Returns a setting after ``checked`` has checked its type, or the default if it is absent."""
    return checked(settings[name], expected, name) if name in settings else default


def require_settings(settings: Settings, expected: Settings) -> None:
    """Raises ValueError with a list of all settings that are present and have an unexpected
    value."""
    wrong = [f"{name}={shown(settings[name])} (expected {value!r})" for name, value in expected.items()
             if settings.get(name, value) != value]
    if wrong:
        raise ValueError(f"this {settings.get('model_type')} model has settings that are not supported: "
                         f"{', '.join(wrong)}")


def translated(value: Any, table: Mapping[Any, Any], name: str) -> Any:
    """Looks a value up in a table; raises ValueError with the supported values if it is not
    there."""
    if isinstance(value, (list, dict)) or value not in table:
        raise ValueError(f"{name}={shown(value)} is not supported; expected {', '.join(map(str, table))}")
    return table[value]
