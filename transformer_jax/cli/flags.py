"""Functions that all programs share: they read configs from flags, print errors in one line, and
switch on the compilation cache."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

from absl import app, flags, logging
from ml_collections import config_dict, config_flags
from ml_collections.config_flags.config_flags import FlagOrderError

from transformer_jax import recipes
from transformer_jax.cli.help import help_text
from transformer_jax.config import ExperimentConfig, ModelSettings
from transformer_jax.runs.record import read_record, recorded_config
from transformer_jax.runtime import end_without_others, join_processes, leave_processes, use_compilation_cache
from transformer_jax.settings import check_field_names, class_for, from_dict, nearest
from transformer_jax.training.errors import Interrupted, LostProcessError, NotFiniteError, OutOfMemoryError

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


def define_config(default: str | None = None, *, resumes: bool = False) -> Callable[[], ExperimentConfig]:
    """Defines the flag ``--config=NAME`` (or a path), and flags that override its settings, such as
    ``--config.optim.peak_lr=3e-4``.

    Args:
      default: The name that is used if ``--config`` is not given.
      resumes: True to use the config of the run in ``--workdir``, if there is one, instead of the
        default.

    Returns:
      A function that returns the config with its overrides, after the flags are parsed.
    """
    name = _take_config_name(sys.argv)
    try:
        config = _config_of_workdir() if name is None and resumes else None
        if config is None and (name or default) is None:
            def missing() -> ExperimentConfig:
                raise ValueError(f"--config is missing; named experiments: {', '.join(recipes.names())}")

            return missing
        config = load_config(str(name or default)) if config is None else config
        # absl cannot parse None for a flag of a number, so these overrides are applied afterwards.
        unset = [argument for argument in sys.argv if _is_unset(argument, config)]
        sys.argv[:] = [argument for argument in sys.argv if argument not in unset]
        overrides = [override[1] for override in map(_OVERRIDE.match, sys.argv[1:]) if override]
        for override in overrides:
            _check_field(override, config)
        holder = config_flags.DEFINE_config_dict("config", overridable(config, overrides))
    except (ValueError, TypeError, OSError, flags.Error, FlagOrderError) as error:
        _fail(str(error))

    def overridden() -> ExperimentConfig:
        given = holder.value
        with given.unlocked():
            given.update_from_flattened_dict({match[1]: None for match in map(_OVERRIDE.match, unset) if match})
        values = _plain(given)
        kind = class_for(type(config.model), values["model"])
        if kind is not type(config.model):
            raise ValueError(f"--config.model.family={values['model']['family']} needs a {kind.__name__}, but the "
                             f"chosen --config has a {type(config.model).__name__}; choose a --config whose model is "
                             "of this family")
        return from_dict(ExperimentConfig, values)

    return overridden


def load_config(name: str) -> ExperimentConfig:
    """Loads the config of a named experiment, or of a Python file that defines ``get_config()``.

    Args:
      name: The name of an experiment, or the path of a Python file.

    Returns:
      The config.

    Raises:
      ValueError: If there is no such experiment and no such file, or the file does not define a
        config.
    """
    path = pathlib.Path(name)
    if name in recipes.names():
        return recipes.get(name)
    if not path.is_file():
        hint = nearest(name, recipes.names())
        raise ValueError(f"there is no experiment and no config file {name!r}{hint}; named experiments: "
                         f"{', '.join(recipes.names())}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{name} is not a Python file; expected a Python file with a function get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # the user's code can raise any error
        raise ValueError(f"the config file {name} fails: {type(error).__name__}: {error}") from error
    if isinstance(config, config_dict.ConfigDict):
        config = from_dict(ExperimentConfig, _plain(config))
    if not isinstance(config, ExperimentConfig):
        raise ValueError(f"get_config() of {name} returns {type(config).__name__}; expected a tj.ExperimentConfig")
    return config


def _config_of_workdir() -> ExperimentConfig | None:
    """Returns the config of the run in ``--workdir``, or ``None`` if there is no run."""
    workdir = argument_of("workdir")
    record = read_record(workdir) if workdir else None
    return None if not workdir or record is None else recorded_config(workdir, record)


def argument_of(name: str) -> str | None:
    """Reads the value of a flag from the command line, before the flags are parsed.

    Args:
      name: The name of the flag, without dashes.

    Returns:
      The value, or ``None`` if the flag is not given.
    """
    value = None
    for index, argument in enumerate(sys.argv[1:], start=1):
        if re.match(rf"--?{name}=", argument):
            value = argument.partition("=")[2]
        elif argument in (f"--{name}", f"-{name}") and index + 1 < len(sys.argv):
            value = sys.argv[index + 1]
    return value


def _take_config_name(arguments: list[str]) -> str | None:
    """Removes ``--config=NAME`` or ``--config NAME`` from the command line and returns the name."""
    name = None
    for index, argument in reversed(list(enumerate(arguments))):
        if re.match(r"--?config=", argument):
            name = argument.partition("=")[2] if name is None else name
            del arguments[index]
        elif argument in ("--config", "-config") and index + 1 < len(arguments):
            name = arguments[index + 1] if name is None else name
            del arguments[index:index + 2]
    return name


def _is_unset(argument: str, config: ExperimentConfig) -> bool:
    """True if the argument sets a field to ``None``, and the field can be ``None``, as in
    ``--config.optim.clip_norm=None``."""
    override = _OVERRIDE.match(argument)
    if not override or not argument.endswith("=None"):
        return False
    try:
        return isinstance(_check_field(override[1], config), types.UnionType)
    except ValueError:
        return False  # the error is reported when the flags are parsed


def overridable(config: ExperimentConfig, overrides: Collection[str] = ()) -> config_dict.ConfigDict:
    """Converts a config to the form of ml_collections, which checks the types of overrides.

    Args:
      config: The config.
      overrides: The names of the settings that will be overridden. A group of settings that is
        ``None``, such as ``model.moe``, has its default values if one of its settings is among
        them.

    Returns:
      The same settings, with typed placeholders for ``None``.
    """
    def convert(node: Any, prefix: str = "") -> config_dict.ConfigDict:
        hints = typing.get_type_hints(type(node))
        result = config_dict.ConfigDict()
        derived = node.derived() if isinstance(node, ModelSettings) else {}
        for name, hint in hints.items():
            value = getattr(node, name)
            if name in derived and derived[name] == value:
                value = None  # derived again after the overrides
            if value is None and any(override.startswith(f"{prefix}{name}.") for override in overrides):
                value = _group_of(hint)()
            if hasattr(value, "__dataclass_fields__"):
                result[name] = convert(value, f"{prefix}{name}.")
            elif isinstance(hint, types.UnionType):
                kind = next(option for option in typing.get_args(hint) if option is not type(None))
                result[name] = config_dict.placeholder(kind)
                if value is not None:
                    result[name] = value
            else:
                result[name] = value
        return result

    return convert(config)


def _group_of(hint: Any) -> Any:
    """Returns the dataclass in the type of a field that may be ``None``; else the type itself."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
    return next(filter(dataclasses.is_dataclass, options), hint)


