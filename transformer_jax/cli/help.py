"""What ``--help`` shows: the program, its flags, and every setting with type, default, choices and
meaning."""

from __future__ import annotations

import dataclasses
import re
import textwrap
import typing
from typing import Any

from absl import flags

from transformer_jax import recipes
from transformer_jax.config import ExperimentConfig, ModelConfig

_WIDTH = 100


def help_text(description: str) -> str:
    """The help of the program whose flags are defined.

    Args:
      description: the docstring of the program.
    """
    lines = [description.strip(), "", "Flags:"]
    for module, defined in sorted(flags.FLAGS.flags_by_module_dict().items()):
        if module.startswith(("transformer_jax.cli", "experiments", "__main__")) or " " in module:
            for flag in defined:
                if "." not in flag.name and flag.name != "config":
                    lines += _entry(f"--{flag.name}", _default(flag.default), flag.help)
    if "config" in flags.FLAGS:
        lines += _entry("--config", f"one of {', '.join(recipes.names())}, or a Python file",
                        "The named config, whose settings the flags below change.")
        config = flags.FLAGS["config"].value
        lines += ["", "Settings of the run; defaults are those of the chosen --config:"]
        lines += _settings(ExperimentConfig, config, "--config.")
    return "\n".join(lines)


def _settings(cls: type, values: Any, prefix: str) -> list[str]:
    """The settings of a dataclass, then its groups, each with a heading."""
    meanings, hints = attribute_docs(cls), typing.get_type_hints(cls)
    lines, groups = [], []
    for field in dataclasses.fields(cls):
        hint, value = hints[field.name], values.get(field.name) if hasattr(values, "get") else None
        if dataclasses.is_dataclass(hint):
            groups += ["", f"{prefix}{field.name}: {_summary(hint)}",
                       *_settings(hint, value, f"{prefix}{field.name}.")]
            continue
        choices = choices_of(cls, field.name)
        kind = " | ".join(choices) if choices else _type_name(hint)
        lines += _entry(f"{prefix}{field.name}", f"{kind}, default {_default(value)}", meanings.get(field.name, ""))
    return lines + groups


def _entry(name: str, detail: str, meaning: str | None) -> list[str]:
    body = textwrap.fill(f"{meaning or ''}", _WIDTH, initial_indent="      ", subsequent_indent="      ")
    return [f"  {name}  ({detail})", *([body] if meaning else [])]


def _default(value: Any) -> str:
    return "none" if value is None else repr(value)


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint).replace("typing.", "")


def _summary(cls: type) -> str:
    return (cls.__doc__ or "").split("\n\n")[0].replace("\n    ", " ").strip()


def attribute_docs(cls: type) -> dict[str, str]:
    """The meaning of each field, from the ``Attributes`` part of a class's docstring."""
    _, _, part = (cls.__doc__ or "").partition("Attributes:\n")
    entries = re.split(r"\n      (?=\w+: )", "\n" + part.rstrip())
    found = dict(entry.split(": ", 1) for entry in entries if re.match(r"\w+: ", entry))
    return {name: " ".join(text.split()) for name, text in found.items()}


def choices_of(cls: type, field: str) -> list[str]:
    """The values that a field of text may have, which its own check lists when it refuses another;
    else none."""
    if typing.get_type_hints(cls)[field] not in (str, str | None):
        return []
    try:
        complete = {"vocab_size": 1} if cls is ModelConfig else {}
        cls(**complete | {field: "?"})
    except ValueError as error:
        listed = re.search(rf"{field}='\?' is not one of ([^;]+)", str(error))
        return listed[1].split(", ") if listed else []
    return []
