"""Word vectors of gensim."""

from __future__ import annotations

import time
from typing import Any

_SENTENCE = 1000  # words


def train_gensim(pipe: Any, documents: list[list[str]], sg: int, epochs: int) -> None:
    """Answers every message on the pipe with a training run: seconds, seconds of all cores, words
    and vectors."""
    from gensim.models import Word2Vec

    sentences = [words[start:start + _SENTENCE] for words in documents for start in range(0, len(words), _SENTENCE)]
    while True:
        seed = pipe.recv()
        model = Word2Vec(vector_size=100, window=5, min_count=5, negative=5, sample=1e-3, sg=sg, workers=2, seed=seed)
        model.build_vocab(sentences)
        start, start_cores = time.perf_counter(), time.process_time()
        model.train(sentences, total_examples=model.corpus_count, epochs=epochs)
        pipe.send((time.perf_counter() - start, time.process_time() - start_cores, model.wv.index_to_key,
                   model.wv.vectors))
