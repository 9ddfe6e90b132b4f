"""Tokens as strings to show: blanks, line ends and invisible characters have marks of their own."""

from __future__ import annotations

import unicodedata

_MARKS = {" ": "▁", "\n": "↵", "\t": "⇥"}  # ▁ is SentencePiece's mark of a space
_UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}  # Unicode's general categories
_JOINERS = "\u200c\u200d"  # inside a word or an emoji they shape what is seen


def visible(token: str) -> str:
    """A token as it is shown: nothing in it stays unseen.

    Args:
      token: any string, as ``Tokenizer.pieces`` gives them: ``" jarra"``, ``"\\n"``, ``"<0xE2>"``.

    Returns:
      The token with ``▁`` for a space, ``↵`` and ``⇥`` for a line end and a tab, ``<U+200B>`` for
      what else is not seen, a dotted circle under an accent that has lost its letter, and ``∅`` for
      an empty token.
    """
    if not token:
        return "∅"
    shown = []
    for place, character in enumerate(token):
        joins = character in _JOINERS and 0 < place < len(token) - 1
        if character in _MARKS:
            shown.append(_MARKS[character])
        elif unicodedata.category(character) in _UNSEEN and not joins:
            shown.append(f"<U+{ord(character):04X}>")
        else:
            shown.append(character)
    orphan = unicodedata.category(token[0]).startswith("M")
    return "◌" * orphan + "".join(shown)


def shorten(label: str, limit: int = 16) -> str:
    """The label, its end replaced by ``…`` where it is longer than ``limit`` characters."""
    return label if len(label) <= limit else f"{label[:limit - 1]}…"
