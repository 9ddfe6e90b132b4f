"""The running batch as the host sees it: which request has which row, and how large the batch and
its cache are."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from transformer_jax.decoding.logits import Settings
from transformer_jax.models.decoder import Decoder
from transformer_jax.serving.prompts import Prefix, beginning_of_row
from transformer_jax.serving.replies import Reply
from transformer_jax.serving.slots import MOST_STEPS, Slots, decode, empty, join, leave, moved, settings_of_row

_FEWEST_SLOTS = 128
_SECONDS_OF_A_CALL = 0.02  # several steps share one call if they take less
_STEPS_BEFORE_SHRINKING = 16


@dataclasses.dataclass
class Row:
    """A request in the batch.

    Attributes:
      reply: its reply.
      start: the slot of the first token of its prompt.
    """

    reply: Reply
    start: int

    @property
    def num_cached(self) -> int:
        """The number of its tokens in the cache: all but the last."""
        return len(self.reply.new.start) + len(self.reply.new.tokens) - 1


class Batch:
    """A batch that rows join and leave. Its shape is one of a few, so that few programs are
    compiled: see ``row_counts`` and ``capacities``.

    Attributes:
      row_counts: the numbers of rows that the batch may have.
      capacities: the numbers of slots that its cache may have.
      shapes: the shapes for which a decoding program was compiled.
      mask_errors: for each row whose grammar could not be followed in the last step, the reason.
    """

    def __init__(self, model: Decoder, max_rows: int, max_context: int, settings: Settings):
        """Makes an empty batch.

        Args:
          model: the model, in the form for decoding.
          max_rows: the largest number of rows.
          max_context: the largest number of tokens of a row.
          settings: the settings of any row, which give the shapes.
        """
        self._model = model
        self._any_settings = settings_of_row(settings)
        self.row_counts = sorted({min(num, max_rows) for num in (1, 8, max_rows)})
        self.capacities = capacities_for(max_context)
        self.rows: list[Row | None] = []
        self.shapes: set[tuple[int, int]] = set()
        self.mask_errors: dict[int, ValueError] = {}
        self._slots: Slots | None = None
        self._length = self._capacity = 0
        self._seconds: dict[tuple[int, int], float] = {}  # of a step, by shape
        self._calls_with_few_rows = 0

    @property
    def active(self) -> list[tuple[int, Row]]:
        """The rows in use, with their indices."""
        return [(index, row) for index, row in enumerate(self.rows) if row is not None]

    @property
    def has_room(self) -> bool:
        """True if another request can join."""
        return len(self.active) < self.row_counts[-1]

    def join(self, reply: Reply, prompt: Prefix, settings: Settings, key: jax.Array) -> None:
        """Puts a request into a free row.

        Args:
          reply: the reply, without tokens.
          prompt: the keys and values of the tokens of its prompt; that of the last one may be left
            out, because the next step reads it.
          settings: how its tokens are drawn.
          key: the PRNG key of its row.
        """
        tokens = reply.new.start
        longest = max([len(tokens) - 1, *(row.num_cached for _, row in self.active)])
        self._make_room(len(self.active) + 1, longest)
        assert self._slots is not None
        index = self.rows.index(None)
        start = self._length - (len(tokens) - 1)
        tokens_S = np.zeros(self._capacity, np.int32)
        tokens_S[start:self._length + 1] = tokens
        self._slots = join(self._slots, np.int32(index), prompt.cache, np.int32(prompt.start - start), tokens_S, key,
                           settings_of_row(settings))
        self.rows[index] = Row(reply, start)

    def leave(self, index: int) -> None:
        """Frees a row."""
        assert self._slots is not None
        self._slots = leave(self._slots, np.int32(index))
        self.rows[index] = None

    def prefix(self, index: int, capacity: int) -> Prefix:
        """Returns the whole text of a row as a beginning for other prompts."""
        row = self.rows[index]
        assert self._slots is not None and row is not None
        cache = beginning_of_row(self._slots, np.int32(index), np.int32(row.start), np.int32(row.num_cached),
                                 capacity=capacity)
        return Prefix((*row.reply.new.start, *row.reply.new.tokens[:-1]), cache, 0)

    def decode(self) -> list[tuple]:
        """Draws one or several tokens of every row.

        Returns:
          For each step, arrays with one entry a row: the tokens, their log-probabilities, the most
          probable tokens and the log-probabilities of those.
        """
        self._shrink()
        room = self._capacity - 1 - self._length
        if room == 0:
            self._move(len(self.rows), max(row.num_cached for _, row in self.active))
            room = self._capacity - 1 - self._length
        shape = len(self.rows), self._capacity
        allowed_BW = self._allowed()
        wants_alternatives = any(row.reply.request.wants_alternatives for _, row in self.active)
        steps = 1 if allowed_BW is not None else int(_SECONDS_OF_A_CALL / self._seconds.get(shape, 1.0))
        left = max(row.reply.request.max_new_tokens - len(row.reply.new.tokens) for _, row in self.active)
        limit = min(max(steps, 1), MOST_STEPS, room, left)
        begin = time.perf_counter()
        assert self._slots is not None
        slots, drawn = decode(self._model, self._slots, np.int32(limit), np.bool_(wants_alternatives), allowed_BW)
        self._slots = slots
        arrays, length = [np.asarray(x) for x in jax.tree.leaves(drawn)], int(slots.cache.length)
        taken = length - self._length
        if shape in self.shapes:  # the first call of a shape compiles
            seconds = (time.perf_counter() - begin) / max(taken, 1)
            self._seconds[shape] = 0.5 * (self._seconds.get(shape, seconds) + seconds)
        self.shapes.add(shape)
        self._length = length
        return [tuple(x[step] for x in arrays) for step in range(taken)]

    def _allowed(self) -> UInt32[np.ndarray, "B W"] | None:
        """Returns the masks of the tokens that each row may draw next; None if no row follows a
        grammar. Rows whose grammar cannot be followed further get an entry in ``mask_errors``."""
        self.mask_errors = {}
        constraints = [(index, row.reply.request.constraint) for index, row in self.active]
        if not any(constraint for _, constraint in constraints):
            return None
        num_words = -(-self._any_settings.ends_V.shape[-1] // 32)
        allowed_BW = np.full((len(self.rows), num_words), 2**32 - 1, np.uint32)
        for index, constraint in constraints:
            if constraint is not None:
                try:
                    bits_W = constraint.allowed()[:num_words]
                    allowed_BW[index, :len(bits_W)] = bits_W
                except ValueError as error:  # of this row only; what it draws is not used
                    self.mask_errors[index] = error
        return allowed_BW

    def _make_room(self, num_rows: int, longest: int) -> None:
        """Makes a free row, and slots for a text of ``longest`` tokens in the cache."""
        if not self.active:
            rows, self._capacity = self._row_count(num_rows), self._capacity_for(longest)
            self._slots = empty(self._model, rows, self._capacity, self._any_settings)
            free: list[Row | None] = [None] * rows
            self.rows, self._length = free, 0
        if None not in self.rows or self._length < longest or self._length >= self._capacity - 1:
            self._move(max(len(self.rows), self._row_count(num_rows)), longest)

    def _shrink(self) -> None:
        """Removes rows that were not in use for some time."""
        rows = self._row_count(len(self.active))
        self._calls_with_few_rows = self._calls_with_few_rows + 1 if rows < len(self.rows) else 0
        if self._calls_with_few_rows >= _STEPS_BEFORE_SHRINKING:
            self._move(rows, max(row.num_cached for _, row in self.active))
            self._calls_with_few_rows = 0

    def _row_count(self, num_rows: int) -> int:
        """Returns the smallest number of rows of a batch that holds ``num_rows``."""
        return next(count for count in self.row_counts if count >= num_rows)

    def _capacity_for(self, longest: int) -> int:
        """Returns the smallest number of slots in which a text can grow for a while."""
        return next((size for size in self.capacities if size - longest > size // 8), self.capacities[-1])

    def _move(self, num_rows: int, length: int) -> None:
        """Moves the rows so that ``length`` slots are in use, into a batch of ``num_rows`` rows."""
        assert self._slots is not None
        shift, capacity, kept = length - self._length, self._capacity_for(length), None
        if num_rows != len(self.rows):
            kept = [index for index, _ in self.active]
            kept += [-1] * (num_rows - len(kept))
        self._slots = moved(self._slots, None if kept is None else jnp.asarray(kept), np.int32(length),
                            capacity=capacity)
        self.rows = self.rows if kept is None else [self.rows[index] if index >= 0 else None for index in kept]
        for _, row in self.active:
            row.start += shift
        self._length, self._capacity = length, capacity


def capacities_for(max_context: int) -> Sequence[int]:
    """Returns the sizes of the cache: doubled from one to the next, and the last one with room to
    spare, so that rows that fill their context are seldom moved."""
    sizes, size = [], _FEWEST_SLOTS
    while size < max_context:
        sizes.append(size)
        size *= 2
    return [*sizes, max_context + max(16, max_context // 8)]
