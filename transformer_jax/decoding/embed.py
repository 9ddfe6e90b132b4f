"""Contextual embeddings of texts, and how alike they are."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding.batch import check_family, pad_right
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.functional import check_tokens

_POOLINGS = ("mean", "first", "last", "none")


def embed(model: Encoder | Decoder, texts: str | Sequence[str] | Sequence[Sequence[int]], *,
          tokenizer: Tokenizer | None = None, layer: int = -1, pooling: str = "mean",
          word: str | None = None) -> np.ndarray | list[np.ndarray]:
    """The residual stream at a layer: contextual embeddings of texts, of their tokens, or of a word
    in them.

    Args:
      model: an encoder or a decoder.
      texts: strings (with a tokenizer), which an encoder reads as ``<s>`` text ``</s>``, or lists
        of token ids, which are read as they are.
      tokenizer: the model's.
      layer: 0 for the embeddings that enter the first layer, -1 for what leaves the last.
      pooling: over the tokens of a text: ``"mean"``, ``"first"``, ``"last"``, or ``"none"`` for all
        of them.
      word: pool over the tokens of the first appearance of this string only; the texts must be
        strings.

    Returns:
      float32 ``[texts, D]``; with ``pooling="none"`` a list of ``[tokens, D]``.

    Raises:
      ValueError: for no text or an empty one, one that is too long or lacks the word, a layer or
        pooling that there is not, or a token id outside the vocabulary.
    """
    check_family("embed", model, "encoder", "decoder")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(len(text) if isinstance(text, str) else np.size(text) for text in texts):
        raise ValueError("embed needs at least one text, and no empty one")
    if pooling not in _POOLINGS:
        raise ValueError(f"pooling={pooling!r} is not one of {', '.join(_POOLINGS)}")
    num_streams = model.config.num_layers + 1
    if not -num_streams <= layer < num_streams:
        raise ValueError(f"layer={layer} is out of range for {model.config.num_layers} layers (0 to {num_streams - 1})")
    rows = [_encode(text, tokenizer, not model.predicts_next) for text in texts]
    for row in rows:
        check_tokens(np.asarray(row), model.config.vocab_size)
    tokens_BT, segment_ids_BT = pad_right(rows, model.config.max_len)
    stream_BTD = np.asarray(_stream(model, tokens_BT, segment_ids_BT, layer % num_streams))
    spans = [(0, len(row)) for row in rows] if word is None else [
        _span(text, row, word, tokenizer) for text, row in zip(texts, rows, strict=True)]
    found = [stream_TD[start:stop] for stream_TD, (start, stop) in zip(stream_BTD, spans, strict=True)]
    pool = {"mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1], "none": lambda x: x}[pooling]
    pooled = [pool(x) for x in found]
    return pooled if pooling == "none" else np.stack(pooled)


@jax.jit
def _stream(model: Encoder | Decoder, tokens_BT: jax.Array, segment_ids_BT: jax.Array, layer: jax.Array) -> jax.Array:
    return model(tokens_BT, segment_ids_BT=segment_ids_BT).trace.residual[layer].astype(jnp.float32)


def similarity(a: jax.Array, b: jax.Array) -> jax.Array:
    """Cosines of the angles between the vectors ``[..., D]`` of two arrays.

    Args:
      a: ``[X, D]`` or ``[D]``.
      b: ``[Y, D]`` or ``[D]``.

    Returns:
      float32, from -1 to 1: ``[X, Y]``, without the axis that an argument lacks.

    Raises:
      ValueError: for vectors of different widths.
    """
    a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    if a.ndim not in (1, 2) or b.ndim not in (1, 2) or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"similarity takes [X, D] and [Y, D] (or vectors [D]), not {a.shape} and {b.shape}")
    a, b = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b))
    return a @ b.T


def _encode(text: str | Sequence[int], tokenizer: Tokenizer | None, is_encoder: bool) -> list[int]:
    if not isinstance(text, str):
        ids = np.asarray(text)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{text!r} is no text; pass strings or lists of token ids")
        return ids.tolist()
    if tokenizer is None:
        raise ValueError("texts that are strings need tokenizer=...; without one, pass lists of token ids")
    ids = tokenizer.encode(text)
    return [tokenizer.bos_id, *ids, tokenizer.eos_id] if is_encoder else ids


def _span(text: str | Sequence[int], ids: list[int], word: str, tokenizer: Tokenizer | None) -> tuple[int, int]:
    """First and last + 1 of the tokens that hold the word's bytes."""
    if not isinstance(text, str):
        raise ValueError(f"word={word!r} is looked for in strings, not in token ids")
    if not word or word not in text:
        raise ValueError(f"the text {text!r} does not contain the word {word!r}")
    if tokenizer.decode(ids) != text:
        raise ValueError(f"the tokenizer does not know all characters of {text!r}: where {word!r} is cannot be told")
    start = len(text[:text.index(word)].encode())
    ends_T = np.cumsum(tokenizer.byte_lengths[ids])
    inside_T = np.flatnonzero((ends_T > start) & (ends_T - tokenizer.byte_lengths[ids] < start + len(word.encode())))
    return int(inside_T[0]), int(inside_T[-1]) + 1
