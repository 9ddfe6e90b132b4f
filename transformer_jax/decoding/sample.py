"""Generates text with a decoder, or with an encoder-decoder from sources: in batches or as a
stream."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from transformer_jax.data.tokens import TextTokenizer
from transformer_jax.decoding.batch import Texts, check_family, pad_right
from transformer_jax.decoding.grammar import Grammars
from transformer_jax.decoding.keys import Keys
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.packed import Generator
from transformer_jax.decoding.prepare import prepared
from transformer_jax.decoding.rules import Processor
from transformer_jax.decoding.session import Session
from transformer_jax.decoding.speculative_session import Speculation, SpeculativeSession
from transformer_jax.models.functional import Model, trace
from transformer_jax.models.output import PairTrace, Trace
from transformer_jax.nn.sites import Intervene

_TOKENS_BETWEEN_STOP_CHECKS = 16


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result of ``generate``, with one entry per row; the samples of a prompt are next to each
    other.

    Attributes:
      texts: the text after the prompt, without the stop string; ``None`` without a tokenizer.
      tokens: the new tokens, including the token that ends a text and those of a stop string.
      logprobs: log-probability of each new token under the model, before temperature and
        truncation, in nats.
      lengths: number of new tokens.
      finish_reasons: ``"eos"``, ``"stop"`` (a stop string), ``"length"``, or ``"grammar"`` (the text
        is complete and the grammar allows nothing after it).
      acceptance_rate: with ``speculation``, the share of the guesses that were right.
      trace: if requested, the trace of each prompt (for an encoder-decoder, of the source and the
        start of the target) with its new tokens.
    """

    texts: list[str] | None
    tokens: list[list[int]]
    logprobs: list[list[float]]
    lengths: list[int]
    finish_reasons: list[str]
    acceptance_rate: float | None = None
    trace: Trace | PairTrace | None = None


def generate(model: Model, prompts: Texts, *, tokenizer: TextTokenizer | None = None,
             key: Keys | None = None, max_new_tokens: int = 100, sampling: Sampling = Sampling(),
             stop: str | Sequence[str] = (), num_samples: int = 1, start_id: int | None = None,
             end_ids: Sequence[int] | None = None, slide: bool = False, processors: Sequence[Processor] = (),
             intervene: Intervene | None = None, return_trace: bool = False,
             grammar: Grammars = None, speculation: Speculation | None = None) -> Generation:
    """Continues every prompt; an encoder-decoder reads the prompts as sources and generates their
    targets.

    A row depends only on its own prompt and key. Lengths are rounded up to powers of two and
    settings are traced, so a new length seldom compiles again and a new setting never does. With a
    tokenizer, ids of the model's vocabulary that it cannot decode are never drawn.

    The function keeps a second copy of the model's weights in the form for decoding, until the
    model is deleted or another one is decoded. To replace the original by that form, use
    ``prepare_for_decoding``.

    Args:
      model: a decoder or an encoder-decoder.
      prompts: strings (with a tokenizer) or lists of token ids. An empty string starts from
        ``<|endoftext|>``. A source that is a string gets ``</s>`` after it.
      tokenizer: encodes prompts and decodes results.
      key: a PRNG key, from which row i gets ``fold_in(key, i)``, or an array with one key per row;
        not needed for greedy decoding.
      max_new_tokens: the largest number of tokens to add to each prompt.
      sampling: how tokens are drawn.
      stop: a string, or several; a text ends where one of them appears.
      num_samples: the number of continuations of each prompt.
      start_id: the token that starts a target, for encoder-decoders. The default is the model's
        ``config.start_ids``, else the tokenizer's ``<s>``.
      end_ids: token ids that end a text; the default is the tokenizer's ``</s>`` and
        ``<|endoftext|>``.
      slide: if True, text may exceed the model's context: when a row is full, the model reads the
        last half of the row again and continues from there. It then ignores the earlier text; so do
        the rules against repetition. If False, such a request raises an error.
      processors: rules ``(logits_BV, history) -> logits_BV``, applied in order to the model's
        logits before the rules of ``sampling``: rules of ``transformer_jax.decoding.processors`` or
        your own. ``history`` is a ``transformer_jax.decoding.History``. If a rule is a registered
        dataclass, its settings are traced, and changing one does not compile again. The logits of
        tokens that are never drawn are minus infinity before the first rule.
      intervene: ``intervene(site, layer, value) -> value``, or an edit of
        ``transformer_jax.inspection``, which acts at every token that the model reads. While the
        model reads the prompts, the axis T of a value holds the prompts, padded on the left; in
        each later step, it holds one token. Edits of single positions therefore raise an error.
      return_trace: also return the trace of all layers. Rows are padded on the right with segment
        id 0: row i has the tokens of its prompt, then ``lengths[i]`` new ones. This costs one more
        forward pass over each finished text.
      grammar: a ``tj.Grammar``, or a list with one (or ``None``) for each prompt. The new text is one
        that the grammar allows, unless it ends by ``"length"`` or by a stop string; then it is the
        beginning of one. The host follows the grammar, so a call of the compiled loop draws only as
        many tokens as it can guess the allowed tokens for: one, until it has seen similar texts.
      speculation: guesses several tokens at a time, by a draft model or from the text itself, and
        lets the model check them in one pass. The tokens are those of plain decoding with the same
        key, up to the rounding of float32; the result has an ``acceptance_rate``. For decoders;
        rows are faster the more guesses are right.

    Returns:
      The texts, tokens, log-probabilities and reasons for ending, one entry per row.

    Raises:
      ValueError: if a prompt is longer than the context, or leaves no room for the new tokens and
        ``slide`` is False; for a token id outside the vocabulary, strings without a tokenizer, or
        sampling without a key; if the rows do not fit in memory; if logits are not finite; if the
        rules leave no token to draw; or for a grammar with a tokenizer whose decoder changes text.
      ImportError: for a grammar, if llguidance is not installed.
    """
    generator: Generator = check_family("generate", model, "decoder", "encoder_decoder")
    if return_trace and (slide or prepared(generator) is generator):
        raise ValueError("return_trace=True needs slide=False, and a model that is not in the form for decoding, "
                         "because it runs the model once more on each whole text")
    arguments = ("generate", generator, prompts, tokenizer, key, max_new_tokens, sampling, stop, num_samples, start_id,
                 end_ids, slide, processors, intervene, grammar)
    session = Session(*arguments) if speculation is None else SpeculativeSession(speculation, *arguments)
    while not session.finished:
        session.advance(_TOKENS_BETWEEN_STOP_CHECKS if session.stop else session.max_new_tokens)
    result = Generation(
        texts=None if tokenizer is None else [row.text for row in session.rows],
        tokens=[row.tokens for row in session.rows], logprobs=[row.logprobs for row in session.rows],
        lengths=[len(row.tokens) for row in session.rows],
        finish_reasons=[str(row.reason) for row in session.rows],
        acceptance_rate=session.acceptance_rate if isinstance(session, SpeculativeSession) else None)
    return dataclasses.replace(result, trace=_trace(generator, session)) if return_trace else result


