"""Reads prompts in chunks of a few fixed lengths, and reuses what equal beginnings have in
common."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer_jax.decoding.loop import read
from transformer_jax.decoding.packed import PackedModel, unpacked
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.sites import Intervene
from transformer_jax.serving.slots import MOST_ALTERNATIVES, Slots, start_cache, window

CHUNKS = (256, 64, 16)  # lengths; every prompt is padded to a multiple of the last
GROUP_SIZE = 8  # prompts that are read in one call
_GROUP_LENGTHS = (16, 32, 48, 64, 96, 128)  # to which they are padded


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The stored cache of one text.

    Attributes:
      tokens: the tokens of the text.
      cache: their keys and values, one row.
      start: the slot of the first token.
    """

    tokens: tuple[int, ...]
    cache: KVCache
    start: int


class Prefixes:
    """The texts that were read last, whose beginnings other prompts may share."""

    def __init__(self, most: int):
        """Makes an empty store for ``most`` texts."""
        self._most = most
        self._stored: list[Prefix] = []  # the one used last comes last

    def find(self, tokens: Sequence[int]) -> tuple[int, Prefix | None]:
        """Finds the stored text with the longest common beginning.

        Returns:
          The number of tokens to reuse, so that the others fill whole chunks, and the stored text;
          0 and ``None`` if no text has a common beginning.
        """
        best, found = 0, None
        for stored in self._stored:
            shared = num_common(stored.tokens, tokens)
            shared -= (shared - len(tokens)) % CHUNKS[-1]
            if shared > best:
                best, found = shared, stored
        if found is not None:
            self._stored = [*(stored for stored in self._stored if stored is not found), found]
        return best, found

    @property
    def most(self) -> int:
        """The largest number of texts that are stored."""
        return self._most

    def num_shared(self, tokens: Sequence[int]) -> int:
        """Returns the length of the longest beginning that a text has in common with a stored
        one."""
        return max((num_common(stored.tokens, tokens) for stored in self._stored), default=0)

    def add(self, prefix: Prefix) -> None:
        """Stores a text, and forgets those that it continues and the one that was not used for the
        longest time."""
        if not self._most or len(prefix.tokens) < CHUNKS[-1]:
            return
        kept = [stored for stored in self._stored if prefix.tokens[:len(stored.tokens)] != stored.tokens]
        self._stored = [*kept, prefix][-self._most:]


