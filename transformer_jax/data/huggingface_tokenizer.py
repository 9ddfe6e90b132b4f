"""Tokenizers of Hugging Face models, which the library ``tokenizers`` runs from their
``tokenizer.json``."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from transformer_jax.data.huggingface_pieces import BYTE_PIECE, bytes_of_piece, encodings, from_json, read_description
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.tokens import Form, Span, StreamDecoder, checked_ids

_ROLES = ("bos", "eos", "pad", "unk", "mask", "sep", "cls")
_BLOCK_TEXTS = 256
_MARGIN = 16  # characters that the removal of spaces before punctuation may still change


class HuggingFaceTokenizer:
    """An immutable tokenizer that encodes and decodes as transformers does. Its methods on texts
    are those of ``Tokenizer``.

    It may normalize text, so ``decode(encode(text))`` can differ from the text. Special tokens that
    a model does not have are None.

    Attributes:
      vocab_size: Number of token ids, added tokens included.
      bos_id, eos_id, pad_id, unk_id, mask_id: The special tokens. BERT's ``[CLS]`` and ``[SEP]``
        are ``bos_id`` and ``eos_id``.
      end_ids: The tokens that end a text.
      mask_token: The name of the token ``mask_id``, such as ``[MASK]``.
      digest: The SHA-256 digest of ``to_bytes``, in hexadecimal.

    Raises:
      ValueError: If ``data`` is not a result of ``to_bytes``.
    """

    _has_byte_runs = False  # whether neighbouring byte tokens must be decoded together

    def __init__(self, data: bytes):
        try:
            stored = json.loads(data)
            self._json, self._settings, ids = stored["tokenizer"], stored["settings"], stored["ids"]
            self._template = stored.get("chat_template")
            self._tokenizer = from_json(self._json, self._settings.get("split_special_tokens") is True)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"not a tokenizer of Hugging Face ({len(data)} bytes): {error}") from error
        self._literal = None
        self._data = data
        self.digest: str = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.eos_id, self.pad_id, self.unk_id, self.mask_id = (
            ids.get(role) for role in ("bos", "eos", "pad", "unk", "mask"))
        self.bos_id = ids.get("cls") if self.bos_id is None else self.bos_id
        self.eos_id = ids.get("sep") if self.eos_id is None else self.eos_id
        if self.unk_id == self.eos_id:  # so in GPT-2, whose byte tokens can encode every text
            self.unk_id = None
        self.end_ids: tuple[int, ...] = tuple(ids.get("end") or ([] if self.eos_id is None else [self.eos_id]))
        self.mask_token = None if self.mask_id is None else self._tokenizer.id_to_token(self.mask_id)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token: entry.content for token, entry in added.items()}
        self._special = {token for token, entry in added.items() if entry.special}
        self._kind, self._frame, self._decoded = read_description(self._json, self._settings)
        self._has_byte_runs = '"ByteFallback"' in json.dumps(json.loads(self._json).get("decoder"))

    @classmethod
    def make(cls, tokenizer_json: str, settings: Mapping[str, Any], ids: Mapping[str, Any]) -> "HuggingFaceTokenizer":
        """Creates a tokenizer from the files of a model.

        Args:
          tokenizer_json: The text of ``tokenizer.json``.
          settings: The content of ``tokenizer_config.json``, which names special tokens, as in
            ``"eos_token"``.
          ids: The special tokens by role (``"bos"``, ``"eos"``, ...) that ``settings`` does not
            name, and under ``"end"`` a list of all tokens that end a text.

        Returns:
          The tokenizer.

        Raises:
          ValueError: If ``tokenizer_json`` is not valid.
        """
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"tokenizer.json is not a valid tokenizer: {error}") from error
        found = dict(ids)
        for role in _ROLES:
            name = settings.get(f"{role}_token")
            name = name.get("content") if isinstance(name, Mapping) else name
            token = None if name is None else tokenizer.token_to_id(name)
            if token is not None:
                found[role] = token
        stored = {"tokenizer": tokenizer_json, "settings": dict(settings), "ids": found}
        return cls(json.dumps(stored, ensure_ascii=False, sort_keys=True).encode())

    def to_bytes(self) -> bytes:
        """Returns the tokenizer as JSON. ``digest`` is its SHA-256 digest in hexadecimal."""
        return self._data

    def __reduce__(self):
        return HuggingFaceTokenizer, (self._data,)

    @property
    def settings(self) -> dict[str, Any]:
        """The content of ``tokenizer_config.json``."""
        return dict(self._settings)

    @property
    def files(self) -> dict[str, str | bytes]:
        """The texts of ``tokenizer.json``, ``tokenizer_config.json`` and, if there is one, the chat
        template, in the form that transformers reads."""
        template: dict[str, str | bytes] = {} if self._template is None else {"chat_template.jinja": self._template}
        return template | {"tokenizer.json": self._json,
                "tokenizer_config.json": json.dumps(self._settings, indent=2, ensure_ascii=False, sort_keys=True)}

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Returns the token ids of a text, without special tokens before and after it.

        Args:
          text: Any Unicode string.
          allow_special: Whether names of special tokens in the text become these tokens, as in
            transformers. Use False for text from an untrusted source.

        Raises:
          ValueError: If the text is not a string, or has half a surrogate pair.
        """
        return self._encode([text], allow_special, framed=False)[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the tokens that a decoder continues: those of ``encode_source``, or ``start_id``
        if there are none."""
        return self.encode_source(text) or [self.start_id]

    def encode_source(self, text: str) -> list[int]:
        """Returns the tokens of a text with the special tokens that the model expects around it.
        Names of special tokens in the text become these tokens."""
        return self._encode([text], True, framed=True)[0]

    def encode_masked(self, text: str) -> list[int]:
        """Returns the tokens that an encoder reads: those of ``encode_source``."""
        return self.encode_source(text)

    def encode_target(self, text: str, *, after: Sequence[int] = (), allow_special: bool = True) -> list[int]:
        """Returns the tokens of a text to generate, after ``bos_id``, unless ``after`` ends with
        it."""
        before, _ = self.frame("target")
        return [*(before if list(after[-1:]) != before else []), *self.encode(text, allow_special=allow_special)]

    def frame(self, form: Form) -> tuple[list[int], list[int]]:
        """Returns the special tokens around a text. Before a target there is at most ``bos_id``."""
        before, after = self._frame
        if form != "target":
            return list(before), list(after)
        return [token for token in before if token == self.bos_id], [] if self.eos_id is None else [self.eos_id]

    def spans(self, text: str, form: Form = "source") -> list[Span]:
        """Returns the character span of each token of a text: the first character, and the one
        after the last.

        Args:
          text: The text before normalization.
          form: How the model uses the text. The spans of special tokens around it are empty.
        """
        found = encodings(self._tokenizer, [text], framed=form != "target")[0].offsets
        if form == "target":
            return [(0, 0)] * len(self.frame(form)[0]) + found
        return found or [(0, 0)] * (form == "prompt")

    def encode_role(self, role: str) -> list[int]:
        """Returns the tokens that start a message of a role: ``<|user|>`` on a line of its own,
        which may be a special token or text."""
        return self.encode(f"\n<|{role}|>\n")

    def encode_batch(self, texts: Iterable[str], *, allow_special: bool = True) -> list[list[int]]:
        """Returns ``encode`` of every text."""
        return self._encode(list(texts), allow_special, framed=False)

    def encode_corpus(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields, in blocks, for every document: ``end_of_text_id``, the special tokens before a
        text, and the tokens of the document."""
        documents = iter(documents)
        while block := list(itertools.islice(documents, _BLOCK_TEXTS)):
            start = [self.end_of_text_id, *(token for token in self._frame[0] if token != self.end_of_text_id)]
            yield np.asarray([token for row in self._encode(block, False, False) for token in (*start, *row)], np.int32)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids. Special tokens are left out unless ``skip_special`` is
        False.

        Raises:
          ValueError: If an id is outside the vocabulary.
        """
        text = self._tokenizer.decode(checked_ids(ids, self.vocab_size), skip_special_tokens=skip_special)
        for change in self._decoded:
            text = change(text)
        return text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the UTF-8 bytes of the pieces of token ids. Each piece is decoded
        independently."""
        return b"".join(map(self._token_bytes, checked_ids(ids, self.vocab_size)))

    def stream_decoder(self, after: Iterable[int] = ()) -> StreamDecoder:
        """Returns a decoder that takes one token at a time, after the tokens ``after``."""
        cleans_up = self._settings.get("clean_up_tokenization_spaces") is True
        return StreamDecoder(self, after, self._is_byte if self._has_byte_runs else None, _MARGIN if cleans_up else 0)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns a string to display for each token: the name of a special token, ``<0xE2>`` for a
        byte, and otherwise its text.

        The text begins with a space if a space, or the start of a word in BERT, is part of the
        token.
        """
        shown = []
        for token in checked_ids(ids, self.vocab_size):
            data = self._token_bytes(token)
            try:
                shown.append(self.id_to_piece(token) if token in self._special else data.decode())
            except UnicodeDecodeError:
                shown.append("".join(f"<0x{byte:02X}>" for byte in data))
        return shown

    def id_to_piece(self, token: int) -> str:
        """Returns the name of a token in the vocabulary."""
        return self._tokenizer.id_to_token(checked_ids([token], self.vocab_size)[0]) or ""

    def piece_to_id(self, piece: str) -> int:
        """Returns the id of the token with a name. Raises ValueError if there is none."""
        token = self._tokenizer.token_to_id(piece)
        if token is None:
            raise ValueError(f"the vocabulary has no piece {piece!r}")
        return token

    @property
    def end_of_text_id(self) -> int:
        """The token that ends a document: ``eos_id``.

        Raises:
          ValueError: If this tokenizer has no such token.
        """
        if self.eos_id is None:
            raise ValueError("this tokenizer has no token that ends a text (eos_token in tokenizer_config.json, "
                             "eos_token_id in config.json)")
        return self.eos_id

    @property
    def start_id(self) -> int:
        """The token from which the first token of a text is predicted: ``bos_id``, or
        ``end_of_text_id`` if the model has no ``bos_id``."""
        return self.end_of_text_id if self.bos_id is None else self.bos_id

    @property
    def special_ids(self) -> list[int]:
        """The ids of all special tokens."""
        return sorted(self._special)

    @property
    def byte_lengths(self) -> np.ndarray:
        """The number of UTF-8 bytes of every token, int32 [V], for bits per byte. It is 0 for
        special tokens.

        Raises:
          ValueError: If the pieces are word pieces, which do not store the white space between
            words.
        """
        if self._kind == "wordpiece":
            raise ValueError("bits per byte need the size of each token, but word pieces do not store white space")
        return np.array([0 if token in self._special else len(self._token_bytes(token))
                         for token in range(self.vocab_size)], np.int32)

    def _encode(self, texts: list[str], allow_special: bool, framed: bool) -> list[list[int]]:
        tokenizer = self._tokenizer if allow_special else self._without_special()
        return [found.ids for found in encodings(tokenizer, texts, framed)]

    def _without_special(self):
        if self._literal is None:
            self._literal = from_json(self._json, splits_special=True)
        return self._literal

    def _is_byte(self, token: int) -> bool:
        return BYTE_PIECE.fullmatch(self._tokenizer.id_to_token(token) or "") is not None

    def _token_bytes(self, token: int) -> bytes:
        return bytes_of_piece(self._tokenizer.id_to_token(token) or "", "added" if token in self._added else self._kind)


def tokenizer_from_bytes(data: bytes) -> Tokenizer | HuggingFaceTokenizer:
    """Creates a tokenizer from a result of ``to_bytes``. The bytes decide its class."""
    if data.startswith(b'{"added"'):
        from transformer_jax.data.vocabulary_tokenizer import VocabularyTokenizer

        return VocabularyTokenizer(data)
    return HuggingFaceTokenizer(data) if data.startswith(b"{") else Tokenizer(data)
