"""From what a caller passes to arrays of few different shapes: prompts, sources, the ids that begin
and end texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from transformer_jax.config import ModelConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.models.functional import Model, check_tokens

Texts = str | Sequence[str] | Sequence[Sequence[int]]

_SMALLEST = 16


def check_family(function: str, model: Model, *families: str) -> None:
    """Raises ValueError for a model of a family that a function is not for."""
    if model.config.family not in families:
        raise ValueError(f"{function} is for models of family {' or '.join(families)}, not {model.config.family}")


def bucket(length: int) -> int:
    """The next power of two, and never below 16: few shapes, few compiles."""
    return max(_SMALLEST, 1 << (length - 1).bit_length())


def pad_right(rows: Sequence[Sequence[int]], max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and segment ids (1, and 0 for padding), int32 ``[B, T]``, T a power of two or
    ``max_len``.

    Raises:
      ValueError: for a row longer than ``max_len``.
    """
    longest = max(map(len, rows))
    if longest > max_len:
        raise ValueError(f"a text of {longest} tokens is longer than the model's context of {max_len}; shorten it")
    return _pad(rows, min(bucket(longest), max_len), lambda ids, width: slice(0, len(ids)))


def pad_left(rows: Sequence[Sequence[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`pad_right` with the texts on the right, int32 ``[B, width]``: every row goes on at
    the same slot."""
    return _pad(rows, width, lambda ids, width: slice(width - len(ids), width))


def _pad(rows: Sequence[Sequence[int]], width: int,
         place: Callable[[Sequence[int], int], slice]) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.zeros((len(rows), width), np.int32)
    segment_ids_BT = np.zeros_like(tokens_BT)
    for row, ids in enumerate(rows):
        tokens_BT[row, place(ids, width)] = ids
        segment_ids_BT[row, place(ids, width)] = 1
    return tokens_BT, segment_ids_BT


def encode_prompts(prompts: Texts, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    """The token ids of every prompt, ``<|endoftext|>`` for an empty string; ValueError for what is
    no prompt."""
    return _encode(prompts, tokenizer, vocab_size, lambda text: tokenizer.encode_prompt(text))


def encode_sources(sources: Texts, tokenizer: Tokenizer | None, vocab_size: int) -> list[list[int]]:
    """The token ids of every source, with ``</s>`` after a string; ValueError for what is no
    source."""
    return _encode(sources, tokenizer, vocab_size, lambda text: tokenizer.encode_source(text))


def _encode(texts: Texts, tokenizer: Tokenizer | None, vocab_size: int,
            encode: Callable[[str], list[int]]) -> list[list[int]]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("there is no prompt")
    encoded = []
    for text in texts:
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("prompts that are strings need tokenizer=...; without one, pass lists of token ids")
            text = encode(text)
        ids = np.asarray(text)
        if ids.size == 0:
            raise ValueError("a prompt of token ids is empty; start it with the end-of-text token")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{text!r} is no prompt; pass a list of strings or a list of lists of token ids")
        check_tokens(ids, vocab_size)
        encoded.append(ids.tolist())
    return encoded


def first_tokens(start_id: int | None, config: ModelConfig, tokenizer: Tokenizer | None) -> list[int]:
    """The tokens before the first of a target: the one given, else the config's, else the
    tokenizer's ``<s>``."""
    if start_id is None and config.start_ids:
        return list(config.start_ids)
    if start_id is None and tokenizer is None:
        raise ValueError("an encoder-decoder without a tokenizer needs start_id=..., the token that starts a target")
    start_id = tokenizer.bos_id if start_id is None else start_id
    check_tokens(np.asarray([start_id]), config.vocab_size)
    return [start_id]


def ending_ids(end_ids: Sequence[int] | None, tokenizer: Tokenizer | None) -> Sequence[int]:
    """The ids that end a text: those given, else the tokenizer's, ``</s>`` and
    ``<|endoftext|>``."""
    if end_ids is not None:
        return end_ids
    return () if tokenizer is None else tokenizer.end_ids
