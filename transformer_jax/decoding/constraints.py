"""Follows grammars while text is generated: which tokens each row may draw next.

The host knows the last token of each row, so it computes the masks between the calls of the
compiled loop. The loop receives them as an argument, in which a token is one bit, and applies them
before it draws. Masks of later steps are guessed; see ``transformer_jax.decoding.mask_table``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt32

from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.decoding.grammar import Grammar, load_llguidance
from transformer_jax.decoding.mask_guesses import GuessedRow, Lookahead
from transformer_jax.decoding.mask_table import AllowedTokens, MaskTable, guesses_for

_BITS = 32
_BYTES_OF_UTF8 = [bytes([byte]) for byte in range(256) if byte not in (0xC0, 0xC1) and byte < 0xF5]
_LACKS_TOKEN = "the vocabulary of the tokenizer has no token for the characters that must come next"
_SPECIAL = b"\xff"  # llguidance's mark of a token that is not text


class GrammarVocabulary:
    """The tokens of a tokenizer in the form that llguidance reads.

    Attributes:
      llguidance: the ``LLTokenizer``.
      num_words: the number of 32-bit words of a mask.
      leading_space_W: the mask of tokens that begin with a space, if the tokenizer leaves out a
        space at the start of a text; otherwise ``None``.
    """

    def __init__(self, tokenizer: Any, never_drawn_V: Bool[np.ndarray, " V"], end_ids: Sequence[int]):
        """Reads the bytes of all tokens.

        Args:
          tokenizer: a tokenizer with the methods of ``Tokenizer``.
          never_drawn_V: True for ids of the model's vocabulary that are never drawn.
          end_ids: the ids that end a text.

        Raises:
          ValueError: if the text of several tokens is not their bytes one after the other.
        """
        library = load_llguidance()
        self._tokenizer = tokenizer
        special = {*tokenizer.special_ids, *end_ids} | ({tokenizer.unk_id} - {None})
        self._bytes = [b"" if token in special or never_drawn_V[token] or token >= tokenizer.vocab_size
                       else tokenizer.decode_bytes([token]) for token in range(len(never_drawn_V))]
        self._bytes = [b"" if data.startswith(_SPECIAL) else data for data in self._bytes]  # never in UTF-8
        strips_space = _strips_leading_space(tokenizer, self._bytes)
        self._longest = max(map(len, self._bytes), default=0)
        self._ids = {data: token for token, data in reversed(list(enumerate(self._bytes))) if data}
        self._spells_all = all(byte in self._ids for byte in _BYTES_OF_UTF8)
        # llguidance needs a token that ends a text. If the model has none, an id after its
        # vocabulary stands for it.
        ends = list(end_ids) or [len(self._bytes)]
        tokens = self._bytes + [b""] * (not end_ids)
        for token in ends:
            tokens[token] = f"<end {token}>".encode()
        self.eos_token_id, self.bos_token_id, self.tokens, self.special_token_ids = ends[0], None, tokens, ends
        self.llguidance = library.LLTokenizer(library.TokenizerWrapper(self), eos_token=ends)
        self.num_words = -(-len(tokens) // _BITS)
        self.leading_space_W = None
        if strips_space:
            self.leading_space_W = _packed([data.startswith(b" ") for data in self._bytes], self.num_words)

    def __call__(self, data: bytes) -> list[int]:
        """Encodes text that the grammar leaves no choice about, as the tokenizer would."""
        ids = self._tokenizer.encode(data.decode(), allow_special=False)
        if b"".join(self._bytes[token] for token in ids if token < len(self._bytes)) == data:
            return ids
        ids = []  # the tokenizer adds a space or changes characters: take the longest token each time
        while data:
            size = next((size for size in range(self._longest, 0, -1) if data[:size] in self._ids), 0)
            if not size:
                break
            ids.append(self._ids[data[:size]])
            data = data[size:]
        return ids

    @functools.lru_cache(maxsize=32)  # noqa: B019 - vocabularies are few, and are kept anyway
    def prepared_matcher(self, definition: str) -> Any:
        """Returns an ``LLMatcher`` at the beginning of a grammar, which must only be copied. A copy
        takes microseconds, and a new one a millisecond.

        Args:
          definition: the grammar in the form that llguidance reads.
        """
        return load_llguidance().LLMatcher(self.llguidance, definition, log_level=0)

    def bytes_of(self, token: int) -> bytes:
        """Returns the text of a token; nothing for one that is not text."""
        return self._bytes[token] if token < len(self._bytes) else b""

    @functools.lru_cache(maxsize=8)  # noqa: B019 - vocabularies are few, and are kept anyway
    def without_tokens_beyond(self, mark: bytes, *, after_first: bool) -> UInt32[np.ndarray, " W"]:
        """Returns the mask of all tokens with which a text can end, or go on, at a mark of two
        bytes, but not beyond it.

        Args:
          mark: the mark.
          after_first: whether the text ends with the first byte of the mark.

        Returns:
          The mask, one bit a token.
        """
        prefix = mark[:1] * after_first
        ends = {self.eos_token_id, *self.special_token_ids}
        return _packed([token in ends or (bool(data) and mark not in (prefix + data)[:-1])
                        for token, data in enumerate(self.tokens)], self.num_words)

    def can_spell(self, data: bytes) -> bool:
        """Returns True if tokens can spell some bytes.

        Args:
          data: UTF-8 text.
        """
        return not data or self._spells_all or sum(len(self._bytes[token]) for token in self(data)) == len(data)


def _strips_leading_space(tokenizer: Any, bytes_of_tokens: Sequence[bytes]) -> bool:
    """Decodes all tokens of whole characters together; returns True if only the first space is left
    out.

    Raises:
      ValueError: if the text differs otherwise, so that a grammar could not be kept.
    """
    texts = {token: data for token, data in enumerate(bytes_of_tokens) if data and _is_text(data)}
    ordered = sorted(texts, key=lambda token: not texts[token].startswith(b" "))
    expected, decoded = b"".join(texts[token] for token in ordered).decode(), tokenizer.decode(ordered)
    if decoded == expected:
        return False
    if expected.startswith(" ") and decoded == expected[1:]:
        return True
    raise ValueError("grammar cannot be used with this tokenizer: the text of several tokens is not the text of each "
                     "token one after the other, because its decoder adds, removes or replaces characters")


def _is_text(data: bytes) -> bool:
    """True if the bytes are whole characters."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _packed(flags: Sequence[bool], num_words: int) -> np.ndarray:
    """Packs one bit for each flag into 32-bit words, uint32 ``[num_words]``."""
    padded = np.zeros(num_words * _BITS, bool)
    padded[:len(flags)] = flags
    return np.packbits(padded, bitorder="little").view(np.uint32)


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: TextTokenizer, never_drawn: bytes, end_ids: tuple[int, ...]) -> GrammarVocabulary:
    return GrammarVocabulary(tokenizer, np.frombuffer(never_drawn, bool), end_ids)


