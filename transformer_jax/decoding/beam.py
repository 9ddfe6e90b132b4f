"""Compiled beam search: finds the most probable continuations without copying the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from transformer_jax.config import ModelConfig
from transformer_jax.data.tokens import TextTokenizer, text_after
from transformer_jax.decoding.batch import Texts, bucket, check_family, decodable, pad_left, whole_number
from transformer_jax.decoding.beam_loop import Finished, Rules, search
from transformer_jax.decoding.packed import Generator
from transformer_jax.decoding.prepare import prepared
from transformer_jax.decoding.request import Request
from transformer_jax.decoding.rules import check_intervention
from transformer_jax.decoding.setting_ranges import checked_setting
from transformer_jax.models.functional import Model
from transformer_jax.nn.sites import Intervene

_PENALTIES = ("gnmt", "length")
_ROOM_BEYOND_SOURCE = 50


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """One result of a beam search.

    Attributes:
      text: the text of the new tokens after the prompt, without the token that ends a text;
        ``None`` without a tokenizer.
      tokens: the new tokens, including the one that ends the text.
      score: ``logprob`` divided by the length penalty; hypotheses are ranked by it.
      logprob: log-probability of the tokens under the model, in nats.
      finish_reason: ``"eos"``, or ``"length"`` if the hypothesis was cut off.
    """

    text: str | None
    tokens: list[int]
    score: float
    logprob: float
    finish_reason: str


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """The result of ``beam_search``.

    Attributes:
      n_best: the hypotheses of each source, the best first. There is at least one. There are fewer
        than requested if the model can write fewer texts, for example if ``max_new_tokens`` is
        small or most tokens are banned.
    """

    n_best: list[list[Hypothesis]]

    @property
    def texts(self) -> list[str | None]:
        """The best text of each source."""
        return [hypotheses[0].text for hypotheses in self.n_best]

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of the best hypothesis of each source."""
        return [hypotheses[0].tokens for hypotheses in self.n_best]

    @property
    def scores(self) -> list[float]:
        """The score of the best hypothesis of each source."""
        return [hypotheses[0].score for hypotheses in self.n_best]


