"""Translating many sentences: beam search over batches of similar length, several searches at
once."""

from __future__ import annotations

import concurrent.futures

from tqdm import tqdm

from transformer_jax.decoding.beam import Hypothesis, beam_search
from transformer_jax.training.bundle import Bundle

_SEARCHES_AT_ONCE = 4  # a step is a few small products after each other: one search leaves half of two cores idle


def translate(bundle: Bundle, sources: list[str], *, beam_size: int, length_penalty: float, n_best: int = 1,
              batch_size: int = 32) -> list[list[Hypothesis]]:
    """The best translations of every source, by beam search over batches of sources of similar
    length.

    A blank source has a blank translation, whatever the model would make of it.

    Args:
      bundle: a trained encoder-decoder with its tokenizer.
      sources: sentences.
      beam_size: hypotheses of beam search.
      length_penalty: exponent of the length that divides log P.
      n_best: translations of each source.
      batch_size: sources at a time.

    Raises:
      ValueError: for a source that is longer than the model can read.
    """
    lengths = [len(bundle.tokenizer.encode(source)) for source in sources]
    longest = max(lengths, default=0)
    if longest >= bundle.config.max_len:
        raise ValueError(f"line {lengths.index(longest) + 1} has {longest} tokens; the model reads "
                         f"{bundle.config.max_len - 1} at most: shorten or split it")
    order = sorted((row for row, source in enumerate(sources) if source.strip()), key=lengths.__getitem__, reverse=True)
    blank = Hypothesis(text="", tokens=[], score=0.0, logprob=0.0, finish_reason="eos")
    found = [[blank] * n_best for _ in sources]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]

    def search(rows: list[int]) -> list[list[Hypothesis]]:
        # Always the same number of rows: another one would compile anew.
        texts = [sources[row] for row in rows] + [""] * (len(batches[0]) - len(rows))
        return beam_search(bundle.model, texts, tokenizer=bundle.tokenizer, beam_size=beam_size, n_best=n_best,
                           length_penalty=length_penalty, penalty="length").n_best

    with (concurrent.futures.ThreadPoolExecutor(_SEARCHES_AT_ONCE) as threads,
          tqdm(total=len(order), unit="sentence", disable=len(order) <= batch_size) as bar):
        for rows, n_bests in zip(batches, threads.map(search, batches), strict=True):
            for row, hypotheses in zip(rows, n_bests, strict=False):
                found[row] = hypotheses
            bar.update(len(rows))
    return found
