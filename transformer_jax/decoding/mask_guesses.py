"""The grammars of rows whose masks are guessed, see ``transformer_jax.decoding.mask_table``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from jaxtyping import UInt32

from transformer_jax.decoding.mask_table import (
    BITS,
    ENDED,
    FREE,
    NUM_PLACES,
    UNKNOWN,
    AllowedTokens,
    Followed,
    MaskGuesses,
    MaskTable,
)

_MOST_ROWS = NUM_PLACES // 2  # that follow a grammar
_MOST_FIRST_STEPS, _MOST_STEPS = 32, 256  # of the first call for a text, and of a later one


class Constraint(Protocol):
    """The state of a grammar that a text must follow.

    Attributes:
      definition: the grammar; guesses are shared by the texts that follow the same one.
      is_complete: True if the text is complete, and nothing may follow.
    """

    definition: str
    is_complete: bool

    def allowed(self) -> UInt32[np.ndarray, " W"]:
        """Returns the mask of the tokens that may come next, one bit a token."""
        ...

    def push(self, token: int) -> None:
        """Takes the token that was drawn."""
        ...


class GuessedRow:
    """The grammar of one row, with the place of its present mask."""

    def __init__(self, constraint: Constraint, vocab_size: int, guesses: MaskGuesses | None):
        """Starts at the present state of the grammar.

        Args:
          constraint: the grammar.
          vocab_size: the number of tokens.
          guesses: the table; ``None`` to guess nothing.
        """
        self._constraint, self._guesses = constraint, guesses
        self._num_bytes = -(-vocab_size // BITS) * (BITS // 8)
        self._last_word = (1 << (vocab_size - 1) % BITS + 1) - 1
        self._mask: bytes | None = None
        # The place of the present mask, or FREE if it is not known, and that of the mask before.
        self._place = self._place_before = FREE
        self._generation = -1
        self._guessed_place = FREE
        self._token = 0

    @property
    def is_complete(self) -> bool:
        """True if the text is complete, and nothing may follow."""
        return self._constraint.is_complete

    def allowed(self) -> bytes:
        """Returns the bytes of the mask of the next token.

        Raises:
          ValueError: if the grammar cannot be followed further.
        """
        if self._mask is None:
            mask = self._constraint.allowed().tobytes()[:self._num_bytes].ljust(self._num_bytes, b"\0")
            # A token after the vocabulary may stand for the end of the text. It is never drawn, so
            # masks that differ in its bit are the same.
            last = int.from_bytes(mask[-4:], "little") & self._last_word
            self._mask = mask[:-4] + last.to_bytes(4, "little")
        return self._mask

    def start(self) -> int:
        """Returns the place of the present mask, from which the compiled loop starts."""
        assert self._guesses is not None
        if self._place == FREE or self._generation != self._guesses.generation:
            self._place = self._guesses.place(self._constraint.definition, self.allowed())
            self._generation = self._guesses.generation
        self._guessed_place = self._place
        return self._place

    def push(self, token: int) -> None:
        """Takes the token that was drawn.

        Raises:
          ValueError: if the grammar does not allow it.
        """
        self._constraint.push(token)
        self._mask, self._token = None, token
        self._place_before, self._place = self._place, FREE
        if self.is_complete and self._guesses is not None:
            with self._guesses.lock:
                if self._place_before != FREE and self._generation == self._guesses.generation:
                    self._guesses.learn(self._place_before, token, ENDED)

    def is_right(self, table: Followed) -> bool:
        """Tells whether the loop had the right mask after the token that was pushed last, and
        learns the mask.

        Args:
          table: the table that the loop followed.

        Returns:
          True if the next token of the loop was drawn with the right mask, or if there is none.

        Raises:
          ValueError: if the grammar cannot be followed further.
        """
        assert self._guesses is not None
        mask, before = self.allowed(), self._place_before
        self._guessed_place = int(table.next_MV[self._guessed_place, self._token])
        is_known = before != FREE and self._generation == self._guesses.generation
        self._place = self._guesses.place(before if is_known else self._constraint.definition, mask)
        if is_known and self._generation == self._guesses.generation:
            self._guesses.learn(before, self._token, self._place)
        self._generation = self._guesses.generation
        return self._guessed_place == UNKNOWN or (
            self._guessed_place != ENDED and table.masks[self._guessed_place] == mask)


Rows = Sequence[tuple[int, GuessedRow]]


class Lookahead:
    """The masks that the compiled loop follows in the calls of one batch."""

    def __init__(self, vocab_size: int, guesses: MaskGuesses | None):
        """Starts with a number of steps that suits the first call for the text before: more if all
        its steps were right, else as many as were right.

        Args:
          vocab_size: the number of tokens.
          guesses: the table; ``None`` to guess nothing.
        """
        self._guesses, self._num_words = guesses, -(-vocab_size // BITS)
        self._steps = 1 if guesses is None else guesses.first_steps
        self._is_first_call = True
        self._followed: Followed | None = None

    @property
    def steps(self) -> int:
        """The number of tokens for which the last result of ``masks`` can be followed."""
        return 1 if self._followed is None else self._steps

    def rule(self, rows: Rows, num_rows: int) -> AllowedTokens:
        """Returns the rule for the next token only.

        Args:
          rows: the rows that follow a grammar, with their indices; the others may draw every token.
          num_rows: the number of rows of the batch.

        Raises:
          ValueError: if a grammar cannot be followed further.
        """
        self._followed = None
        bits_BW = np.full((num_rows, self._num_words), 2**BITS - 1, np.uint32)
        for index, row in rows:
            bits_BW[index] = np.frombuffer(row.allowed(), np.uint32)
        return AllowedTokens(bits_BW)

    def masks(self, rows: Rows, num_rows: int, *, can_discard: bool = True) -> tuple[MaskTable, np.ndarray]:
        """Returns the masks for the next tokens, and the place of each row's mask among them.

        Args:
          rows: the rows that follow a grammar, with their indices; the others may draw every token.
          num_rows: the number of rows of the batch.
          can_discard: whether tokens can be discarded after they were drawn, so that masks may be
            guessed.

        Raises:
          ValueError: if a grammar cannot be followed further.
        """
        if self._guesses is None or not can_discard or len(rows) > _MOST_ROWS:
            bits_BW = np.asarray(self.rule(rows, num_rows).bits_BW)
            before_BW = np.zeros((UNKNOWN + 1, self._num_words), np.uint32)  # places with a meaning of their own
            return (MaskTable(np.concatenate([before_BW, bits_BW]), None),
                    np.arange(UNKNOWN + 1, UNKNOWN + 1 + num_rows, dtype=np.int32))
        places_B = np.zeros(num_rows, np.int32)
        with self._guesses.lock:
            generation = None
            while generation != self._guesses.generation:  # once more if the table became full and was emptied
                generation = self._guesses.generation
                for index, row in rows:
                    places_B[index] = row.start()
            self._followed, on_device = self._guesses.table()
        return on_device, places_B

    def is_right(self, row: GuessedRow) -> bool:
        """Tells whether the loop had the right mask for a row after the token that was pushed last;
        see ``GuessedRow.is_right``."""
        if self._guesses is None or self._followed is None:
            return True
        with self._guesses.lock:
            return row.is_right(self._followed)

    def end_call(self, num_kept: int, *, are_right: bool) -> None:
        """Chooses the number of steps of the next call: twice as many if all were right, else as
        many as were right.

        Args:
          num_kept: the number of steps that were kept.
          are_right: whether no token of the call had to be discarded.
        """
        if self._guesses is not None and self._followed is not None:
            self._steps = min(2 * self._steps, _MOST_STEPS) if are_right else num_kept
            if self._is_first_call:
                self._guesses.first_steps = min(self._steps, _MOST_FIRST_STEPS)
                self._is_first_call = False