def _plain(config: config_dict.ConfigDict) -> dict[str, Any]:
    """Converts the form of ml_collections to nested dicts."""
    return {name: _plain(value) if isinstance(value, config_dict.ConfigDict) else value
            for name, value in config.items(preserve_field_references=False)}


def directory(flag: flags.FlagHolder) -> pathlib.Path:
    """Returns the directory that a flag names. Raises ValueError for an empty name, which would
    mean the current directory."""
    if not required(flag).strip():
        raise ValueError(f"--{flag.name} is empty: name a directory")
    return pathlib.Path(flag.value)


def required(flag: flags.FlagHolder) -> Any:
    """Returns the value of a flag. Raises ValueError if the flag is not given."""
    if flag.value is None:
        raise ValueError(f"--{flag.name} is missing; --help describes it")
    return flag.value


def run(main: Callable[[], None]) -> None:
    """Runs a program. An error in the user's input ends it with one line and exit status 2.

    Args:
      main: The program. The docstring of its module is the beginning of its help.
    """
    def wrapped(arguments: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # orbax and grain log too many details at the level INFO
        if len(arguments) > 1:
            _fail(f"unexpected argument {arguments[1]!r}; flags are written --name=value")
        try:
            use_compilation_cache()
            join_processes()
            main()
            leave_processes()
        except Interrupted as stopped:
            leave_processes()
            print(f"{stopped}; run the same command again to resume", file=sys.stderr)
            sys.exit(128 + stopped.signum)
        except OSError as error:
            _fail(str(error) if error.filename is None else f"{error.filename}: {error.strerror}")
        except LostProcessError as error:
            end_without_others(str(error))
        except (ValueError, ImportError, NotFiniteError, OutOfMemoryError) as error:
            _fail(str(error))
        except KeyboardInterrupt:
            sys.exit(130)

    description = sys.modules[main.__module__].__doc__ or ""
    app.run(wrapped, flags_parser=lambda arguments: _parse(arguments, description))


def _parse(arguments: list[str], description: str) -> list[str]:
    """Parses the flags, or prints the help and exits if the user asked for it."""
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in arguments[1:]):
        try:
            print(help_text(description), flush=True)
        except BrokenPipeError:  # the reader, such as head, stopped before the end; Python must not write the rest
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    try:
        if "config" not in flags.FLAGS and any(map(_OVERRIDE.match, arguments)):
            raise ValueError(f"--config is missing; named experiments: {', '.join(recipes.names())}")
        return flags.FLAGS(arguments)
    except (flags.Error, ValueError, OSError) as error:
        _fail(str(error))


def _check_field(path: str, config: ExperimentConfig) -> Any:
    """Returns the type of a field of a config. If the config has no such field, raises ValueError
    with the field that has the most similar name."""
    value, cls = config, type(config)
    for name in path.split("."):
        if not dataclasses.is_dataclass(cls):
            raise ValueError(f"--config.{path} does not exist, because --config.{path.rpartition('.')[0]} is a value, "
                             "not a group of settings; --help lists all settings")
        check_field_names(cls, [name])
        value = getattr(value, name, None)
        cls = type(value) if dataclasses.is_dataclass(value) else _group_of(typing.get_type_hints(cls)[name])
    if dataclasses.is_dataclass(cls):
        raise ValueError(f"--config.{path} is a group of settings; set one of its fields, as in --config.{path}."
                         f"{dataclasses.fields(cls)[0].name}=...")
    return cls


def _fail(message: str) -> typing.NoReturn:
    """Prints an error in one line and exits with status 2."""
    print("error:", *message.split(), file=sys.stderr)
    sys.exit(2)
