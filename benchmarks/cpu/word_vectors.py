"""Word vectors of this library and of gensim; run by ``python -m benchmarks words``.

Both sides train on the same words with the same settings: vectors of 100 numbers, a window of 5, 5
negatives, subsampling at 1e-3, 5 epochs, 2 cores. The time is that of training, without the
counting of words and without compilation. The vectors are compared by the analogy test and by the
correlation of the cosines of pairs of frequent words.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.peers.gensim_vectors import train_gensim
from benchmarks.timing import OtherProcess
from transformer_jax.data import read_documents
from transformer_jax.data.words import words_of

_EPOCHS, _FREQUENT, _PAIRS = 5, 5000, 200_000


def words(data: str, analogies: str, rounds: int) -> list[dict[str, Any]]:
    """Trains both sides in turns and measures their speed and how good their vectors are.

    Args:
      data: One or several texts, separated by commas.
      analogies: The path of ``questions-words.txt``.
      rounds: The number of turns.

    Returns:
      For each method and each side: the speed, the speed for each second of a core, the percentage
      of analogies that are right, and the correlation of the cosines with those of gensim.
    """
    texts = [words_of(document) for path in data.split(",") for document in read_documents(path)]
    num_words = sum(text.count(" ") for text in texts) * _EPOCHS
    rows = []
    for method in ("skip_gram", "cbow"):
        sides = {"transformer_jax": OtherProcess(_train_ours, texts, method),
                 "gensim": OtherProcess(train_gensim, [text.split() for text in texts], int(method == "skip_gram"),
                                        _EPOCHS)}
        results: dict[str, list[Any]] = {name: [] for name in sides}
        for seed in range(1, rounds + 1):
            for name, side in sides.items():
                results[name].append(side(seed))
        frequent, theirs = results["gensim"][-1][2], _cosines(*results["gensim"][-1][2:], results["gensim"][-1][2])
        for name, found in results.items():
            seconds, core_seconds = (statistics.median(run[place] for run in found) for place in (0, 1))
            scores = [100 * _accuracy(run[2], run[3], analogies) for run in found]
            cosines = _cosines(*found[0][2:], frequent)  # the first of gensim has another seed than the last
            rows.append({"method": method, "side": name, "words/s": num_words / seconds,
                         "words per second of a core": num_words / core_seconds,
                         "analogies in %": statistics.median(scores),
                         "correlation of cosines": float(np.corrcoef(cosines, theirs)[0, 1])})
        for side in sides.values():
            side.close()
    return rows


def _train_ours(pipe: Any, texts: list[str], method: str) -> None:
    """Answers every message on the pipe as ``train_gensim`` does."""
    import jax

    import transformer_jax as tj
    from transformer_jax import recipes

    config = recipes.get("word_vectors")
    config = config.replace(model=config.model.replace(method=method), sample=tj.config.SampleConfig())
    tokenizer = tj.Tokenizer.train(texts, kind="word")
    while True:
        seed, times = pipe.recv(), []

        def clock(loop: Any, times: list = times) -> None:
            if loop.step in (1, loop.config.steps):
                jax.block_until_ready(loop.state.params)
                times.append((time.perf_counter(), time.process_time()))

        steps = _steps(texts, tokenizer, config)
        bundle = tj.train(config.replace(seed=seed, steps=steps), texts, tokenizer=tokenizer, hooks=[clock])
        seconds = [(end - start) * steps / (steps - 1) for start, end in zip(*times, strict=True)]
        vectors = np.asarray(bundle.model.input[...])
        order = np.flatnonzero(np.asarray(bundle.model.output[...]).any(1))
        pipe.send((*seconds, [tokenizer.decode([token]).strip() for token in order.tolist()], vectors[order]))


def _steps(texts: list[str], tokenizer: Any, config: Any) -> int:
    """Returns the number of steps of all epochs."""
    counts = np.bincount(np.concatenate(list(tokenizer.encode_corpus(texts))), minlength=tokenizer.vocab_size)
    counts[tokenizer.special_ids] = 0
    rows = counts[counts >= config.model.min_count].sum() // config.model.max_len
    return _EPOCHS * math.ceil(rows / config.batch_size)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _accuracy(names: list[str], vectors: np.ndarray, path: str) -> float:
    """Returns the accuracy at analogies, by the same few lines for both sides."""
    places, unit_VD = {name: place for place, name in enumerate(names)}, _unit(vectors)
    with open(path, encoding="utf-8") as lines:
        questions = [line.lower().split() for line in lines if not line.startswith(":")]
    asked = np.array([[places[word] for word in words] for words in questions if all(word in places for word in words)])
    right = 0
    for part in np.array_split(asked, math.ceil(len(asked) / 500)):
        scores = (unit_VD[part[:, 1]] - unit_VD[part[:, 0]] + unit_VD[part[:, 2]]) @ unit_VD.T
        np.put_along_axis(scores, part[:, :3], -np.inf, axis=1)
        right += int((scores.argmax(1) == part[:, 3]).sum())
    return right / len(asked)


def _cosines(names: list[str], vectors: np.ndarray, frequent: list[str]) -> np.ndarray:
    """Returns the cosines of random pairs of the first words of ``frequent``."""
    places = {name: place for place, name in enumerate(names)}
    unit_VD = _unit(vectors)[[places[name] for name in frequent[:_FREQUENT]]]
    first, second = np.random.default_rng(0).choice(len(unit_VD), (2, _PAIRS))
    is_pair = first != second
    return (unit_VD[first[is_pair]] * unit_VD[second[is_pair]]).sum(1)
