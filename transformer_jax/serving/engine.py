"""The engine: a thread that answers many requests together, each as if it were alone."""

from __future__ import annotations

import collections
import math
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.decoding.batch import check_family, ending_ids, never_drawn, token_ids, vocab_size_of, whole_number
from transformer_jax.decoding.failures import draw_failure
from transformer_jax.decoding.logits import Sampling, Settings
from transformer_jax.decoding.mask_guesses import GuessedRow
from transformer_jax.decoding.mask_table import guesses_for
from transformer_jax.decoding.new_text import NewText
from transformer_jax.decoding.packed import packed
from transformer_jax.decoding.prepare import prepared
from transformer_jax.decoding.session import stop_strings
from transformer_jax.models.functional import Model
from transformer_jax.nn.cache import KVCache
from transformer_jax.serving.batch import Batch, Joining, Row
from transformer_jax.serving.prompts import CHUNKS, Prefixes
from transformer_jax.serving.replies import Reply, TextRequest
from transformer_jax.serving.waiting import Queue, Waiting


class QueueFullError(RuntimeError):
    """Too many requests are waiting."""


class ClosedError(RuntimeError):
    """The engine takes no more requests."""


class Engine:
    """Generates texts for many requests at a time with one decoder.

    Requests join and leave the running batch between steps. The tokens of a reply do not depend on
    the other requests: in float32 they are those of ``tj.generate`` with the same key.

    Attributes:
      max_context: the largest number of tokens of a prompt with its reply.
      counts: how many requests and tokens there were, by name, since the start.
    """

    def __init__(self, model: Model, *, tokenizer: TextTokenizer | None = None, max_batch: int = 32,
                 max_context: int | None = None, queue_limit: int = 256, num_prefixes: int = 8):
        """Starts the engine.

        Args:
          model: a decoder.
          tokenizer: decodes the replies; without it they have no text.
          max_batch: the largest number of requests that are answered at a time.
          max_context: the largest number of tokens of a prompt with its reply; by default that of
            the model.
          queue_limit: the largest number of requests that wait for their first token.
          num_prefixes: the number of texts whose caches are kept, because later prompts may begin
            with them. Each needs as much memory as one row of ``max_context`` tokens.

        Raises:
          ValueError: if the model is not a decoder with a cache of keys and values, or if a number
            is out of range.
        """
        decoder = check_family("Engine", model, "decoder")
        self._model: Any = prepared(decoder)
        self._packed = packed(self._model)
        if not isinstance(jax.eval_shape(lambda: self._model.start_cache(1, 1)), KVCache):
            raise ValueError(f"Engine needs a model with a cache of keys and values; one of family "
                             f"{model.config.family} has none, so use tj.generate")
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size_of(model)
        longest = model.config.max_len
        self.max_context = longest if max_context is None else whole_number("max_context", max_context, most=longest)
        self._queue_limit = whole_number("queue_limit", queue_limit)
        self._batch = Batch(self._packed, model.config, whole_number("max_batch", max_batch), self.max_context,
                            self._settings(Sampling(), []))
        self._prefixes = Prefixes(whole_number("num_prefixes", num_prefixes, least=0))
        self._changed = threading.Condition()
        self._greedy_key = np.asarray(jax.random.key_data(jax.random.key(0)))  # greedy decoding does not use it
        self._is_closed = False
        self.counts: collections.Counter[str] = collections.Counter()
        self._prompt_capacity = -(-self.max_context // CHUNKS[-1]) * CHUNKS[-1] + CHUNKS[-1]
        self._queue = Queue(self._packed, model.config, self._prompt_capacity, self._prefixes, self._batch,
                            self.counts, self._changed, self._end)
        self._thread = threading.Thread(target=self._run, name="transformer_jax engine", daemon=True)
        self._thread.start()

    def submit(self, request: TextRequest, listener: Callable[[], Any] | None = None) -> Reply:
        """Adds a request to the queue.

        Args:
          request: the request.
          listener: called in the engine's thread after every change of the reply; it must return at
            once.

        Returns:
          The reply, which is not complete yet.

        Raises:
          ValueError: if the request is not valid, or too long for the context.
          QueueFullError: if too many requests are waiting.
          ClosedError: if the engine was closed.
        """
        prompt = token_ids("prompt", request.prompt, self._vocab_size)
        num_new = whole_number("max_new_tokens", request.max_new_tokens, least=0)
        if not prompt:
            raise ValueError("a prompt of token ids is empty; start it with the end-of-text token")
        if len(prompt) + num_new > self.max_context:
            raise ValueError(f"a prompt of {len(prompt)} tokens and {num_new} new ones exceed the context of "
                             f"{self.max_context} tokens; shorten the prompt, or ask for fewer new tokens")
        if request.key is None and request.sampling.temperature > 0 and num_new:
            raise ValueError("sampling needs key=jax.random.key(seed); for greedy decoding, pass "
                             "sampling=tj.Sampling(temperature=0)")
        ends = [token for token in token_ids("end_ids", ending_ids(request.end_ids, self._tokenizer))
                if token < self._vocab_size]
        new = NewText(prompt, self._tokenizer, set(ends), stop_strings(request.stop, self._tokenizer), incremental=True)
        grammar = None if request.constraint is None else GuessedRow(request.constraint, self._vocab_size,
                                                                     guesses_for(self._vocab_size))
        reply = Reply(request, new, grammar, listener)
        key = self._greedy_key if request.key is None else request.key
        key_data = key if isinstance(key, np.ndarray) else np.asarray(jax.random.key_data(key))
        waiting = Waiting(Joining(reply, self._settings(request.sampling, ends), key_data))
        with self._changed:
            if self._is_closed:
                raise ClosedError("the engine is closing and takes no more requests")
            if len(self._queue) >= self._queue_limit:
                raise QueueFullError(f"{len(self._queue)} requests are waiting, and no more are taken; try again later")
            self._queue.add(waiting)
            self.counts["requests"] += 1
            self._changed.notify_all()
        return reply

    def close(self, *, finishes: bool = True) -> None:
        """Takes no more requests, and waits until the engine has ended.

        Args:
          finishes: whether to complete the replies that were requested before; otherwise they are
            cancelled.
        """
        with self._changed:
            self._is_closed = True
            if not finishes:
                for reply in self._replies():
                    reply.cancel()
            self._changed.notify_all()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        """The number of requests that have no row yet."""
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """The number of requests in the batch."""
        return len(self._batch.active)

    @property
    def num_programs(self) -> int:
        """The number of decoding programs that were compiled, one for each shape of the batch."""
        return len(self._batch.shapes)

    def _settings(self, sampling: Sampling, ends: list[int]) -> Settings:
        """Makes the settings of a request."""
        excluded_V = never_drawn(self._model.config, self._tokenizer, ends)
        return Settings.of(sampling, self._vocab_size, ends, excluded_V)

    def _replies(self) -> list[Reply]:
        """Returns the replies that are not complete."""
        return [waiting.reply for waiting in self._queue.waiting] + [row.reply for _, row in self._batch.active]

    def _run(self) -> None:
        """Answers requests until the engine is closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._queue) or self._batch.active or self._is_closed)
                if self._is_closed and not len(self._queue) and not self._batch.active:
                    return
            try:
                self._drop_cancelled()
                self._queue.read_prompts()
                if self._batch.active:
                    self._decode()
            except Exception as error:  # those who wait must learn of any failure
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Ends all requests with an error."""
        with self._changed:
            replies = list(dict.fromkeys(self._replies()))  # a request that was joining is in both places
            self._queue.clear()
        self._batch.rows = []
        for reply in replies:
            self.counts["failed"] += 1
            reply.changed(error=error)

    def _drop_cancelled(self) -> None:
        """Removes requests that nobody waits for any more."""
        for waiting in self._queue.remove_cancelled():
            self._end(waiting.reply, "cancelled")
        for index, row in self._batch.active:
            if row.reply.is_cancelled:
                self._batch.leave(index)
                self._end(row.reply, "cancelled")

    def _end(self, reply: Reply, count: str) -> None:
        """Marks a reply as complete."""
        self.counts[count] += 1
        reply.changed(is_done=True)

    def _decode(self) -> None:
        """Draws the next tokens of all rows, and ends the replies that are complete."""
        drawn = self._batch.decode()
        active, errors = self._batch.active, self._batch.mask_errors  # decode may have moved the rows
        num_steps, num_kept = len(drawn[0]), 0
        # With a grammar, the tokens of a step count only if its masks were guessed right.
        at_once = 1 if self._batch.follows_grammar else num_steps
        are_right = True
        while num_kept < num_steps and are_right:
            steps = slice(num_kept, num_kept + at_once)
            for index, row in active:
                if row.reply.new.reason is None and index not in errors:
                    try:
                        self._add(row.reply, *(x[steps, index] for x in drawn))
                    except ValueError as error:
                        errors[index] = error
            num_kept += at_once
            are_right = not self._batch.follows_grammar or self._batch.are_right()
        if self._batch.follows_grammar:
            self._batch.keep(num_kept, num_steps)
        self._end_rows(active, errors)

    def _end_rows(self, active: list[tuple[int, Row]], errors: dict[int, ValueError]) -> None:
        """Frees the rows whose replies are complete or have failed, and tells those who wait."""
        ended = [index for index, row in active if row.reply.new.reason is not None and index not in errors]
        plain = [index for index, row in active if index in ended and row.reply.request.edits is None]
        for index in plain[-self._prefixes.most:] if self._prefixes.most else ():
            self._prefixes.add(self._batch.prefix(index, self._prompt_capacity))
        for index, row in active:
            if index in errors:
                self._batch.leave(index)
                self.counts["failed"] += 1
                row.reply.changed(error=errors[index])
            elif row.reply.new.reason is not None:
                self._batch.leave(index)
                self._end(row.reply, "completed")
            else:
                row.reply.changed()

    def _add(self, reply: Reply, tokens: np.ndarray, logprobs: np.ndarray, top_tokens: np.ndarray,
             top_logprobs: np.ndarray) -> None:
        """Adds drawn tokens to a reply until it ends. Raises ValueError if a token could not be
        drawn, or if the grammar does not allow it."""
        has_failed = ~(logprobs < math.inf)
        num = int(has_failed.argmax()) if has_failed.any() else len(tokens)
        empty: list[list] = [[]] * num
        tops = (x[:num].tolist() if reply.request.wants_alternatives else empty for x in (top_tokens, top_logprobs))
        self.counts["tokens"] += reply.add(tokens[:num].tolist(), logprobs[:num].tolist(), *tops)
        if num < len(tokens) and reply.new.reason is None:
            raise draw_failure(self._model, float(logprobs[num]), f"new token {len(reply.new.tokens) + 1}")
