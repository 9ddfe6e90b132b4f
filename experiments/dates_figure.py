"""The rows and columns of the figure of ``experiments.dates``: the fields of a date and the words
of a text, each with its tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from transformer_jax.data.tokenizer import Tokenizer

WORD = r"\w+(?:-\w+)*|\S"  # a word may contain hyphens; any other sign is a word by itself


def fields(tokens: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Finds the year, the month and the day of a date in ISO form, and the tokens of each.

    A token that extends into the next field, such as the second of ``"199", "8-0", "4-", "23"``,
    belongs to the field in which it starts. The attention of a field is the mean over its tokens
    (Clark et al., 2019, section 4.1).

    Args:
      tokens: The texts of the T tokens of the date.

    Returns:
      Three labels, and the weight of each token in the mean of each field, ``[3, T]``. Each row
      sums to one.
    """
    date = "".join(tokens)
    token_of = [place for place, token in enumerate(tokens) for _ in token]
    starts = {place: token_of.index(place) + len(token) - len(token.lstrip("-"))  # the place of its first digit
              for place, token in enumerate(tokens) if token.strip("-")}
    labels, shares_FT, start = [], np.zeros((3, len(tokens))), 0
    for row, (name, field) in enumerate(zip(("year", "month", "day"), date.split("-"), strict=True)):
        own = [place for place, first in starts.items() if start <= first < start + len(field)] or [token_of[start]]
        shares_FT[row, own] = 1 / len(own)
        labels.append(f"{name}={field}")
        start += len(field) + 1
    return labels, shares_FT


def words(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """Finds the words of a text, and the tokens of each word.

    The attention to a word is the sum over its tokens (Clark et al., 2019, section 4.1). Two words
    that share a token are treated as one word.

    Args:
      tokenizer: The tokenizer of the text.
      ids: The S token ids of the text.

    Returns:
      The W words, and an array ``[W, S]`` that is 1 if the token belongs to the word, and 0
      otherwise.
    """
    pieces = [tokenizer.decode_bytes([token]) for token in ids]
    text = b"".join(pieces).decode()
    found = list(re.finditer(WORD, text))
    stops = [len(text[:word.end()].encode()) for word in found]
    # A token belongs to the word that contains its last byte, because its first byte may be a
    # space.
    ends = np.cumsum([len(piece) for piece in pieces])
    owner_S = [min(int(np.searchsorted(stops, end)), len(found) - 1) if piece else len(found) + place  # </s>
               for place, (piece, end) in enumerate(zip(pieces, ends, strict=True))]
    labels, start = {}, 0
    for number in sorted(set(owner_S)):
        if number < len(found):
            labels[number] = text[start:found[number].end()].strip()
            start = found[number].end()
        else:
            labels[number] = tokenizer.pieces([ids[number - len(found)]])[0]
    return list(labels.values()), (np.array(list(labels))[:, None] == np.array(owner_S)).astype(np.float32)
