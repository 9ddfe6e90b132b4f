"""The running batch as the host sees it: which request has which row, and how large the batch and
its cache are."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.config import ModelConfig
from transformer_jax.decoding.logits import Settings
from transformer_jax.decoding.mask_guesses import GuessedRow, Lookahead
from transformer_jax.decoding.mask_table import guesses_for
from transformer_jax.decoding.packed import PackedModel
from transformer_jax.nn.cache import KVCache
from transformer_jax.serving.edits import RowEdits, row_edits
from transformer_jax.serving.prompts import Prefix, beginning_of_row
from transformer_jax.serving.replies import Reply
from transformer_jax.serving.slots import MOST_STEPS, Slots, decode, discard, empty, join, moved, settings_of_row

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


@dataclasses.dataclass(frozen=True)
class Joining:
    """A request whose prompt was read.

    Attributes:
      reply: its reply, without tokens.
      settings: how its tokens are drawn.
      key_data: the data of the PRNG key of its row.
    """

    reply: Reply
    settings: Settings
    key_data: np.ndarray


class Batch:
    """A batch that rows join and leave. Its shape is one of a few, so that few programs are
    compiled: see ``row_counts`` and ``capacities``.

    Attributes:
      row_counts: the numbers of rows that the batch may have.
      capacities: the numbers of slots that its cache may have.
      shapes: the shapes for which a decoding program was compiled.
      mask_errors: for each row whose grammar could not be followed in the last step, the reason.
      follows_grammar: whether a row followed a grammar in the last call.
    """

    def __init__(self, model: PackedModel, config: ModelConfig, max_rows: int, max_context: int, settings: Settings):
        """Makes an empty batch.

        Args:
          model: the model, in the form for decoding.
          config: its config.
          max_rows: the largest number of rows.
          max_context: the largest number of tokens of a row.
          settings: the settings of any row, which give the shapes.
        """
        self._model, self._config = model, config
        self._any_settings = settings_of_row(settings)
        doublings = (8 << num for num in range(max_rows.bit_length()))
        self.row_counts = sorted({min(num, max_rows) for num in (1, *doublings)})
        self.capacities = capacities_for(max_context)
        self.rows: list[Row | None] = []
        self.shapes: set[tuple[int, int]] = set()
        self.mask_errors: dict[int, ValueError] = {}
        self.follows_grammar = False
        self._slots: Slots | None = None
        self._length = self._capacity = 0
        self._seconds: dict[tuple[int, int], float] = {}  # of a step, by shape
        self._calls_with_few_rows = 0
        vocab_size = settings.ends_V.shape[-1]
        self._lookahead = Lookahead(vocab_size, guesses_for(vocab_size))
        self._edits: RowEdits | None = None
        self._edits_of: list[Row | None] = []  # the rows for which these are the edits

    @property
    def active(self) -> list[tuple[int, Row]]:
        """The rows in use, with their indices."""
        return [(index, row) for index, row in enumerate(self.rows) if row is not None]

    @property
    def num_free(self) -> int:
        """The number of requests that can join."""
        return self.row_counts[-1] - len(self.active)

    def join(self, joining: Sequence[Joining], prompts: KVCache, next_slot: int, num_expected: int) -> None:
        """Puts requests into free rows.

        Args:
          joining: the requests.
          prompts: the keys and values of the tokens of their prompts, one row for each; there may
            be more rows. Those of the last tokens may be left out, because the next step reads
            them.
          next_slot: the slot of the last tokens in ``prompts``.
          num_expected: the number of requests that the batch will soon have.
        """
        longest = max([row.num_cached for _, row in self.active] + [len(one.reply.new.start) - 1 for one in joining])
        self._make_room(len(joining), min(num_expected, self.row_counts[-1]), longest)
        assert self._slots is not None
        num_entries = prompts.segment_ids_BS.shape[0]
        free = [index for index, row in enumerate(self.rows) if row is None][:len(joining)]
        rows_R = np.full(num_entries, len(self.rows), np.int32)
        rows_R[:len(joining)] = free
        tokens_RS = np.zeros((num_entries, self._capacity), np.int32)
        for entry, (index, one) in enumerate(zip(free, joining, strict=True)):
            tokens = one.reply.new.start
            start = self._length - (len(tokens) - 1)
            tokens_RS[entry, start:self._length + 1] = tokens
            self.rows[index] = Row(one.reply, start)
        filled = [*joining, *[joining[-1]] * (num_entries - len(joining))]
        settings = jax.tree.map(lambda *leaves: np.stack(leaves), *(settings_of_row(one.settings) for one in filled))
        self._slots = join(self._slots, rows_R, prompts, np.int32(next_slot - self._length), tokens_RS,
                           np.stack([one.key_data for one in filled]), settings)

    def leave(self, index: int) -> None:
        """Frees a row."""
        self.rows[index] = None

    def prefix(self, index: int, capacity: int) -> Prefix:
        """Returns the whole text of a row as a beginning for other prompts."""
        row = self.rows[index]
        assert self._slots is not None and row is not None
        cache = beginning_of_row(self._slots, np.int32(index), np.int32(row.start), np.int32(row.num_cached),
                                 capacity=capacity)
        return Prefix((*row.reply.new.start, *row.reply.new.tokens[:-1]), cache, 0)

    def decode(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draws one or several tokens of every row.

        Returns:
          With one entry for each step and row: the tokens, their log-probabilities, the most
          probable tokens and the log-probabilities of those.
        """
        self._shrink()
        room = self._capacity - 1 - self._length
        if room == 0:
            self._move(len(self.rows), max(row.num_cached for _, row in self.active))
            room = self._capacity - 1 - self._length
        shape = len(self.rows), self._capacity
        wants_alternatives = any(row.reply.request.wants_alternatives for _, row in self.active)
        left = max(row.reply.request.max_new_tokens - len(row.reply.new.tokens) for _, row in self.active)
        limit = min(max(int(_SECONDS_OF_A_CALL / self._seconds.get(shape, 1.0)), 1), MOST_STEPS, room, left)
        constrained, masks = self._constrained(), None
        self.follows_grammar = bool(constrained)
        if constrained:
            masks = self._lookahead.masks(constrained, len(self.rows))
            limit = min(limit, self._lookahead.steps)
        begin = time.perf_counter()
        assert self._slots is not None
        is_active_B = np.array([row is not None for row in self.rows])
        slots, drawn = decode(self._model, self._slots, is_active_B, np.int32(limit), np.bool_(wants_alternatives),
                              masks, self._row_edits())
        self._slots = slots
        taken = int(slots.cache.length) - self._length
        tokens, logprobs, top_tokens, top_logprobs = (np.asarray(x)[:taken] for x in jax.tree.leaves(drawn))
        if shape in self.shapes:  # the first call of a shape compiles
            seconds = (time.perf_counter() - begin) / max(taken, 1)
            self._seconds[shape] = 0.5 * (self._seconds.get(shape, seconds) + seconds)
        self.shapes.add(shape)
        self._length += taken
        return tokens, logprobs, top_tokens, top_logprobs

    def _constrained(self) -> list[tuple[int, GuessedRow]]:
        """Returns the rows that follow a grammar, with their indices. Rows whose grammar cannot be
        followed further get an entry in ``mask_errors`` instead; what they draw is not used."""
        self.mask_errors, constrained = {}, []
        for index, row in self.active:
            if row.reply.grammar is not None:
                try:
                    row.reply.grammar.allowed()
                    constrained.append((index, row.reply.grammar))
                except ValueError as error:
                    self.mask_errors[index] = error
        return constrained

    def are_right(self) -> bool:
        """Tells whether the masks of the next step, after the tokens that were added last, were
        guessed right. Rows whose grammar cannot be followed further get an entry in
        ``mask_errors``."""
        are_right = True
        for index, row in self.active:
            if row.reply.grammar is not None and row.reply.new.reason is None and index not in self.mask_errors:
                try:
                    are_right &= self._lookahead.is_right(row.reply.grammar)
                except ValueError as error:
                    self.mask_errors[index] = error
        return are_right

    def keep(self, num_kept: int, num_drawn: int) -> None:
        """Keeps the first steps that ``decode`` drew, and discards the others, because their masks
        were wrong."""
        self._lookahead.end_call(num_kept, are_right=num_kept == num_drawn)
        if num_kept < num_drawn:
            assert self._slots is not None
            self._slots = discard(self._slots, np.int32(num_drawn - num_kept))
            self._length -= num_drawn - num_kept

    def _row_edits(self) -> RowEdits | None:
        """Returns the intervention that changes each row in its own way."""
        if self._edits_of != self.rows:
            self._edits_of = list(self.rows)
            self._edits = row_edits([None if row is None else row.reply.request.edits for row in self.rows],
                                    self._config)
        return self._edits

    def _make_room(self, num_new: int, num_rows: int, longest: int) -> None:
        """Makes ``num_new`` free rows in a batch for ``num_rows``, and slots for a text of
        ``longest`` tokens in the cache."""
        if not self.active:
            rows, self._capacity = self._row_count(num_rows), self._capacity_for(longest)
            self._slots = empty(self._model, rows, self._capacity, self._any_settings)
            free: list[Row | None] = [None] * rows
            self.rows, self._length = free, 0
        if self.rows.count(None) < num_new or self._length < longest or self._length >= self._capacity - 1:
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