def beam_search(model: Model, sources: Texts, *, tokenizer: TextTokenizer | None = None, beam_size: int = 4,
                length_penalty: float = 0.6, penalty: str = "gnmt", n_best: int = 1, max_new_tokens: int | None = None,
                start_id: int | None = None, end_ids: Sequence[int] | None = None,
                intervene: Intervene | None = None) -> BeamSearch:
    """Finds the most probable targets of every source or, for a decoder, continuations of every
    prompt.

    Each step extends all hypotheses by one token and keeps the ``beam_size`` best extensions. Those
    that end are stored as finished, and the others continue. Log-probabilities can only fall, so
    the score of a hypothesis can never exceed its present log-probability divided by the largest
    penalty. The search stops as soon as, by this bound, no unfinished hypothesis can be among the n
    best. Hypotheses that reach ``max_new_tokens`` are cut off and ranked with the others. A beam of
    1 is greedy decoding. Layers with a sliding window keep all tokens here, because the hypotheses
    of a source share its cache.

    Source: Wu et al. (2016), GNMT, section 7, for the penalty.

    Args:
      model: an encoder-decoder or a decoder.
      sources: strings (with a tokenizer) or lists of token ids. An encoder reads a string with
        ``</s>`` after it.
      tokenizer: the model's tokenizer.
      beam_size: the number of hypotheses that each step keeps.
      length_penalty: the exponent alpha, from 0 to 6; 0 ranks by log-probability, which favours
        short texts.
      penalty: ``"gnmt"`` divides the log-probability by ((5 + length) / 6)^alpha, ``"length"`` by
        length^alpha.
      n_best: the number of hypotheses to return, at most ``beam_size``.
      max_new_tokens: the largest number of new tokens. The default is the number of tokens of the
        longest source plus 50 (Vaswani et al., 2017), or what the model's context has room for.
      start_id: the token that starts a target, for encoder-decoders. The default is the model's
        ``config.start_ids``, else the tokenizer's ``<s>``.
      end_ids: token ids that end a text; the default is the tokenizer's ``</s>`` and
        ``<|endoftext|>``.
      intervene: as in ``generate``. After the prompt, the axis T of a value holds the hypotheses of
        a source.

    Returns:
      The best hypotheses of each source.

    Raises:
      ValueError: if a setting is out of range; if a source or prompt is too long; if a token id is
        outside the vocabulary; if the model is an encoder; if the hypotheses do not fit in memory;
        if logits are not finite; or if every text of a source has the probability 0.
    """
    generator: Generator = check_family("beam_search", model, "decoder", "encoder_decoder")
    request = Request.of(generator, sources, tokenizer, start_id, end_ids)
    config, vocab_size = request.config, request.vocab_size
    beam_size = whole_number("beam_size", beam_size, most=vocab_size,
                             expected=f"from 1 to the {vocab_size} tokens of the vocabulary")
    n_best = whole_number("n_best", n_best, most=beam_size, expected=f"from 1 to beam_size={beam_size}")
    length_penalty = checked_setting("length_penalty", length_penalty)
    if penalty not in _PENALTIES:
        raise ValueError(f"penalty={penalty!r} is not one of {', '.join(_PENALTIES)}")
    if not isinstance(config, ModelConfig):
        raise ValueError(f"beam_search keeps the keys of all hypotheses in one cache, which a model of family "
                         f"{config.family!r} does not have; use generate")
    if max_new_tokens is None:
        rows = request.sources or request.starts
        max_new_tokens = min(max(map(len, rows)) + _ROOM_BEYOND_SOURCE, request.room)
    max_new_tokens = whole_number("max_new_tokens", max_new_tokens, most=request.room, expected=(
        f"from 1 to {request.room}; the model's context of {config.max_len} already holds {request.longest}"))
    if request.boundary is not None and min(map(len, request.starts)) <= request.boundary < (
            request.longest + max_new_tokens):
        raise ValueError(f"beam_search cannot cross {request.boundary} tokens, beyond which this model rotates all "
                         "positions differently (rope_scaling.original_max_len); ask for fewer tokens, or use generate")
    request.check_memory("beam_size", beam_size, bucket(max_new_tokens))
    width = 1 if request.longest == 1 else bucket(request.longest)
    ends_V = np.zeros(vocab_size, bool)
    ends_V[request.ends] = True
    rules = Rules(ends_V=ends_V, banned_V=request.excluded_V if request.excluded_V.any() else None,
                  alpha=np.float32(length_penalty), limit=np.int32(max_new_tokens), penalty=penalty, n_best=n_best)
    finished = search(prepared(generator), *pad_left(request.starts, width), request.padded_sources(), rules, beam_size,
                   check_intervention(intervene, generator))
    return BeamSearch([_hypotheses(source, one, n_best, request, tokenizer) for source, one in enumerate(finished)])


def _hypotheses(source: int, found: Finished, n_best: int, request: Request,
                tokenizer: TextTokenizer | None) -> list[Hypothesis]:
    """Returns the hypotheses of one source: fewer than ``n_best`` if the search found fewer."""
    ranks = np.flatnonzero(np.asarray(found.scores_BK[:n_best]) > -np.inf)
    if not ranks.size:
        raise ValueError(f"there is no hypothesis for source {source}: after some token, all tokens that are neither "
                         "banned nor unknown to the tokenizer have the probability 0")
    return [_hypothesis(found, rank, request, request.starts[source], tokenizer) for rank in ranks.tolist()]


def _hypothesis(found: Finished, rank: int, request: Request, start: list[int],
                tokenizer: TextTokenizer | None) -> Hypothesis:
    """Converts one hypothesis from the arrays of the search, and decodes its text."""
    tokens = found.tokens_BKT[rank, :found.lengths_BK[rank]].tolist()
    ended = tokens[-1] in request.ends
    text = None
    if tokenizer is not None:
        text = text_after(tokenizer, decodable(start, tokenizer), tokens[:-1] if ended else tokens)
    return Hypothesis(text=text, tokens=tokens, score=float(found.scores_BK[rank]),
                      logprob=float(found.logprobs_BK[rank]), finish_reason="eos" if ended else "length")
