"""The tokenizer in a directory of Hugging Face's, from and to its files."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.interop.sentencepiece import tokenizer_json

# Ours, which transformers would read as something else: under a name that it does not look for.
_OURS = "transformer_jax_tokenizer.model"
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_NOT_READ = ("vocab.json", "vocab.txt", "merges.txt", "source.spm")


def read_tokenizer(directory: pathlib.Path, settings: Mapping[str, Any]) -> Tokenizer | HuggingFaceTokenizer | None:
    """The tokenizer of a directory; ``None`` where there are no files of one.

    Args:
      directory: with ``tokenizer.json``, or else a SentencePiece model, or a file that
        :func:`write_tokenizer` wrote.
      settings: those of ``config.json``, which names special tokens that ``tokenizer_config.json``
        may not name.

    Raises:
      ValueError: for a tokenizer in another form.
    """
    if (directory / _OURS).is_file():
        return Tokenizer.load(directory / _OURS)
    named = _read(directory / "special_tokens_map.json") | _read(directory / "tokenizer_config.json")
    pieces = [directory / name for name in _SENTENCEPIECE if (directory / name).is_file()]
    if (directory / "tokenizer.json").is_file():
        text, roles = (directory / "tokenizer.json").read_text(encoding="utf-8"), {}
    elif pieces:
        text, roles = tokenizer_json(pieces[0].read_bytes(), named)
    else:
        others = [name for name in _NOT_READ if (directory / name).is_file()]
        if others:
            raise ValueError(f"{directory} has its tokenizer as {', '.join(others)}; expected tokenizer.json, which "
                             "transformers writes: AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained(DIRECTORY)")
        return None
    ids = roles | {role: settings[f"{role}_token_id"] for role in ("bos", "eos", "pad")
                   if isinstance(settings.get(f"{role}_token_id"), int)}
    end = _read(directory / "generation_config.json").get("eos_token_id", settings.get("eos_token_id"))
    if end is not None:
        ids["end"] = end if isinstance(end, list) else [end]
    return HuggingFaceTokenizer.make(text, named, ids)


def write_tokenizer(directory: pathlib.Path, tokenizer: Tokenizer | HuggingFaceTokenizer | None) -> dict[str, Any]:
    """Writes a tokenizer, and returns what ``config.json`` says of its special tokens."""
    for name in (_OURS, "tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink(missing_ok=True)
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(directory / _OURS)
    else:
        for name, text in tokenizer.files.items():
            (directory / name).write_text(text, encoding="utf-8")
    end = list(tokenizer.end_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": end[0] if len(end) == 1 else end or None,
            "pad_token_id": tokenizer.pad_id}


def _read(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
