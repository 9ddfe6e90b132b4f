"""The compiled part of serving: a batch whose rows join and leave between steps.

All rows append at the same slot of the cache, as in ``transformer_jax.decoding.loop``. A row that
joins is placed so that its last token has that slot, with empty slots before it. When the slots are
used up, all rows are moved towards the first slot.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from transformer_jax.decoding.logits import Settings
from transformer_jax.decoding.loop import draw, read
from transformer_jax.decoding.mask_table import MaskTable
from transformer_jax.decoding.packed import PackedModel, unpacked
from transformer_jax.decoding.products import JitByRows
from transformer_jax.decoding.rules import History, Processor
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.sites import Intervene

MOST_STEPS = 32  # of one call
MOST_ALTERNATIVES = 20  # tokens whose log-probability is returned with each new token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The rows of the running batch.

    Attributes:
      cache: keys and values of all tokens except the last one of each row.
      history_BS: token ids, in the slots of the cache; the last token of each row has the slot
        ``cache.length``.
      num_new_B1: the number of tokens that were drawn for each row.
      keys_B: one PRNG key per row.
      settings: the sampling settings, with one entry per row.
    """

    cache: KVCache
    history_BS: Int[Array, "B S"]
    num_new_B1: Int[Array, "B 1"]
    keys_B: Key[Array, " B"]
    settings: Settings

    @property
    def num_rows(self) -> int:
        """The number of rows, whether they are in use or not."""
        return self.history_BS.shape[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """The tokens of one call of ``decode``, ``[MOST_STEPS, B]``.

    Attributes:
      tokens_NB: the tokens.
      logprobs_NB: their log-probabilities under the model, see ``transformer_jax.decoding.loop``.
      top_tokens_NBK: the most probable tokens of each step, if they were requested.
      top_logprobs_NBK: the log-probabilities of these tokens.
    """

    tokens_NB: Int[Array, "N B"]
    logprobs_NB: Float[Array, "N B"]
    top_tokens_NBK: Int[Array, "N B K"]
    top_logprobs_NBK: Float[Array, "N B K"]


@functools.partial(jax.jit, static_argnums=(1, 2))
def empty(model: PackedModel, num_rows: int, capacity: int, settings: Settings) -> Slots:
    """Makes a batch without requests.

    Args:
      model: the model, in the form for decoding.
      num_rows: the number of rows.
      capacity: the number of slots of each row.
      settings: the settings of any row, which give the shapes.
    """
    return Slots(cache=start_cache(model, num_rows, capacity),
                 history_BS=jnp.zeros((num_rows, capacity), jnp.int32),
                 num_new_B1=jnp.zeros((num_rows, 1), jnp.int32), keys_B=jax.random.split(jax.random.key(0), num_rows),
                 settings=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_rows, *np.shape(leaf))), settings))


@functools.partial(jax.jit, static_argnums=(1, 2))
def start_cache(model: PackedModel, num_rows: int, capacity: int) -> KVCache:
    """Makes an empty cache, in which layers with a sliding window keep all tokens too, so that rows
    can be moved, and tokens discarded."""
    decoder: Any = unpacked(model)
    return decoder.start_cache(num_rows, capacity, keeps_all=True)


def settings_of_row(settings: Settings) -> Settings:
    """Converts the settings of a request to arrays: numbers to ``[1]``, and so to ``[B, 1]`` in a
    batch."""
    return jax.tree.map(lambda leaf: np.atleast_1d(np.asarray(leaf, np.float32 if isinstance(leaf, float) else None)),
                        settings)