def num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the number of tokens that two texts begin with in common."""
    size = min(len(a), len(b))
    differs = np.asarray(a[:size]) != np.asarray(b[:size])
    return int(differs.argmax()) if differs.any() else size


@dataclasses.dataclass(frozen=True)
class PromptScores:
    """The log-probabilities of tokens of a prompt, each given the tokens before it.

    Attributes:
      logprobs: of each token after the first.
      top_tokens: for each of these tokens, the most probable tokens in its place.
      top_logprobs: the log-probabilities of those.
    """

    logprobs: list[float]
    top_tokens: list[list[int]]
    top_logprobs: list[list[float]]


class PromptReader:
    """Reads one prompt, one chunk a call, into a cache of one row."""

    def __init__(self, model: PackedModel, tokens: Sequence[int], capacity: int, prefixes: Prefixes, *,
                 is_scored: bool = False, edits: Intervene | None = None):
        """Starts with the longest stored beginning.

        Args:
          model: the model, in the form for decoding.
          tokens: the tokens to read.
          capacity: the number of slots of the cache, at least ``len(tokens)`` rounded up to chunks.
          prefixes: the stored texts.
          is_scored: whether to compute the log-probabilities of the tokens too. All of them are
            then read.
          edits: an intervention. With one, no stored beginning is used, because it was read
            without.
        """
        self._model, self._tokens, self._capacity, self._edits = model, tuple(tokens), capacity, edits
        self.num_reused, prefix = (0, None) if is_scored or edits is not None else prefixes.find(self._tokens)
        if prefix is None:
            self.cache, self._padding = start_cache(model, 1, capacity), -len(self._tokens) % CHUNKS[-1]
        else:
            self.cache, self._padding = beginning(prefix.cache, np.int32(prefix.start),
                                                  np.int32(self.num_reused), capacity=capacity), 0
        self._num_read, self._start = self.num_reused, self._padding
        self._scores = [] if is_scored else None

    @property
    def is_done(self) -> bool:
        """True if all tokens are in the cache."""
        return self._num_read == len(self._tokens)

    def advance(self) -> int:
        """Reads one chunk, and returns its length."""
        left = len(self._tokens) - self._num_read + self._padding
        size = next(size for size in CHUNKS if size <= left)
        padding, self._padding = self._padding, 0
        ids = self._tokens[self._num_read:self._num_read + size - padding]
        tokens_1T, segment_ids_1T, next_1T = (np.zeros((1, size), np.int32) for _ in range(3))
        tokens_1T[0, padding:], segment_ids_1T[0, padding:] = ids, 1
        following = self._tokens[self._num_read + 1:self._num_read + 1 + len(ids)]
        next_1T[0, padding:padding + len(following)] = following
        self._num_read += len(ids)
        if self._scores is None:
            self.cache = read_chunk(self._model, self.cache, tokens_1T, segment_ids_1T, self._edits)
        else:
            self.cache, *arrays = read_and_score(self._model, self.cache, tokens_1T, segment_ids_1T, next_1T,
                                                 self._edits)
            self._scores.append([np.asarray(x)[padding:padding + len(following)] for x in arrays])
        return size

    def prefix(self) -> Prefix:
        """Returns the whole text as a beginning for others."""
        return Prefix(self._tokens, self.cache, self._start)

    def scores(self) -> PromptScores:
        """Returns the log-probabilities, after everything was read with ``is_scored``."""
        assert self._scores is not None and self.is_done
        return PromptScores(*([value for part in parts for value in part.tolist()]
                              for parts in zip(*self._scores, strict=True)))


def group_length(most_tokens: int, max_len: int) -> int | None:
    """Returns the length to which the prompts of a group are padded.

    Args:
      most_tokens: the largest number of tokens to read.
      max_len: the context of the model.

    Returns:
      The length; ``None`` if the prompts are too long to be read together.
    """
    return next((length for length in _GROUP_LENGTHS if most_tokens <= length <= max_len), None)


def padded_group(rows: Sequence[Sequence[int]], length: int) -> tuple[Int[np.ndarray, "R T"], Int[np.ndarray, "R T"]]:
    """Returns the token ids and the segment ids of a group of prompts, which end at the same
    slot."""
    tokens_RT, segment_ids_RT = (np.zeros((GROUP_SIZE, length), np.int32) for _ in range(2))
    for index, row in enumerate(rows):
        tokens_RT[index, length - len(row):], segment_ids_RT[index, length - len(row):] = row, 1
    return tokens_RT, segment_ids_RT


@jax.jit
def read_group(model: PackedModel, tokens_RT: Int[Array, "R T"], segment_ids_RT: Int[Array, "R T"]) -> KVCache:
    """Reads short prompts together, and returns a cache in whose last slots they end."""
    R, T = tokens_RT.shape
    cache = start_cache(model, R, _GROUP_LENGTHS[-1])
    cache = dataclasses.replace(cache, length=jnp.int32(_GROUP_LENGTHS[-1] - T))
    return read(unpacked(model), tokens_RT, cache, segment_ids_BT=segment_ids_RT)[1]


@functools.partial(jax.jit, donate_argnames="cache")
def read_chunk(model: PackedModel, cache: KVCache, tokens_1T: Int[Array, "1 T"], segment_ids_1T: Int[Array, "1 T"],
               edits: Intervene | None = None) -> KVCache:
    """Reads a chunk of a prompt into a cache."""
    return read(unpacked(model), tokens_1T, cache, segment_ids_BT=segment_ids_1T, intervene=edits)[1]


@functools.partial(jax.jit, donate_argnames="cache")
def read_and_score(model: PackedModel, cache: KVCache, tokens_1T: Int[Array, "1 T"], segment_ids_1T: Int[Array, "1 T"],
                   next_1T: Int[Array, "1 T"],
                   edits: Intervene | None = None) -> tuple[KVCache, Float[Array, " T"], Int[Array, "T K"],
                                                            Float[Array, "T K"]]:
    """Reads a chunk, and returns the log-probabilities of the tokens ``next_1T`` that follow each
    of its tokens, the most probable tokens, and the log-probabilities of those."""
    out, cache = read(unpacked(model), tokens_1T, cache, segment_ids_BT=segment_ids_1T, intervene=edits)
    logprobs_TV = jax.nn.log_softmax(out.logits[0], axis=-1)
    top_TK, tokens_TK = jax.lax.top_k(logprobs_TV, min(MOST_ALTERNATIVES, logprobs_TV.shape[-1]))
    return cache, jnp.take_along_axis(logprobs_TV, next_1T[0][:, None], axis=-1)[:, 0], tokens_TK, top_TK


@functools.partial(jax.jit, static_argnames="capacity")
def beginning(cache: KVCache, start: Int[Array, ""], length: Int[Array, ""], *, capacity: int) -> KVCache:
    """Copies the first ``length`` tokens of a cache of one row, whose first token has the slot
    ``start``, to the first slots of a new cache."""
    copy = window(cache, start, capacity)
    is_kept_S = jnp.arange(capacity) < length
    return dataclasses.replace(copy, length=length, segment_ids_BS=jnp.where(is_kept_S, copy.segment_ids_BS, 0))


@functools.partial(jax.jit, static_argnames="capacity")
def beginning_of_row(slots: Slots, row: Int[Array, ""], start: Int[Array, ""], length: Int[Array, ""], *,
                     capacity: int) -> KVCache:
    """Copies the first ``length`` tokens of a row of the batch, as ``beginning`` does."""
    def take(stored: jax.Array) -> jax.Array:
        if stored.ndim == 0:
            return stored
        num = stored.shape[0] // slots.num_rows
        return jax.lax.dynamic_slice_in_dim(stored, row * num, num, axis=0)

    return beginning(jax.tree.map(take, slots.cache), start, length, capacity=capacity)
