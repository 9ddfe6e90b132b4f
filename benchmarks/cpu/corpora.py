"""Deduplication and the quality filter on real texts: planted duplicates, and held-out examples."""

from __future__ import annotations

import pathlib
import random
import time
from typing import Any

import numpy as np

from transformer_jax.data import QualityClassifier, deduplicate, read_documents
from transformer_jax.data.deduplication import shingles
from transformer_jax.data.quality import is_kept

_WORDS = 200  # of a document
_CHANGES = 25  # the most words that are replaced in a near duplicate


def corpora(folder: str) -> list[dict[str, Any]]:
    """Cuts novels, tales and reviews into documents of 200 words, plants duplicates of 10 % of
    them, and measures what is found. Then it filters novels from reviews.

    Args:
      folder: The folder that holds ``english_novels``, ``machado_tales`` and ``movie_reviews``.

    Returns:
      The rows of the result.
    """
    root = pathlib.Path(folder)
    novels, tales, reviews = (_pieces(root / name) for name in (
        "english_novels/*.txt", "machado_tales/contos.txt", "movie_reviews/reviews.jsonl.gz"))
    return [*_planted([*novels, *tales, *reviews]), _filtered(novels, reviews)]


def _pieces(path: pathlib.Path) -> list[str]:
    """Cuts the documents of files into pieces of 200 words; the rest of each document is left
    out."""
    found = []
    for document in read_documents(path):
        words = document.split()
        found += [" ".join(words[i:i + _WORDS]) for i in range(0, len(words) - _WORDS + 1, _WORDS)]
    return found


def _planted(texts: list[str]) -> list[dict[str, Any]]:
    """Plants exact and near duplicates, and compares the result with the exact similarities."""
    draw = random.Random(0)
    vocabulary = texts[0].split() + texts[-1].split()
    sources = draw.sample(range(len(texts)), len(texts) // 10)
    planted = []
    for place, source in enumerate(sources):
        words = texts[source].split()
        for position in draw.sample(range(len(words)), place % (_CHANGES + 1)):
            words[position] = draw.choice(vocabulary)
        planted.append("\n".join(words).upper() if place % (_CHANGES + 1) == 0 else " ".join(words))
    everything = [*texts, *planted]
    begin = time.perf_counter()
    found = deduplicate(everything)
    seconds = time.perf_counter() - begin
    exact = [_similarity(texts[source], text) for source, text in zip(sources, planted, strict=True)]
    removed = {duplicate.index for duplicate in found.duplicates}
    rows: list[dict[str, Any]] = [{
        "what": f"{len(everything):,} documents", "MB": sum(len(text.encode()) for text in everything) / 1e6,
        "seconds": seconds, "removed": len(removed), "removed that were not planted":
        sum(number < len(texts) for number in removed)}]
    for low, high in ((0.0, 0.6), (0.6, 0.7), (0.7, 0.75), (0.75, 0.8), (0.8, 0.85), (0.85, 0.9), (0.9, 1.0)):
        hits = [len(texts) + place in removed for place, value in enumerate(exact) if low <= value < high]
        rows.append({"what": f"exact similarity in [{low}, {high})", "planted": len(hits), "found": sum(hits)})
    equal = [len(texts) + place in removed for place, value in enumerate(exact) if value == 1]
    rows.append({"what": "exact duplicates", "planted": len(equal), "found": sum(equal)})
    pairs = [_similarity(everything[pair.index], everything[pair.of]) for pair in found.duplicates]
    should = {len(texts) + place for place, value in enumerate(exact) if value >= 0.8}
    rows.append({"what": "recall of planted similarities of at least 0.8",
                 "value": len(should & removed) / len(should)})
    rows.append({"what": "precision: removed pairs with a similarity of at least 0.8",
                 "value": float(np.mean(np.array(pairs) >= 0.8)), "smallest": min(pairs)})
    return rows


def _similarity(a: str, b: str) -> float:
    """The exact Jaccard similarity."""
    first, second = set(shingles(a)), set(shingles(b))
    return len(first & second) / len(first | second)


def _filtered(good: list[str], bad: list[str]) -> dict[str, Any]:
    """Trains the filter on half of the documents, and filters the other half."""
    begin = time.perf_counter()
    classifier = QualityClassifier.train(good[::2], bad[::2])
    seconds = time.perf_counter() - begin
    kept, right = [], []
    for label, texts in ((True, good[1::2]), (False, bad[1::2])):
        scores = classifier(texts)
        right.append(float(np.mean((scores > 0.5) == label)))
        kept.append(float(np.mean([is_kept(float(score), number) for number, score in enumerate(scores)])))
    return {"what": f"quality filter, {len(good) + len(bad):,} documents", "seconds of training": seconds,
            "accuracy on held-out novels": right[0], "on held-out reviews": right[1], "novels kept": kept[0],
            "reviews kept": kept[1]}
