"""Read the tokenizer of a directory in the Hugging Face format, and write it."""

from __future__ import annotations

import json
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.interop.tokenizer_building import tokenizer_as_written, tokenizer_of_class
from transformer_jax.interop.tokenizer_names import AS_WRITTEN, tokenizer_class
from transformer_jax.interop.tokenizer_rows import CLASSES
from transformer_jax.interop.tokenizer_settings import ROLES, StoredTokenizer, read_object, read_settings
from transformer_jax.interop.tokenizer_vocabulary import VOCABULARY_CLASSES, read_vocabulary_tokenizer

# Our own tokenizer file. transformers would misread it, so it has a name that transformers ignores.
_OURS = "transformer_jax_tokenizer.model"
_JSON = "tokenizer.json"
_WITH_JSON = ("to read it as its tokenizer.json describes it, load the directory with transformers as "
              "PreTrainedTokenizerFast, and save it there: "
              "PreTrainedTokenizerFast.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)")
_WITHOUT_JSON = ("its files have no tokenizer.json: to read the model alone, delete them, and give it token ids that "
                 "AutoTokenizer of transformers made")
_KNOWN = (_JSON, "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model", "sentencepiece.model",
          "vocab.json", "vocab.txt", "merges.txt", "source.spm", "target.spm", "tekken.json", "tiktoken.model",
          "bpe.codes")


def read_tokenizer(directory: pathlib.Path, config: Mapping[str, Any]) -> Tokenizer | HuggingFaceTokenizer | None:
    """Reads the tokenizer of a directory. It gives the same ids as ``AutoTokenizer`` of
    transformers.

    Args:
      directory: the directory with the files of a tokenizer.
      config: the content of ``config.json``. Its model type determines the tokenizer class, and it
        may contain special tokens that the tokenizer's own files leave out.

    Returns:
      The tokenizer, or ``None`` if there are no tokenizer files.

    Raises:
      ValueError: if the files are damaged, or if the tokenizer class is not supported.
    """
    if (directory / _OURS).is_file():
        return Tokenizer.load(directory / _OURS)
    files = [name for name in _KNOWN if (directory / name).is_file()]
    if not files:
        _warn_of_missing_files(directory, config)
        return None
    content = read_object(directory / _JSON)
    stored = StoredTokenizer((directory / _JSON).read_text("utf-8-sig"), content) if _JSON in files else None
    written = read_object(directory / "tokenizer_config.json")
    name = tokenizer_class(written, config, stored is not None and '"ByteLevel"' in stored.text)
    settings = read_settings(directory, stored)
    kept = _merged(directory, written)
    if tokenizer_class(kept, {}, False) != name or "tokenizer_class" not in kept:
        kept["tokenizer_class"] = "PreTrainedTokenizerFast" if name == AS_WRITTEN else name
    config_ids = _config_ids(directory, config)
    try:
        if name in VOCABULARY_CLASSES:
            return read_vocabulary_tokenizer(directory, name, settings, kept, config_ids)
        if name == AS_WRITTEN:
            tokenizer = tokenizer_as_written(directory, stored, settings)
        elif name in CLASSES:
            tokenizer = tokenizer_of_class(directory, CLASSES[name], stored, settings)
        else:
            raise ValueError(f"its class in transformers is {name}, which is not supported; "
                             f"{_WITHOUT_JSON if stored is None else _WITH_JSON}")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        raise ValueError(f"the tokenizer in {directory} ({', '.join(files)}) cannot be read: {error}") from error
    named = {role: token for role in ROLES if (token := settings.get(f"{role}_token")) is not None}
    ids = {role: number for role, token in named.items() if (number := tokenizer.token_to_id(str(token))) is not None}
    for role, token in named.items():
        kept.setdefault(f"{role}_token", str(token))
    return HuggingFaceTokenizer.make(tokenizer.to_str(), kept, config_ids | ids)


def _warn_of_missing_files(directory: pathlib.Path, config: Mapping[str, Any]) -> None:
    """Warns that a model has no tokenizer although a file names its class, such as that of ByT5,
    which has no vocabulary."""
    written = read_object(directory / "tokenizer_config.json")
    name = tokenizer_class(written, config, False)
    if not written and "tokenizer_class" not in config:
        return
    reason = (f"its class in transformers is {name}, which is not supported" if name not in CLASSES and name not in
              VOCABULARY_CLASSES and name != AS_WRITTEN else f"the files of its {name} are missing")
    warnings.warn(f"{directory} is loaded without a tokenizer: {reason}; give the model token ids that AutoTokenizer "
                  "of transformers made", stacklevel=4)


def _merged(directory: pathlib.Path, written: dict[str, Any]) -> dict[str, Any]:
    """Merges the settings with those in older files, in the form of ``tokenizer_config.json``."""
    if "added_tokens_decoder" in written:
        return dict(written)
    others = {name: {"__type": "AddedToken"} | value if isinstance(value, dict) and name != "extra_special_tokens"
              else value for name, value in read_object(directory / "special_tokens_map.json").items()}
    return written | others


def _config_ids(directory: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the ids of special tokens in ``config.json``, and of all tokens that end a text."""
    ids = {role: number for role in ("bos", "eos", "pad") if _is_id(number := config.get(f"{role}_token_id"))}
    ends = read_object(directory / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    ends = [number for number in (ends if isinstance(ends, list) else [ends]) if _is_id(number)]
    return ids | ({"end": ends} if ends else {})


def _is_id(value: Any) -> bool:
    """Returns True for a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def write_tokenizer(directory: pathlib.Path, tokenizer: Tokenizer | HuggingFaceTokenizer | None) -> dict[str, Any]:
    """Writes a tokenizer, and returns the settings for its special tokens in ``config.json``."""
    for name in (_OURS, *_KNOWN, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (directory / name).unlink(missing_ok=True)
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(directory / _OURS)
    else:
        files = tokenizer.files
        _write(directory, files)
        stored = files.get(_JSON)
        if isinstance(stored, str) and not _is_read_as_written(directory, stored):
            # The tokenizer class in transformers would change these files when it reads them. This
            # class reads tokenizer.json unchanged.
            settings = tokenizer.settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
            _write(directory, HuggingFaceTokenizer.make(stored, settings, {}).files)
    end = list(tokenizer.end_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": end[0] if len(end) == 1 else end or None,
            "pad_token_id": tokenizer.pad_id}


def _write(directory: pathlib.Path, files: Mapping[str, str | bytes]) -> None:
    """Writes files by name."""
    for name, content in files.items():
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)


def _is_read_as_written(directory: pathlib.Path, stored: str) -> bool:
    """Returns True if the written files are read back as the same tokenizer."""
    try:
        again = read_tokenizer(directory, {})
    except ValueError:
        return False
    return isinstance(again, HuggingFaceTokenizer) and json.loads(again.files[_JSON]) == json.loads(stored)
