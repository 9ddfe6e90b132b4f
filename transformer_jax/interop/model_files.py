"""Read, keep and write the JSON files and chat templates of a model in the Hugging Face format."""

from __future__ import annotations

import contextlib
import json
import pathlib
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from transformer_jax.config import ModelConfig
from transformer_jax.interop.family import Family, banned_sequences, read_targets
from transformer_jax.interop.setting import checked, shown
from transformer_jax.json_files import located, read_json

CONFIG, GENERATION = "config.json", "generation_config.json"
_TEMPLATE, _MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# Generation settings that belong to the model. The caller chooses the search settings.
_DECODING = ("decoder_start_token_id", "forced_bos_token_id", "bad_words_ids")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")
# Settings of an earlier file that are not correct for the exported files.
_NOT_KEPT = ("transformers_weights", "auto_map", "quantization_config")


def read_settings(directory: pathlib.Path) -> dict[str, Any]:
    """Reads the settings in ``config.json``, and those for decoding in ``generation_config.json``.

    As in transformers, if ``generation_config.json`` exists, the decoding settings of
    ``config.json`` are ignored, except for the token that starts a target.

    Raises:
      ValueError: if a file is not a JSON object, or if a token id is not a whole number.
    """
    try:
        settings = read_json(directory / CONFIG, dict[str, Any])
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {CONFIG}; expected a directory that transformers' save_pretrained "
                         "wrote") from None
    with located(str(directory / CONFIG)):
        _check_ids(settings)
    generation = None
    if (directory / GENERATION).is_file():
        generation = read_json(directory / GENERATION, dict[str, Any])
        with located(str(directory / GENERATION)):
            _check_ids(generation)
    if (settings.get("pad_token_id") or 0) < 0:
        settings["pad_token_id"] = None  # the first files of Llama have -1 for no padding
    return _with_decoding(settings, generation)


