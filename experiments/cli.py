"""What all programs share: configs by name, errors in one line, the compilation cache."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import itertools
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

from transformer_jax.config import ExperimentConfig, ModelConfig
from transformer_jax.runtime import end_without_others, join_processes, leave_processes
from transformer_jax.settings import check_field_names, from_dict
from transformer_jax.training.errors import Interrupted, LostProcessError, NotFiniteError, OutOfMemoryError

_CONFIGS = pathlib.Path(__file__).parent / "configs"
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]+)")


def define_config(default: str | None = None) -> Callable[[], ExperimentConfig]:
    """Defines ``--config=NAME`` (or a path) with overrides ``--config.optim.peak_lr=3e-4``; call the result for it."""
    sys.argv[:] = _with_paths(sys.argv)
    # Flags of numbers cannot be None, so those are set afterwards.
    unset = [argument for argument in sys.argv if _is_unset(argument)]
    sys.argv[:] = [argument for argument in sys.argv if argument not in unset]
    holder = config_flags.DEFINE_config_file(
        "config", default and str(_CONFIGS / f"{default}.py"), "A named experiment, or the path of a config file.")

    def config() -> ExperimentConfig:
        given = _given(holder.value)
        with given.unlocked():
            given.update_from_flattened_dict({_OVERRIDE.match(argument)[1]: None for argument in unset})
        return from_dict(ExperimentConfig, _plain(given))

    return config


def _is_unset(argument: str) -> bool:
    """Whether it sets a field to ``None`` that can be ``None``, as in ``--config.optim.clip_norm=None``."""
    override = _OVERRIDE.match(argument)
    if not override or not argument.endswith("=None"):
        return False
    try:
        return isinstance(_check_field(override[1]), types.UnionType)
    except ValueError:
        return False  # is said when the flags are read


def named(name: str) -> ExperimentConfig:
    """A named experiment's config."""
    return from_dict(ExperimentConfig, _plain(importlib.import_module(f"experiments.configs.{name}").get_config()))


def _given(value: Any) -> Any:
    if value is None:
        raise ValueError(f"--config is missing; named experiments: {', '.join(_names())}")
    return value


def _names() -> list[str]:
    return sorted(path.stem for path in _CONFIGS.glob("*.py") if path.stem != "__init__")


def _with_paths(arguments: list[str]) -> list[str]:
    """The command line with names of experiments as paths of their files, which is what config_flags reads."""
    resolved = []
    for before, argument in itertools.pairwise(["", *arguments]):
        flag, equals, name = argument.rpartition("=") if argument.startswith("--config=") else ("", "", argument)
        is_name = equals or before == "--config"
        resolved.append(f"{flag}{equals}{_path(name)}" if is_name else argument)
    # ml_collections wants the config before what overrides it.
    return [resolved[0], *sorted(resolved[1:], key=lambda argument: not argument.startswith("--config="))]


def _path(name: str) -> str:
    if name in _names():
        return str(_CONFIGS / f"{name}.py")
    if not pathlib.Path(name).is_file():
        near = difflib.get_close_matches(name, _names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        _fail(f"there is no experiment and no config file {name!r}; {hint}named experiments: {', '.join(_names())}")
    return name


def overridable(config: ExperimentConfig) -> config_dict.ConfigDict:
    """The config as ml_collections reads it: typed, so that overrides are checked, with placeholders for ``None``."""
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

    app.run(wrapped, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
    try:
        for override in filter(None, map(_OVERRIDE.match, arguments)):
            _check_field(override[1])
        return flags.FLAGS(arguments)
    except (flags.Error, ValueError, OSError) as error:
        _fail(str(error))


def _check_field(path: str) -> Any:
    """The type of a field; raises ValueError for one that the config has not, with the nearest that it has."""
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

    Whoever can write there can run code as this user, so it belongs to the user alone. ``JAX_COMPILATION_CACHE_DIR``
    names another place; empty, it switches the cache off.
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

