"""The requests that wait for a row: their prompts are read, and then they join the batch."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Sequence

from transformer_jax.config import ModelConfig
from transformer_jax.decoding.packed import PackedModel
from transformer_jax.nn.cache import KVCache
from transformer_jax.serving.batch import Batch, Joining
from transformer_jax.serving.edits import row_edits
from transformer_jax.serving.prompts import (
    CHUNKS,
    GROUP_SIZE,
    Prefixes,
    PromptReader,
    group_length,
    num_common,
    padded_group,
    read_group,
)
from transformer_jax.serving.replies import Reply

_TOKENS_READ_BETWEEN_STEPS = 512  # of prompts, while other requests wait for their next token
_SMALLEST_GROUP = 4


@dataclasses.dataclass
class Waiting:
    """A request that has no row yet.

    Attributes:
      joining: the request, for the batch.
      reader: reads its prompt, once this has begun.
    """

    joining: Joining
    reader: PromptReader | None = None

    @property
    def reply(self) -> Reply:
        """The reply, without tokens."""
        return self.joining.reply

    @property
    def tokens_to_read(self) -> list[int]:
        """The tokens of the prompt; without the last one, which the batch reads, unless the prompt
        is scored."""
        request, prompt = self.reply.request, self.reply.new.start
        return prompt if request.max_new_tokens == 0 or request.scores_prompt else prompt[:-1]


class Queue:
    """The waiting requests, the first one first."""

    def __init__(self, model: PackedModel, config: ModelConfig, prompt_capacity: int, prefixes: Prefixes, batch: Batch,
                 counts: collections.Counter[str], lock: threading.Condition, end: Callable[[Reply, str], None]):
        """Makes an empty queue.

        Args:
          model: the model, in the form for decoding.
          config: its config.
          prompt_capacity: the number of slots of the cache of a prompt that is read alone.
          prefixes: the stored beginnings.
          batch: the batch that requests join.
          counts: the numbers of requests and tokens, by name.
          lock: held while the queue changes.
          end: marks a reply as complete, and counts it under a name.
        """
        self._model, self._config, self._capacity, self._prefixes = model, config, prompt_capacity, prefixes
        self._batch, self._counts, self._changed, self._end = batch, counts, lock, end
        self._waiting: collections.deque[Waiting] = collections.deque()

    def __len__(self) -> int:
        """Returns the number of waiting requests."""
        return len(self._waiting)

    @property
    def waiting(self) -> Sequence[Waiting]:
        """The waiting requests."""
        return list(self._waiting)

    def add(self, waiting: Waiting) -> None:
        """Adds a request at the end. The lock must be held."""
        self._waiting.append(waiting)

    def clear(self) -> None:
        """Removes all requests. The lock must be held."""
        self._waiting.clear()

    def remove_cancelled(self) -> list[Waiting]:
        """Removes and returns the requests that nobody waits for any more."""
        with self._changed:
            cancelled = [waiting for waiting in self._waiting if waiting.reply.is_cancelled]
            for waiting in cancelled:
                self._waiting.remove(waiting)
        return cancelled

    def read_prompts(self) -> None:
        """Reads the prompts of the first requests in the queue, which then join the batch: short
        ones together, long ones in chunks."""
        budget = _TOKENS_READ_BETWEEN_STEPS if self._batch.active else math.inf
        while self._waiting and self._batch.num_free and budget > 0:
            group = self._group()
            if group:
                budget -= self._read_group(group)
                continue
            waiting = self._waiting[0]
            if waiting.reply.is_cancelled:
                return
            if waiting.reader is None:
                waiting.reader = self._start_reading(waiting)
            reader = waiting.reader
            while not reader.is_done and budget > 0:
                num_read = reader.advance()
                self._counts["prompt_tokens_read"] += num_read
                budget -= num_read
            if reader.is_done:
                self._finish_reading(waiting, reader)
                budget -= CHUNKS[-1]

    def _group(self) -> list[Waiting]:
        """Returns the first requests of the queue if their prompts can be read together: they are
        short, and have no long beginning in common with each other or with a stored text. Few
        requests are read one by one, because an entry of a group costs as much without a prompt."""
        with self._changed:
            first = list(itertools.islice(self._waiting, min(GROUP_SIZE, self._batch.num_free)))
        group: list[Waiting] = []
        for waiting in first:
            tokens, request = waiting.tokens_to_read, waiting.reply.request
            shared = max([self._prefixes.num_shared(tokens),
                          *(num_common(other.tokens_to_read, tokens) for other in group)])
            if (waiting.reader is not None or waiting.reply.is_cancelled or request.max_new_tokens == 0
                    or request.scores_prompt or request.edits is not None or 2 * shared > len(tokens)
                    or group_length(len(tokens), self._config.max_len) is None):
                break
            group.append(waiting)
        return group if len(group) >= _SMALLEST_GROUP else []

    def _read_group(self, group: list[Waiting]) -> int:
        """Reads prompts together and moves their requests to the batch. Returns the number of
        tokens that were read, with padding."""
        rows = [waiting.tokens_to_read for waiting in group]
        length = group_length(max(map(len, rows)), self._config.max_len)
        assert length is not None
        cache = read_group(self._model, *padded_group(rows, length))
        self._counts["prompt_tokens"] += sum(len(row) + 1 for row in rows)
        self._counts["prompt_tokens_read"] += GROUP_SIZE * length
        self._join(group, cache, cache.capacity)
        return GROUP_SIZE * length

    def _join(self, group: list[Waiting], prompts: KVCache, next_slot: int) -> None:
        """Moves requests from the queue to the batch."""
        num_expected = len(self._batch.active) + len(self._waiting)
        self._batch.join([waiting.joining for waiting in group], prompts, next_slot, num_expected)
        with self._changed:
            for _ in group:
                self._waiting.popleft()

    def _start_reading(self, waiting: Waiting) -> PromptReader:
        """Starts to read a prompt."""
        request = waiting.reply.request
        edits = None if request.edits is None else row_edits([request.edits], self._config)
        reader = PromptReader(self._model, waiting.tokens_to_read, self._capacity, self._prefixes,
                              is_scored=request.scores_prompt, edits=edits)
        waiting.reply.num_reused = reader.num_reused
        self._counts["prompt_tokens"] += len(waiting.reply.new.start)
        self._counts["prompt_tokens_reused"] += reader.num_reused
        return reader

    def _finish_reading(self, waiting: Waiting, reader: PromptReader) -> None:
        """Moves a request whose prompt was read from the queue to the batch."""
        reply = waiting.reply
        if reply.request.scores_prompt:
            reply.prompt_scores = reader.scores()
        if reply.request.max_new_tokens == 0:
            with self._changed:
                self._waiting.popleft()
            reply.new.end("length")
            self._end(reply, "completed")
            return
        prefix = reader.prefix()
        if reply.request.edits is None:
            self._prefixes.add(prefix)
        self._join([waiting], prefix.cache, prefix.start + len(reply.new.start) - 1)
