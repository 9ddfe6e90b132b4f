"""Translation of many sentences by beam search, in batches of sentences of similar length and with
several searches at the same time."""

from __future__ import annotations

import concurrent.futures
from typing import cast

from tqdm import tqdm

from transformer_jax.config import ModelConfig
from transformer_jax.decoding.beam import Hypothesis, beam_search
from transformer_jax.decoding.logits import Sampling
from transformer_jax.decoding.sample import generate
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.tasks.inputs import tokenizer_of
from transformer_jax.training.bundle import Bundle

# A decoding step is a sequence of small matrix products, so that one search cannot keep two CPU
# cores busy.
_SEARCHES_AT_ONCE = 4


def translate(bundle: Bundle, sources: list[str], *, beam_size: int, length_penalty: float, n_best: int = 1,
              batch_size: int = 32) -> list[list[Hypothesis]]:
    """Translates sentences by beam search, in batches of sentences of similar length.

    The translation of a blank sentence is always empty; the model does not run on it.

    Args:
      bundle: A trained encoder-decoder with its tokenizer.
      sources: The sentences.
      beam_size: The number of hypotheses that beam search keeps.
      length_penalty: The exponent of the length, by which log P of a hypothesis is divided.
      n_best: The number of translations of each sentence.
      batch_size: The number of sentences in a batch.

    Returns:
      The ``n_best`` best translations of each sentence, the best first.

    Raises:
      ValueError: If beam search is asked for and the model is not a Transformer, or if a sentence
        is longer than the model can read.
    """
    if beam_size > 1 and not isinstance(bundle.config, ModelConfig):
        raise ValueError(f"a model of family {bundle.config.family!r} translates greedily, because beam search needs "
                         f"the cache of a Transformer; set beam_size=1 (now {beam_size})")
    tokenizer, model = tokenizer_of(bundle), cast(EncoderDecoder, bundle.model)
    lengths = [len(tokenizer.encode_source(source)) for source in sources]
    longest = max(lengths, default=0)
    if longest > bundle.config.max_source_len:
        num_special = sum(map(len, tokenizer.frame("source")))
        raise ValueError(f"line {lengths.index(longest) + 1} has {longest - num_special} tokens; the model reads "
                         f"{bundle.config.max_source_len - num_special} at most: shorten or split it")
    order = sorted((row for row, source in enumerate(sources) if source.strip()), key=lengths.__getitem__, reverse=True)
    blank = Hypothesis(text="", tokens=[], score=0.0, logprob=0.0, finish_reason="eos")
    found = [[blank] * n_best for _ in sources]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]

    def search(rows: list[int]) -> list[list[Hypothesis]]:
        # All batches have the same number of rows, because a new shape would compile the search
        # again.
        texts = [sources[row] for row in rows] + [""] * (len(batches[0]) - len(rows))
        if not isinstance(bundle.config, ModelConfig):
            return _greedily(bundle, texts)
        return beam_search(model, texts, tokenizer=tokenizer, beam_size=beam_size, n_best=n_best,
                           length_penalty=length_penalty, penalty="length").n_best

    with (concurrent.futures.ThreadPoolExecutor(_SEARCHES_AT_ONCE) as threads,
          tqdm(total=len(order), unit="sentence", disable=len(order) <= batch_size) as bar):
        for rows, n_bests in zip(batches, threads.map(search, batches), strict=True):
            for row, hypotheses in zip(rows, n_bests, strict=False):
                found[row] = hypotheses
            bar.update(len(rows))
    return found


def _greedily(bundle: Bundle, sources: list[str]) -> list[list[Hypothesis]]:
    """Translates sentences with the most likely token at each step."""
    room = bundle.config.max_len - 1
    found = generate(cast(EncoderDecoder, bundle.model), sources, tokenizer=tokenizer_of(bundle), max_new_tokens=room,
                     sampling=Sampling(temperature=0))
    return [[Hypothesis(text=text, tokens=tokens, score=sum(logprobs) / len(tokens), logprob=sum(logprobs),
                        finish_reason=reason)]
            for text, tokens, logprobs, reason in zip(found.texts or [], found.tokens, found.logprobs,
                                                      found.finish_reasons, strict=True)]
