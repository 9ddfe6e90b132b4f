"""What all programs share: configs by name, errors in one line, the compilation cache."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_dict, config_flags
from ml_collections.config_flags.config_flags import FlagOrderError

from transformer_jax import recipes
from transformer_jax.cli.help import help_text
from transformer_jax.config import ExperimentConfig, ModelConfig
from transformer_jax.runtime import end_without_others, join_processes, leave_processes
from transformer_jax.settings import check_field_names, from_dict, nearest
from transformer_jax.training.errors import Interrupted, LostProcessError, NotFiniteError, OutOfMemoryError

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


def define_config(default: str | None = None) -> Callable[[], ExperimentConfig]:
    """Defines ``--config=NAME`` (or a path) with overrides ``--config.optim.peak_lr=3e-4``; call
    the result for it.

    Args:
      default: the name that is used where ``--config`` is not given.
    """
    # Flags of numbers cannot be None, so those are set afterwards.
    unset = [argument for argument in sys.argv if _is_unset(argument)]
    sys.argv[:] = [argument for argument in sys.argv if argument not in unset]
    name = _take_config_name(sys.argv) or default
    if name is None:
        def missing() -> ExperimentConfig:
            raise ValueError(f"--config is missing; named experiments: {', '.join(recipes.names())}")

        return missing
    try:
        config = load_config(name)
        for override in filter(None, map(_OVERRIDE.match, sys.argv[1:])):
            _check_field(override[1])
        holder = config_flags.DEFINE_config_dict("config", overridable(config))
    except (ValueError, TypeError, OSError, flags.Error, FlagOrderError) as error:
        _fail(str(error))

    def overridden() -> ExperimentConfig:
        given = holder.value
        with given.unlocked():
            given.update_from_flattened_dict({_OVERRIDE.match(argument)[1]: None for argument in unset})
        return from_dict(ExperimentConfig, _plain(given))

    return overridden


def load_config(name: str) -> ExperimentConfig:
    """The config of a named experiment, or of a Python file whose ``get_config()`` returns one.

    Raises:
      ValueError: for a name that is neither, or a file that does not define a config.
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
        raise ValueError(f"{name} is not a Python file; a config file is one, with a function get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:  # whatever the user's own code raises
        raise ValueError(f"the config file {name} fails: {type(error).__name__}: {error}") from error
    if isinstance(config, config_dict.ConfigDict):
        config = from_dict(ExperimentConfig, _plain(config))
    if not isinstance(config, ExperimentConfig):
        raise ValueError(f"get_config() of {name} returns {type(config).__name__}; expected a tj.ExperimentConfig")
    return config


def _take_config_name(arguments: list[str]) -> str | None:
    """Removes ``--config=NAME`` or ``--config NAME`` from the command line, and returns the
    name."""
    name = None
    for index, argument in reversed(list(enumerate(arguments))):
        if re.match(r"--?config=", argument):
            name = argument.partition("=")[2] if name is None else name
            del arguments[index]
        elif argument in ("--config", "-config") and index + 1 < len(arguments):
            name = arguments[index + 1] if name is None else name
            del arguments[index:index + 2]
    return name


def _is_unset(argument: str) -> bool:
    """Whether it sets a field to ``None`` that can be ``None``, as in
    ``--config.optim.clip_norm=None``."""
    override = _OVERRIDE.match(argument)
    if not override or not argument.endswith("=None"):
        return False
    try:
        return isinstance(_check_field(override[1]), types.UnionType)
    except ValueError:
        return False  # is said when the flags are read


def overridable(config: ExperimentConfig) -> config_dict.ConfigDict:
    """The config as ml_collections reads it: typed, so that overrides are checked, with
    placeholders for ``None``."""
    def convert(node: Any) -> config_dict.ConfigDict:
        hints = typing.get_type_hints(type(node))
        result = config_dict.ConfigDict()
        derived = node.derived() if isinstance(node, ModelConfig) else {}
        for name, hint in hints.items():
            value = getattr(node, name)
            if name in derived and derived[name] == value:
                value = None  # derived anew after the overrides
            if hasattr(value, "__dataclass_fields__"):
                result[name] = convert(value)
            elif isinstance(hint, types.UnionType):
                kind = next(option for option in typing.get_args(hint) if option is not type(None))
                result[name] = config_dict.placeholder(kind)
                if value is not None:
                    result[name] = value
            else:
                result[name] = value
        return result

    return convert(config)


def _plain(config: config_dict.ConfigDict) -> dict[str, Any]:
    return {name: _plain(value) if isinstance(value, config_dict.ConfigDict) else value
            for name, value in config.items(preserve_field_references=False)}


def required(flag: flags.FlagHolder) -> Any:
    """The value of a flag that must be given."""
    if flag.value is None:
        raise ValueError(f"--{flag.name} is missing; --help says what it is")
    return flag.value


def run(main: Callable[[], None]) -> None:
    """Runs a program; what a user got wrong ends it with one line and exit status 2."""
    def wrapped(arguments: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # orbax and grain tell every detail at INFO
        if len(arguments) > 1:
            _fail(f"unexpected argument {arguments[1]!r}; flags are written --name=value")
        try:
            _use_compilation_cache()
            join_processes()
            main()
            leave_processes()
        except Interrupted as stopped:
            leave_processes()
            print(f"{stopped}; the same command resumes", file=sys.stderr)
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
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in arguments[1:]):
        print(help_text(description))
        sys.exit(0)
    try:
        if "config" not in flags.FLAGS and any(map(_OVERRIDE.match, arguments)):
            raise ValueError(f"--config is missing; named experiments: {', '.join(recipes.names())}")
        return flags.FLAGS(arguments)
    except (flags.Error, ValueError, OSError) as error:
        _fail(str(error))


def _check_field(path: str) -> Any:
    """The type of a field; raises ValueError for one that the config has not, with the nearest that
    it has."""
    cls = ExperimentConfig
    for name in path.split("."):
        if not dataclasses.is_dataclass(cls):
            raise ValueError(f"--config.{path}: there is nothing below --config.{path.rpartition('.')[0]}")
        check_field_names(cls, [name])
        cls = typing.get_type_hints(cls)[name]
    if dataclasses.is_dataclass(cls):
        raise ValueError(f"--config.{path} is a group of settings; set one of its fields, as in --config.{path}."
                         f"{dataclasses.fields(cls)[0].name}=...")
    return cls


def _fail(message: str) -> typing.NoReturn:
    print("error:", *message.split(), file=sys.stderr)
    sys.exit(2)


def _use_compilation_cache() -> None:
    """Keeps compiled programs in a private directory: a second start reads what the first compiled.

    Whoever can write there can run code as this user, so it belongs to the user alone.
    ``JAX_COMPILATION_CACHE_DIR`` names another place; empty, it switches the cache off.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        directory = base / "transformer_jax" / "compiled"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            directory.chmod(0o700)
        except OSError as error:
            logging.warning("no compilation cache in %s: %s", directory, error.strerror)
            return
        jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

