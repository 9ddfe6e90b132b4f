"""Labels of tokens for display: spaces, line ends and invisible characters become visible marks."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

_MARKS = {" ": "·", "\n": "↵", "\t": "⇥"}  # as editors show them; SentencePiece's ▁ would hang below the line
_INVISIBLE = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}  # Unicode's general categories
_JOINERS = "\u200c\u200d"  # inside a word or an emoji they change its shape


def visible(token: str) -> str:
    """Replaces every invisible character of a token by a visible mark.

    Args:
      token: any string, such as those of ``Tokenizer.pieces``: ``" jarra"``, ``"\\n"``,
        ``"<0xE2>"``.

    Returns:
      The token with ``·`` for a space, ``↵`` for a line end, ``⇥`` for a tab, and a code such as
      ``<U+200B>`` for any other invisible character. A combining accent at the start is drawn on a
      dotted circle. An empty token becomes ``∅``.
    """
    if not token:
        return "∅"
    marked = []
    for place, character in enumerate(token):
        joins = character in _JOINERS and 0 < place < len(token) - 1
        if character in _MARKS:
            marked.append(_MARKS[character])
        elif unicodedata.category(character) in _INVISIBLE and not joins:
            marked.append(f"<U+{ord(character):04X}>")
        else:
            marked.append(character)
    starts_with_accent = unicodedata.category(token[0]).startswith("M")
    return "◌" * starts_with_accent + "".join(marked)


def predicted_tokens(tokens: Sequence[str], segment_ids: np.ndarray | None) -> list[str]:
    """Returns for each token the token that follows it; for the last token of a text, ``"(next)"``.

    Args:
      tokens: the T tokens of a row.
      segment_ids: the document of each token, ``[T]``; ``None`` for one document.
    """
    is_last = np.diff(np.zeros(len(tokens)) if segment_ids is None else segment_ids, append=-1) != 0
    following = [*tokens[1:], ""]
    return ["(next)" if last else token for token, last in zip(following, is_last, strict=True)]


def shorten(label: str, limit: int = 16) -> str:
    """Cuts a label that is longer than ``limit`` characters, and marks the cut with ``…``."""
    return label if len(label) <= limit else f"{label[:limit - 1]}…"
