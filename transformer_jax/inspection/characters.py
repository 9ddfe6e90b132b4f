"""Labels for tokens that are single bytes: the characters that the bytes belong to."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from transformer_jax.inspection.labels import visible

_BYTES = re.compile(r"(?:<0x[0-9A-F]{2}>)+")
# Ranges of the first byte of a character in UTF-8, each with the number of its bytes.
_LENGTHS = ((0x00, 0x80, 1), (0xC2, 0xE0, 2), (0xE0, 0xF0, 3), (0xF0, 0xF5, 4))


def shown(tokens: Sequence[str]) -> list[str]:
    """Makes a label for each token of a text, in which nothing is invisible.

    A tokenizer may represent a character outside its vocabulary by its bytes, with one or several
    bytes in a token: ``"<0xC3>", "<0xA9>"``. Their labels are ``"é 1/2", "é 2/2"``: the first and
    the second of the two tokens of an é.

    Args:
      tokens: the tokens that ``Tokenizer.pieces`` returns, in the order of the text.

    Returns:
      One label for each token, as the function ``visible`` writes it. Bytes that do not form a
      character keep their codes.
    """
    labels = []
    for is_bytes, run in itertools.groupby(map(str, tokens), lambda token: bool(_BYTES.fullmatch(token))):
        neighbours = list(run)
        labels += _characters(neighbours) if is_bytes else map(visible, neighbours)
    return labels


def joined(tokens: Sequence[str]) -> str:
    """Joins tokens to their text, decodes bytes to characters, and replaces each run of white space
    by one space."""
    text = _BYTES.sub(lambda found: _data(found[0]).decode("utf-8", "replace"), "".join(map(str, tokens)))
    return " ".join(text.split())


def _data(token: str) -> bytes:
    """Converts a token such as ``"<0xC3>"`` to its bytes."""
    return bytes.fromhex(token.replace("<0x", "").replace(">", ""))


def _characters(tokens: list[str]) -> list[str]:
    """Makes the labels of adjacent tokens that all consist of bytes."""
    owners, data = [], bytearray()  # owners: the index of the token of each byte
    for place, token in enumerate(tokens):
        found = _data(token)
        owners += [place] * len(found)
        data += found
    parts: list[list[str]] = [[] for _ in tokens]
    start = 0
    while start < len(data):
        character, length = _first_character(bytes(data[start:start + 4]))
        places = list(dict.fromkeys(owners[start:start + length]))
        for number, place in enumerate(places, 1):
            parts[place].append(character if len(places) == 1 else f"{character} {number}/{len(places)}")
        start += length
    # Join the complete characters of a token without spaces, as in the text.
    return ["".join(part if index == 0 or len(part) == 1 == len(of_token[index - 1]) else f" {part}"
                    for index, part in enumerate(of_token)) for of_token in parts]


def _first_character(data: bytes) -> tuple[str, int]:
    """Returns the label of the first character, or of the first byte if no character begins there,
    and its number of bytes."""
    length = next((length for first, last, length in _LENGTHS if first <= data[0] < last), 1)
    try:
        return visible(data[:length].decode()), length
    except UnicodeDecodeError:
        return f"<0x{data[0]:02X}>", 1
