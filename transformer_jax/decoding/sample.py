"""Text from a decoder, or from an encoder-decoder given sources: batched generation, streaming, stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding.batch import (
    bucket,
    check_family,
    encode_prompts,
    encode_sources,
    ending_ids,
    first_tokens,
    pad_left,
    pad_right,
)
from transformer_jax.decoding.keys import row_keys
from transformer_jax.decoding.logits import Sampling, Settings
from transformer_jax.decoding.loop import DecodeState, Generator, Sources, decode, prefill
from transformer_jax.decoding.prepare import prepared
from transformer_jax.decoding.rules import Processor, check_intervention, check_processors
from transformer_jax.models.functional import trace
from transformer_jax.models.output import PairTrace, Trace
from transformer_jax.nn.sites import Intervene

_TOKENS_BETWEEN_STOP_CHECKS = 16


@dataclasses.dataclass(frozen=True)
class Generation:
    """What :func:`generate` returns, one entry a row; the samples of a prompt are neighbours.

    Attributes:
      texts: the new text, without the stop string; ``None`` without a tokenizer.
      tokens: the new tokens, an end-of-text token or those of a stop string included.
      logprobs: log P of each new token under the model itself, before temperature and truncation.
      lengths: number of new tokens.
      finish_reasons: ``"eos"``, ``"stop"`` (a stop string) or ``"length"``.
      trace: of each prompt (of a translation, the start of its target) and its new tokens, where it was asked for.
    """

    texts: list[str] | None
    tokens: list[list[int]]
    logprobs: list[list[float]]
    lengths: list[int]
    finish_reasons: list[str]
    trace: Trace | PairTrace | None = None


def generate(model: Generator, prompts: str | Sequence[str] | Sequence[Sequence[int]], *,
             tokenizer: Tokenizer | None = None, key: jax.Array | None = None, max_new_tokens: int = 100,
             sampling: Sampling = Sampling(), stop: str | Sequence[str] = (), num_samples: int = 1,
             start_id: int | None = None, end_ids: Sequence[int] | None = None, slide: bool = False,
             processors: Sequence[Processor] = (), intervene: Intervene | None = None,
             return_trace: bool = False) -> Generation:
    """Continues every prompt; of an encoder-decoder, the prompts are the sources, and the target is generated.

    A row depends on its own prompt and key only. Lengths are rounded up to powers of two and settings are
    traced, so that a new length seldom compiles and a new setting never does.

    The model's weights are kept a second time in the form for decoding, as long as the model lives and no other
    is decoded; :func:`prepare_for_decoding` gives that form to take the place of the original.

    Args:
      model: a decoder or an encoder-decoder.
      prompts: strings (with a tokenizer) or lists of token ids; an empty string starts from ``<|endoftext|>``.
        A source that is a string is read with ``</s>`` after it.
      tokenizer: encodes prompts and decodes results.
      key: PRNG key, of which row i has ``fold_in(key, i)``, or an array of keys, one a row; not needed when greedy.
      max_new_tokens: most tokens to add to each prompt.
      sampling: how tokens are drawn.
      stop: a string, or several, that end a text where they appear.
      num_samples: continuations of each prompt.
      start_id: the token before the first of a target; by default the model's ``config.start_ids``, else the
        tokenizer's ``<s>``. For encoder-decoders.
      end_ids: token ids that end a text; by default the tokenizer's ``</s>`` and ``<|endoftext|>``.
      slide: go on past the model's context, by reading the last half of a full row anew (earlier text is then
        forgotten, also by the penalties for repetition), instead of refusing to.
      processors: rules ``(logits_BV, history) -> logits_BV``, applied in order to the model's logits before those of
        ``sampling``; ``history`` is a :class:`transformer_jax.decoding.rules.History`. A rule that is a registered
        dataclass has traced settings: changing one compiles nothing.
      intervene: ``intervene(site, layer, value) -> value`` or an edit of ``transformer_jax.inspection``, at every
        token that is read. The axis T of a value is the prompts, padded on the left, while they are read, and one
        token at each step after that; an edit of single positions is therefore refused.
      return_trace: also return the trace of all layers. Rows are padded on the right with segment id 0: row i has
        the tokens of its prompt, then ``lengths[i]`` new ones. It costs one more pass over each finished text.

    Raises:
      ValueError: for a prompt longer than the context (or one that leaves no room and ``slide`` is off), an
        unknown token id, strings without a tokenizer, or sampling without a key.
    """
    if return_trace and (slide or prepared(model) is model):
        raise ValueError("return_trace=True needs slide=False, and a model that is not in the form for decoding: it "
                         "reads each text once more, whole")
    session = _Session(model, prompts, tokenizer, key, max_new_tokens, sampling, stop, num_samples, start_id, end_ids,
                       slide, processors, intervene)
    while not session.finished:
        session.advance(_TOKENS_BETWEEN_STOP_CHECKS if session.stop else max_new_tokens)
    result = session.result()
    return dataclasses.replace(result, trace=_trace(model, session)) if return_trace else result


def _trace(model: Generator, session: _Session) -> Trace | PairTrace:
    tokens_BT, segment_ids_BT = pad_right([start + tokens for start, tokens in zip(
        session.starts, session.tokens, strict=True)], session.config.max_len)
    options = {} if session.intervene is None else {"intervene": session.intervene}
    if session.sources:
        source_BS, source_ids_BS = session.sources
        return trace(model, source_BS, tokens_BT, source_segment_ids_BS=source_ids_BS,
                     target_segment_ids_BT=segment_ids_BT, **options)
    return trace(model, tokens_BT, segment_ids_BT=segment_ids_BT, **options)


def stream(model: Generator, prompt: str | Sequence[int], *, tokenizer: Tokenizer, key: jax.Array | None = None,
           max_new_tokens: int = 100, sampling: Sampling = Sampling(), stop: str | Sequence[str] = (),
           slide: bool = False, processors: Sequence[Processor] = (),
           intervene: Intervene | None = None) -> Iterator[str]:
    """Continues one prompt, yielding text as it comes: whole characters, never part of a stop string.

    The pieces join to the text that :func:`generate` gives for the same arguments, which are those here.
    """
    return _pieces(_Session(model, [prompt], tokenizer, key, max_new_tokens, sampling, stop, 1, None, None,
                            slide, processors, intervene))


def _pieces(session: _Session) -> Iterator[str]:
    shown = 0
    while not session.finished:
        session.advance(1)
        text = session.texts[0]
        safe = len(text) if session.finished else len(text) - _held_back(text, session.stop)
        if safe > shown:
            yield text[shown:safe]
            shown = safe


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of the text that may turn out to begin a stop string."""
    return max((size for string in stop for size in range(1, len(string)) if text.endswith(string[:size])), default=0)


