"""Relative paths in the config of a run, which mean files of the directory that the run was started
in."""

from __future__ import annotations

import dataclasses
import glob
import os
from typing import Any

from transformer_jax.config import ExperimentConfig

# The settings that name files or directories.
_PATHS = ("data.path", "data.validation_path", "data.tokenizer.path", "data.cache_dir", "rl.reward")


def current_directory() -> str | None:
    """Returns the current directory, or ``None`` if it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def found_from(config: ExperimentConfig, directory: str | None) -> ExperimentConfig:
    """Makes the relative paths of a config absolute, if another directory holds their files.

    Args:
      config: The config of a run.
      directory: The directory that the run was started in, or ``None`` if it is unknown.

    Returns:
      The config. A path stays as it is if the directory is the current one, or holds no such file:
      the run may have been moved together with its data.
    """
    if directory is None or directory == current_directory():
        return config
    for name in _names(config):
        value = _get(config, name)
        if value is not None:
            config = _replaced(config, name, _found(value, directory))
    return config


def with_equal_paths(new: ExperimentConfig, old: ExperimentConfig, directory: str | None) -> ExperimentConfig:
    """Gives a config the paths of an earlier one, where both are written alike or name the same
    file.

    Args:
      new: The config of this start.
      old: The config of the last start.
      directory: The directory of the last start, or ``None`` if it is unknown.

    Returns:
      ``new``, with these paths as they are in ``old``.
    """
    for name in set(_names(new)) & set(_names(old)):
        value, earlier = _get(new, name), _get(old, name)
        if None not in (value, earlier) and _absolute(value, current_directory()) == _absolute(earlier, directory):
            new = _replaced(new, name, earlier)
    return new


def _found(value: str, directory: str) -> str:
    """Returns the absolute form of a path, a pattern or a ``"SOURCE,TARGET"`` pair whose files are
    in the directory, and other values unchanged."""
    whole = _absolute(value, directory)
    if _is_there(whole):
        return whole
    parts = [_absolute(part, directory) for part in value.split(",")]
    return ",".join(parts) if all(map(_is_there, parts)) else value


def _is_there(path: str) -> bool:
    """True if a path names something, or a pattern matches something."""
    return "\0" not in path and (os.path.lexists(path) or bool(glob.glob(path)))


def _absolute(path: str, directory: str | None) -> str:
    """Returns a path as it is seen from a directory."""
    return path if directory is None else os.path.normpath(os.path.join(directory, path))


def _names(config: ExperimentConfig) -> list[str]:
    """Returns the names of all settings of a config that are paths."""
    return [*_PATHS, *(f"data.mixture.{number}.path" for number in range(len(config.data.mixture)))]


def _get(config: Any, name: str) -> Any:
    """Returns a setting by its name, or by its number in a tuple, with dots."""
    for part in name.split("."):
        config = config[int(part)] if isinstance(config, tuple) else getattr(config, part)
    return config


def _replaced(config: Any, name: str, value: Any) -> Any:
    """Returns a config with another value of one setting."""
    first, _, rest = name.partition(".")
    if isinstance(config, tuple):
        number = int(first)
        return (*config[:number], _replaced(config[number], rest, value), *config[number + 1:])
    return dataclasses.replace(config, **{first: _replaced(getattr(config, first), rest, value) if rest else value})
