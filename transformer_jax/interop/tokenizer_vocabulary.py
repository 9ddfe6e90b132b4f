"""Read the tokenizers of Marian and M2M100, which consist of SentencePiece models and a
vocabulary."""

from __future__ import annotations

import base64
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from transformer_jax.data.vocabulary_tokenizer import VocabularyTokenizer
from transformer_jax.interop.language_codes import M2M100, WMT21
from transformer_jax.interop.tokenizer_building import extra_tokens, special_tokens
from transformer_jax.json_files import read_json

_MARIAN = {"unk": "<unk>", "eos": "</s>", "pad": "<pad>"}
_M2M100 = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
_ROLES = ("bos", "eos", "pad", "unk", "mask", "cls")
VOCABULARY_CLASSES = {"MarianTokenizer": _MARIAN, "M2M100Tokenizer": _M2M100}


def read_vocabulary_tokenizer(directory: pathlib.Path, name: str, settings: dict[str, Any], kept: Mapping[str, Any],
                              config_ids: Mapping[str, Any]) -> VocabularyTokenizer:
    """Reads the tokenizer of a class in ``VOCABULARY_CLASSES``.

    Args:
      directory: the directory with ``vocab.json``, and with ``source.spm`` and ``target.spm`` or
        ``sentencepiece.bpe.model``.
      name: the name of the class.
      settings: the result of ``read_settings``.
      kept: the settings that an export writes again.
      config_ids: the ids of special tokens in ``config.json``.

    Raises:
      ValueError: if a file is missing or damaged, or if the tokenizer does not have the language.
    """
    is_marian = name == "MarianTokenizer"
    models = ("source.spm", "target.spm") if is_marian else ("sentencepiece.bpe.model",)
    vocabularies = ["vocab.json", *(["target_vocab.json"] if settings.get("separate_vocabs") is True else [])]
    missing = [file for file in (*models, *vocabularies) if not (directory / file).is_file()]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing; expected {', '.join((*models, *vocabularies))}")
    contents = {file: (directory / file).read_bytes() for file in (*models, *vocabularies)}
    ids = _vocabulary(directory / "vocab.json")
    for file in vocabularies[1:]:
        _vocabulary(directory / file)
    for role, token in VOCABULARY_CLASSES[name].items():
        settings.setdefault(f"{role}_token", token)
    unknown = str(settings["unk_token"])
    if unknown not in ids:
        raise ValueError(f"vocab.json has no {unknown!r}; expected the token for unknown pieces")
    added = _added_pieces(settings, ids, is_marian)
    number_of = {piece["name"]: piece["token"] for piece in added}
    codes = {} if is_marian else _codes(settings, len(ids))
    rules = {"is_marian": is_marian, "source_model": models[0], "target_model": models[-1], "unknown": unknown,
             # As in transformers, the source model decodes if both sides share one vocabulary.
             "decoding_model": models[-1] if len(vocabularies) == 2 else models[0],
             "vocabularies": vocabularies, "codes": codes, "before": [] if is_marian else [_language(settings, codes)],
             "after": [number_of[str(settings["eos_token"])]],
             "ids": dict(config_ids) | {role: number_of[str(token)] for role in _ROLES
                                        if (token := settings.get(f"{role}_token")) is not None}}
    stored = {"added": added, "contents": {file: base64.b64encode(content).decode() for file, content in
                                           contents.items()}, "rules": rules, "settings": dict(kept)}
    return VocabularyTokenizer(json.dumps(stored, ensure_ascii=False, sort_keys=True).encode())


def _vocabulary(path: pathlib.Path) -> dict[str, int]:
    """Reads a vocabulary file; raises ValueError if it does not contain ids by piece."""
    vocab = read_json(path, dict[str, int])
    if not vocab or min(vocab.values()) < 0:
        raise ValueError(f"{path} is not a vocabulary; expected an object with the id of each piece")
    return vocab


def _added_pieces(settings: Mapping[str, Any], ids: Mapping[str, int], is_marian: bool) -> list[dict[str, Any]]:
    """Returns the tokens that the tokenizer finds in a text before it splits the text: those of the
    files, and special tokens that get ids after the vocabulary."""
    by_id = settings["added_tokens_decoder"]
    named = [str(token) for token in (*special_tokens(settings).values(), *extra_tokens(settings)) if token is not None]
    added = {str(token): {"token": number, "name": str(token), "special": str(token) in named, "lstrip": token.lstrip,
                          "rstrip": token.rstrip, "single_word": token.single_word}
             for number, token in sorted(by_id.items())}
    if not is_marian:  # an added token replaces the piece with the same id
        ids = {piece: number for piece, number in ids.items() if number not in by_id}
    further = len({*ids, *added})
    for name in dict.fromkeys(named):
        if name and name not in added:
            added[name] = {"token": ids.get(name, further), "name": name}
            further += name not in ids
    return list({piece["token"]: piece for piece in added.values()}.values())  # of one id, the last token wins


def _codes(settings: Mapping[str, Any], start: int) -> dict[str, int]:
    """Returns the language tokens of M2M100 with their ids, which follow the vocabulary."""
    kind = settings.get("language_codes", "m2m100")
    if kind not in ("m2m100", "wmt21"):
        raise ValueError(f"language_codes={kind!r}; expected m2m100 or wmt21")
    return {f"__{code}__": start + place for place, code in enumerate(M2M100 if kind == "m2m100" else WMT21)}


def _language(settings: Mapping[str, Any], codes: Mapping[str, int]) -> int:
    """Returns the id of the source language's token."""
    language = settings.get("src_lang") or "en"
    if f"__{language}__" not in codes:
        raise ValueError(f"src_lang={language!r} is not a language of this tokenizer; expected a code such as en")
    return codes[f"__{language}__"]