class _Session:
    """Host-side bookkeeping around the compiled loop."""

    def __init__(self, model, prompts, tokenizer, key, max_new_tokens, sampling, stop, num_samples, start_id, end_ids,
                 slide, processors, intervene):
        check_family("generate", model, "decoder", "encoder_decoder")
        if max_new_tokens < 1 or num_samples < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} and num_samples={num_samples} must be at least 1")
        self.tokenizer = tokenizer
        self.stop = [stop] if isinstance(stop, str) else list(stop)
        if self.stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer; without one, pass end_ids")
        if "" in self.stop:
            raise ValueError("a stop string is empty: it would stop every text before its first token")
        self.config = model.config
        self.sources: Sources | tuple[()] = ()
        if model.reads_sources:
            if slide:
                raise ValueError("slide=True goes on past the context of a decoder; a translation has one context")
            sources = encode_sources(prompts, tokenizer, self.config.vocab_size)
            self.sources = pad_right([source for source in sources for _ in range(num_samples)], self.config.max_len)
            prompts = [first_tokens(start_id, self.config, tokenizer) for _ in sources]
        else:
            if start_id is not None:
                raise ValueError("start_id starts the targets of an encoder-decoder; a decoder has its prompts")
            prompts = encode_prompts(prompts, tokenizer, self.config.vocab_size)
        longest = max(len(prompt) for prompt in prompts)
        if longest > self.config.max_len - 1:
            raise ValueError(f"a prompt of {longest} tokens leaves no room in the model's context of "
                             f"{self.config.max_len}; shorten it")
        if longest + max_new_tokens > self.config.max_len and not slide:
            or_slide = ("" if self.sources else
                        ", or pass slide=True to go on with the last half of the context read anew")
            raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context "
                             f"of {self.config.max_len}; ask for at most {self.config.max_len - longest}{or_slide}")
        if key is None and sampling.temperature > 0:
            raise ValueError("sampling needs key=jax.random.key(seed); or be greedy with Sampling(temperature=0)")
        end_ids = ending_ids(end_ids, tokenizer)
        sampling = dataclasses.replace(sampling, banned=(*sampling.banned, *self.config.banned_ids))
        self.settings = Settings.of(sampling, self.config.vocab_size, end_ids)
        self.end_ids = set(end_ids)
        self.max_new_tokens = max_new_tokens
        self.starts = [list(prompt) for prompt in prompts for _ in range(num_samples)]
        self.contexts = list(map(list, self.starts))
        self.keys_B = row_keys(key, len(self.contexts))
        self.processors = check_processors(processors)
        self.intervene = check_intervention(intervene, model)
        self.model = prepared(model)
        self.tokens: list[list[int]] = [[] for _ in self.contexts]
        self.logprobs: list[list[float]] = [[] for _ in self.contexts]
        self.texts = ["" for _ in self.contexts]
        self.reasons: list[str | None] = [None] * len(self.contexts)
        self.num_new = 0
        self.next_slot = self.end_slot = 0  # of the cache: where the next token goes, and where the context is full
        self.state: DecodeState | None = None
        self._decoders = None if tokenizer is None else [tokenizer.stream_decoder() for _ in self.contexts]

    @property
    def finished(self) -> bool:
        return all(reason is not None for reason in self.reasons)

    def advance(self, num_tokens: int) -> None:
        """Draws up to ``num_tokens`` more of every unfinished row."""
        target = min(self.num_new + num_tokens, self.max_new_tokens)
        while self.num_new < target and not self.finished:
            room = self.end_slot - self.next_slot
            if room == 0:
                self._read()
            else:
                self.state = decode(self.model, self.state, self.settings, jnp.int32(min(target, self.num_new + room)),
                                    self.processors, self.intervene)
            self._collect()

    def _read(self) -> None:
        """Reads every row, but the last half only of a row that fills the context, and draws its next token."""
        max_len = self.config.max_len
        for row, context in enumerate(self.contexts):
            if self.reasons[row] is not None:
                self.contexts[row] = context[-1:]  # ended: as short as can be
            elif len(context) == max_len:
                self.contexts[row] = context[-(max_len // 2):]
        longest = max(map(len, self.contexts))
        padded = bucket(longest)
        self.next_slot, self.end_slot = padded, padded + min(self.max_new_tokens - self.num_new, max_len - longest)
        self.state = prefill(self.model, *pad_left(self.contexts, padded), self.keys_B, jnp.int32(self.num_new),
                             self.settings, self.sources, self.processors, self.intervene,
                             capacity=bucket(self.end_slot))
        if any(self.reasons):
            self.state = dataclasses.replace(self.state, done_B=self.state.done_B | self._ended())

    def _ended(self) -> jax.Array:
        return jnp.asarray([reason is not None for reason in self.reasons])

    def _collect(self) -> None:
        """Takes the newly drawn tokens to the host and ends rows that met an end token, a stop string or the limit."""
        state = self.state
        num_drawn = int(state.num_new) - self.num_new
        drawn = slice(self.next_slot, self.next_slot + num_drawn)
        history_BS, logprobs_BS = (np.asarray(x)[:, drawn] for x in (state.history_BS, state.logprobs_BS))
        self.next_slot += num_drawn
        self.num_new += num_drawn
        stopped = False
        for row, reason in enumerate(self.reasons):
            for token, logprob in zip(history_BS[row].tolist(), logprobs_BS[row].tolist(), strict=True):
                if self.reasons[row] is not None:
                    break
                self.contexts[row].append(token)
                self.tokens[row].append(token)
                self.logprobs[row].append(logprob)
                self._show(row, token)
            stopped |= reason is None and self.reasons[row] == "stop"
        if self.num_new == self.max_new_tokens:
            self._end_by_length()
        if stopped:
            self.state = dataclasses.replace(state, done_B=state.done_B | self._ended())

    def _show(self, row: int, token: int) -> None:
        if token in self.end_ids:
            self.reasons[row] = "eos"
        elif self._decoders is not None:
            self.texts[row] += self._decoders[row].push(token)
            found = [self.texts[row].find(string) for string in self.stop if string in self.texts[row]]
            if found:
                self.texts[row] = self.texts[row][:min(found)]
                self.reasons[row] = "stop"
                return
        if self.reasons[row] is not None:
            self._finish_text(row)

    def _end_by_length(self) -> None:
        for row, reason in enumerate(self.reasons):
            if reason is None:
                self.reasons[row] = "length"
                self._finish_text(row)

    def _finish_text(self, row: int) -> None:
        if self._decoders is not None:
            self.texts[row] += self._decoders[row].finish()

    def result(self) -> Generation:
        return Generation(texts=None if self.tokenizer is None else self.texts, tokens=self.tokens,
                          logprobs=self.logprobs, lengths=[len(tokens) for tokens in self.tokens],
                          finish_reasons=self.reasons)
