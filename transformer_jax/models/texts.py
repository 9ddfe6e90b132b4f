"""Converts strings and lists of token ids to the arrays that a model's call takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import jax
import numpy as np

from transformer_jax.settings import shown

Text = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array


def as_arrays(model: Any, given: tuple[Text | None, ...],
              tokenizer: Any) -> tuple[tuple[Any, ...], dict[str, np.ndarray]]:
    """Converts each argument to token ids, int32 ``[B, T]``, and pads rows of different lengths.

    Args:
      model: the model that will read the texts. A decoder reads a string as a prompt. An encoder
        reads it between ``<s>`` and ``</s>``, with ``<mask>`` as one token. An encoder-decoder
        reads a source with ``</s>`` after it, and a target with ``<s>`` before it.
      given: for each argument an array (returned unchanged), a string, a list of strings, a list of
        ids, or a list of lists of ids; ``None`` if embeddings take its place.
      tokenizer: the model's tokenizer; needed for strings.

    Returns:
      The arrays; and segment ids for the arguments that had to be padded, by the name of the
      argument of the model's call: 1 for tokens and 0 for the padding on the right.

    Raises:
      ValueError: for strings without a tokenizer, for an empty text, and for a value that is not a
        text.
    """
    names = ("source_segment_ids_BS", "target_segment_ids_BT") if model.reads_sources else ("segment_ids_BT",)
    arrays, segments = [], {}
    for argument_index, text in enumerate(given):
        if text is None or (hasattr(text, "ndim") and cast(Any, text).dtype != object):
            arrays.append(text)
            continue
        rows = [_ids(row, model, argument_index, tokenizer) for row in _rows(text)]
        lengths_B1 = np.asarray([[len(row)] for row in rows])
        tokens_BT = np.zeros((len(rows), lengths_B1.max()), np.int32)
        is_token_BT = np.arange(tokens_BT.shape[1]) < lengths_B1
        tokens_BT[is_token_BT] = np.concatenate(rows)
        arrays.append(tokens_BT)
        if not is_token_BT.all():
            segments[names[argument_index]] = is_token_BT.astype(np.int32)
    return tuple(arrays), segments


def _rows(text: Text) -> list[Any]:
    """Returns a list of texts, also if one text was given."""
    rows = as_list("the model", text)
    if not rows:
        raise ValueError("the list of texts is empty; pass at least one string or list of token ids")
    return rows if is_text(rows[0]) else [rows]


def is_text(item: Any) -> bool:
    """Returns True if an item of a list is itself a text, and False if it can only be a token
    id."""
    return isinstance(item, (str, list, tuple)) or getattr(item, "ndim", 0) > 0


def as_list(function: str, texts: Any) -> list[Any]:
    """Returns one text or several as a list.

    Args:
      function: what was called, for the message.
      texts: a string, or a list or another iterable of texts or token ids.

    Returns:
      A list that holds the string, or the items of ``texts``.

    Raises:
      ValueError: if ``texts`` is neither a string nor a list.
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, bytearray)) or getattr(texts, "ndim", 1) == 0:
        raise ValueError(f"{function} was given {shown(texts)}, which is not a text; pass a string, or a list of "
                         "strings or of lists of token ids")
    return list(texts)


def _ids(text: str | Sequence[int], model: Any, argument_index: int, tokenizer: Any) -> np.ndarray:
    """Returns the token ids of one text, which is a string or a list of ids, as an array
    ``[T]``."""
    ids = np.asarray(_encoded(text, model, argument_index, tokenizer) if isinstance(text, str) else text)
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{shown(text)} is not a text; pass strings, or lists of token ids that are not empty")
    return ids


def check_tokenizer(tokenizer: Any) -> None:
    """Raises ValueError if an object is not a tokenizer of this library."""
    if isinstance(tokenizer, type) or not hasattr(tokenizer, "encode_prompt"):
        raise ValueError(f"tokenizer={shown(tokenizer)} is not a tokenizer; pass bundle.tokenizer, or what "
                         "tj.Tokenizer.load returns")


def _encoded(text: str, model: Any, argument_index: int, tokenizer: Any) -> list[int]:
    """Encodes a string: argument 0 as a prompt, masked text or source, argument 1 as a target."""
    if tokenizer is None:
        raise ValueError("strings need tokenizer=..., such as bundle.tokenizer; without one, pass token ids")
    check_tokenizer(tokenizer)
    if argument_index == 0:
        return read_text(model, text, tokenizer)
    start = model.config.start_ids or (tokenizer.bos_id,)
    return [*start, *read_target(model, text, tokenizer, start)]


def text_form(model: Any) -> Literal["prompt", "source", "masked"]:
    """Returns the form in which a model reads a text: "prompt", "source" or "masked" (see
    ``transformer_jax.data.tokens.Form``)."""
    if model.reads_sources:
        return "source"
    model = getattr(model, "trunk", model)  # a head on a model does not change how it reads
    return "prompt" if model.predicts_next else "masked"


def read_text(model: Any, text: str, tokenizer: Any) -> list[int]:
    """Encodes a text in the form in which a model reads it, with the special tokens that the
    tokenizer adds.

    Every function that encodes texts for a model calls this one, and the tokenizer decides which
    special tokens it adds.

    Args:
      model: a decoder, which reads a prompt; an encoder, which reads the whole text, with the name
        of the mask as one token; or an encoder-decoder, which reads a source.
      text: a string.
      tokenizer: the model's tokenizer.

    Returns:
      The token ids.
    """
    return getattr(tokenizer, f"encode_{text_form(model)}")(text)


def read_target(model: Any, text: str, tokenizer: Any, start: Sequence[int] = ()) -> list[int]:
    """Encodes a text that a model is to write, without the token that ends it.

    Args:
      model: a decoder, which writes the text after a prompt, or an encoder-decoder.
      text: a string.
      tokenizer: the model's tokenizer, which may encode targets differently from sources.
      start: the tokens that start an encoder-decoder's target.

    Returns:
      The token ids.
    """
    return tokenizer.encode_target(text, after=start) if model.reads_sources else tokenizer.encode(text)
