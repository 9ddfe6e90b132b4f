"""Reads the parts of a ``tokenizer.json`` that this library needs.

These are the form of its pieces, the changes to decoded text, and the special tokens around a text.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from transformer_jax.settings import check_text

_SPACE = "\u2581"
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# transformers removes these spaces from decoded text if `clean_up_tokenization_spaces` is set.
_SPACES = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
           (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))


def from_json(tokenizer_json: str, splits_special: bool) -> Any:
    """Creates a tokenizer of the library ``tokenizers`` that neither truncates nor pads. If
    ``splits_special`` is true, names of special tokens are ordinary text."""
    import tokenizers

    found = tokenizers.Tokenizer.from_str(tokenizer_json)
    found.no_truncation()
    found.no_padding()
    found.encode_special_tokens = splits_special
    return found


def encodings(tokenizer: Any, texts: list[str], framed: bool) -> list[Any]:
    """Encodes texts with the library. ``framed`` adds the special tokens around each text. Raises
    ValueError if a text cannot be encoded."""
    for text in texts:
        check_text(text)
    try:
        return tokenizer.encode_batch(texts, add_special_tokens=framed)
    except Exception as error:  # the library raises Exception itself, for instance if there is no unknown token
        raise ValueError(f"this tokenizer cannot encode the text: {error}") from error


def read_description(tokenizer_json: str, settings: Mapping[str, Any]) -> tuple[str, tuple[list[int], list[int]], list]:
    """Returns the form of the pieces, the tokens before and after a text, and the changes to
    decoded text."""
    described = json.loads(tokenizer_json)
    return kind_of(described), frame_of(described.get("post_processor")), changes_of_decoded(described, settings)


def kind_of(tokenizer: Mapping[str, Any]) -> str:
    """Returns the form of the pieces: "bytes" (one character for each byte), "wordpiece" or
    "text"."""
    if tokenizer["model"].get("type") == "WordPiece":
        return "wordpiece"
    return "bytes" if '"ByteLevel"' in json.dumps(tokenizer.get("decoder")) else "text"


def frame_of(processor: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    """Returns the tokens that a post-processor puts before and after a text."""
    kind = (processor or {}).get("type")
    before, after = [], []
    if processor is None or kind == "ByteLevel":
        return before, after
    if kind == "Sequence":
        frames = [frame for frame in map(frame_of, processor["processors"]) if any(frame)]
        if len(frames) > 1:  # the library applies the second one to each part that the first one makes
            raise ValueError("several parts of its post_processor add special tokens; expected one")
        before, after = frames[0] if frames else ([], [])
    elif kind in ("BertProcessing", "RobertaProcessing"):
        before, after = [processor["cls"][1]], [processor["sep"][1]]
    elif kind == "TemplateProcessing":
        ids = processor["special_tokens"]
        places = [place for place, part in enumerate(processor["single"]) if "Sequence" in part]
        if len(places) != 1 or "A" not in processor["single"][places[0]]["Sequence"]["id"]:
            raise ValueError("the template of its post_processor does not contain the text (A) exactly once; expected "
                             "one such as <s> $A </s>")
        place = places[0]
        before, after = ([number for part in parts for number in ids[part["SpecialToken"]["id"]]["ids"]]
                         for parts in (processor["single"][:place], processor["single"][place + 1:]))
    else:
        raise ValueError(f"a post_processor of type {kind!r} is not supported")
    return before, after


def changes_of_decoded(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> list[Callable[[str], str]]:
    """Returns the functions that transformers applies to the text that the library has decoded. For
    byte pair encodings, transformers does not remove spaces."""
    changes = []
    if str(settings.get("tokenizer_class")).removesuffix("Fast") == "CLIPTokenizer":
        changes.append(lambda text: text.replace("</w>", " ").strip())
    if settings.get("clean_up_tokenization_spaces") is True and tokenizer["model"].get("type") != "BPE":
        changes.append(without_spaces)
    return changes


def without_spaces(text: str) -> str:
    """Returns the text without the spaces before punctuation and before English contractions."""
    for spaced, plain in _SPACES:
        text = text.replace(spaced, plain)
    return text


def _bytes_of_characters() -> dict[str, int]:
    """Returns GPT-2's map from characters to bytes. Visible Latin-1 characters stand for
    themselves; the characters from U+0100 on stand for the other bytes."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHAR = _bytes_of_characters()


def bytes_of_piece(piece: str, kind: str) -> bytes:
    """Returns the UTF-8 bytes of a piece, in one of the forms of ``kind_of``. For "added" they are
    the bytes of its name."""
    if kind == "added":
        return piece.encode()
    if kind == "bytes":
        return bytes(_BYTE_OF_CHAR[char] for char in piece)
    if kind == "wordpiece":
        return (piece[2:] if piece.startswith("##") else f" {piece}").encode()
    byte = BYTE_PIECE.fullmatch(piece)
    return bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE, " ").encode()
