"""Build a tokenizer from the files of a directory, in the same steps as transformers."""

from __future__ import annotations

import base64
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformer_jax.interop.sentencepiece import as_written, extracted, read_proto
from transformer_jax.interop.tokenizer_classes import Given, TokenizerClass
from transformer_jax.interop.tokenizer_settings import ROLES, StoredTokenizer, added_token

if TYPE_CHECKING:
    import tokenizers

_SENTENCEPIECE = "tokenizer.model"


def tokenizer_as_written(directory: pathlib.Path, stored: StoredTokenizer | None,
                         settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """Builds the tokenizer that ``tokenizer.json`` or ``tokenizer.model`` describes, without a
    class.

    Args:
      directory: the directory with one of these files.
      stored: the content of ``tokenizer.json``, or ``None``.
      settings: the result of ``read_settings``. The function adds the special tokens that the files
        name.

    Raises:
      ValueError: if neither file exists.
    """
    import tokenizers

    if stored is not None:
        tokenizer = tokenizers.Tokenizer.from_str(stored.text)
        if tokenizer.padding is not None:
            settings.setdefault("pad_token", tokenizer.padding["pad_token"])
    elif (directory / _SENTENCEPIECE).is_file():
        tokenizer = as_written(read_proto(directory / _SENTENCEPIECE), settings)
    else:
        raise ValueError("a model of this type is read from tokenizer.json or tokenizer.model; to say which class of "
                         "transformers its files belong to, set tokenizer_class in tokenizer_config.json")
    _add_special(tokenizer, settings)
    if _has_flags(settings) or tokenizer.post_processor is None:
        tokenizer.post_processor = _flags_frame(tokenizer, settings)
    return tokenizer


def tokenizer_of_class(directory: pathlib.Path, row: TokenizerClass, stored: StoredTokenizer | None,
                       settings: dict[str, Any]) -> tokenizers.Tokenizer:
    """Builds the tokenizer that a class of transformers makes from a vocabulary.

    Args:
      directory: the directory with ``tokenizer.json``, from which the class takes the vocabulary
        and the special tokens around a text, or with the vocabulary files of the class.
      row: the class.
      stored: the content of ``tokenizer.json``, or ``None``.
      settings: the result of ``read_settings``. The function adds the settings of the class.

    Raises:
      ValueError: if these files are missing, or if the vocabulary has a different form.
    """
    if stored is None:
        vocab, merges, frame = *_from_vocabulary(directory, row, settings), None
    else:
        vocab, merges, frame = _from_json(row, stored, settings)
    for name, value in {**{f"{role}_token": token for role, token in row.special.items()}, **row.settings}.items():
        settings.setdefault(name, value)
    for role, flags in row.added.items():
        token = settings[f"{role}_token"]
        if isinstance(token, str):
            settings[f"{role}_token"] = added_token(token, role, **flags)
    row.prepare(settings)
    given = Given(vocab, merges, settings)
    tokenizer = row.build(given)
    if row.frame is not None and row.frame_first:
        tokenizer.post_processor = row.frame(given, _finder(tokenizer, settings))
    if frame is not None:
        tokenizer.post_processor = frame
    _add_special(tokenizer, settings)
    by_flags = _has_flags(settings) or tokenizer.post_processor is None
    if by_flags or row.flags_last:
        tokenizer.post_processor = _flags_frame(tokenizer, settings)
    if row.frame is not None and not row.frame_first and not (by_flags and row.adds_named == "special"):
        tokenizer.post_processor = row.frame(given, _finder(tokenizer, settings))
    if row.adds_named is not None:
        _add_once_more(tokenizer, settings, row.adds_named == "special")
    return tokenizer


def _from_vocabulary(directory: pathlib.Path, row: TokenizerClass,
                     settings: dict[str, Any]) -> tuple[Any, list[tuple[str, str]]]:
    """Reads the vocabulary and the merges from the vocabulary files of a class."""
    from tokenizers import models

    # transformers prefers tokenizer.model if it exists.
    files = (_SENTENCEPIECE,) if (directory / _SENTENCEPIECE).is_file() else row.files
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing; expected tokenizer.json or {' and '.join(row.files)}")
    paths = [str(directory / name) for name in files]
    if files[0].endswith(".model"):
        vocab, merges, brought = extracted(read_proto(directory / files[0]), row.model)
        settings.update(brought)
        return row.rearrange(vocab, settings), merges
    if row.model == "wordpiece":
        return models.WordPiece.read_file(paths[0]), []
    return models.BPE.read_file(*paths)


def _from_json(row: TokenizerClass, stored: StoredTokenizer,
               settings: dict[str, Any]) -> tuple[Any, list[tuple[str, str]], Any]:
    """Reads the vocabulary, the merges and the post-processor from ``tokenizer.json``."""
    import tokenizers

    whole = tokenizers.Tokenizer.from_str(stored.text)
    model = stored.content["model"]
    vocab = model.get("vocab")
    if isinstance(vocab, dict) != (row.model in ("bpe", "wordpiece")) and row.model is not None:
        raise ValueError(f"tokenizer.json contains a {type(whole.model).__name__} vocabulary, but its class expects "
                         f"{row.model}; to read the file without this class, set tokenizer_class to "
                         "PreTrainedTokenizerFast in tokenizer_config.json")
    if isinstance(vocab, list):
        vocab = [(piece, score) for piece, score in vocab]
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or [])
    merges = [(left, right) for left, right in pairs]
    normalizer = stored.content.get("normalizer") or {}
    for step in normalizer.get("normalizers", [normalizer]):
        if step.get("type") == "Precompiled":
            settings["_spm_precompiled_charsmap"] = base64.b64decode(step["precompiled_charsmap"])
            break
    return vocab, merges, whole.post_processor