def _with_decoding(settings: Mapping[str, Any], generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Combines the settings of ``config.json`` with the decoding settings of
    ``generation_config.json``, if it exists."""
    merged = dict(settings)
    if generation is not None:
        starts = [generation.get("decoder_start_token_id"), generation.get("bos_token_id"),
                  merged.get("decoder_start_token_id")]
        for name in (*_DECODING, "force_bos_token_to_be_generated"):
            merged.pop(name, None)
        merged |= {name: generation[name] for name in _DECODING if name in generation}
        starts = [token for token in starts if token is not None]
        if starts and "decoder_start_token_id" in {*settings, *generation}:
            merged["decoder_start_token_id"] = starts[0]
    if merged.get("bad_words_ids"):
        # transformers can still choose the end token if bad_words_ids contains it.
        ends = _as_list((settings if generation is None else generation).get("eos_token_id"))
        merged["bad_words_ids"] = [ids for ids in banned_sequences(merged) if ids not in [[end] for end in ends]]
    return merged


def read_kept(directory: pathlib.Path) -> dict[str, str]:
    """Returns the texts of the files that an export writes again, by file name."""
    paths = [directory / name for name in (CONFIG, GENERATION, _TEMPLATE)]
    paths += sorted((directory / _MORE_TEMPLATES).glob("*.jinja"))
    kept = {}
    for path in paths:
        if path.is_file():
            with located(str(path)):
                kept[path.relative_to(directory).as_posix()] = path.read_bytes().decode()
    return kept


def earlier_model_type(kept: Mapping[str, str]) -> str | None:
    """Returns the ``model_type`` of the files that a model was loaded from, or ``None``."""
    return json.loads(kept.get(CONFIG, "{}")).get("model_type")


def write_templates(directory: pathlib.Path, kept: Mapping[str, str]) -> None:
    """Writes the kept chat templates, and removes those of an earlier model in the directory."""
    for path in (directory / _TEMPLATE, *(directory / _MORE_TEMPLATES).glob("*.jinja")):
        path.unlink(missing_ok=True)
    for name, text in kept.items():
        if name == _TEMPLATE or re.fullmatch(rf"{_MORE_TEMPLATES}/[^/\\]+\.jinja", name):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(text.encode())


def write_config(directory: pathlib.Path, family: Family, settings: Mapping[str, Any], ids: Mapping[str, Any],
                 kept: Mapping[str, str]) -> dict[str, Any]:
    """Writes ``config.json``.

    Args:
      directory: the directory to write to.
      family: the family of the model.
      settings: the settings that the file must contain.
      ids: the ids of the tokenizer's special tokens, by the name of the setting.
      kept: the result of ``read_kept``. The function keeps settings of the earlier file that do not
        change the model, and leaves out the others with a warning.

    Returns:
      The settings in the written file.
    """
    earlier = json.loads(kept.get(CONFIG, "{}"))
    if earlier.get("model_type") != family.model_type:
        earlier = {}
    if "torch_dtype" in earlier:  # the name of dtype before transformers 5
        settings = {**settings, "torch_dtype": settings["dtype"]}
    ids = {name: value for name, value in ids.items() if value is not None or name not in earlier}
    ends = set(_as_list(earlier.get("eos_token_id")))
    if GENERATION in kept and ends and ends <= set(_as_list(ids.get("eos_token_id"))):
        ids.pop("eos_token_id")  # generation_config.json contains all end tokens
    written = {**ids, **settings}
    lost, expected = [], family.read_config(written)
    for name, value in earlier.items():
        if name not in written and name not in _NOT_KEPT and _reads_as(family, {**written, name: value}, expected):
            written[name] = value
        elif name not in written:
            lost.append(f"{name}={shown(value)}")
    if lost:
        warnings.warn(f"{directory / CONFIG}: settings of the earlier file that do not apply to this model are left "
                      f"out: {', '.join(lost)}", stacklevel=3)
    _write_json(directory / CONFIG, written)
    return written


def write_generation(directory: pathlib.Path, config: ModelConfig, settings: Mapping[str, Any], ends: tuple[int, ...],
                     kept: Mapping[str, str]) -> None:
    """Writes ``generation_config.json``: the earlier file with the decoding settings of the model.

    Args:
      directory: the directory to write to.
      config: the config of the model.
      settings: the settings in ``config.json``. transformers ignores their decoding settings,
        except for the token that starts a target, so the function also writes this file if there
        are others.
      ends: the ids of the tokens that end a text; ``()`` if they are not known.
      kept: the result of ``read_kept``.
    """
    path = directory / GENERATION
    path.unlink(missing_ok=True)
    if GENERATION not in kept:
        if settings.keys() & set(_DECODING[1:]):
            names = (*_DECODING, "bos_token_id", "eos_token_id", "pad_token_id")
            _write_json(path, {name: settings[name] for name in names if settings.get(name) is not None})
        return
    earlier = json.loads(kept[GENERATION])
    generation = dict(earlier)
    with _quiet():
        before = read_targets(_with_decoding(settings, earlier))
    if before["start_ids"] != config.start_ids:
        generation = {name: value for name, value in generation.items() if name not in _DECODING[:2]}
        generation |= {name: settings[name] for name in _DECODING[:2] if settings.get(name) is not None}
    if before["banned_ids"] != config.banned_ids:
        longer = [ids for ids in banned_sequences(earlier) if len(ids) > 1]
        generation["bad_words_ids"] = [*longer, *([token] for token in config.banned_ids)] or None
    if ends and tuple(_as_list(generation.get("eos_token_id"))) != ends:
        generation["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    if generation == earlier:
        path.write_bytes(kept[GENERATION].encode())
    else:
        _write_json(path, generation)


def _check_ids(settings: Mapping[str, Any]) -> None:
    """Raises ValueError if a token id is not a whole number."""
    for name in _IDS:
        value = settings.get(name)
        for item in value if isinstance(value, list) and name == "eos_token_id" else [value]:
            checked(item, int | None, name)
    banned_sequences(settings)


def _as_list(value: Any) -> list[Any]:
    """Returns a list unchanged, ``None`` as an empty list, and another value in a list."""
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def _reads_as(family: Family, settings: Mapping[str, Any], expected: ModelConfig) -> bool:
    """Returns True if the family reads the settings as the expected config."""
    try:
        with _quiet():
            return family.read_config(settings) == expected
    except ValueError:
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses warnings, because the loader already gave them when it read the earlier files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _write_json(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes settings to a JSON file with sorted keys."""
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
