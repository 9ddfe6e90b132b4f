"""Find the weight files in a directory: the files that transformers reads, and no others."""

from __future__ import annotations

import pathlib
import re
import warnings
from typing import Any, TypedDict

from transformer_jax.interop.setting import Settings, shown
from transformer_jax.json_files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_ADAPTERS = "adapter_config.json"


class _Index(TypedDict):
    """The part of an index file that the loader reads."""

    weight_map: dict[str, str]


def weight_files(directory: pathlib.Path, settings: Settings) -> list[pathlib.Path]:
    """Returns the safetensors files to read.

    As in transformers, these are the file that ``config.json`` names as ``transformers_weights``,
    else ``model.safetensors``, else the files in the index. The loader ignores all other files:
    those of an earlier save, of another type, or of adapters.

    Raises:
      ValueError: if there are no weight files, if an index is damaged, or if a named file does not
        exist or is outside the directory.
    """
    named = settings.get("transformers_weights")
    choices = (SINGLE, INDEX) if named is None else (named,)
    paths = [path for path in (_inside(directory, name, directory / "config.json") for name in choices)
             if path.is_file()]
    if not paths:
        raise ValueError(_none(directory, choices))
    if len(paths) > 1:
        warnings.warn(f"{directory} has two sets of weights; {SINGLE} is read, as transformers does, and not the files "
                      f"that {INDEX} names", stacklevel=4)
    if (directory / _ADAPTERS).is_file():
        warnings.warn(f"{directory} has adapters too ({_ADAPTERS}), which are not applied: the model is that of "
                      f"{paths[0].name}", stacklevel=4)
    return _indexed(paths[0]) if paths[0].name.endswith(".index.json") else paths[:1]


def _indexed(index: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files that an index names."""
    names = read_json(index, _Index)["weight_map"]
    paths = [_inside(index.parent, name, index) for name in sorted(set(names.values()))]
    if not paths:
        raise ValueError(f"{index}: weight_map is empty; expected the file of each tensor")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{index} names files that are not there: {', '.join(missing)}")
    return paths


def _inside(directory: pathlib.Path, name: Any, where: pathlib.Path) -> pathlib.Path:
    """Returns the path of a file that another file names.

    The file may be a symbolic link, like all files in the cache of the Hugging Face hub. Its name
    must not point outside the directory on any operating system.
    """
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else []
    if not parts or not all(parts) or ".." in parts or ":" in parts[0] or "\0" in name:
        raise ValueError(f"{where} names the file {shown(name)}; expected a name inside its directory, such as "
                         f"{SINGLE}")
    return directory / name


def _none(directory: pathlib.Path, choices: tuple[str, ...]) -> str:
    """Returns the error message for a directory without readable weights."""
    found = {kind: sorted(path.name for pattern in patterns for path in directory.glob(pattern))
             for kind, patterns in {"pickle": ("*.bin", "*.pt", "*.pth", "*.ckpt"), "adapters": (_ADAPTERS,),
                                    "others": ("*.safetensors", "*.index.json", "*.h5", "*.msgpack", "*.gguf")}.items()}
    if found["adapters"]:
        return (f"{directory} has adapters of a model ({_ADAPTERS}) but not the model; merge them with peft: "
                "model.merge_and_unload().save_pretrained(DIRECTORY), and load that directory")
    if found["pickle"]:
        return (f"{directory} has its weights in {', '.join(found['pickle'])} only, which is pickle: reading it runs "
                "any code that its author put there. Convert it in a safe environment, with transformers: "
                "model.save_pretrained(DIRECTORY, safe_serialization=True), and load that directory")
    others = f"; it has these files, which are not read: {', '.join(found['others'])}" if found["others"] else ""
    neither = f"neither {' nor '.join(choices)}" if len(choices) > 1 else f"no {''.join(choices)}"
    return f"{directory} has {neither}{others}"
