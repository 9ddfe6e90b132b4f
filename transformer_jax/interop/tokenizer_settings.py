"""Read the JSON files that describe a tokenizer, as the tokenizer classes of transformers do."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from transformer_jax.json_files import read_json

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_NAMED = tuple(f"{role}_token" for role in ROLES)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class StoredTokenizer(NamedTuple):
    """A ``tokenizer.json`` file: its text, and its parsed content."""

    text: str
    content: dict[str, Any]


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object in a JSON file, or an empty dict if the file does not exist."""
    return read_json(path, dict[str, Any]) if path.is_file() else {}


def added_token(value: Any, where: str, **flags: bool) -> Any:
    """Makes the special or added token that a JSON string or object describes.

    Raises:
      ValueError: if the value has another type, or if the text of the token is missing.
    """
    from tokenizers import AddedToken

    if isinstance(value, AddedToken):
        return value
    given = value if isinstance(value, Mapping) else {"content": value}
    if not isinstance(given.get("content"), str):
        raise ValueError(f"{where} is {_shortened(value)}; expected a token: a string, or an object with its content")
    wrong = [name for name in _FLAGS if not isinstance(given.get(name, False), bool)]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} is {_shortened(given[wrong[0]])}; expected true or false")
    return AddedToken(given["content"], **({name: given[name] for name in _FLAGS if name in given} | flags))


def read_settings(directory: pathlib.Path, stored: StoredTokenizer | None) -> dict[str, Any]:
    """Returns the arguments that ``from_pretrained`` passes to a tokenizer class.

    Args:
      directory: the directory with ``tokenizer_config.json`` and, from older versions,
        ``special_tokens_map.json`` and ``added_tokens.json``.
      stored: the content of ``tokenizer.json``, or ``None``.

    Returns:
      The settings. Special tokens are strings or ``AddedToken``. ``added_tokens_decoder`` contains
      added tokens by id, and ``model_specific_special_tokens`` contains the special tokens that
      only some models have.

    Raises:
      ValueError: if a value has a type that transformers does not write.
    """
    path = directory / "tokenizer_config.json"
    settings = read_object(path)
    for name in ("tokenizer_class", "init_inputs", "auto_map", "chat_template", "vocab_file", "tokenizer_file", "vocab",
                 "merges", "_spm_precompiled_charsmap", "model_specific_special_tokens"):
        settings.pop(name, None)
    if stored is not None:  # tokenizer.json defines the tokens around a text
        settings.pop("add_bos_token", None)
        settings.pop("add_eos_token", None)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    own = {name: settings.pop(name) for name in list(settings)
           if name.endswith("_token") and name not in _NAMED and isinstance(settings[name], str)}
    if isinstance(settings.get("extra_special_tokens"), dict):
        own |= settings.pop("extra_special_tokens")
    settings["model_specific_special_tokens"] = own
    added = _added_tokens(directory, settings, stored)
    settings["added_tokens_decoder"] = added
    by_name = {str(token): token for token in added.values()}
    for name in list(settings):
        token = settings[name]
        if token is not None and (name in _NAMED or (name.endswith("_token") and isinstance(token, dict))):
            token = token if isinstance(token, str) else added_token(token, f"{path}: {name}")
            settings[name] = by_name.get(str(token), token) if name in _NAMED else token
    for name in ("extra_special_tokens", "additional_special_tokens"):
        settings[name] = _tokens(settings.get(name), f"{path}: {name}")
        if settings[name] is None:
            del settings[name]
    settings["model_specific_special_tokens"] = {
        name: token if isinstance(token, str) else added_token(token, f"{path}: {name}")
        for name, token in settings["model_specific_special_tokens"].items()}
    return settings


def _tokens(value: Any, where: str) -> list[Any] | None:
    """Converts a JSON list of tokens; raises ValueError if it is not a list."""
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"{where} is {_shortened(value)}; expected a list of tokens")
    return [token if isinstance(token, str) else added_token(token, where) for token in value]


def _added_tokens(directory: pathlib.Path, settings: dict[str, Any],
                  stored: StoredTokenizer | None) -> dict[int, Any]:
    """Returns the added tokens by id; also copies special tokens of older files to the settings."""
    path = directory / "tokenizer_config.json"
    if "added_tokens_decoder" in settings:
        given = settings["added_tokens_decoder"]
        if not isinstance(given, dict) or not all(number.isdecimal() for number in given):
            raise ValueError(f"{path}: added_tokens_decoder is {_shortened(given)}; expected tokens by id")
        return {int(number): added_token(token, f"{path}: added_tokens_decoder") for number, token in given.items()}
    path = directory / "special_tokens_map.json"
    for name, value in read_object(path).items():
        if name == "extra_special_tokens" and isinstance(value, list):
            already = list(settings.get(name) or [])
            value = already + [token for token in _tokens(value, f"{path}: {name}") or [] if token not in already]
        elif name == "extra_special_tokens" and isinstance(value, dict):
            settings["model_specific_special_tokens"] |= value
            continue
        elif isinstance(value, dict):
            value = added_token(value, f"{path}: {name}", special=True)
        settings[name] = value
    added, path = {}, directory / "added_tokens.json"
    # As in transformers, this does not find tokens that tokenizer_config.json describes as objects.
    special = {str(settings[name]) for name in _NAMED if settings.get(name)}
    extra = settings.get("extra_special_tokens")
    special |= {str(token) for token in (extra if isinstance(extra, list) else [])}
    for name, number in read_object(path).items():
        if not isinstance(number, int):
            raise ValueError(f"{path}: the id of {name!r} is {_shortened(number)}; expected a number")
        added[number] = added_token(name, str(path), normalized=name not in special, special=name in special)
    where = f"{directory / 'tokenizer.json'}: added_tokens"
    entries = (stored.content.get("added_tokens") or []) if stored else []
    if not isinstance(entries, list):
        raise ValueError(f"{where} is {_shortened(entries)}; expected a list of objects")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
            raise ValueError(f"{where} has {_shortened(entry)}; expected an object with an id")
        added[entry["id"]] = added_token(entry, where)
    return added


def _shortened(value: Any) -> str:
    """Formats a value for an error message, and cuts it if it is long."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
