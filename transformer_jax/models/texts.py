"""From strings and lists of token ids to the arrays that a model's call takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

Text = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array


def as_arrays(model: Any, given: tuple[Text, ...], tokenizer: Any) -> tuple[tuple[Any, ...], dict[str, np.ndarray]]:
    """Token ids, int32 ``[B, T]``, of each argument, and the segment ids of those that had to be
    padded.

    Args:
      model: a decoder reads a string as a prompt, an encoder between ``<s>`` and ``</s>``, with
        ``<mask>`` as a token; an encoder-decoder reads a source with ``</s>`` after it, and a
        target after ``<s>``.
      given: arrays, which stay as they are, strings, lists of strings, ids, or lists of ids.
      tokenizer: the model's; needed for strings.

    Returns:
      The arrays; and by the name of the argument of the model's call, segment ids that are 1 for
      tokens and 0 for the padding on the right, for rows of different lengths.

    Raises:
      ValueError: for strings without a tokenizer, an empty text, or what is no text.
    """
    names = ("source_segment_ids_BS", "target_segment_ids_BT") if model.reads_sources else ("segment_ids_BT",)
    arrays, segments = [], {}
    for place, text in enumerate(given):
        if hasattr(text, "ndim"):
            arrays.append(text)
            continue
        rows = [_ids(row, model, place, tokenizer) for row in _rows(text)]
        lengths_B1 = np.asarray([[len(row)] for row in rows])
        tokens_BT = np.zeros((len(rows), lengths_B1.max()), np.int32)
        is_token_BT = np.arange(tokens_BT.shape[1]) < lengths_B1
        tokens_BT[is_token_BT] = np.concatenate(rows)
        arrays.append(tokens_BT)
        if not is_token_BT.all():
            segments[names[place]] = is_token_BT.astype(np.int32)
    return tuple(arrays), segments


def _rows(text: Text) -> list[Any]:
    if isinstance(text, str):
        return [text]
    if not len(text):
        raise ValueError("there is no text: pass a string, token ids, or lists of them")
    return [text] if np.ndim(text[0]) == 0 and not isinstance(text[0], str) else list(text)


def _ids(text: str | Sequence[int], model: Any, place: int, tokenizer: Any) -> np.ndarray:
    ids = np.asarray(_encoded(text, model, place, tokenizer) if isinstance(text, str) else text)
    if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{text!r} is no text: pass strings, or lists of token ids that are not empty")
    return ids


def _encoded(text: str, model: Any, place: int, tokenizer: Any) -> list[int]:
    if tokenizer is None:
        raise ValueError("strings need tokenizer=..., such as bundle.tokenizer; without one, pass token ids")
    if not model.reads_sources:
        return tokenizer.encode_prompt(text) if model.predicts_next else tokenizer.encode_masked(text)
    if place == 0:
        return tokenizer.encode_source(text)
    return [*(model.config.start_ids or (tokenizer.bos_id,)), *tokenizer.encode(text)]
