"""The part of generation that runs on the host: the tokens and text of every row, and why it
ended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.decoding.batch import Texts, bucket, decodable, pad_left, whole_number
from transformer_jax.decoding.constraints import Constraints, RowConstraint, grammar_vocabulary
from transformer_jax.decoding.failures import draw_failure
from transformer_jax.decoding.grammar import Grammars, check_grammars
from transformer_jax.decoding.keys import Keys, row_keys
from transformer_jax.decoding.logits import Sampling, Settings
from transformer_jax.decoding.loop import DecodeState, decode, discard, prefill
from transformer_jax.decoding.new_text import NewText
from transformer_jax.decoding.packed import Generator, packed
from transformer_jax.decoding.prepare import prepared
from transformer_jax.decoding.request import Request
from transformer_jax.decoding.rules import Processor, check_intervention, check_processors
from transformer_jax.decoding.speculation import SpeculationState
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.sites import Intervene
from transformer_jax.settings import shown

# The state of a compiled loop, with the field ``done_B``.
State = TypeVar("State", DecodeState, SpeculationState)


class Session:
    """The state of one call of ``generate`` or ``stream``; it calls the compiled loop and collects
    the results."""

    def __init__(self, function: str, model: Generator, prompts: Texts, tokenizer: TextTokenizer | None,
                 key: Keys | None, max_new_tokens: int, sampling: Sampling, stop: str | Sequence[str],
                 num_samples: int, start_id: int | None, end_ids: Sequence[int] | None, slide: bool,
                 processors: Sequence[Processor], intervene: Intervene | None, grammar: Grammars = None):
        request = Request.of(model, prompts, tokenizer, start_id, end_ids)
        self.max_new_tokens = whole_number("max_new_tokens", max_new_tokens)
        num_samples = whole_number("num_samples", num_samples)
        self.stop = stop_strings(stop, tokenizer)
        self.config, self.tokenizer = request.config, tokenizer
        self.boundary = request.boundary
        self._check_room(request, slide)
        request.check_memory("num_samples", num_samples, request.longest_source + min(
            self.config.max_len, request.longest + self.max_new_tokens))
        if not isinstance(sampling, Sampling):
            raise ValueError(f"sampling={sampling!r} is not a tj.Sampling")
        if key is None and sampling.temperature > 0:
            raise ValueError("sampling needs key=jax.random.key(seed); for greedy decoding, pass "
                             "sampling=tj.Sampling(temperature=0)")
        self.settings = Settings.of(sampling, request.vocab_size, request.ends, request.excluded_V)
        self.keys_B = row_keys(key, len(request.starts) * num_samples)
        self.processors = check_processors(processors)
        self.intervene = check_intervention(intervene, model)
        self.sources = request.padded_sources(num_samples)
        self.contexts = [list(start) for start in request.starts for _ in range(num_samples)]
        self.model = prepared(model)
        self._packed = packed(self.model)
        # Without stop strings, only a stream uses a text before it is complete.
        self.rows = [NewText(start, tokenizer, set(request.ends), self.stop,
                             incremental=bool(self.stop) or function == "stream") for start in self.contexts]
        self.num_new = 0
        # Slots of the cache: the one of the next token, and the one at which the context is full.
        self.next_slot = self.end_slot = 0
        self.state: DecodeState | None = None
        self._constraints = self._follow(grammar, request, num_samples)

    def _follow(self, grammar: Grammars, request: Request, num_samples: int) -> Constraints | None:
        """Starts the grammar of every row; returns None if there is no grammar."""
        grammars = check_grammars(grammar, len(request.starts))
        if not any(grammars):
            return None
        vocabulary = grammar_vocabulary(self.tokenizer, request.excluded_V, request.ends)
        grammars = [one for one in grammars for _ in range(num_samples)]
        assert self.tokenizer is not None  # grammar_vocabulary has checked it
        return Constraints([one and RowConstraint(one, vocabulary, starts_text=not self.tokenizer.decode(
            decodable(start, self.tokenizer))) for one, start in zip(grammars, self.contexts, strict=True)],
            request.vocab_size)

    def _check_room(self, request: Request, slide: bool) -> None:
        """Raises ValueError if the new tokens would exceed the model's context and ``slide`` does
        not allow that."""
        if slide and request.sources:
            raise ValueError("slide=True is for decoders; an encoder-decoder cannot continue beyond its context")
        if self.max_new_tokens > request.room and not slide:
            or_slide = ("" if request.sources else
                        ", or pass slide=True to continue after reading the last half of the context again")
            raise ValueError(f"a prompt of {request.longest} tokens and {self.max_new_tokens} new ones exceed the "
                             f"model's context of {self.config.max_len}; ask for at most {request.room}{or_slide}")

    @property
    def finished(self) -> bool:
        """True if every row has ended."""
        return all(row.reason is not None for row in self.rows)

    def advance(self, num_tokens: int) -> None:
        """Draws up to ``num_tokens`` more tokens of every unfinished row."""
        target = min(self.num_new + num_tokens, self.max_new_tokens)
        while self.num_new < target and not self.finished:
            room = self.end_slot - self.next_slot
            if self.state is None or room == 0:
                state = self._prefill()
            else:
                state = self._decode(min(target, self.num_new + room))
            self.state = self._collect(state)

    def _decode(self, limit: int) -> DecodeState:
        """Draws tokens until ``limit`` are drawn; with a grammar, fewer, because the host follows
        it."""
        assert self.state is not None
        masks = None
        if self._constraints is not None:
            masks, steps = self._constraints.masks(self._ended, can_discard=_keeps_all_tokens(self.state.cache))
            limit = min(limit, self.num_new + steps)
        return decode(self._packed, self.state, self.settings, np.int32(limit), self.processors, self.intervene, masks)

    @property
    def _ended(self) -> list[bool]:
        """True for rows that have ended."""
        return [row.reason is not None for row in self.rows]

    def _prefill(self) -> DecodeState:
        """Reads every row and draws its next token; of a row that fills the context, only the last
        half is read."""
        max_len = self.config.max_len
        for row, context in enumerate(self.contexts):
            if self.rows[row].reason is not None:
                self.contexts[row] = context[-1:]  # an ended row needs only one token
            elif len(context) == max_len:
                self.contexts[row] = context[-(max_len // 2):]
        longest = max(map(len, self.contexts))
        padded = bucket(longest)
        room = min(self.max_new_tokens - self.num_new, max_len - longest)
        if self.boundary is not None:
            # Beyond this length the model rotates all positions differently, so a row that crosses
            # it is read again.
            room = min([room, *(self.boundary - len(context) + 1 for context in self.contexts
                                if len(context) <= self.boundary)])
        self.next_slot, self.end_slot = padded, padded + room
        rules = self.processors
        if self._constraints is not None:
            rules = (self._constraints.rule(self._ended), *rules)
        state = prefill(self._packed, *pad_left(self.contexts, padded), self.keys_B, jnp.int32(self.num_new),
                        self.settings, self.sources, rules, self.intervene, capacity=bucket(self.end_slot))
        return self._mark_ended(state) if any(row.reason for row in self.rows) else state

    def _mark_ended(self, state: State) -> State:
        """Marks the rows that ended on the host as done."""
        ended_B = jnp.asarray([row.reason is not None for row in self.rows])
        return dataclasses.replace(state, done_B=state.done_B | ended_B)

    def _collect(self, state: DecodeState) -> DecodeState:
        """Copies the new tokens to the host, and ends rows at an end token, at a stop string or at
        the limit."""
        num_drawn = int(state.num_new) - self.num_new
        drawn = slice(self.next_slot, self.next_slot + num_drawn)
        history_BS, logprobs_BS = (np.asarray(x)[:, drawn] for x in (state.history_BS, state.logprobs_BS))
        before = self._ended
        num_kept, were_right = self._add(history_BS, logprobs_BS, num_drawn)
        self.next_slot += num_kept
        self.num_new += num_kept
        if self.num_new == self.max_new_tokens:
            for row in self.rows:
                if row.reason is None:
                    row.end("length")
        if not were_right:  # also after the last token, because the loop may have taken its row for complete
            return discard(state, np.int32(num_drawn - num_kept), np.array(self._ended))
        stopped = any(row.reason in ("stop", "grammar") and not ended
                      for row, ended in zip(self.rows, before, strict=True))
        return self._mark_ended(state) if stopped else state

    def _add(self, history_BS: np.ndarray, logprobs_BS: np.ndarray, num_drawn: int) -> tuple[int, bool]:
        """Adds the tokens of a call to the rows, as far as they were drawn with the right masks.
        Returns the number of steps that were added, and whether all masks were right."""
        tokens, logprobs = history_BS.tolist(), logprobs_BS.tolist()
        if self._constraints is None:
            for index in range(len(self.rows)):
                self._append(index, tokens[index], logprobs[index])
            return num_drawn, True
        num_kept, are_right = 0, True
        while are_right and num_kept < num_drawn:
            for index, row in enumerate(self.rows):
                if row.reason is None:
                    self._append_token(index, tokens[index][num_kept], logprobs[index][num_kept])
            num_kept += 1
            if self.num_new + num_kept < self.max_new_tokens:
                are_right = self._constraints.are_right(self._ended)
        self._constraints.end_call(num_kept, are_right=num_kept == num_drawn)
        return num_kept, are_right

    def _append(self, index: int, tokens: list[int], logprobs: list[float]) -> None:
        """Adds new tokens to a row until it ends; raises ValueError if one could not be drawn."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if self.rows[index].reason is not None:
                break
            self._append_token(index, token, logprob)

    def _append_token(self, index: int, token: int, logprob: float) -> None:
        """Adds a new token to a row that has not ended; raises ValueError if it could not be
        drawn."""
        row = self.rows[index]
        if not logprob < math.inf:
            raise draw_failure(self.model, logprob, f"new token {len(row.tokens) + 1} of row {index}")
        self.contexts[index].append(token)
        is_complete = self._constraints is not None and self._constraints.push(index, token)
        row.append(token, logprob)
        if is_complete and row.reason is None:
            row.end("grammar")


def stop_strings(stop: str | Sequence[str], tokenizer: TextTokenizer | None) -> list[str]:
    """Returns the stop strings as a list, after checking them."""
    if not isinstance(stop, Iterable):
        raise ValueError(f"stop={shown(stop)} must be a string or several; for token ids that end a text, use end_ids")
    strings = [stop] if isinstance(stop, str) else list(stop)
    if strings and tokenizer is None:
        raise ValueError("stop strings need a tokenizer; without one, pass end_ids")
    if not all(isinstance(string, str) for string in strings):
        raise ValueError(f"stop={stop!r} must be a string or several; for token ids that end a text, use end_ids")
    if "" in strings:
        raise ValueError("a stop string is empty: it would stop every text before its first token")
    return strings


def _keeps_all_tokens(cache: KVCache) -> bool:
    """True if a cache keeps all tokens, so that the last ones can be discarded. The state of a
    recurrent network, in place of a cache, does not."""
    return isinstance(cache, KVCache) and not any(map(cache.keeps_window, range(len(cache.keys))))
