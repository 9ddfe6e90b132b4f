"""The pieces of a SentencePiece model: their bytes, and the characters of a text that they come
from."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from transformer_jax.data.sentencepiece_training import SPACE, SPECIAL_TOKENS
from transformer_jax.data.tokens import Span


def load_model(data: bytes) -> Any:
    """Loads a SentencePiece model. Raises ValueError if the bytes are not a model, or if the model
    lacks one of the special tokens."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor()
        model.load_from_serialized_proto(data)
    except RuntimeError as error:
        raise ValueError(f"not a SentencePiece model ({len(data)} bytes)") from error
    missing = [name for name in SPECIAL_TOKENS if model.id_to_piece(model.piece_to_id(name)) != name]
    if missing:
        raise ValueError(
            f"the SentencePiece model lacks {', '.join(missing)}; expected one trained by Tokenizer.train"
        )
    return model


def encode_with_spans(model: Any, text: str) -> tuple[list[int], list[str], list[Span]]:
    """Encodes a text and returns the ids, the pieces, and the character span of each piece.

    Several pieces may have the same span: the bytes of one character, or several pieces that a
    normalizer made from one character. The space that SentencePiece adds before the first word is
    not in the text, so its span is empty.

    Args:
      model: A SentencePieceProcessor.
      text: The text before normalization.

    Returns:
      The ids, the pieces and the spans (first, last + 1).
    """
    found = model.encode(text, return_type="offset_mapping")
    ids, pieces, spans = found["ids"], found["pieces"], found["offsets"]
    # If several pieces come from one character, SentencePiece gives the span to the last piece
    # only.
    for place in reversed(range(len(spans) - 1)):
        begin, end = spans[place]
        if begin == end == spans[place + 1][0] and pieces[place].strip(SPACE):
            spans[place] = spans[place + 1]
    return ids, pieces, spans


def spans_of_runs(model: Any, runs: Iterable[str], fixed: Mapping[str, list[int]],
                  space_bytes: list[int], start: int) -> list[Span]:
    """Returns the character span of each token of a text.

    Args:
      model: A SentencePieceProcessor.
      runs: The parts in which the text is encoded.
      fixed: The tokens of parts that are not encoded by the model.
      space_bytes: The three byte tokens that spell SentencePiece's mark of a space; they are
        replaced by one token.
      start: The position in the text at which the runs begin.

    Returns:
      The spans (first, last + 1).
    """
    found = []
    for run in runs:
        if run in fixed:
            found += [(start, start + len(run))] * len(fixed[run])
        else:
            ids, _, spans = encode_with_spans(model, run)
            found += [(start + begin, start + end) for begin, end in with_plain_spaces(ids, spans, space_bytes,
                                                                                       lambda three: three[-1])]
        start += len(run)
    return found


def spans_of_text(text: str, mask: str | None, spans_of_part: Callable[[str, int], list[Span]]) -> list[Span]:
    """Returns the character span of each token of a text that may contain the name of the mask
    token.

    Args:
      text: The text.
      mask: The name of the mask token, which also covers the space before it. None if the name is
        ordinary text.
      spans_of_part: Returns the spans of a part of the text, given the part and its position.

    Returns:
      The spans (first, last + 1).
    """
    found, start = [], 0
    parts = [text] if mask is None else text.split(mask)
    for place, part in enumerate(parts):
        is_before_mask = place < len(parts) - 1
        body = part.removesuffix(" ") if is_before_mask else part
        found += spans_of_part(body, start)
        if is_before_mask:
            found.append((start + len(body), start + len(part) + len(mask or "")))
        start += len(part) + len(mask or "")
    return found


def with_plain_spaces(ids: list[int], items: list[Any], space_bytes: list[int],
                      joined: Callable[[list[Any]], Any]) -> list[Any]:
    """Joins the items of the three byte tokens that spell the mark of a space to one item.

    SentencePiece spells the leading space of an unknown word as the three bytes of U+2581, not as
    byte 0x20.

    Args:
      ids: The token ids.
      items: One item for each token.
      space_bytes: The ids of the three byte tokens, or an empty list.
      joined: Makes one item of three.

    Returns:
      One item for each token that remains.
    """
    if not space_bytes or space_bytes[0] not in ids:
        return items
    plain, i = [], 0
    while i < len(ids):
        is_space = ids[i : i + 3] == space_bytes
        plain += [joined(items[i : i + 3])] if is_space else items[i : i + 1]
        i += 3 if is_space else 1
    return plain


def token_bytes(model: Any, token: int) -> bytes:
    """Returns the UTF-8 bytes of a token's text. A control token has none."""
    piece = model.id_to_piece(token)
    if model.is_control(token):
        return b""
    if model.is_unknown(token):
        return "\ufffd".encode()
    if model.is_byte(token):
        return bytes([int(piece[1:-1], base=16)])
    return piece.replace(SPACE, " ").encode()


def displayed_pieces(model: Any, ids: Iterable[int], bytes_of_tokens: Sequence[bytes],
                     special: Container[str]) -> list[str]:
    """Returns a string to display for each token: the name of a special token, ``<0xE2>`` for a
    byte token, and otherwise its text."""
    shown = []
    for token in ids:
        piece = model.id_to_piece(token)
        shown.append(piece if model.is_byte(token) or piece in special else bytes_of_tokens[token].decode())
    return shown