def special_tokens(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the special tokens that have a name, the common ones first; ``None`` for those that
    the tokenizer does not have."""
    named = {f"{role}_token": settings.get(f"{role}_token") for role in ROLES}
    own = {name: token for name, token in settings.items()
           if name.endswith("_token") and name not in named and not isinstance(token, bool) and token is not None}
    return named | own | settings["model_specific_special_tokens"]


def _add_special(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> None:
    """Adds special tokens that are missing in the vocabulary, and marks the others as special."""
    named, extra = special_tokens(settings), extra_tokens(settings)
    by_id = settings["added_tokens_decoder"]
    tokens = [by_id[number] for number in sorted(by_id)]
    names = [str(token) for token in (*tokenizer.get_added_tokens_decoder().values(), *tokens)]
    for token in (*(token for token in named.values() if token is not None), *extra):
        if str(token) not in names and token not in tokens:
            tokens.append(token)
    special = {str(token) for token in named.values() if token}
    for place, token in enumerate(tokens):
        if isinstance(token, str):
            tokens[place] = added_token(token, "special tokens", special=True)
        elif str(token) in special:
            token.special = True
    tokenizer.add_tokens(tokens)


def _add_once_more(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any], special: bool) -> None:
    """Adds each special token again, as some classes do, which changes its flags."""
    tokens = [token for token in (*special_tokens(settings).values(), *extra_tokens(settings)) if token is not None]
    if special:
        tokenizer.add_special_tokens([token if not isinstance(token, str) else
                                      added_token(token, "special tokens", special=True, normalized=False)
                                      for token in tokens])
    else:
        tokenizer.add_tokens([added_token(name, "special tokens", special=True)
                              for name in dict.fromkeys(map(str, tokens))])


def extra_tokens(settings: Mapping[str, Any]) -> list[Any]:
    """Returns the special tokens that have no name."""
    return settings.get("extra_special_tokens" if "extra_special_tokens" in settings
                        else "additional_special_tokens") or []


def _has_flags(settings: Mapping[str, Any]) -> bool:
    """Returns True if the settings contain ``add_bos_token`` or ``add_eos_token``."""
    return "add_bos_token" in settings or "add_eos_token" in settings


def _finder(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> Callable[[str], int]:
    """Returns a function from a token to its id, or to the id of the unknown token."""
    def find(name: str) -> int:
        token_id = tokenizer.token_to_id(name)
        if token_id is None:
            token_id = tokenizer.token_to_id(str(settings.get("unk_token")))
        if token_id is None:
            raise ValueError(f"the vocabulary has no token {name!r} and no unknown token; expected one of them")
        return token_id

    return find


def _flags_frame(tokenizer: tokenizers.Tokenizer, settings: Mapping[str, Any]) -> Any:
    """Makes the post-processor for the settings ``add_bos_token`` and ``add_eos_token``."""
    from tokenizers import processors

    around = {role: [str(settings[f"{role}_token"])] if settings.get(f"add_{role}_token") is True
              and settings.get(f"{role}_token") is not None else [] for role in ("bos", "eos")}
    find, names = _finder(tokenizer, settings), (*around["bos"], *around["eos"])
    first, second = ([*(f"{name}:{part}" for name in around["bos"]), f"${'AB'[part]}:{part}",
                      *(f"{name}:{part}" for name in around["eos"])] for part in (0, 1))
    return processors.TemplateProcessing(single=first, pair=[*first, *second],
                                         special_tokens=[(name, find(name)) for name in names])
