"""The text that ``--help`` prints: the program, its flags, and every setting of the config with its
type, choices, default and meaning."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import typing
from typing import Any

from absl import flags

from transformer_jax import recipes
from transformer_jax.config import ExperimentConfig, ModelConfig
from transformer_jax.settings import class_for

_WIDTH = 100


def help_text(description: str) -> str:
    """Formats the help of the program whose flags are defined.

    Args:
      description: The docstring of the program.

    Returns:
      The text, in lines of up to 100 columns.
    """
    lines = [description.strip(), "", "Flags:"]
    for module, defined in sorted(flags.FLAGS.flags_by_module_dict().items()):
        if module.startswith(("transformer_jax.cli", "experiments", "__main__")) or " " in module:
            for flag in defined:
                if "." not in flag.name and flag.name != "config":
                    lines += _entry(f"--{flag.name}", _default(flag.default), flag.help)
    if "config" in flags.FLAGS:
        lines += _entry("--config", f"one of {', '.join(recipes.names())}, or a Python file",
                        "The config to start from. The flags below change its settings.")
        config = flags.FLAGS["config"].value
        lines += ["", "Settings of the run, with the defaults of the chosen --config:"]
        lines += _settings(ExperimentConfig, config, "--config.")
    return "\n".join(lines)


def _settings(cls: type, values: Any, prefix: str) -> list[str]:
    """Formats the settings of a dataclass, and then each of its groups with a heading."""
    meanings, hints = attribute_docs(cls), typing.get_type_hints(cls)
    lines, groups = [], []
    for field in dataclasses.fields(cls):
        hint, value = hints[field.name], values.get(field.name) if hasattr(values, "get") else None
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            hint = class_for(hint, value)
            groups += ["", f"{prefix}{field.name}: {_summary(hint)}",
                       *_settings(hint, value, f"{prefix}{field.name}.")]
            continue
        choices = choices_of(cls, field.name)
        kind = " | ".join(choices) if choices else _type_name(hint)
        lines += _entry(f"{prefix}{field.name}", f"{kind}, default {_default(value)}", meanings.get(field.name, ""))
    return lines + groups


def _entry(name: str, detail: str, meaning: str | None) -> list[str]:
    """Formats one flag or setting."""
    body = textwrap.fill(f"{meaning or ''}", _WIDTH, initial_indent="      ", subsequent_indent="      ")
    return [f"  {name}  ({detail})", *([body] if meaning else [])]


def _default(value: Any) -> str:
    """Formats a default value."""
    return "none" if value is None else repr(value)


def _type_name(hint: Any) -> str:
    """Formats a type."""
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint).replace("typing.", "")


def _summary(cls: type) -> str:
    """Returns the first paragraph of a class's docstring."""
    return (cls.__doc__ or "").split("\n\n")[0].replace("\n    ", " ").strip()


def attribute_docs(cls: type) -> dict[str, str]:
    """Reads the meaning of each field from the ``Attributes`` section of a class's docstring."""
    _, _, part = (cls.__doc__ or "").partition("Attributes:\n")
    entries = re.split(r"\n      (?=\w+: )", "\n" + part.rstrip())
    found = dict(entry.split(": ", 1) for entry in entries if re.match(r"\w+: ", entry))
    return {name: " ".join(text.split()) for name, text in found.items()}


def choices_of(cls: type, field: str) -> list[str]:
    """Returns the allowed values of a string field, or an empty list if any string is allowed.

    The values come from the error message that the class raises for an invalid value.
    """
    if typing.get_type_hints(cls)[field] not in (str, str | None):
        return []
    try:
        required = {"vocab_size": 1} if cls is ModelConfig else {}
        values: dict[str, Any] = required | {field: "?"}
        cls(**values)
    except ValueError as error:
        listed = re.search(rf"{field}='\?' is not one of ([^;]+)", str(error))
        return listed[1].split(", ") if listed else []
    return []
