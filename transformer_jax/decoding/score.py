"""The probability of given texts, by the chain rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding.batch import check_family
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.functional import check_tokens


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities in nats, one entry a text.

    Attributes:
      totals: log P of each text: the sum over its tokens.
      tokens: its tokens.
      logprobs: log P of each token given those before it, the first given ``<|endoftext|>``.
    """

    totals: list[float]
    tokens: list[list[int]]
    logprobs: list[list[float]]


@jax.jit
def _token_logprobs(model: Decoder, tokens_BT: jax.Array, targets_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    logits_BTV = model(tokens_BT, segment_ids_BT=segments_BT).logits
    target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return target_logits_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def score(model: Decoder, texts: str | Sequence[str], *, tokenizer: Tokenizer) -> Score:
    """log P of each text, and of each of its tokens.

    Args:
      model: a decoder.
      texts: one or several.
      tokenizer: the model's.

    Raises:
      ValueError: for no text, an empty one, or one longer than the model's context.
    """
    check_family("score", model, "decoder")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or "" in texts:
        raise ValueError("score needs at least one text, and no empty one")
    tokens = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, tokens))
    if longest > model.config.max_len:
        raise ValueError(f"a text of {longest} tokens is longer than the model's context of {model.config.max_len}")
    width = min(max(16, 1 << (longest - 1).bit_length()), model.config.max_len)
    inputs_BT = np.zeros((len(texts), width), np.int32)
    targets_BT = np.zeros_like(inputs_BT)
    segments_BT = np.zeros_like(inputs_BT)
    for row, ids in enumerate(tokens):
        check_tokens(np.asarray(ids), model.config.vocab_size)
        inputs_BT[row, :len(ids)] = [tokenizer.end_of_text_id, *ids[:-1]]
        targets_BT[row, :len(ids)] = ids
        segments_BT[row, :len(ids)] = 1
    logprobs_BT = np.asarray(_token_logprobs(model, inputs_BT, targets_BT, segments_BT))
    logprobs = [row[:len(ids)].tolist() for row, ids in zip(logprobs_BT, tokens, strict=True)]
    return Score(totals=[sum(row) for row in logprobs], tokens=tokens, logprobs=logprobs)
