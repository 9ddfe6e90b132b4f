"""Converts prompts and sources to arrays of few different shapes, and finds the ids that start and
end texts."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Bool, Int32

from transformer_jax.config import ModelConfig
from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.models.functional import Model, check_model, check_tokens
from transformer_jax.models.texts import as_list, check_tokenizer
from transformer_jax.settings import shown

Texts = str | Sequence[str] | Sequence[Sequence[int]]

# Token ids, and segment ids: 1 for a token, 0 for padding.
Padded = tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]

_SMALLEST = 16


def check_family(function: str, model: Model, *families: str) -> Any:
    """Returns the model, or raises ValueError if it is not a model, or if neither its family nor
    the role of its family is one that the function supports."""
    check_model(function, model)
    if model.config.role not in families:
        raise ValueError(f"{function} is for models of family {' or '.join(families)}, not {model.config.family}")
    return model


def whole_number(name: str, value: Any, *, least: int = 1, most: int | None = None, expected: str | None = None) -> int:
    """Converts a whole number of Python, NumPy or JAX to a Python integer.

    Args:
      name: the name of the argument, for the message.
      value: the value to convert.
      least: the smallest number allowed.
      most: the largest number allowed; ``None`` for no limit.
      expected: what the value must be, in words, for the message.

    Raises:
      ValueError: if the value is not a whole number, or is out of range.
    """
    expected = expected or f"a whole number, at least {least}"
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r} must be {expected}") from None
    if isinstance(value, (bool, np.bool_)) or number < least or (most is not None and number > most):
        raise ValueError(f"{name}={value} must be {expected}")
    return number


def vocab_size_of(model: Model) -> int:
    """Returns the size of the model's vocabulary.

    Raises:
      ValueError: if the config has none, which a model that was made by this library always has.
    """
    if model.config.vocab_size is None:
        raise ValueError("the model's config has no vocab_size; use config.replace(vocab_size=tokenizer.vocab_size)")
    return model.config.vocab_size


def bucket(length: int) -> int:
    """Rounds a length up to a power of two, at least 16, so that few shapes are compiled."""
    return max(_SMALLEST, 1 << (length - 1).bit_length())


def pad_right(rows: Sequence[Sequence[int]], max_len: int) -> Padded:
    """Pads rows of token ids on the right to the next power of two, but at most ``max_len``.

    Returns:
      Token ids and segment ids (1 for tokens and 0 for padding), int32 ``[B, T]``.

    Raises:
      ValueError: if a row is longer than ``max_len``.
    """
    longest = max(map(len, rows))
    if longest > max_len:
        raise ValueError(f"a text of {longest} tokens is longer than the model's context of {max_len}; shorten it")
    return _pad(rows, min(bucket(longest), max_len), lambda ids, width: slice(0, len(ids)))


def pad_left(rows: Sequence[Sequence[int]], width: int) -> Padded:
    """Pads rows of token ids on the left to ``[B, width]``, so that the next token of every row has
    the same slot."""
    return _pad(rows, width, lambda ids, width: slice(width - len(ids), width))


def _pad(rows: Sequence[Sequence[int]], width: int,
         place: Callable[[Sequence[int], int], slice]) -> Padded:
    """Writes each row of token ids into the slice that ``place(ids, width)`` returns."""
    tokens_BT = np.zeros((len(rows), width), np.int32)
    segment_ids_BT = np.zeros_like(tokens_BT)
    for row, ids in enumerate(rows):
        tokens_BT[row, place(ids, width)] = ids
        segment_ids_BT[row, place(ids, width)] = 1
    return tokens_BT, segment_ids_BT


def encode_prompts(prompts: Texts, tokenizer: TextTokenizer | None, vocab_size: int) -> list[list[int]]:
    """Returns the token ids of every prompt; an empty string becomes ``<|endoftext|>``.

    Raises:
      ValueError: if a prompt is not a string or a list of token ids, or cannot be encoded.
    """
    return _encode(prompts, tokenizer, vocab_size, lambda tokenizer, text: tokenizer.encode_prompt(text))


def encode_sources(sources: Texts, tokenizer: TextTokenizer | None, vocab_size: int) -> list[list[int]]:
    """Returns the token ids of every source; a string gets ``</s>`` after it.

    Raises:
      ValueError: if a source is not a string or a list of token ids, or cannot be encoded.
    """
    return _encode(sources, tokenizer, vocab_size, lambda tokenizer, text: tokenizer.encode_source(text))


def _encode(texts: Texts, tokenizer: TextTokenizer | None, vocab_size: int,
            encode: Callable[[TextTokenizer, str], list[int]]) -> list[list[int]]:
    """Encodes strings with ``encode(tokenizer, text)``, and checks the token ids of every text."""
    several = as_list("a function that decodes", texts)
    if not several:
        raise ValueError("the list of prompts or sources is empty; pass at least one")
    encoded = []
    for text in several:
        if isinstance(text, str):
            if tokenizer is None:
                raise ValueError("prompts that are strings need tokenizer=...; without one, pass lists of token ids")
            check_tokenizer(tokenizer)
            text = encode(tokenizer, text)
        ids = np.asarray(text)
        if ids.size == 0:
            raise ValueError("a prompt of token ids is empty; start it with the end-of-text token")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{shown(text)} is not a prompt; pass a list of strings or a list of lists of token ids")
        check_tokens(ids, vocab_size)
        encoded.append(ids.tolist())
    return encoded


def first_tokens(start_id: int | None, config: ModelConfig, tokenizer: TextTokenizer | None) -> list[int]:
    """Returns the tokens that start a target: ``start_id`` if given, else the config's, else the
    tokenizer's ``<s>``.

    Raises:
      ValueError: if none of them is known, or the id is outside the vocabulary.
    """
    if start_id is None and config.start_ids:
        return list(config.start_ids)
    if start_id is None:
        if tokenizer is None:
            raise ValueError("an encoder-decoder without a tokenizer needs start_id=..., the token that starts a "
                             "target")
        start_id = tokenizer.bos_id
    if start_id is None:
        raise ValueError("the tokenizer has no token that starts a text; pass start_id=..., the token that starts a "
                         "target")
    check_tokens(np.asarray([start_id]), config.vocab_size or 0)
    return [start_id]


def ending_ids(end_ids: Iterable[int] | None, tokenizer: TextTokenizer | None) -> Sequence[int]:
    """Returns the ids that end a text: ``end_ids`` if given, else the tokenizer's ``</s>`` and
    ``<|endoftext|>``."""
    if end_ids is not None:
        return token_ids("end_ids", end_ids)
    return () if tokenizer is None else tokenizer.end_ids


def token_ids(name: str, ids: Iterable[int], vocab_size: int | None = None) -> list[int]:
    """Returns token ids as a list of Python integers.

    Raises:
      ValueError: if ``ids`` is not a list of whole numbers, or an id is outside the vocabulary.
    """
    try:
        ids = list(ids)
        tokens = [operator.index(token) for token in ids]
    except TypeError:
        raise ValueError(f"{name}={shown(ids)} is not a list of token ids; pass a list of whole numbers") from None
    for token, given in zip(tokens, ids, strict=True):
        if isinstance(given, (bool, np.bool_)):
            raise ValueError(f"{name}={shown(ids)} has {given}, which is not a token id; pass a list of whole numbers")
        if vocab_size is not None and not 0 <= token < vocab_size:
            raise ValueError(f"{name}: token id {token} is outside the vocabulary of {vocab_size}")
    return tokens


def undecodable(tokenizer: TextTokenizer | None, vocab_size: int) -> Bool[np.ndarray, " V"]:
    """Returns True for the ids of a model's vocabulary that the tokenizer cannot decode, bool
    ``[vocab_size]``.

    A vocabulary is often rounded up (GPT-2's 50,257 to 50,304), so the model has logits for ids
    that are not tokens. All functions that draw tokens set these logits to minus infinity. Without
    a tokenizer nothing is decoded, and every id may be drawn.
    """
    return np.arange(vocab_size) >= (vocab_size if tokenizer is None else tokenizer.vocab_size)


def never_drawn(config: ModelConfig, tokenizer: TextTokenizer | None,
                ends: Iterable[int]) -> Bool[np.ndarray, " V"]:
    """Returns True for the ids of a model's vocabulary that are never drawn, bool ``[V]``.

    These are the ids that the tokenizer cannot decode, except those that end a text, and those that
    the config bans. Reinforcement learning gives the same ids the probability 0.

    Args:
      config: the config of the model; ``vocab_size`` must be set.
      tokenizer: the tokenizer, or ``None``.
      ends: the ids that end a text, which are not decoded.
    """
    vocab_size = cast(int, config.vocab_size)
    excluded_V = undecodable(tokenizer, vocab_size)
    excluded_V[[token for token in ends if token < vocab_size]] = False
    excluded_V[list(config.banned_ids)] = True
    return excluded_V


def decodable(tokens: Sequence[int], tokenizer: TextTokenizer) -> list[int]:
    """Returns the tokens without those that the tokenizer cannot decode; a prompt of token ids may
    hold some."""
    return [token for token in tokens if token < tokenizer.vocab_size]
