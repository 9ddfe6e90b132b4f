"""Speculative decoding on the host: the settings of the guesses, and the session that calls the
compiled loop."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.decoding.batch import bucket, check_family, pad_left, vocab_size_of, whole_number
from transformer_jax.decoding.prepare import prepare_for_decoding
from transformer_jax.decoding.session import Session
from transformer_jax.decoding.speculation import SpeculationState, read_texts, speculate
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.functional import Model
from transformer_jax.nn.cache import KVCache


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How ``generate`` guesses the next tokens, which the model then checks in one pass.

    Attributes:
      draft: a small decoder with the same vocabulary, which guesses the tokens; ``None`` to look
        them up earlier in the text, which helps where a text repeats itself or its prompt.
      num_guesses: the number of tokens to guess at a time.
      ngram: without a draft model, the largest number of last tokens to look up.

    Raises:
      ValueError: if ``draft`` is not a decoder with a cache of keys and values, or a number is out
        of range.
    """

    draft: Model | None = None
    num_guesses: int = 4
    ngram: int = 3

    def __post_init__(self):
        for name, most in (("num_guesses", 64), ("ngram", 16)):
            whole_number(name, getattr(self, name), most=most, expected=f"a whole number from 1 to {most}")
        if self.draft is not None:
            check_can_speculate("draft", self.draft)

    @functools.cached_property
    def prepared_drafts(self) -> tuple[Decoder, ...]:
        """The draft model in the form for decoding; empty without one."""
        drafts: Any = () if self.draft is None else (prepare_for_decoding(self.draft),)
        return drafts


def check_can_speculate(name: str, model: Any) -> None:
    """Raises ValueError unless a model is a decoder whose cache can forget the last tokens."""
    decoder = check_family(f"speculation, as its {name},", model, "decoder")
    if not isinstance(jax.eval_shape(lambda: decoder.start_cache(1, 16)), KVCache):
        raise ValueError(f"speculation needs a Transformer as its {name}, because a {decoder.config.family} model "
                         "cannot forget tokens that were guessed wrongly")


class SpeculativeSession(Session):
    """A session whose rows may get several tokens in each pass of the model."""

    def __init__(self, speculation: Speculation, *arguments: Any):
        super().__init__(*arguments)
        if not isinstance(speculation, Speculation):
            raise ValueError(f"speculation={speculation!r} is not a tj.Speculation")
        check_can_speculate("model", self.model)
        if self.intervene is not None:
            raise ValueError("speculation cannot be combined with intervene, because the model reads several tokens in "
                             "a step; leave one of them out")
        if self._constraints is not None:
            raise ValueError("speculation cannot be combined with grammar, because the host allows one token at a "
                             "time; leave one of them out")
        longest = max(map(len, self.contexts)) + self.max_new_tokens
        if self.boundary is not None and min(map(len, self.contexts)) <= self.boundary < longest:
            raise ValueError(f"speculation cannot cross {self.boundary} tokens, beyond which this model rotates all "
                             "positions differently; ask for fewer new tokens, or decode without speculation")
        has_windows = any(one.config.windows(one.config.num_layers) != (None,) * one.config.num_layers
                          for one in (self.model, *speculation.prepared_drafts))
        if has_windows and len(self.contexts) > 1:
            raise ValueError(f"speculation decodes {len(self.contexts)} rows together, but a sliding window would "
                             "count the gaps that wrong guesses leave; pass one prompt at a time")
        if longest > self.config.max_len:
            raise ValueError(f"speculation needs all new tokens in the model's context of {self.config.max_len}; ask "
                             "for fewer new tokens, or decode without speculation")
        self.speculation, drafts = speculation, speculation.prepared_drafts
        for draft in drafts:
            size, needed = vocab_size_of(draft), vocab_size_of(self.model)
            if size != needed:
                raise ValueError(f"the draft model has a vocabulary of {size}, but the model one of {needed}; both "
                                 "must use the same tokenizer")
        self.speculated: SpeculationState | None = None
        # Counts of earlier states; a state starts from zero when the texts are read again.
        self._num_guessed = self._num_accepted = 0

    @property
    def acceptance_rate(self) -> float:
        """The share of the guesses that were equal to the token that was drawn; 0 before any guess."""
        return self._num_accepted / max(self._num_guessed, 1)

    def advance(self, num_tokens: int) -> None:
        """Draws tokens until every unfinished row has at least ``num_tokens`` more than the shortest
        of them had."""
        target = min(self._shortest() + num_tokens, self.max_new_tokens)
        while not self.finished and self._shortest() < target:
            state = self._start() if self.speculated is None else self.speculated
            state = speculate(self.model, self.speculation.prepared_drafts, state, self.keys_B, self.settings,
                              jnp.int32(target), jnp.int32(self.max_new_tokens), self.processors,
                              num_guesses=self.speculation.num_guesses, ngram=self.speculation.ngram)
            self.speculated = self._collect_rows(state)

    def _shortest(self) -> int:
        """Returns the smallest number of new tokens of an unfinished row."""
        return min(len(row.tokens) for row in self.rows if row.reason is None)

    def _start(self) -> SpeculationState:
        """Reads all texts except their last token, which the first pass reads."""
        contexts = [context if row.reason is None else context[-1:]  # an ended row needs only one token
                    for context, row in zip(self.contexts, self.rows, strict=True)]
        padded = bucket(max(map(len, contexts)) - 1)
        # A round needs room for all guesses, and for the last token.
        capacity = bucket(padded + self.max_new_tokens - self._shortest() + self.speculation.num_guesses + 2)
        text_BP, valid_BP = pad_left(contexts, padded + 1)
        text_BS = np.pad(text_BP, ((0, 0), (0, capacity - padded - 1)))
        B, zero = len(contexts), jnp.int32(0)
        return SpeculationState(
            caches=read_texts((self.model, *self.speculation.prepared_drafts),
                              *pad_left([context[:-1] for context in contexts], padded), capacity=capacity),
            text_BS=jnp.asarray(text_BS), logprobs_BS=jnp.zeros(text_BS.shape, jnp.float32),
            begin_B=jnp.asarray(padded + 1 - valid_BP.sum(1), jnp.int32), end_B=jnp.full(B, padded + 1, jnp.int32),
            num_new_B=jnp.asarray([len(row.tokens) for row in self.rows], jnp.int32),
            done_B=jnp.asarray([row.reason is not None for row in self.rows]),
            num_guessed=zero, num_accepted=zero + 0)

    def _collect_rows(self, state: SpeculationState) -> SpeculationState | None:
        """Copies the new tokens to the host and ends rows; returns None if the cache is full."""
        text_BS, logprobs_BS = np.asarray(state.text_BS), np.asarray(state.logprobs_BS)
        ends, counts = np.asarray(state.end_B), np.asarray(state.num_new_B)
        self._num_guessed += int(state.num_guessed)
        self._num_accepted += int(state.num_accepted)
        for index, row in enumerate(self.rows):
            if row.reason is None:
                drawn = slice(ends[index] - (counts[index] - len(row.tokens)), ends[index])
                self._append(index, text_BS[index, drawn].tolist(), logprobs_BS[index, drawn].tolist())
                if row.reason is None and len(row.tokens) == self.max_new_tokens:
                    row.end("length")
        cache = state.caches[0]
        if int(cache.length) + self.speculation.num_guesses >= cache.capacity:
            return None
        state = dataclasses.replace(state, num_guessed=jnp.int32(0), num_accepted=jnp.int32(0))
        return self._mark_ended(state)
