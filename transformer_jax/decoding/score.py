"""The log-probability of given texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.decoding.batch import check_family, pad_right, vocab_size_of
from transformer_jax.decoding.failures import not_finite
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.functional import Model, check_tokens
from transformer_jax.models.texts import as_list, check_tokenizer, read_text


@dataclasses.dataclass(frozen=True)
class Score:
    """Log-probabilities in nats, with one entry per text.

    Attributes:
      totals: the log-probability of each text: the sum over its tokens.
      tokens: the tokens of each text, without those that the tokenizer adds before it.
      logprobs: the log-probability of each token, given the tokens before it. The first token
        follows the tokens that the tokenizer adds before a text, such as ``<s>``, or else
        ``<|endoftext|>``.
    """

    totals: list[float]
    tokens: list[list[int]]
    logprobs: list[list[float]]


@jax.jit
def _token_logprobs(model: Decoder, tokens_BT: Int[Array, "B T"], targets_BT: Int[Array, "B T"],
                    segments_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Returns the log-probability of each target token, ``[B, T]``."""
    logits_BTV = model(tokens_BT, segment_ids_BT=segments_BT).logits
    target_logits_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return target_logits_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def score(model: Model, texts: str | Sequence[str], *, tokenizer: TextTokenizer | None) -> Score:
    """Computes the log-probability of each text and of each of its tokens.

    Args:
      model: a decoder.
      texts: one text or several.
      tokenizer: the model's tokenizer.

    Returns:
      The log-probabilities and the tokens of each text.

    Raises:
      ValueError: if there is no text; if a text is empty or longer than the model's context; or if
        logits are not finite.
    """
    decoder: Decoder = check_family("score", model, "decoder")
    texts = as_list("score", texts)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("score needs at least one text, and no empty one; each must be a string")
    if tokenizer is None:
        raise ValueError("score needs the model's tokenizer=..., such as bundle.tokenizer")
    check_tokenizer(tokenizer)
    prefix, _ = tokenizer.frame("prompt")
    tokens = [read_text(decoder, text, tokenizer)[len(prefix):] for text in texts]
    check_tokens(np.concatenate(tokens), vocab_size_of(decoder))
    context = prefix or [tokenizer.start_id]
    targets_BT, segments_BT = pad_right([[*context[1:], *ids] for ids in tokens], decoder.config.max_len)
    inputs_BT = np.roll(targets_BT, 1, axis=1)
    inputs_BT[:, 0] = context[0]
    logprobs_BT = np.asarray(_token_logprobs(decoder, inputs_BT, targets_BT, segments_BT))
    if np.isnan(logprobs_BT[segments_BT == 1]).any():
        raise not_finite(decoder, "the probabilities of the texts are")
    logprobs = [row[len(context) - 1:][:len(ids)].tolist() for row, ids in zip(logprobs_BT, tokens, strict=True)]
    return Score(totals=[sum(row) for row in logprobs], tokens=tokens, logprobs=logprobs)