def grammar_vocabulary(tokenizer: TextTokenizer | None, never_drawn_V: Bool[np.ndarray, " V"],
                       end_ids: Sequence[int]) -> GrammarVocabulary:
    """Returns the tokens of a tokenizer for llguidance. The last ones are kept, because reading
    50,000 tokens takes about a second.

    Raises:
      ValueError: if there is no tokenizer, it does not tell the bytes of its tokens, or the text of
        several tokens is not their bytes one after the other.
    """
    if tokenizer is None:
        raise ValueError("grammar needs a tokenizer, because it constrains the text of the tokens")
    if not all(hasattr(tokenizer, name) for name in ("decode_bytes", "special_ids", "unk_id")):
        raise ValueError(f"grammar needs a tokenizer with decode_bytes, special_ids and unk_id, such as tj.Tokenizer; "
                         f"{type(tokenizer).__name__} has not all of them")
    return _vocabulary(tokenizer, np.asarray(never_drawn_V, bool).tobytes(), tuple(end_ids))


class RowConstraint:
    """The state of a grammar in one row.

    Attributes:
      definition: the grammar in the form that llguidance reads.
      is_complete: True if the text is complete, and the grammar allows nothing after it.
    """

    def __init__(self, grammar: Grammar, vocabulary: GrammarVocabulary, *, starts_text: bool):
        """Starts at the beginning of the grammar.

        Args:
          grammar: the grammar.
          vocabulary: the tokens of the model's tokenizer.
          starts_text: whether no text stands before the new tokens.
        """
        self.definition = grammar.definition
        self._vocabulary = vocabulary
        self._matcher = vocabulary.prepared_matcher(grammar.definition).deep_copy()
        self._removed_W = vocabulary.leading_space_W if starts_text else None
        self._num_words = vocabulary.num_words
        self.is_complete = False
        self._check()

    def allowed(self) -> UInt32[np.ndarray, " W"]:
        """Returns the mask of the tokens that may come next, one bit a token.

        Raises:
          ValueError: if the grammar cannot be followed further.
        """
        # Without a token for the forced characters, llguidance would leave them out.
        if not self._vocabulary.can_spell(self._matcher.compute_ff_bytes()):
            raise ValueError(f"the text cannot follow the grammar: {_LACKS_TOKEN}")
        bits_W = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[:self._num_words]
        self._check()
        return bits_W if self._removed_W is None else bits_W & ~self._removed_W

    def push(self, token: int) -> None:
        """Takes the token that was drawn.

        Raises:
          ValueError: if the grammar does not allow it.
        """
        if not self._matcher.consume_token(token):
            raise ValueError(f"token {token} was drawn, but the grammar does not allow it: a rule of processors gave "
                             "it a logit again. Rules may only choose among the tokens whose logits are finite")
        self._removed_W = None
        self.is_complete = self._matcher.is_stopped()

    def _check(self) -> None:
        """Raises ValueError if no token fits, or if the grammar takes too much time or memory."""
        if not self._matcher.is_error():
            return
        reason = self._matcher.get_error().strip().split("\n")[0]
        if reason.startswith("NoExtension"):
            reason = _LACKS_TOKEN
        raise ValueError(f"the text cannot follow the grammar: {reason}")


