"""Tokenizers of models from Hugging Face: what a ``tokenizer.json`` says, run by the library ``tokenizers``."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.tokens import checked_ids

_ROLES = ("bos", "eos", "pad", "unk", "mask", "sep", "cls")
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BLOCK_TEXTS = 256


class HuggingFaceTokenizer:
    """An immutable tokenizer that encodes and decodes as transformers does, with `Tokenizer`'s methods on texts.

    Unlike ours it may normalise text, so that `decode(encode(text))` need not be the text. Special tokens that a model
    does not have are `None`.

    Attributes:
        vocab_size: Number of token ids, added tokens included.
        bos_id, eos_id, pad_id, unk_id, mask_id: The special tokens; BERT's `[CLS]` and `[SEP]` serve as `bos_id` and
            `eos_id`.
        end_ids: The tokens that end a text.
        mask_token: The name of the token with `mask_id`, such as `[MASK]`.
        digest: SHA-256 of `to_bytes`, in hexadecimal.

    Raises:
        ValueError: `data` is not what `to_bytes` returned.
    """

    def __init__(self, data: bytes):
        import tokenizers

        try:
            stored = json.loads(data)
            self._json, self._settings, ids = stored["tokenizer"], stored["settings"], stored["ids"]
            self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"not a tokenizer of Hugging Face ({len(data)} bytes): {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._literal = None
        self._data = data
        self.digest: str = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.eos_id, self.pad_id, self.unk_id, self.mask_id = (
            ids.get(role) for role in ("bos", "eos", "pad", "unk", "mask"))
        self.bos_id = ids.get("cls") if self.bos_id is None else self.bos_id
        self.eos_id = ids.get("sep") if self.eos_id is None else self.eos_id
        if self.unk_id == self.eos_id:  # as GPT-2's files say, whose bytes leave nothing unknown
            self.unk_id = None
        self.end_ids: tuple[int, ...] = tuple(ids.get("end") or ([] if self.eos_id is None else [self.eos_id]))
        self.mask_token = None if self.mask_id is None else self._tokenizer.id_to_token(self.mask_id)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token: entry.content for token, entry in added.items()}
        self._special = {token for token, entry in added.items() if entry.special}
        self._kind = _kind(json.loads(self._json))

    @classmethod
    def make(cls, tokenizer_json: str, settings: Mapping[str, Any], ids: Mapping[str, Any]) -> "HuggingFaceTokenizer":
        """Makes a tokenizer of a model's files.

        Args:
            tokenizer_json: The text of `tokenizer.json`.
            settings: Those of `tokenizer_config.json`; special tokens are named there, as in `"eos_token"`.
            ids: Special tokens by role (`"bos"`, `"eos"`, ...) for those that `settings` does not name, and under
                `"end"` a list of all tokens that end a text.

        Raises:
            ValueError: this is no tokenizer.
        """
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # as the library raises it
            raise ValueError(f"tokenizer.json is not one: {error}") from error
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
        """Returns the tokenizer as JSON; `digest` is its SHA-256 in hexadecimal."""
        return self._data

    def __reduce__(self):
        return HuggingFaceTokenizer, (self._data,)

    @property
    def files(self) -> dict[str, str]:
        """The texts of `tokenizer.json` and `tokenizer_config.json`, as transformers reads them."""
        return {"tokenizer.json": self._json,
                "tokenizer_config.json": json.dumps(self._settings, indent=2, ensure_ascii=False, sort_keys=True)}

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """Returns the token ids of a text, without those that begin and end it.

        Args:
            text: Any Unicode string.
            allow_special: Whether names of special tokens in the text become these tokens, as they do in
                transformers. A text from outside should not be allowed to.

        Raises:
            ValueError: half a surrogate pair, which is no Unicode character.
        """
        return self._encode([text], allow_special, framed=False)[0]

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the tokens that a decoder goes on from, for no text `start_id`; as in :meth:`encode_source`."""
        return self.encode_source(text) or [self.start_id]

    def encode_source(self, text: str) -> list[int]:
        """Returns the tokens of a text with those that its model expects before and after it, and special tokens."""
        return self._encode([text], True, framed=True)[0]

    def encode_masked(self, text: str) -> list[int]:
        """Returns the tokens that an encoder reads; as :meth:`encode_source`."""
        return self.encode_source(text)

    def encode_role(self, role: str) -> list[int]:
        """Returns what says who speaks in a conversation: `<|user|>` on a line of its own, a token or text."""
        return self.encode(f"\n<|{role}|>\n")

    def encode_batch(self, texts: Iterable[str], *, allow_special: bool = True) -> list[list[int]]:
        """Returns `encode` of every text."""
        return self._encode(list(texts), allow_special, framed=False)

    def encode_corpus(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields, in blocks, `end_of_text_id` and then the tokens of the document, for every document."""
        documents = iter(documents)
        while block := list(itertools.islice(documents, _BLOCK_TEXTS)):
            rows = self._encode(block, False, framed=False)
            yield np.asarray([token for row in rows for token in (self.end_of_text_id, *row)], np.int32)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Returns the text of token ids; special tokens vanish unless `skip_special` is False.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return self._tokenizer.decode(checked_ids(ids, self.vocab_size), skip_special_tokens=skip_special)

    def stream_decoder(self) -> "HuggingFaceStreamDecoder":
        """Returns a decoder that takes one token at a time."""
        return HuggingFaceStreamDecoder(self)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns a string to show for each token: a special token's name, `<0xE2>` for a byte, else its text.

        Text begins with a space where a space, or in BERT's pieces the beginning of a word, is part of the token.
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
        """Returns the vocabulary's own name of a token."""
        return self._tokenizer.id_to_token(checked_ids([token], self.vocab_size)[0]) or ""

    def piece_to_id(self, piece: str) -> int:
        """Returns the token that `id_to_piece` calls `piece`; ValueError when there is none."""
        token = self._tokenizer.token_to_id(piece)
        if token is None:
            raise ValueError(f"the vocabulary has no piece {piece!r}")
        return token

    @property
    def end_of_text_id(self) -> int:
        """What ends a document: `eos_id`.

        Raises:
            ValueError: this tokenizer has none.
        """
        if self.eos_id is None:
            raise ValueError("this tokenizer has no token that ends a text (eos_token in tokenizer_config.json, "
                             "eos_token_id in config.json)")
        return self.eos_id

    @property
    def start_id(self) -> int:
        """The token from which the first of a text is predicted: `bos_id`, or in a model without, `end_of_text_id`."""
        return self.end_of_text_id if self.bos_id is None else self.bos_id

    @property
    def special_ids(self) -> list[int]:
        """The ids of all special tokens."""
        return sorted(self._special)

    @property
    def byte_lengths(self) -> np.ndarray:
        """The number of UTF-8 bytes of every token, int32 [V], 0 for special tokens: for bits per byte.

        Raises:
            ValueError: pieces of BERT's kind, which do not say what white space was between them.
        """
        if self._kind == "wordpiece":
            raise ValueError("word pieces do not say how many bytes of a text they are")
        return np.array([0 if token in self._special else len(self._token_bytes(token))
                         for token in range(self.vocab_size)], np.int32)

    def _encode(self, texts: list[str], allow_special: bool, framed: bool) -> list[list[int]]:
        for text in texts:
            text.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair
        tokenizer = self._tokenizer if allow_special else self._without_special()
        return [found.ids for found in tokenizer.encode_batch(texts, add_special_tokens=framed)]

    def _without_special(self):
        if self._literal is None:
            import tokenizers

            self._literal = tokenizers.Tokenizer.from_str(self._json)
            self._literal.no_truncation()
            self._literal.no_padding()
            self._literal.encode_special_tokens = True
        return self._literal

    def _token_bytes(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token) or ""
        if token in self._added:
            return piece.encode()
        if self._kind == "bytes":
            return bytes(_BYTE_OF_CHAR[char] for char in piece)
        if self._kind == "wordpiece":
            return (piece[2:] if piece.startswith("##") else f" {piece}").encode()
        byte = _BYTE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace(_SPACE, " ").encode()


class HuggingFaceStreamDecoder:
    """Decodes tokens one at a time into whole characters; the strings together are `decode` of all the tokens."""

    def __init__(self, tokenizer: HuggingFaceTokenizer):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """Takes the next token and returns the characters that are now complete, often none or several."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        # What may be the first bytes of a character waits for the others; what a later token changes (the white space
        # before a full stop, in BERT's pieces) waits too.
        return "" if text.endswith("\ufffd") else self._show(text)

    def finish(self) -> str:
        """Returns what is left of an incomplete last character."""
        return self._show(self._tokenizer.decode(self._tokens))

    def _show(self, text: str) -> str:
        if not text.startswith(self._shown):
            return ""
        new, self._shown = text[len(self._shown):], text
        return new


def tokenizer_from_bytes(data: bytes) -> Tokenizer | HuggingFaceTokenizer:
    """The tokenizer of either kind that `to_bytes` was called of."""
    return HuggingFaceTokenizer(data) if data.startswith(b"{") else Tokenizer(data)


def _kind(tokenizer: Mapping[str, Any]) -> str:
    """How its pieces are written: "bytes" (a character stands for a byte), "wordpiece", or "text"."""
    if tokenizer["model"].get("type") == "WordPiece":
        return "wordpiece"
    return "bytes" if '"ByteLevel"' in json.dumps(tokenizer.get("decoder")) else "text"


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's way to write bytes: those of visible Latin-1 characters as these, the others from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHAR = _bytes_of_characters()