@functools.partial(JitByRows, donate_argnames="slots")
def decode(model: PackedModel, slots: Slots, is_active_B: Bool[Array, " B"], limit: Int[Array, ""],
           wants_alternatives: Bool[Array, ""], masks: tuple[MaskTable, Int[Array, " B"]] | None = None,
           edits: Intervene | None = None) -> tuple[Slots, Drawn]:
    """Draws up to ``limit`` tokens of every active row; fewer, if all rows end before.

    Args:
      model: the model, in the form for decoding.
      slots: the batch. The cache must have room for ``limit`` tokens.
      is_active_B: True for the rows in use.
      limit: the number of steps, at most ``MOST_STEPS``.
      wants_alternatives: whether to return the most probable tokens of each step.
      masks: the masks of grammars, and the place of each row among them. Drawing stops where no
        mask was guessed.
      edits: an intervention that changes each row in its own way.

    Returns:
      The batch and the tokens.
    """
    generator: Any = unpacked(model)
    B, vocab_size = slots.num_rows, slots.settings.ends_V.shape[-1]
    table, places_B = (None, jnp.zeros(B, jnp.int32)) if masks is None else masks
    num_alternatives = min(MOST_ALTERNATIVES, vocab_size)
    drawn = Drawn(*(jnp.zeros((MOST_STEPS, B, *shape), dtype) for shape, dtype in (
        ((), jnp.int32), ((), jnp.float32), ((num_alternatives,), jnp.int32), ((num_alternatives,), jnp.float32))))

    def alternatives(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
        top_BK, tokens_BK = jax.lax.top_k(logits_BV, num_alternatives)
        return tokens_BK, top_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)

    def no_alternatives(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((B, num_alternatives), jnp.int32), jnp.zeros((B, num_alternatives), jnp.float32)

    def goes_on(carry: tuple[jax.Array, ...]) -> jax.Array:
        index, places_B, is_active_B, *_ = carry
        return (index < limit) & is_active_B.any() & (MaskTable.is_known(places_B) | ~is_active_B).all()

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        index, places_B, is_active_B, slots, drawn = carry
        logits_BV, slots = _logits(generator, slots, is_active_B, edits)
        rules = () if table is None else (table.rule(places_B),)
        slots, token_B, logprob_B, is_end_B = _draw(slots, logits_BV, rules)
        rows = (token_B, logprob_B, *jax.lax.cond(wants_alternatives, alternatives, no_alternatives, logits_BV))
        names = [field.name for field in dataclasses.fields(Drawn)]
        drawn = Drawn(*(jax.lax.dynamic_update_index_in_dim(getattr(drawn, name), row, index, 0)
                        for name, row in zip(names, rows, strict=True)))
        if table is not None:
            places_B = table.after(places_B, token_B)
        return index + 1, places_B, is_active_B & ~is_end_B & ~MaskTable.has_ended(places_B), slots, drawn

    *_, slots, drawn = jax.lax.while_loop(goes_on, step, (jnp.int32(0), places_B, is_active_B, slots, drawn))
    return slots, drawn


def _logits(model: Any, slots: Slots, is_active_B: jax.Array,
            edits: Intervene | None) -> tuple[jax.Array, Slots]:
    """Reads the last token of every active row, and returns the logits of the next ones."""
    last_B1 = jax.lax.dynamic_slice_in_dim(slots.history_BS, slots.cache.length, 1, axis=1)
    out, cache = read(model, last_B1, slots.cache, segment_ids_BT=is_active_B[:, None].astype(jnp.int32),
                      intervene=edits)
    return out.logits[:, -1], dataclasses.replace(slots, cache=cache)


def _draw(slots: Slots, logits_BV: jax.Array,
          rules: tuple[Processor, ...]) -> tuple[Slots, jax.Array, jax.Array, jax.Array]:
    """Draws the next token of every row. Returns the batch, the tokens, their log-probabilities,
    and True for rows that end there."""
    settings = slots.settings
    history = History(slots.history_BS, slots.cache.segment_ids_BS != 0, slots.num_new_B1, settings.ends_V)
    token_B, logprob_B = draw(logits_BV, history, slots.keys_B, settings, rules)
    is_end_B = jnp.take_along_axis(jnp.asarray(settings.ends_V), token_B[:, None], axis=1)[:, 0]
    history_BS = jax.lax.dynamic_update_slice_in_dim(slots.history_BS, token_B[:, None], slots.cache.length, axis=1)
    return (dataclasses.replace(slots, history_BS=history_BS, num_new_B1=slots.num_new_B1 + 1), token_B, logprob_B,
            is_end_B | ~(logprob_B < jnp.inf))


@functools.partial(jax.jit, donate_argnames="slots")
def discard(slots: Slots, num_tokens: Int[Array, ""]) -> Slots:
    """Removes the last ``num_tokens`` tokens of every row, which are then drawn again."""
    return dataclasses.replace(slots, cache=slots.cache.without_last(num_tokens),
                               num_new_B1=slots.num_new_B1 - num_tokens)


@functools.partial(jax.jit, donate_argnames="slots")
def join(slots: Slots, rows_R: Int[Array, " R"], prompts: KVCache, shift: Int[Array, ""], tokens_RS: Int[Array, "R S"],
         keys_R: UInt32[Array, "R ..."], settings: Settings) -> Slots:
    """Puts requests into rows.

    Args:
      slots: the batch.
      rows_R: the row of each request; one that does not exist for an entry that is no request.
      prompts: the cache with the tokens of the prompts, all of which end at the same slot. Their
        last tokens are left out, because the next step reads them.
      shift: the slot of a token in ``prompts``, less its slot in the batch.
      tokens_RS: the rows of ``history_BS``.
      keys_R: the data of the rows' PRNG keys.
      settings: the settings of the requests, each in the form of ``settings_of_row``, stacked.

    Returns:
      The batch.
    """
    placed = window(prompts, shift, slots.cache.capacity)
    is_before_S = jnp.arange(slots.cache.capacity) < slots.cache.length
    placed = dataclasses.replace(placed, segment_ids_BS=jnp.where(is_before_S, placed.segment_ids_BS, 0))

    def put(stored: jax.Array, new: jax.Array) -> jax.Array:
        return stored.at[rows_R].set(new, mode="drop")

    def put_cached(stored: jax.Array, new: jax.Array) -> jax.Array:
        if stored.ndim == 0:  # the number of slots in use is the same for all rows
            return stored
        by_row = stored.reshape(slots.num_rows, -1, *stored.shape[1:])
        return put(by_row, new.reshape(len(rows_R), *by_row.shape[1:])).reshape(stored.shape)

    keys = jax.random.wrap_key_data(keys_R, impl=jax.random.key_impl(slots.keys_B))
    return Slots(cache=jax.tree.map(put_cached, slots.cache, placed), history_BS=put(slots.history_BS, tokens_RS),
                 num_new_B1=put(slots.num_new_B1, jnp.zeros((len(rows_R), 1), jnp.int32)),
                 keys_B=put(slots.keys_B, keys), settings=jax.tree.map(put, slots.settings, settings))


@functools.partial(jax.jit, static_argnames="capacity")
def moved(slots: Slots, rows_B: Int[Array, " B"] | None, length: Int[Array, ""], *, capacity: int) -> Slots:
    """Moves all rows so that ``length`` slots are in use, and changes the shape of the batch.

    Args:
      slots: the batch.
      rows_B: the old row of each new row; ``None`` keeps the rows.
      length: the new number of slots in use, at least as many as the longest row has tokens.
      capacity: the new number of slots.

    Returns:
      The batch.
    """
    start = slots.cache.length - length

    def take(leaf: Any) -> Any:
        return leaf if rows_B is None else leaf[rows_B]

    def take_cached(stored: jax.Array) -> jax.Array:
        if stored.ndim == 0 or rows_B is None:
            return stored
        return stored.reshape(slots.num_rows, -1, *stored.shape[1:])[rows_B].reshape(-1, *stored.shape[1:])

    cache = dataclasses.replace(window(jax.tree.map(take_cached, slots.cache), start, capacity), length=length)
    return Slots(cache=cache, history_BS=_window(take(slots.history_BS), start, capacity),
                 num_new_B1=take(slots.num_new_B1), keys_B=take(slots.keys_B),
                 settings=jax.tree.map(take, slots.settings))


def window(cache: KVCache, start: jax.Array, size: int) -> KVCache:
    """Returns ``size`` slots of a cache from slot ``start``, which may be negative.

    Slots outside of the cache are empty.

    Args:
      cache: the cache.
      start: the first slot.
      size: the number of slots.

    Returns:
      The cache, with its old ``length``.
    """
    return jax.tree.map(lambda stored: stored if stored.ndim == 0 else _window(stored, start, size), cache)


def _window(stored: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Returns a window of the slots of one array, ``[rows, S, ...]``, with zeros outside of it."""
    padding = ((0, 0), (size, size), *((0, 0) for _ in stored.shape[2:]))
    start = jnp.clip(start + size, 0, stored.shape[1] + size)
    return jax.lax.dynamic_slice_in_dim(jnp.pad(stored, padding), start, size, axis=1)
