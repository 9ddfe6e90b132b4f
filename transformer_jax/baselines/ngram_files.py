"""Saves an n-gram model in a directory, and loads it.

The directory has three files: ``counts.npz`` with the arrays, ``tokenizer.model`` if the model has
a tokenizer, and ``ngrams.json`` with the settings and the SHA-256 digests of the other two.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import pathlib
import zipfile
from typing import Any, TypedDict

import numpy as np

from transformer_jax.baselines.ngram_counts import LARGEST_ORDER, NgramCounts
from transformer_jax.baselines.ngrams import NgramModel
from transformer_jax.baselines.smoothing import Smoothing
from transformer_jax.data.huggingface_tokenizer import tokenizer_from_bytes
from transformer_jax.files import naming
from transformer_jax.json_files import located, read_json
from transformer_jax.settings import from_dict, require

DESCRIPTION = "ngrams.json"
_COUNTS, _TOKENIZER = "counts.npz", "tokenizer.model"


class _Description(TypedDict):
    """The content of ``ngrams.json``."""

    order: int
    vocab_size: int
    end_of_text_id: int | None
    smoothing: dict[str, Any]
    files: dict[str, str]


def save_ngrams(directory: str | pathlib.Path, model: NgramModel) -> None:
    """Saves an n-gram model so that ``load_ngrams`` can load it.

    Args:
      directory: The directory, which is created if it does not exist.
      model: The model.
    """
    directory, counts = pathlib.Path(directory), model.counts
    arrays = {f"{name}_{place}": array for name in ("codes", "counts", "suffixes")
              for place, array in enumerate(getattr(counts, name))}
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=False, **arrays)
    contents = {_COUNTS: stream.getvalue()}
    if model.tokenizer is not None:
        contents[_TOKENIZER] = model.tokenizer.to_bytes()
    description = {"order": counts.order, "vocab_size": counts.vocab_size, "end_of_text_id": counts.end_of_text_id,
                   "smoothing": dataclasses.asdict(model.smoothing),
                   "files": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}}
    contents[DESCRIPTION] = json.dumps(description, indent=1).encode()  # last, so that it describes complete files
    with naming(directory):
        directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with naming(directory / name):
            temporary = directory / f"{name}.tmp"
            temporary.write_bytes(content)
            temporary.replace(directory / name)


def load_ngrams(directory: str | pathlib.Path) -> NgramModel:
    """Loads an n-gram model.

    Args:
      directory: A directory that ``save_ngrams`` wrote.

    Returns:
      The model.

    Raises:
      ValueError: If there is no n-gram model in the directory, or a file is damaged.
    """
    directory = pathlib.Path(directory)
    if not (directory / DESCRIPTION).is_file():
        raise ValueError(f"there is no n-gram model in {directory}: it has no file {DESCRIPTION}; count one with "
                         "python -m experiments.ngrams")
    description = read_json(directory / DESCRIPTION, _Description)
    contents = {name: _content(directory / name, description["files"].get(name)) for name in (_COUNTS, _TOKENIZER)
                if name == _COUNTS or name in description["files"]}
    tokenizer = None
    if _TOKENIZER in contents:
        with located(str(directory / _TOKENIZER)):
            tokenizer = tokenizer_from_bytes(contents[_TOKENIZER])
    with located(str(directory / DESCRIPTION)):
        smoothing = from_dict(Smoothing, description["smoothing"])
        require(1 <= description["order"] <= LARGEST_ORDER, f"order={description['order']} is not from 1 to "
                f"{LARGEST_ORDER}")
        require(description["vocab_size"] > 0, f"vocab_size={description['vocab_size']} is not positive")
    with located(str(directory / _COUNTS)):
        counts = _counts(contents[_COUNTS], description)
        return NgramModel(counts, smoothing, tokenizer)


def _content(path: pathlib.Path, digest: str | None) -> bytes:
    """Reads a file, and raises ValueError if its digest is not the one that was recorded."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}, so the n-gram model is incomplete; count it again")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"{path} is damaged: its SHA-256 digest is not the one in {DESCRIPTION}; count the n-grams "
                         "again")
    return content


def _counts(content: bytes, description: _Description) -> NgramCounts:
    """Reads the arrays, and checks that they describe each other."""
    order, vocab_size = description["order"], description["vocab_size"]
    names = {name: [f"{name}_{place}" for place in range(order - (name != "counts"))]
             for name in ("codes", "counts", "suffixes")}
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"the arrays cannot be read: {error}") from error
    require(sorted(arrays) == sorted(itertools.chain(*names.values())), "expected the arrays of n-grams up to length "
            f"{order}, got {', '.join(sorted(arrays))}")
    codes, counts, suffixes = ([arrays[name] for name in group] for group in names.values())
    for array in (*codes, *counts, *suffixes):
        require(array.ndim == 1 and array.dtype == np.int64 and not (array < 0).any(),
                f"expected arrays of one axis with whole numbers from 0, got {array.dtype} {list(array.shape)}")
    require(len(counts[0]) == vocab_size, f"expected the counts of {vocab_size} tokens, got {len(counts[0])}")
    for place, (code, suffix) in enumerate(zip(codes, suffixes, strict=True), start=1):
        num_shorter = len(counts[place - 1])
        require(len(code) == len(suffix) == len(counts[place]),
                f"the arrays of length {place + 1} have different sizes")
        require(not len(code) or (bool((np.diff(code) > 0).all()) and int(code[-1]) < num_shorter * vocab_size
                                  and int(suffix.max()) < num_shorter),
                f"the n-grams of length {place + 1} do not fit the shorter ones")
    return NgramCounts(vocab_size, description["end_of_text_id"], tuple(codes), tuple(counts), tuple(suffixes))
