"""SentencePiece tokenizers that give back every text exactly as it was."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from transformer_jax.data.sentencepiece_training import (
    ISOLATED,
    ISOLATED_PIECES,
    MASK,
    ROLE_TOKENS,
    ROLES,
    SPACE,
    SPECIAL_TOKENS,
    isolated_or_special,
    split_runs,
    train_model,
)
from transformer_jax.data.tokens import StreamDecoder, checked_ids

_BLOCK_CHARS = 1 << 20


class Tokenizer:
    """An immutable SentencePiece model with the special tokens of `SPECIAL_TOKENS` and maybe those of `ROLE_TOKENS`.

    Text is never normalised. With byte fallback `decode(encode(text)) == text` for every Unicode string; without it
    characters outside the vocabulary (and U+2581, which SentencePiece uses for the space) become `<unk>`, neighbours
    sharing one, and decode to U+FFFD. Line breaks and tabs are tokens of their own. A line is encoded in runs of at
    most 4,096 characters, cut before the last space that follows a non-space, where no token straddles the cut; only
    a run without such a place is cut at exactly 4,096.

    Raises:
        ValueError: `data` is no SentencePiece model or lacks one of the special tokens.

    Source: Kudo and Richardson 2018, "SentencePiece".
    """

    def __init__(self, data: bytes):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor()
            self._model.load_from_serialized_proto(data)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(data)} bytes)") from error
        missing = [name for name in SPECIAL_TOKENS if self._model.id_to_piece(self._model.piece_to_id(name)) != name]
        if missing:
            raise ValueError(
                f"the SentencePiece model lacks {', '.join(missing)}; expected one trained by Tokenizer.train"
            )
        self._data = data
        self.digest: str = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        special_ids = [self._model.piece_to_id(name) for name in SPECIAL_TOKENS]
        self.pad_id, self.bos_id, self.eos_id, self.unk_id, self.mask_id, self.end_of_text_id = special_ids
        has_roles = all(self._model.is_control(self._model.piece_to_id(name)) for name in ROLE_TOKENS)
        names = SPECIAL_TOKENS + ROLE_TOKENS * has_roles
        self._special = {name: [self._model.piece_to_id(name)] for name in names}
        self._isolated_or_special = isolated_or_special(names)
        self._bytes = [self._token_bytes(token) for token in range(self.vocab_size)]
        self._has_bytes = self._model.is_byte(self._model.piece_to_id("<0x00>"))
        self._space_bytes = self._byte_ids(SPACE)
        self._isolated = {char: self._isolated_ids(char) for char in "\0" + SPACE + ISOLATED_PIECES}

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        kind: str = "bpe",
        vocab_size: int | None = None,
        byte_fallback: bool | None = None,
        min_frequency: int = 1,
        chat: bool = False,
    ) -> "Tokenizer":
        """Trains a tokenizer; the same texts in the same order give the same bytes.

        Args:
            texts: Texts of any length, held in memory while training.
            kind: "char", "word" (parted at white space), "bpe" or "unigram".
            vocab_size: Number of tokens, special tokens and bytes included; None, for "char" and "word" only, takes
                every one that occurs.
            byte_fallback: Whether what is not in the vocabulary is spelled in 256 byte tokens; None means yes,
                except for "char".
            min_frequency: For "bpe": a piece of several characters must occur at least so often in the texts. Above
                1, `vocab_size` is an upper limit, and texts that support fewer tokens give fewer.
            chat: Whether there are role tokens, `<|system|>`, `<|user|>` and `<|assistant|>`, which conversations need.

        Raises:
            ValueError: unknown kind, no text, a vocabulary too large or too small for the texts, or `min_frequency`
                below 1 or with another kind.
        """
        return cls(train_model(texts, kind, vocab_size, byte_fallback, min_frequency, chat))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer that `save` wrote."""
        return cls(Path(path).read_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> "Tokenizer":
        """Makes a tokenizer of what `to_bytes` returned."""
        return cls(data)

    def save(self, path: str | Path) -> None:
        """Writes the SentencePiece model to a file."""
        Path(path).write_bytes(self._data)

    def to_bytes(self) -> bytes:
        """Returns the SentencePiece model; `digest` is its SHA-256 in hexadecimal."""
        return self._data

    def __reduce__(self):
        return Tokenizer, (self._data,)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Returns the token ids of a text.

        Args:
            text: Any Unicode string.
            allow_special: Whether names of special tokens in the text, such as `<mask>`, become these tokens; by
                default they are text like any other, so that a user's text cannot inject them.

        Raises:
            ValueError: half a surrogate pair, which is no Unicode character (UnicodeEncodeError).
        """
        pattern = self._isolated_or_special if allow_special else ISOLATED
        fixed = self._isolated | self._special if allow_special else self._isolated
        return self._encode_runs(list(split_runs(text, pattern)), fixed)

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the tokens that a decoder goes on from: those of the text, for no text `end_of_text_id`."""
        return self.encode(text) or [self.end_of_text_id]

    def encode_source(self, text: str) -> list[int]:
        """Returns the tokens that an encoder-decoder reads: those of the text and `eos_id`."""
        return [*self.encode(text), self.eos_id]

    def encode_masked(self, text: str) -> list[int]:
        """Returns the tokens that an encoder reads, between `bos_id` and `eos_id`.

        `<mask>` is a token, of the space before it too; names of other special tokens are text.
        """
        *before, last = text.split(MASK)
        ids = [self.bos_id]
        for part in before:
            ids += [*self.encode(part.removesuffix(" ")), self.mask_id]
        return [*ids, *self.encode(last), self.eos_id]

    def encode_role(self, role: str) -> list[int]:
        """Returns what says who speaks in a conversation: the role's token; ValueError without role tokens."""
        return [self.role_ids[role]]

    def encode_batch(self, texts: Iterable[str], *, allow_special: bool = False) -> list[list[int]]:
        """Returns `encode` of every text."""
        return [self.encode(text, allow_special=allow_special) for text in texts]

    def encode_corpus(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields, in blocks, `end_of_text_id` and then the tokens of the document, for every document.

        Args:
            documents: Texts of any length; they are encoded about a million characters at a time, on all cores.

        Returns:
            int32 arrays whose concatenation is the token stream.
        """
        fixed: Mapping[str | None, list[int]] = self._isolated | {None: [self.end_of_text_id]}
        block: list[str | None] = []
        num_chars = 0
        for document in documents:
            for run in itertools.chain([None], split_runs(document, ISOLATED)):
                block.append(run)
                num_chars += len(run or "")
                if num_chars >= _BLOCK_CHARS:
                    yield np.asarray(self._encode_runs(block, fixed, parallel=True), np.int32)
                    block, num_chars = [], 0
        if block:
            yield np.asarray(self._encode_runs(block, fixed, parallel=True), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids; control tokens vanish, `<unk>` and broken UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """Returns a decoder that takes one token at a time."""
        return StreamDecoder(self)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the UTF-8 bytes of token ids, which may begin or end inside a character.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return b"".join([self._bytes[token] for token in checked_ids(ids, self.vocab_size)])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns a string to show for each token: a special token's name, `<0xE2>` for a byte, else its text."""
        shown = []
        for token in checked_ids(ids, self.vocab_size):
            named = self._model.is_byte(token) or self.id_to_piece(token) in self._special
            shown.append(self.id_to_piece(token) if named else self._bytes[token].decode())
        return shown

    def id_to_piece(self, token: int) -> str:
        """Returns SentencePiece's own name of a token, in which U+2581 is a space."""
        return self._model.id_to_piece(checked_ids([token], self.vocab_size)[0])

    def piece_to_id(self, piece: str) -> int:
        """Returns the token that `id_to_piece` calls `piece`; ValueError when there is none."""
        token = self._model.piece_to_id(piece)
        if self._model.id_to_piece(token) != piece:
            raise ValueError(f"the vocabulary has no piece {piece!r}")
        return token

    @property
    def mask_token(self) -> str:
        """The name of the token with `mask_id`."""
        return MASK

    @property
    def start_id(self) -> int:
        """The token from which the first of a text is predicted: `end_of_text_id`."""
        return self.end_of_text_id

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        return self.eos_id, self.end_of_text_id

    @property
    def special_ids(self) -> list[int]:
        """The ids of all special tokens, role tokens included."""
        return list(itertools.chain.from_iterable(self._special.values()))

    @property
    def role_ids(self) -> dict[str, int]:
        """The token of every role: "system", "user" and "assistant".

        Raises:
            ValueError: this tokenizer has no role tokens.
        """
        if ROLE_TOKENS[0] not in self._special:
            raise ValueError(
                f"this tokenizer has no role tokens ({', '.join(ROLE_TOKENS)}), which conversations need; train the "
                "tokenizer, and the base model with it, with --config.data.tokenizer.chat=true (Tokenizer.train(..., "
                "chat=True))"
            )
        return {role: self._special[name][0] for role, name in zip(ROLES, ROLE_TOKENS, strict=True)}

    @property
    def byte_lengths(self) -> np.ndarray:
        """The number of UTF-8 bytes of every token, int32 [V], 0 for control tokens: for bits per byte."""
        return np.array([len(piece) for piece in self._bytes], np.int32)

    def _token_bytes(self, token: int) -> bytes:
        piece = self._model.id_to_piece(token)
        if self._model.is_control(token):
            return b""
        if self._model.is_unknown(token):
            return "\ufffd".encode()
        if self._model.is_byte(token):
            return bytes([int(piece[1:-1], base=16)])
        return piece.replace(SPACE, " ").encode()

    def _byte_ids(self, text: str) -> list[int]:
        if not self._has_bytes:
            return []
        return [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]

    def _isolated_ids(self, char: str) -> list[int]:
        token = self._model.piece_to_id(char) if char in ISOLATED_PIECES else self.unk_id
        return [token] if token != self.unk_id else self._byte_ids(char) or [self.unk_id]

    def _encode_runs(self, runs: list, fixed: Mapping, parallel: bool = False) -> list[int]:
        """Encodes the runs of a text, those in `fixed` to the ids given there."""
        ordinary = [run for run in runs if run not in fixed]
        # Threads cost 50 us a call: too much for a prompt.
        encoded = self._model.encode(ordinary, num_threads=-1) if parallel else map(self._model.encode, ordinary)
        encoded = iter(encoded)
        return list(
            itertools.chain.from_iterable(
                fixed[run] if run in fixed else self._with_plain_spaces(next(encoded)) for run in runs
            )
        )

    def _with_plain_spaces(self, ids: list[int]) -> list[int]:
        # SentencePiece spells an unknown word's leading space as the three bytes of U+2581, not as byte 0x20.
        if not self._has_bytes or self._space_bytes[0] not in ids:
            return ids
        plain, i = [], 0
        while i < len(ids):
            is_space = ids[i : i + 3] == self._space_bytes
            plain += self._byte_ids(" ") if is_space else ids[i : i + 1]
            i += 3 if is_space else 1
        return plain
