"""The probability of given texts, by the chain rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding.batch import check_family, pad_right
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.functional import check_tokens


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities in nats, one entry a text.

    Attributes:
      totals: log P of each text: the sum over its tokens.
      tokens: its tokens.
      logprobs: log P of each token given those before it, the first given ``<|endoftext|>`` (or a
        model's own ``<s>``).
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
    check_tokens(np.concatenate(tokens), model.config.vocab_size)
    targets_BT, segments_BT = pad_right(tokens, model.config.max_len)
    inputs_BT = np.roll(targets_BT, 1, axis=1)
    inputs_BT[:, 0] = tokenizer.start_id
    logprobs_BT = np.asarray(_token_logprobs(model, inputs_BT, targets_BT, segments_BT))
    logprobs = [row[:len(ids)].tolist() for row, ids in zip(logprobs_BT, tokens, strict=True)]
    return Score(totals=[sum(row) for row in logprobs], tokens=tokens, logprobs=logprobs)