def _trace(model: Generator, session: Session) -> Trace | PairTrace:
    """Runs the model once more over the prompts and their new tokens, and returns the trace."""
    tokens_BT, segment_ids_BT = pad_right([row.start + row.tokens for row in session.rows], session.config.max_len)
    options = {} if session.intervene is None else {"intervene": session.intervene}
    if session.sources:
        source_BS, source_ids_BS = session.sources
        return trace(model, source_BS, tokens_BT, source_segment_ids_BS=source_ids_BS,
                     target_segment_ids_BT=segment_ids_BT, **options)
    return trace(model, tokens_BT, segment_ids_BT=segment_ids_BT, **options)


def stream(model: Model, prompt: str | Sequence[int], *, tokenizer: TextTokenizer | None,
           key: Keys | None = None,
           max_new_tokens: int = 100, sampling: Sampling = Sampling(), stop: str | Sequence[str] = (),
           end_ids: Sequence[int] | None = None, slide: bool = False, processors: Sequence[Processor] = (),
           intervene: Intervene | None = None, grammar: Grammars = None) -> Iterator[str]:
    """Continues one prompt and yields the text piece by piece.

    A piece holds whole characters and never a part of a stop string. Together, the pieces are the
    text that ``generate`` returns for the same arguments.

    Args:
      model: a decoder or an encoder-decoder.
      prompt: a string or a list of token ids.
      tokenizer: encodes the prompt and decodes the result.
      key: PRNG key; not needed for greedy decoding.
      max_new_tokens: the largest number of tokens to add to the prompt.
      sampling: how tokens are drawn.
      stop: a string, or several; the text ends where one of them appears.
      end_ids: token ids that end a text, as in ``generate``; for an answer in a chat, pass
        ``tj.data.answer_end_ids(tokenizer)``.
      slide: if True, the text may exceed the model's context, as in ``generate``.
      processors: sampling rules, as in ``generate``.
      intervene: an intervention, as in ``generate``.
      grammar: the texts that may be written, as in ``generate``.

    Returns:
      An iterator over pieces of the new text. The arguments are checked before it is returned.

    Raises:
      ValueError: if there is no tokenizer, and for the same reasons as ``generate``.
    """
    if tokenizer is None:
        raise ValueError("stream yields text, so it needs a tokenizer; without one, use generate, which returns "
                         "token ids")
    generator: Generator = check_family("stream", model, "decoder", "encoder_decoder")
    prompts: Any = [prompt]
    return _pieces(Session("stream", generator, prompts, tokenizer, key, max_new_tokens, sampling, stop, 1, None,
                           end_ids, slide, processors, intervene, grammar))


def _pieces(session: Session) -> Iterator[str]:
    """Yields the text of a session as soon as no later token can change it."""
    row, num_yielded = session.rows[0], 0
    while not session.finished:
        session.advance(1)
        if row.num_final > num_yielded:
            yield row.text[num_yielded:row.num_final]
            num_yielded = row.num_final
