"""Guesses which tokens grammars will allow, so that one call of the compiled loop draws several
tokens.

The host knows the mask of the next token only. The masks after it were mostly seen before, in an
earlier text or earlier in this one: inside a string, the mask stays the same from one character to
the next. So the host keeps a table of masks, and for each mask and token the mask that followed
last. The compiled loop follows the table. Then the host follows the grammar along the drawn tokens,
and discards all that were drawn after a mask that was wrong. Discarded tokens are drawn again, so a
wrong guess costs time and changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from transformer_jax.decoding.rules import History

LARGEST_VOCABULARY = 4096  # larger tables cost more than calls
BITS = 32  # of a word of a mask
# Places of the table that are no masks of a grammar.
FREE, ENDED, UNKNOWN = 0, 1, 2  # no grammar; the text is complete; no guess, so the loop must stop
NUM_PLACES = 256
_FEW_TOKENS = 16  # a mask of so few tokens seldom stays the same
_MOST_TRUST = 3
_FIRST_STEPS = 8  # of the first call for the first text


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AllowedTokens:
    """A sampling rule that sets the logits of all tokens to minus infinity, except those allowed.

    Attributes:
      bits_BW: for each row one bit for each token, beginning with the lowest bit of the first word.
    """

    bits_BW: UInt32[Array | np.ndarray, "B W"]

    def __call__(self, logits_BV: Float[Array, "B V"], history: History) -> Float[Array, "B V"]:
        B, V = logits_BV.shape
        bits_BWb = (self.bits_BW[:, :, None] >> jnp.arange(BITS, dtype=jnp.uint32)) & 1
        return jnp.where(bits_BWb.reshape(B, -1)[:, :V] == 1, logits_BV, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MaskTable:
    """The masks that the compiled loop follows.

    Attributes:
      masks_MW: the masks.
      next_MV: for each mask and token the place of the guessed next mask; ``None`` to guess
        nothing.
    """

    masks_MW: UInt32[Array | np.ndarray, "M W"]
    next_MV: Int[Array | np.ndarray, "M V"] | None

    def rule(self, places_B: Int[Array, " B"]) -> AllowedTokens:
        """Returns the sampling rule of the next step.

        Args:
          places_B: the place of each row's mask.
        """
        return AllowedTokens(jnp.asarray(self.masks_MW)[places_B])

    def after(self, places_B: Int[Array, " B"], token_B: Int[Array, " B"]) -> Int[Array, " B"]:
        """Returns the places of the guessed next masks, after each row has drawn a token."""
        if self.next_MV is None:
            return jnp.full_like(places_B, UNKNOWN)
        return jnp.asarray(self.next_MV)[places_B, token_B].astype(places_B.dtype)

    @staticmethod
    def has_ended(places_B: Int[Array, " B"]) -> Bool[Array, " B"]:
        """True for rows whose text is complete."""
        return places_B == ENDED

    @staticmethod
    def is_known(places_B: Int[Array, " B"]) -> Bool[Array, " B"]:
        """True for rows whose next mask was guessed."""
        return places_B != UNKNOWN


@dataclasses.dataclass(frozen=True)
class Followed:
    """A table that the compiled loop has followed, as the host compares it with the grammars.

    Attributes:
      masks: the bytes of the masks.
      next_MV: see ``MaskTable``.
    """

    masks: Sequence[bytes]
    next_MV: Int[np.ndarray, "M V"]


class MaskGuesses:
    """The table on the host, which grows with every text.

    A place stands for a mask and the way to it: the same mask after another one has another place.

    Attributes:
      generation: counts how often the table became full and was emptied.
      first_steps: the number of steps of the first call for the next text; see ``Lookahead``.
      lock: held while the table is read or changed, because engines may share it.
    """

    def __init__(self, vocab_size: int):
        """Makes a table without masks for a vocabulary."""
        self.lock = threading.RLock()
        self.generation = -1
        self.first_steps = _FIRST_STEPS
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // BITS)
        self._empty()

    def _empty(self) -> None:
        self.generation += 1
        self._masks_MW = np.full((NUM_PLACES, self._num_words), 2**BITS - 1, np.uint32)
        self._next_MV = np.repeat(np.arange(NUM_PLACES, dtype=np.int16)[:, None], self._vocab_size, axis=1)
        self._masks = [row.tobytes() for row in self._masks_MW[:UNKNOWN + 1]]
        self._children: dict[tuple[int | str, bytes], int] = {}
        self._trust: dict[tuple[int, int], int] = {}
        self._table: tuple[Followed, MaskTable] | None = None

    def table(self) -> tuple[Followed, MaskTable]:
        """Returns copies of the table as it is now: for the host, and on the device."""
        if self._table is None:
            followed = Followed(tuple(self._masks), self._next_MV.copy())
            self._table = followed, MaskTable(jnp.array(self._masks_MW), jnp.array(followed.next_MV))
        return self._table

    def place(self, before: int | str, mask: bytes) -> int:
        """Finds the place of a mask.

        Args:
          before: the place of the mask before it; for the first mask of a text, its grammar.
          mask: the bytes of the mask.

        Returns:
          Its place, which is new if the mask was not seen here.
        """
        has_few = int.from_bytes(mask).bit_count() <= _FEW_TOKENS
        if isinstance(before, int) and not has_few and self._masks[before] == mask:
            return before
        if (before, mask) not in self._children:
            if len(self._masks) == NUM_PLACES:
                self._empty()
                before = ""  # the place before it is gone
            index = self._children[before, mask] = len(self._masks)
            self._masks.append(mask)
            self._masks_MW[index] = np.frombuffer(mask, np.uint32)
            if has_few:
                self._next_MV[index] = UNKNOWN
            self._table = None
        return self._children[before, mask]

    def learn(self, place: int, token: int, after: int) -> None:
        """Remembers which mask followed a mask and a token. A guess that was right several times is
        kept when it is wrong once.

        Args:
          place: the place of the mask.
          token: the token.
          after: the place of the mask that followed.
        """
        trust = self._trust.get((place, token), 0)
        guess = self._next_MV[place, token]
        if guess == after:
            self._trust[place, token] = min(trust + 1, _MOST_TRUST)
        elif trust and guess != UNKNOWN:
            self._trust[place, token] = trust - 1
        else:
            self._next_MV[place, token] = after
            self._table = None


@functools.lru_cache(maxsize=4)
def guesses_for(vocab_size: int) -> MaskGuesses | None:
    """Returns the table for a vocabulary of a size, which all texts share; ``None`` if the
    vocabulary is too large for one.

    Args:
      vocab_size: the number of tokens.
    """
    return MaskGuesses(vocab_size) if vocab_size <= LARGEST_VOCABULARY else None
