"""Beam search: the most probable continuations, compiled, without ever copying a cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding.batch import (
    Texts,
    bucket,
    check_family,
    encode_prompts,
    encode_sources,
    ending_ids,
    first_tokens,
    pad_left,
    pad_right,
)
from transformer_jax.decoding.beam_loop import Finished, Rules, search
from transformer_jax.decoding.loop import Generator, Sources
from transformer_jax.decoding.prepare import prepared
from transformer_jax.decoding.rules import check_intervention
from transformer_jax.models.functional import check_tokens
from transformer_jax.nn.sites import Intervene

_PENALTIES = ("gnmt", "length")
_ROOM_BEYOND_SOURCE = 50


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One result of a search.

    Attributes:
      text: without the end-of-text token; ``None`` without a tokenizer.
      tokens: the new tokens, the one that ends the text included.
      score: ``logprob`` over the length penalty; what hypotheses are ranked by.
      logprob: log P of the tokens under the model.
      finish_reason: ``"eos"``, or ``"length"`` when it was cut off.
    """

    text: str | None
    tokens: list[int]
    score: float
    logprob: float
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """What :func:`beam_search` returns.

    Attributes:
      n_best: for each source, its hypotheses, the best first.
    """

    n_best: list[list[Hypothesis]]

    @property
    def texts(self) -> list[str | None]:
        """The best text of each source."""
        return [hypotheses[0].text for hypotheses in self.n_best]

    @property
    def tokens(self) -> list[list[int]]:
        """The best tokens of each source."""
        return [hypotheses[0].tokens for hypotheses in self.n_best]

    @property
    def scores(self) -> list[float]:
        """The best score of each source."""
        return [hypotheses[0].score for hypotheses in self.n_best]


def beam_search(model: Generator, sources: Texts, *, tokenizer: Tokenizer | None = None, beam_size: int = 4,
                length_penalty: float = 0.6, penalty: str = "gnmt", n_best: int = 1, max_new_tokens: int | None = None,
                start_id: int | None = None, end_ids: Sequence[int] | None = None,
                intervene: Intervene | None = None) -> BeamSearch:
    """Searches the most probable target of every source, or continuation of every prompt of a
    decoder.

    At each step the ``beam_size`` best extensions of all hypotheses are kept; of these, the ones
    that end are set aside, and the others go on. A search stops as soon as no hypothesis that goes
    on could still enter the n best: log-probabilities only fall, so none can score above what it
    has, divided by the largest penalty. Hypotheses that reach ``max_new_tokens`` are cut off and
    compete by their scores. A beam of 1 is greedy decoding.

    Source: Wu et al. (2016), GNMT, section 7, for the penalty.

    Args:
      model: an encoder-decoder or a decoder.
      sources: strings (with a tokenizer), which an encoder reads with ``</s>`` after them, or lists
        of token ids.
      tokenizer: the model's.
      beam_size: hypotheses kept at each step.
      length_penalty: the exponent alpha, 0 or more; 0 ranks by log P, which favours short texts.
      penalty: ``"gnmt"`` divides log P by ((5 + length) / 6)^alpha, ``"length"`` by length^alpha.
      n_best: hypotheses to return, at most ``beam_size``.
      max_new_tokens: by default the longest source's tokens and 50 (Vaswani et al., 2017), as far
        as the model's context goes.
      start_id: the token before the first of a target; by default the model's ``config.start_ids``,
        else the tokenizer's ``<s>``. For encoder-decoders.
      end_ids: token ids that end a text; by default the tokenizer's ``</s>`` and ``<|endoftext|>``.
      intervene: as in :func:`generate`; after the prompt, the axis T of a value is the hypotheses
        of a source.

    Raises:
      ValueError: for a setting out of range, a source or prompt that is too long, a token id
        outside the vocabulary, an encoder, or a model whose attention depends on the distance in
        the cache (sliding windows).
    """
    check_family("beam_search", model, "decoder", "encoder_decoder")
    config = model.config
    if beam_size < 1 or beam_size > config.vocab_size:
        raise ValueError(f"beam_size={beam_size} must be from 1 to the {config.vocab_size} tokens of the vocabulary")
    if not 1 <= n_best <= beam_size:
        raise ValueError(f"n_best={n_best} must be from 1 to beam_size={beam_size}")
    if not 0 <= length_penalty < np.inf:
        raise ValueError(f"length_penalty={length_penalty} must be 0 (off) or positive")
    if penalty not in _PENALTIES:
        raise ValueError(f"penalty={penalty!r} is not one of {', '.join(_PENALTIES)}")
    if config.sliding_window is not None:
        raise ValueError("beam search keeps all hypotheses in one cache, where distances are not those of the text: it "
                         "cannot serve sliding_window; use generate")
    encoded_sources: Sources | tuple[()] = ()
    if model.reads_sources:
        rows = encode_sources(sources, tokenizer, config.vocab_size)
        encoded_sources = pad_right(rows, config.max_len)
        prompts = [first_tokens(start_id, config, tokenizer)] * len(rows)
    else:
        if start_id is not None:
            raise ValueError("start_id starts the targets of an encoder-decoder; a decoder has its prompts")
        prompts = rows = encode_prompts(sources, tokenizer, config.vocab_size)
    longest = max(map(len, prompts))
    room = config.max_len - longest
    if room < 1:
        raise ValueError(f"a prompt of {longest} tokens leaves no room in the model's context of {config.max_len}; "
                         "shorten it")
    if max_new_tokens is None:
        max_new_tokens = min(max(map(len, rows)) + _ROOM_BEYOND_SOURCE, room)
    if not 1 <= max_new_tokens <= room:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be from 1 to the {room} that the model's context of "
                         f"{config.max_len} leaves after {longest}")
    width = 1 if longest == 1 else bucket(longest)
    ends = list(ending_ids(end_ids, tokenizer))
    check_tokens(np.asarray(ends, np.int64), config.vocab_size)
    ends_V = np.zeros(config.vocab_size, bool)
    ends_V[ends] = True
    banned_V = None
    if config.banned_ids:
        banned_V = np.zeros(config.vocab_size, bool)
        banned_V[list(config.banned_ids)] = True
    rules = Rules(ends_V=ends_V, banned_V=banned_V, alpha=np.float32(length_penalty), limit=np.int32(max_new_tokens),
                  penalty=penalty, n_best=n_best)
    found = search(prepared(model), *pad_left(prompts, width), encoded_sources, rules, beam_size,
                   check_intervention(intervene, model))
    return BeamSearch([[_hypothesis(one, rank, ends_V, tokenizer) for rank in range(n_best)] for one in found])


def _hypothesis(found: Finished, rank: int, ends_V: np.ndarray, tokenizer: Tokenizer | None) -> Hypothesis:
    tokens = found.tokens_BKT[rank, :found.lengths_BK[rank]].tolist()
    ended = bool(tokens) and bool(ends_V[tokens[-1]])
    text = None if tokenizer is None else tokenizer.decode(tokens[:-1] if ended else tokens)
    return Hypothesis(text=text, tokens=tokens, score=float(found.scores_BK[rank]),
                      logprob=float(found.logprobs_BK[rank]), finish_reason="eos" if ended else "length")
