"""Contextual embeddings of texts, and their similarity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.decoding.batch import check_family, pad_right, vocab_size_of, whole_number
from transformer_jax.decoding.failures import not_finite
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.functional import Model, check_tokens
from transformer_jax.models.texts import as_list, check_tokenizer, read_text, text_form
from transformer_jax.settings import shown

_POOLINGS = ("mean", "first", "last", "none")


def embed(model: Model, texts: str | Sequence[str] | Sequence[Sequence[int]], *,
          tokenizer: TextTokenizer | None = None, layer: int = -1, pooling: str = "mean",
          word: str | None = None) -> np.ndarray | list[np.ndarray]:
    """Computes contextual embeddings of texts, of their tokens, or of a word in them.

    An embedding is the value of the residual stream at a layer.

    Args:
      model: an encoder or a decoder.
      texts: strings (with a tokenizer) or lists of token ids. Strings get the special tokens that
        the tokenizer adds, such as an encoder's ``<s>`` and ``</s>``; token ids are used as they
        are.
      tokenizer: the model's tokenizer.
      layer: 0 for the embeddings that enter the first layer, -1 for the output of the last layer.
      pooling: how to combine the tokens of a text: ``"mean"``, ``"first"``, ``"last"``, or
        ``"none"`` to return all of them.
      word: pool only over the tokens of the first occurrence of this string; the texts must be
        strings.

    Returns:
      float32 ``[texts, D]``; with ``pooling="none"`` a list of ``[tokens, D]``.

    Raises:
      ValueError: if there is no text or an empty one; if a text is too long or does not contain the
        word; if the layer or pooling does not exist; or if a token id is outside the vocabulary.
    """
    trunk: Encoder | Decoder = check_family("embed", model, "encoder", "decoder", "elmo")
    texts = as_list("embed", texts)
    if not texts or not all(len(text) if isinstance(text, str) else np.size(text) for text in texts):
        raise ValueError("embed needs at least one text, and no empty one")
    if pooling not in _POOLINGS:
        raise ValueError(f"pooling={pooling!r} is not one of {', '.join(_POOLINGS)}")
    num_streams = trunk.config.num_layers + 1
    layer = whole_number("layer", layer, least=-10**9, expected="a whole number")
    if not -num_streams <= layer < num_streams:
        raise ValueError(f"layer={layer} is out of range for {trunk.config.num_layers} layers (0 to {num_streams - 1})")
    rows = [_encode(trunk, text, tokenizer) for text in texts]
    for row in rows:
        check_tokens(np.asarray(row), vocab_size_of(trunk))
    tokens_BT, segment_ids_BT = pad_right(rows, trunk.config.max_len)
    stream_BTD = np.asarray(_stream(trunk, tokens_BT, segment_ids_BT, layer % num_streams))
    spans = [(0, len(row)) for row in rows] if word is None else [
        _span(trunk, text, word, tokenizer) for text in texts]
    selected = [stream_TD[start:stop] for stream_TD, (start, stop) in zip(stream_BTD, spans, strict=True)]
    pool = {"mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1], "none": lambda x: x}[pooling]
    if not all(np.isfinite(x).all() for x in selected):
        raise not_finite(trunk, f"the embeddings at layer {layer} are")
    pooled = [pool(x) for x in selected]
    return pooled if pooling == "none" else np.stack(pooled)


@jax.jit
def _stream(model: Encoder | Decoder, tokens_BT: jax.Array, segment_ids_BT: jax.Array, layer: jax.Array) -> jax.Array:
    """Returns the residual stream at a layer, float32 ``[B, T, D]``."""
    trace: Any = model(tokens_BT, segment_ids_BT=segment_ids_BT).trace
    return trace.residual[layer].astype(jnp.float32)


def similarity(a: jax.Array | np.ndarray, b: jax.Array | np.ndarray) -> jax.Array:
    """Computes the cosines of the angles between vectors.

    Args:
      a: ``[X, D]`` or ``[D]``.
      b: ``[Y, D]`` or ``[D]``.

    Returns:
      float32 from -1 to 1, ``[X, Y]``; an argument that is a single vector has no axis in the
      result.

    Raises:
      ValueError: if an argument has another number of axes, or if the vectors have different
        widths.
    """
    try:
        a, b = jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"similarity takes arrays of numbers, not {shown(a)} and {shown(b)}; pass what tj.embed "
                         "returns") from error
    if a.ndim not in (1, 2) or b.ndim not in (1, 2) or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"similarity takes [X, D] and [Y, D] (or vectors [D]), not {a.shape} and {b.shape}")
    a, b = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b))
    return a @ b.T


def _encode(model: Encoder | Decoder, text: str | Sequence[int], tokenizer: TextTokenizer | None) -> list[int]:
    """Returns the token ids of a string or a list of token ids."""
    if not isinstance(text, str):
        ids = np.asarray(text)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{shown(text)} is not a text; pass strings or lists of token ids")
        return ids.tolist()
    if tokenizer is None:
        raise ValueError("texts that are strings need tokenizer=...; without one, pass lists of token ids")
    check_tokenizer(tokenizer)
    return read_text(model, text, tokenizer)


def _span(model: Encoder | Decoder, text: str | Sequence[int], word: str,
          tokenizer: TextTokenizer | None) -> tuple[int, int]:
    """Returns the first token of the word and the token after its last one."""
    if not isinstance(text, str) or tokenizer is None:
        raise ValueError(f"word={word!r} cannot be found in token ids; pass texts that are strings, and a tokenizer")
    if not isinstance(word, str):
        raise ValueError(f"word={shown(word)} is not a string; pass a word of the texts")
    if not word or word not in text:
        raise ValueError(f"the text {text!r} does not contain the word {word!r}")
    start = text.index(word)
    spans_T2 = np.asarray(tokenizer.spans(text, text_form(model)))
    inside_T = np.flatnonzero((spans_T2[:, 0] < start + len(word)) & (spans_T2[:, 1] > start)
                              & (spans_T2[:, 0] < spans_T2[:, 1]))
    if not inside_T.size:
        raise ValueError(f"no token of {text!r} stands for the word {word!r}: the tokenizer leaves it out")
    return int(inside_T[0]), int(inside_T[-1]) + 1
