"""Predicts masked tokens with an encoder."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer_jax.data.sentencepiece_training import SPECIAL_TOKENS
from transformer_jax.data.tokens import TextTokenizer, text_after
from transformer_jax.decoding.batch import check_family, pad_right, vocab_size_of, whole_number
from transformer_jax.decoding.failures import not_finite
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.functional import Model, check_tokens
from transformer_jax.models.texts import as_list
from transformer_jax.settings import shown

_BYTE = re.compile("<0x[0-9A-F]{2}>")
_LOOKS_SPECIAL = re.compile(r"<\|?\w+\|?>|\[\w+\]")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A token that may replace a mask.

    Attributes:
      token: the text of the token, with a space before it if it has one; for a special token or a
        part of a character, its name in the vocabulary.
      token_id: the id of the token.
      probability: the probability of the token under the model, given the rest of the text.
      text: the text with this token in place of the mask; other masks stay.
    """

    token: str
    token_id: int
    probability: float
    text: str


def fill_mask(model: Model, texts: str | Sequence[str], *, tokenizer: TextTokenizer | None,
              top_k: int = 5) -> list[list[list[Candidate]]]:
    """Finds the most probable tokens in place of every ``<mask>``; each mask is predicted
    separately.

    Args:
      model: an encoder.
      texts: one text or several, each with at least one ``<mask>``. A mask replaces a token and the
        space before it.
      tokenizer: the model's tokenizer.
      top_k: the number of candidates.

    Returns:
      For each text and each of its masks, ``top_k`` candidates, the most probable first.

    Raises:
      ValueError: if a text has no ``<mask>`` or is longer than the model's context; if ``top_k`` is
        out of range; or if a token id is outside the model's vocabulary.
    """
    encoder: Encoder = check_family("fill_mask", model, "encoder")
    texts = as_list("fill_mask", texts)
    if not texts:
        raise ValueError("the list of texts is empty; pass at least one text with a mask")
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"fill_mask was given {shown(texts)}, expected a string, or a list of strings")
    if tokenizer is None:
        raise ValueError("fill_mask needs the model's tokenizer=..., such as bundle.tokenizer")
    num_tokens = min(tokenizer.vocab_size, vocab_size_of(encoder))
    top_k = whole_number("top_k", top_k, most=num_tokens,
                         expected=f"from 1 to the {num_tokens} tokens of the vocabulary")
    for text in texts:
        check_masked(text, tokenizer)
    rows = [tokenizer.encode_masked(text) for text in texts]
    check_tokens(np.concatenate(rows), vocab_size_of(encoder))
    tokens_BT, segment_ids_BT = pad_right(rows, encoder.config.max_len)
    places = [np.flatnonzero(np.equal(row, tokenizer.mask_id)).tolist() for row in rows]
    positions_BP, _ = pad_right(places, encoder.config.max_len)
    probabilities_BPK, ids_BPK = map(np.asarray, _most_probable(
        encoder, tokens_BT, segment_ids_BT, positions_BP, num_tokens, top_k))
    if np.isnan(probabilities_BPK).any():
        raise not_finite(encoder, "the probabilities of the tokens in the place of the masks are")
    return [[[_candidate(text, mask, row[:place], token, probability, tokenizer)
              for token, probability in zip(ids_PK[mask].tolist(), probabilities_PK[mask].tolist(), strict=True)]
             for mask, place in enumerate(row_places)]
            for text, row, row_places, ids_PK, probabilities_PK in zip(
                texts, rows, places, ids_BPK, probabilities_BPK, strict=True)]


@functools.partial(jax.jit, static_argnums=(4, 5))
def _most_probable(model: Encoder, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"],
                   positions_BP: Int[Array, "B P"], vocab_size: int,
                   top_k: int) -> tuple[Float[Array, "B P K"], Int[Array, "B P K"]]:
    """Returns the probabilities and the ids of the ``top_k`` most probable tokens at some
    positions, ``[B, P, K]``."""
    hidden_BTD = model(tokens_BT, segment_ids_BT=segment_ids_BT).hidden
    hidden_BPD = jnp.take_along_axis(hidden_BTD, positions_BP[..., None], axis=1)
    probabilities_BPV = jax.nn.softmax(model.predict(hidden_BPD), axis=-1)
    # The embedding table may have more rows than the tokenizer has tokens.
    return jax.lax.top_k(probabilities_BPV[..., :vocab_size], top_k)


def check_masked(text: str, tokenizer: TextTokenizer) -> None:
    """Raises ValueError if the text does not contain the tokenizer's ``<mask>``."""
    mask = tokenizer.mask_token
    if mask is None:
        raise ValueError("this tokenizer has no mask token; fill_mask needs a masked language model and its tokenizer")
    if mask not in text:
        # The text may use another tokenizer's name of the mask: "<mask>" instead of BERT's
        # "[MASK]".
        names = [name for name in _LOOKS_SPECIAL.findall(text) if name not in SPECIAL_TOKENS or name == "<mask>"]
        unknown = names[0] if names else None
        near = unknown and difflib.get_close_matches(unknown[1:-1].casefold(), ["mask"], n=1)
        hint = f": {unknown} is not a token; did you mean {mask}?" if near else f"; write {mask} in place of a token"
        raise ValueError(f"the text {text!r} has no {mask}{hint}")


def _candidate(text: str, mask: int, before: list[int], token: int, probability: float,
               tokenizer: TextTokenizer) -> Candidate:
    """Makes the candidate for the mask with this index in the text; ``before`` are the tokens
    before it."""
    name, = tokenizer.pieces([token])
    token_text = text_after(tokenizer, before, [token])
    if not token_text or "\ufffd" in token_text or _BYTE.fullmatch(name):  # a special token or a part of a character
        token_text = name
    mask_token = str(tokenizer.mask_token)
    parts = text.split(mask_token)
    text_before, after = (mask_token.join(half) for half in (parts[:mask + 1], parts[mask + 1:]))
    return Candidate(token_text, token, probability, text_before.removesuffix(" ") + token_text + after)
