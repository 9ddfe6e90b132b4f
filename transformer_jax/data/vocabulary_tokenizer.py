"""Tokenizers of Marian and M2M100, which split a text with SentencePiece and take the token ids
from a vocabulary file."""

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformer_jax.data.huggingface_pieces import bytes_of_piece, without_spaces
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.data.sentencepiece_pieces import encode_with_spans
from transformer_jax.data.tokens import Form, Span, checked_ids
from transformer_jax.settings import check_text

_SPACE = "\u2581"
_Located = tuple[int, Span]  # a token and its character span


@dataclasses.dataclass(frozen=True)
class AddedPiece:
    """A token whose name is searched in a text before the text is split.

    Attributes:
      token: Its id.
      name: The text to search for.
      special: Whether the token is left out of decoded text.
      lstrip, rstrip: Whether the token includes the white space before or after it.
      single_word: Whether the name must have spaces around it.
    """

    token: int
    name: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class VocabularyTokenizer(HuggingFaceTokenizer):
    """An immutable tokenizer of a translation model, with the methods of ``HuggingFaceTokenizer``.

    One SentencePiece model splits sources and another one splits targets, or the same model splits
    both. A piece that is not in the vocabulary becomes the unknown token.

    Attributes:
      files: The contents of its files by name.

    Raises:
      ValueError: If ``data`` is not a result of ``to_bytes``.
    """

    def __init__(self, data: bytes):
        import sentencepiece

        try:
            stored = json.loads(data)
            self._contents = {name: base64.b64decode(content) for name, content in stored["contents"].items()}
            self._models = {name: sentencepiece.SentencePieceProcessor(model_proto=content)
                            for name, content in self._contents.items() if name.endswith((".spm", ".model"))}
            self._settings = stored["settings"]
            self._rules = stored["rules"]
            self._added_pieces = [AddedPiece(**piece) for piece in stored["added"]]
            vocabularies = [json.loads(self._contents[name]) for name in self._rules["vocabularies"]]
        except Exception as error:  # from the library, from JSON, or because an entry is missing
            raise ValueError(f"not a tokenizer of a translation model ({len(data)} bytes): {error}") from error
        self._data = data
        self.digest = hashlib.sha256(data).hexdigest()
        self._ids = {False: vocabularies[0], True: vocabularies[-1]}
        self._added = {piece.token: piece.name for piece in self._added_pieces}
        self._special = {piece.token for piece in self._added_pieces if piece.special}
        self._by_name = {piece.name: piece for piece in self._added_pieces}
        names = sorted(self._by_name, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, names))) if names else None
        codes = {number: name for name, number in self._rules["codes"].items()}
        self._names = {number: name for name, number in vocabularies[-1].items()} | codes | self._added
        self.vocab_size = 1 + max(*self._names, *vocabularies[0].values())
        ids = self._rules["ids"]
        self.bos_id, self.eos_id, self.pad_id, self.unk_id = (ids.get(role) for role in ("bos", "eos", "pad", "unk"))
        self.bos_id = ids.get("cls") if self.bos_id is None else self.bos_id
        self.mask_id = ids.get("mask")
        self.mask_token = None if self.mask_id is None else self._names[self.mask_id]
        self.end_ids = tuple(ids.get("end") or ([] if self.eos_id is None else [self.eos_id]))
        self._kind = "text"

    def __reduce__(self):
        return VocabularyTokenizer, (self._data,)

    @property
    def files(self) -> dict[str, str | bytes]:
        """The contents of its files by name, in the form that transformers reads."""
        settings = json.dumps(self._settings, indent=2, ensure_ascii=False, sort_keys=True)
        return {**self._contents, "tokenizer_config.json": settings}

    def encode_target(self, text: str, *, after: Sequence[int] = (), allow_special: bool = True) -> list[int]:
        """Returns the tokens of a text to generate, without the special tokens around it."""
        del after
        return [token for token, _ in self._located(text, allow_special, is_target=True)]

    def frame(self, form: Form) -> tuple[list[int], list[int]]:
        """Returns the special tokens before and after a text."""
        return ([], [self.eos_id]) if form == "target" else (list(self._rules["before"]), list(self._rules["after"]))

    def spans(self, text: str, form: Form = "source") -> list[Span]:
        """Returns the character span of each token of a text: the first character, and the one
        after the last."""
        spans = [span for _, span in self._located(text, is_target=form == "target")]
        before, after = self.frame(form) if form != "target" else ([], [])
        return [(0, 0)] * len(before) + spans + [(0, 0)] * len(after)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of the token ids of a target. Special tokens are left out unless
        ``skip_special`` is False."""
        text, pieces, model = "", [], self._models[self._rules["decoding_model"]]
        after = " " if self._rules["is_marian"] else ""
        for token in checked_ids(ids, self.vocab_size):
            piece = self.id_to_piece(token)
            if token in self._special and skip_special:
                continue
            if piece in self._by_name and self._by_name[piece].special:
                text += model.decode_pieces(pieces) + piece + after
                pieces = []
            else:
                pieces.append(piece)
        text += model.decode_pieces(pieces)
        text = (text.replace(_SPACE, " ") if self._rules["is_marian"] else text).strip()
        return without_spaces(text) if self._settings.get("clean_up_tokenization_spaces") is True else text

    def id_to_piece(self, token: int) -> str:
        """Returns the name of a token in the vocabulary."""
        token = checked_ids([token], self.vocab_size)[0]
        return self._names.get(token, self._names.get(self.unk_id or 0, ""))

    def piece_to_id(self, piece: str) -> int:
        """Returns the id of the token with a name. Raises ValueError if there is none."""
        found = self._ids[True].get(piece, self._rules["codes"].get(piece))
        found = self._by_name[piece].token if piece in self._by_name else found
        if found is None:
            raise ValueError(f"the vocabulary has no piece {piece!r}")
        return found

    def _encode(self, texts: list[str], allow_special: bool, framed: bool) -> list[list[int]]:
        before, after = self.frame("source") if framed else ([], [])
        return [[*before, *(token for token, _ in self._located(text, allow_special)), *after] for text in texts]

    def _located(self, text: str, allow_special: bool = True, is_target: bool = False) -> list[_Located]:
        """Returns each token of a text with its character span."""
        check_text(text)
        if not allow_special or self._settings.get("split_special_tokens") is True:
            return self._part(text, 0, is_target)
        found = []
        for start, part in self._parts(text):
            piece = self._by_name.get(part)
            if piece is not None:
                found.append((piece.token, (start, start + len(part))))
            elif part:
                found += self._part(part, start, is_target)
        return found

    def _parts(self, text: str) -> list[tuple[int, str]]:
        """Splits a text into added tokens and the parts between them. Returns each part with its
        position."""
        parts, end = [], 0
        for match in self._split.finditer(text) if self._split else ():
            parts += [(end, text[end:match.start()]), (match.start(), match.group())]
            end = match.end()
        parts = [part for part in [*parts, (end, text[end:])] if part[1]]
        for place, (start, name) in enumerate(parts):
            piece = self._by_name.get(name)
            left = parts[place - 1][1] if piece and place else ""
            right_start, right = parts[place + 1] if piece and place + 1 < len(parts) else (0, "")
            if piece and piece.rstrip and right:
                parts[place + 1] = right_start + len(right) - len(right.lstrip()), right.lstrip()
            if piece and piece.lstrip and left:
                parts[place - 1] = parts[place - 1][0], left.rstrip()
            if piece and piece.single_word and left and left[-1] != " ":
                parts[place - 1], parts[place] = (parts[place - 1][0], left + name), (start, "")
            elif piece and piece.single_word and right and right[0] != " ":
                parts[place + 1], parts[place] = (start, name + parts[place + 1][1]), (start, "")
        return parts

    def _part(self, text: str, start: int, is_target: bool) -> list[_Located]:
        """Returns the tokens and spans of a part without added tokens. A part for Marian may begin
        with the name of a language."""
        found: list[_Located] = []
        if self._rules["is_marian"] and text.startswith(">>") and "<<" in text:
            end = text.index("<<") + 2
            found.append((self._token(text[:end], is_target), (start, start + end)))
            text, start = text[end:], start + end
        model = self._models[self._rules["target_model" if is_target else "source_model"]]
        _, pieces, spans = encode_with_spans(model, text)
        return found + [(self._token(piece, is_target), (start + begin, start + end))
                        for piece, (begin, end) in zip(pieces, spans, strict=True)]

    def _token(self, piece: str, is_target: bool) -> int:
        """Returns the id of a piece, or the unknown token."""
        if piece in self._by_name:
            return self._by_name[piece].token
        vocabulary: Mapping[str, Any] = self._ids[is_target]
        return vocabulary.get(piece, self._rules["codes"].get(piece, vocabulary[self._rules["unknown"]]))

    def _token_bytes(self, token: int) -> bytes:
        return bytes_of_piece(self.id_to_piece(token), "added" if token in self._added else "text")
