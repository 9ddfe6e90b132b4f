"""SentencePiece tokenizers that encode every text without loss."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from transformer_jax.data.sentencepiece_pieces import displayed_pieces, load_model, spans_of_text, token_bytes
from transformer_jax.data.sentencepiece_runs import RunEncoder
from transformer_jax.data.sentencepiece_training import MASK, ROLE_TOKENS, SPECIAL_TOKENS, ids_of_roles, train_model
from transformer_jax.data.tokens import Form, Span, StreamDecoder, TextTokenizer, checked_ids
from transformer_jax.files import read_file
from transformer_jax.settings import checked_path


class Tokenizer(TextTokenizer):
    """An immutable SentencePiece model with the special tokens of ``SPECIAL_TOKENS`` and possibly
    those of ``ROLE_TOKENS``.

    Text is never normalized. With byte fallback ``decode(encode(text)) == text`` holds for every
    Unicode string. Without it, characters outside the vocabulary (and U+2581, which SentencePiece
    uses for the space) become ``<unk>``, which decodes to U+FFFD; neighbouring ones share one
    ``<unk>``. Line breaks and tabs are tokens of their own. ``split_runs`` describes how a long
    line is split.

    Raises:
      ValueError: If ``data`` is not a SentencePiece model or lacks one of the special tokens.

    Source: Kudo and Richardson 2018, "SentencePiece".
    """

    def __init__(self, data: bytes):
        self._model = load_model(data)
        self._data = data
        self.digest: str = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = self._model.vocab_size()
        special_ids = [self._model.piece_to_id(name) for name in SPECIAL_TOKENS]
        self.pad_id, self.bos_id, self.eos_id, self.unk_id, self.mask_id, self.end_of_text_id = special_ids
        has_roles = all(self._model.is_control(self._model.piece_to_id(name)) for name in ROLE_TOKENS)
        names = SPECIAL_TOKENS + ROLE_TOKENS * has_roles
        self._special = {name: [self._model.piece_to_id(name)] for name in names}
        self._bytes = [token_bytes(self._model, token) for token in range(self.vocab_size)]
        self._run_encoder = RunEncoder(self._model, self.unk_id, self._special)

    @classmethod
    def train(cls, texts: Iterable[str], *, kind: str = "bpe", vocab_size: int | None = None,
              byte_fallback: bool | None = None, min_frequency: int = 1, chat: bool = False) -> "Tokenizer":
        """Trains a tokenizer. The same texts in the same order give the same bytes.

        Args:
          texts: Texts of any length. They are held in memory during training.
          kind: "char", "word" (split at white space), "bpe" or "unigram".
          vocab_size: Number of tokens, special and byte tokens included. None, for "char" and
            "word" only, uses every character or word that occurs.
          byte_fallback: Whether characters outside the vocabulary are spelled with 256 byte tokens.
            None means yes, except for "char".
          min_frequency: For "bpe": pieces of several characters must occur at least this often in
            the texts. With a value above 1, ``vocab_size`` is an upper limit.
          chat: Whether to add the role tokens ``<|system|>``, ``<|user|>`` and ``<|assistant|>``,
            which conversations need.

        Returns:
          The tokenizer.

        Raises:
          ValueError: If the kind is unknown, if there is no text, if the vocabulary is too large or
            too small for the texts, or if ``min_frequency`` is below 1 or is given for another
            kind.
        """
        return cls(train_model(texts, kind, vocab_size, byte_fallback, min_frequency, chat))

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer from a file.

        Args:
          path: A file that ``save`` wrote.

        Returns:
          The tokenizer.
        """
        return cls(read_file(checked_path("path", path)))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Tokenizer":
        """Creates a tokenizer from bytes, which ``to_bytes`` returned.

        Args:
          data: The bytes.

        Returns:
          The tokenizer.
        """
        return cls(data)

    def save(self, path: str | Path) -> None:
        """Writes the SentencePiece model to a file.

        Args:
          path: The file.
        """
        Path(path).write_bytes(self._data)

    def to_bytes(self) -> bytes:
        """Serializes the tokenizer.

        Returns:
          The SentencePiece model. ``digest`` is its SHA-256 digest in hexadecimal.
        """
        return self._data

    def __reduce__(self):
        return Tokenizer, (self._data,)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Encodes a text.

        Args:
          text: Any Unicode string.
          allow_special: Whether names of special tokens in the text, such as ``<mask>``, become
            these tokens. By default they are ordinary text, so that a user's text cannot inject
            them.

        Returns:
          The token ids.

        Raises:
          ValueError: If the text is not a string, or has half a surrogate pair.
        """
        return self._run_encoder.encode_text(text, allow_special)

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the tokens that a decoder continues; ``end_of_text_id`` for an empty text."""
        return self.encode(text) or [self.end_of_text_id]

    def encode_source(self, text: str) -> list[int]:
        """Returns the input of an encoder-decoder: the tokens of the text and ``eos_id``."""
        return [*self.encode(text), self.eos_id]

    def encode_masked(self, text: str) -> list[int]:
        """Returns the input of an encoder: the tokens of the text between ``bos_id`` and
        ``eos_id``.

        ``<mask>`` and the space before it are one token. Names of other special tokens are ordinary
        text.
        """
        *before, last = text.split(MASK)
        ids = [self.bos_id]
        for part in before:
            ids += [*self.encode(part.removesuffix(" ")), self.mask_id]
        return [*ids, *self.encode(last), self.eos_id]

    def encode_target(self, text: str, *, after: Sequence[int] = (), allow_special: bool = False) -> list[int]:
        """Returns the tokens of a text that an encoder-decoder generates, without special
        tokens."""
        del after
        return self.encode(text, allow_special=allow_special)

    def frame(self, form: Form) -> tuple[list[int], list[int]]:
        """Returns the tokens before and after a text of a form."""
        return [self.bos_id] * (form == "masked"), [self.eos_id] * (form != "prompt")

    def spans(self, text: str, form: Form = "source") -> list[Span]:
        """Returns the character span of each token. The span of a mask includes the space before
        it."""
        masks = MASK if form == "masked" else None
        found = spans_of_text(text, masks, self._run_encoder.spans)
        before, after = [(0, 0)] * (form == "masked"), [(len(text), len(text))] * (form in ("source", "masked"))
        return [*before, *found, *after] or [(0, 0)] * (form == "prompt")

    def encode_role(self, role: str) -> list[int]:
        """Returns the tokens that start a message of a role.

        Args:
          role: "system", "user" or "assistant".

        Returns:
          The id of the role token, in a list.

        Raises:
          ValueError: If this tokenizer has no role tokens.
        """
        return [self.role_ids[role]]

    def encode_batch(self, texts: Iterable[str], *, allow_special: bool = False) -> list[list[int]]:
        """Encodes several texts.

        Args:
          texts: The texts.
          allow_special: The same as for ``encode``.

        Returns:
          The token ids of each text.
        """
        return [self.encode(text, allow_special=allow_special) for text in texts]

    def encode_corpus(self, documents: Iterable[str]) -> Iterator[np.ndarray]:
        """Encodes a corpus in blocks: for every document ``end_of_text_id``, then its tokens.

        Args:
          documents: Texts of any length. About a million characters are encoded at a time, on all
            cores.

        Returns:
          An iterator over int32 arrays. Together they are the token stream.
        """
        return self._run_encoder.encode_documents(documents, self.end_of_text_id)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of token ids. Control tokens are left out; ``<unk>`` and invalid UTF-8
        become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream_decoder(self, after: Iterable[int] = ()) -> StreamDecoder:
        """Returns a decoder that takes one token at a time, after the tokens ``after``."""
        return StreamDecoder(self, after)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Decodes token ids to bytes.

        Args:
          ids: The token ids. The first and the last token may be a part of a character.

        Returns:
          The UTF-8 bytes.

        Raises:
          ValueError: If an id is outside the vocabulary.
        """
        return b"".join([self._bytes[token] for token in checked_ids(ids, self.vocab_size)])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Returns a string to display for each token: the name of a special token, ``<0xE2>`` for a
        byte token, and otherwise its text."""
        return displayed_pieces(self._model, checked_ids(ids, self.vocab_size), self._bytes, self._special)

    def id_to_piece(self, token: int) -> str:
        """Returns SentencePiece's name of a token, in which U+2581 is a space.

        Args:
          token: The token id.

        Returns:
          The name.
        """
        return self._model.id_to_piece(checked_ids([token], self.vocab_size)[0])

    def piece_to_id(self, piece: str) -> int:
        """Returns the id of a token.

        Args:
          piece: The name of the token, as ``id_to_piece`` returns it.

        Returns:
          The token id.

        Raises:
          ValueError: If the vocabulary has no such token.
        """
        token = self._model.piece_to_id(piece)
        if self._model.id_to_piece(token) != piece:
            raise ValueError(f"the vocabulary has no piece {piece!r}")
        return token

    @property
    def mask_token(self) -> str:
        """The name of the token ``mask_id``."""
        return MASK

    @property
    def start_id(self) -> int:
        """The token from which the first token of a text is predicted: ``end_of_text_id``."""
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
        """The token ids of the roles "system", "user" and "assistant".

        Raises:
          ValueError: If this tokenizer has no role tokens.
        """
        return ids_of_roles(self._special)

    @property
    def byte_lengths(self) -> np.ndarray:
        """The number of UTF-8 bytes of every token, int32 [V]; 0 for control tokens."""
        return np.array([len(piece) for piece in self._bytes], np.int32)
