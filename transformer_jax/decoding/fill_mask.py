"""Filling in masked tokens with an encoder."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.sentencepiece_training import SPECIAL_TOKENS
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding.batch import check_family, pad_right
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.functional import check_tokens

_LOOKS_SPECIAL = re.compile(r"<\|?\w+\|?>|\[\w+\]")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A token that may stand in the place of a mask.

    Attributes:
      token: its text, with the space before it if it has one.
      token_id: its id.
      probability: under the model, given the rest of the text.
      text: the text with this token in the mask's place; other masks stay.
    """

    token: str
    token_id: int
    probability: float
    text: str


def fill_mask(model: Encoder, texts: str | Sequence[str], *, tokenizer: Tokenizer,
              top_k: int = 5) -> list[list[list[Candidate]]]:
    """The most probable tokens in the place of every ``<mask>``, each mask by itself.

    Args:
      model: an encoder.
      texts: one or several, each with at least one ``<mask>``, which takes the place of a token and
        of the space before it.
      tokenizer: the model's.
      top_k: how many candidates.

    Returns:
      For each text, for each of its masks, ``top_k`` candidates, the most probable first.

    Raises:
      ValueError: for a text without ``<mask>`` or longer than the model takes, a ``top_k`` out of
        range, or a token id outside the model's vocabulary.
    """
    check_family("fill_mask", model, "encoder")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("there is no text to fill in")
    if not 1 <= top_k <= tokenizer.vocab_size:
        raise ValueError(f"top_k={top_k} must be from 1 to the {tokenizer.vocab_size} tokens of the vocabulary")
    for text in texts:
        check_masked(text, tokenizer)
    rows = [tokenizer.encode_masked(text) for text in texts]
    check_tokens(np.concatenate(rows), model.config.vocab_size)
    tokens_BT, segment_ids_BT = pad_right(rows, model.config.max_len)
    places = [np.flatnonzero(np.equal(row, tokenizer.mask_id)) for row in rows]
    positions_BP, _ = pad_right([list(place) for place in places], model.config.max_len)
    probabilities_BPK, ids_BPK = map(np.asarray, _most_probable(
        model, tokens_BT, segment_ids_BT, positions_BP, tokenizer.vocab_size, top_k))
    return [[[_candidate(text, mask, token, probability, tokenizer)
              for token, probability in zip(ids_PK[mask].tolist(), probabilities_PK[mask].tolist(), strict=True)]
             for mask in range(len(place))]
            for text, place, ids_PK, probabilities_PK in zip(texts, places, ids_BPK, probabilities_BPK, strict=True)]


@functools.partial(jax.jit, static_argnums=(4, 5))
def _most_probable(model: Encoder, tokens_BT: jax.Array, segment_ids_BT: jax.Array, positions_BP: jax.Array,
                   vocab_size: int, top_k: int) -> tuple[jax.Array, jax.Array]:
    hidden_BTD = model(tokens_BT, segment_ids_BT=segment_ids_BT).hidden
    hidden_BPD = jnp.take_along_axis(hidden_BTD, positions_BP[..., None], axis=1)
    probabilities_BPV = jax.nn.softmax(model.predict(hidden_BPD), axis=-1)
    return jax.lax.top_k(probabilities_BPV[..., :vocab_size], top_k)  # a model may have more rows than there are tokens


def check_masked(text: str, tokenizer: Tokenizer) -> None:
    """Raises ValueError for a text without the tokenizer's ``<mask>``."""
    mask = tokenizer.mask_token
    if mask is None:
        raise ValueError("this tokenizer has no token for what is masked; fill_mask needs a masked language model")
    if mask not in text:
        # Of another tokenizer's names, that of its mask: "<mask>" is BERT's "[MASK]".
        names = [name for name in _LOOKS_SPECIAL.findall(text) if name not in SPECIAL_TOKENS or name == "<mask>"]
        unknown = names[0] if names else None
        near = unknown and difflib.get_close_matches(unknown[1:-1].casefold(), ["mask"], n=1)
        hint = f": {unknown} is no token; did you mean {mask}?" if near else f"; write {mask} where a token is wanted"
        raise ValueError(f"the text {text!r} has no {mask}{hint}")


def _candidate(text: str, mask: int, token: int, probability: float, tokenizer: Tokenizer) -> Candidate:
    shown = tokenizer.pieces([token])[0]
    parts = text.split(tokenizer.mask_token)
    before, after = (tokenizer.mask_token.join(some) for some in (parts[:mask + 1], parts[mask + 1:]))
    return Candidate(shown, token, probability, before.removesuffix(" ") + shown + after)