class Constraints:
    """The grammars of all rows of a batch.

    The loop may draw several tokens in a call, if masks can be guessed.
    """

    def __init__(self, rows: Sequence[RowConstraint | None], vocab_size: int):
        """Starts to follow the grammars.

        Args:
          rows: the grammar of each row, or ``None``.
          vocab_size: the number of tokens.
        """
        guesses = guesses_for(vocab_size)
        self._rows = [None if row is None else GuessedRow(row, vocab_size, guesses) for row in rows]
        self._lookahead = Lookahead(vocab_size, guesses)

    def rule(self, ended: Sequence[bool]) -> AllowedTokens:
        """Returns the rule for the next token. Rows without a grammar, and those that have ended,
        may draw every token."""
        return self._lookahead.rule(self._live(ended), len(self._rows))

    def masks(self, ended: Sequence[bool], *, can_discard: bool) -> tuple[tuple[MaskTable, np.ndarray], int]:
        """Returns the masks for the next tokens, and for how many tokens they can be followed.

        Args:
          ended: True for rows that have ended.
          can_discard: whether tokens can be discarded after they were drawn, so that masks may be
            guessed.
        """
        masks = self._lookahead.masks(self._live(ended), len(self._rows), can_discard=can_discard)
        return masks, self._lookahead.steps

    def _live(self, ended: Sequence[bool]) -> list[tuple[int, GuessedRow]]:
        """Returns the rows whose grammar is followed further."""
        return [(row, constraint) for row, constraint in enumerate(self._rows)
                if constraint is not None and not ended[row]]

    def push(self, row: int, token: int) -> bool:
        """Takes the token that a row drew, and returns True if the text is complete and nothing may
        follow."""
        constraint = self._rows[row]
        if constraint is None:
            return False
        constraint.push(token)
        return constraint.is_complete

    def are_right(self, ended: Sequence[bool]) -> bool:
        """Tells whether the masks of the next step, after the tokens that were pushed last, were
        guessed right."""
        return all([self._lookahead.is_right(row) for _, row in self._live(ended)])

    def end_call(self, num_kept: int, *, are_right: bool) -> None:
        """Takes note that the tokens of a call were pushed.

        Args:
          num_kept: the number of steps whose tokens were pushed.
          are_right: whether none of its tokens had to be discarded.
        """
        self._lookahead.end_call(num_kept, are_right=are_right)
