"""The checked arguments that ``generate``, ``stream`` and ``beam_search`` have in common."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from transformer_jax.config import ModelConfig
from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.decoding.batch import (
    Padded,
    Texts,
    encode_prompts,
    encode_sources,
    ending_ids,
    first_tokens,
    never_drawn,
    pad_right,
    token_ids,
    vocab_size_of,
    whole_number,
)
from transformer_jax.decoding.packed import Generator

# Approximate memory of one token in Python lists; a row takes about ten times as much.
_HOST_BYTES = 100


@dataclasses.dataclass(frozen=True)
class Request:
    """Checked prompts or sources, as token ids.

    Attributes:
      config: the model's config.
      vocab_size: the size of the model's vocabulary.
      sources: the token ids that the encoder of an encoder-decoder reads; empty for a decoder.
      starts: the tokens before the new ones of each text: a prompt, or the start of a target.
      ends: token ids that end a text.
      excluded_V: True for tokens that are never drawn: those that the tokenizer cannot decode
        (except those that end a text), and those that the model's config bans.
    """

    config: ModelConfig
    vocab_size: int
    sources: list[list[int]]
    starts: list[list[int]]
    ends: list[int]
    excluded_V: Bool[np.ndarray, " V"]

    @classmethod
    def of(cls, model: Generator, texts: Texts, tokenizer: TextTokenizer | None,
           start_id: int | None, end_ids: Iterable[int] | None) -> Request:
        """Checks and encodes the arguments; see ``transformer_jax.generate`` for them."""
        config, vocab_size = model.config, vocab_size_of(model)
        sources = []
        if model.reads_sources:
            sources = encode_sources(texts, tokenizer, vocab_size)
            start_id = None if start_id is None else whole_number("start_id", start_id, least=-1)
            starts = [first_tokens(start_id, config, tokenizer) for _ in sources]
        else:
            if start_id is not None:
                raise ValueError("start_id starts the targets of an encoder-decoder; leave it out for a decoder")
            starts = encode_prompts(texts, tokenizer, vocab_size)
        longest = max(map(len, starts))
        if longest > config.max_len - 1:
            raise ValueError(f"a prompt of {longest} tokens leaves no room in the model's context of {config.max_len}; "
                             "shorten it")
        ends = token_ids("end_ids", ending_ids(end_ids, tokenizer), None if end_ids is None else vocab_size)
        ends = [token for token in ends if token < vocab_size]  # a tokenizer may have more tokens than the model
        excluded_V = never_drawn(config, tokenizer, ends)
        if excluded_V.all():
            raise ValueError(f"the model's config.banned_ids leave none of {vocab_size} tokens to draw")
        return cls(config, vocab_size, sources, starts, ends, excluded_V)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt or start of a target."""
        return max(map(len, self.starts))

    @property
    def longest_source(self) -> int:
        """Number of tokens of the longest source; 0 for a decoder."""
        return max(map(len, self.sources), default=0)

    @property
    def room(self) -> int:
        """Number of new tokens for which the model's context has room."""
        return self.config.max_len - self.longest

    @property
    def boundary(self) -> int | None:
        """The length beyond which the model rotates all positions of a text differently (see
        ``transformer_jax.config.RopeScaling``); ``None`` if there is none."""
        if not isinstance(self.config, ModelConfig):
            return None
        lengths = [place.rope_scaling.boundary for place in self.config.of_places()]
        return min((length for length in lengths if length is not None), default=None)

    def padded_sources(self, num_samples: int = 1) -> Padded | tuple[()]:
        """Returns the padded sources for the encoder, each repeated ``num_samples`` times; ``()``
        for a decoder."""
        if not self.sources:
            return ()
        return pad_right([source for source in self.sources for _ in range(num_samples)], self.config.max_source_len)

    def check_memory(self, name: str, rows_each: int, slots: int) -> None:
        """Raises ValueError if the keys, values and logits of all rows would not fit in memory.

        Args:
          name: the argument that sets the number of rows of each text, for the message.
          rows_each: the number of rows of each text.
          slots: the number of cache slots of each row.
        """
        config = self.config
        bytes_per_slot = config.cached_per_token * jnp.dtype(config.dtype).itemsize
        bytes_per_row = slots * (bytes_per_slot + _HOST_BYTES) + 4 * self.vocab_size + 10 * _HOST_BYTES
        memory, num_texts = _memory(), len(self.starts)
        needed = num_texts * rows_each * bytes_per_row
        if needed > memory:
            raise ValueError(
                f"{name}={rows_each} for each of {num_texts} texts needs {needed / 2**30:,.0f} GiB for "
                f"keys, values and logits, but there are {memory / 2**30:,.0f} GiB; ask for at most "
                f"{name}={memory // (num_texts * bytes_per_row)}, or for fewer texts at a time")


def _memory() -> int:
    """Returns the memory of all local devices in bytes, or that of the machine if the devices do
    not report theirs."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in jax.local_devices()]
    return sum(limits) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
