"""Nearest words and analogies of word vectors (Mikolov et al., 2013)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from transformer_jax.data.files import decode_utf8
from transformer_jax.data.words import words_of
from transformer_jax.training.bundle import Bundle

_QUESTIONS_AT_A_TIME = 512


def word_ids(bundle: Bundle, words: Sequence[str]) -> list[int | None]:
    """Finds the tokens of words.

    Args:
      bundle: Word vectors with their tokenizer.
      words: The words, in any case.

    Returns:
      The token of each word; ``None`` for a word that was not trained.
    """
    tokenizer: Any = bundle.tokenizer
    trained_V = _trained(bundle)
    found = [tokenizer.encode(words_of(word)) for word in words]
    return [tokens[0] if len(tokens) == 1 and trained_V[tokens[0]] else None for tokens in found]


def most_similar(bundle: Bundle, positive: Sequence[str], negative: Sequence[str] = (), *,
                 top: int = 10) -> list[tuple[str, float]]:
    """Finds the words whose vectors are nearest to a sum of vectors of unit length.

    Args:
      bundle: Word vectors with their tokenizer.
      positive: Words whose vectors are added, as in ``["king", "woman"]``.
      negative: Words whose vectors are subtracted, as in ``["man"]``.
      top: The number of words to return.

    Returns:
      The nearest words with their cosine similarity, the nearest first, without the given words.

    Raises:
      ValueError: If a word has no vector, or no word is given.
    """
    words = [*positive, *negative]
    if not words or isinstance(positive, str):
        raise ValueError(f"positive={positive!r} must be a list of words, such as ['king', 'woman']")
    ids = word_ids(bundle, words)
    missing = [word for word, token in zip(words, ids, strict=True) if token is None]
    if missing:
        raise ValueError(f"there is no vector of {', '.join(map(repr, missing))}: expected single words "
                         "that occur at least model.min_count times in the training text")
    unit_VD, tokens = unit_vectors(bundle), np.array(ids, int)
    signs = np.array([1.0] * len(positive) + [-1.0] * len(negative))
    target = signs @ unit_VD[tokens]
    scores = unit_VD @ (target / np.linalg.norm(target))
    scores[tokens] = -np.inf
    scores[~_trained(bundle)] = -np.inf
    best = np.argsort(-scores)[:top]
    tokenizer: Any = bundle.tokenizer
    return [(tokenizer.decode([int(token)]).strip(), float(scores[token])) for token in best
            if np.isfinite(scores[token])]


def analogy_accuracy(bundle: Bundle, path: str | pathlib.Path) -> dict[str, float]:
    """Measures how often the vector of the fourth word of an analogy is the nearest one to the sum
    of the others: b - a + c.

    Args:
      bundle: Word vectors with their tokenizer.
      path: A text file with four words in each line, and lines that start with ``:`` between
        sections, as in ``questions-words.txt`` of word2vec.

    Returns:
      ``accuracy``, ``questions`` and ``skipped``: the number of questions with an unknown word.

    Raises:
      ValueError: If a line does not have four words, or no question can be asked.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; expected a file of analogies such as questions-words.txt")
    questions = []
    for number, line in enumerate(decode_utf8(path, path.read_bytes(), 0).splitlines(), start=1):
        words = line.split()
        if not words or words[0].startswith(":"):
            continue
        if len(words) != 4:
            raise ValueError(f"{path}, line {number} has {len(words)} words; expected the four words of an analogy")
        questions.append(words)
    kinds = list(dict.fromkeys(word for words in questions for word in words))
    tokens = {word: token for word, token in zip(kinds, word_ids(bundle, kinds), strict=True) if token is not None}
    asked = np.array([[tokens[word] for word in words] for words in questions if all(word in tokens for word in words)])
    if not len(asked):
        raise ValueError(f"{path} has no analogy of four words that have vectors; train on more text")
    unit_VD, right = unit_vectors(bundle), 0
    others = np.where(_trained(bundle), 0.0, -np.inf).astype(np.float32)
    for start in range(0, len(asked), _QUESTIONS_AT_A_TIME):
        part = asked[start:start + _QUESTIONS_AT_A_TIME]
        scores = (unit_VD[part[:, 1]] - unit_VD[part[:, 0]] + unit_VD[part[:, 2]]) @ unit_VD.T + others
        np.put_along_axis(scores, part[:, :3], -np.inf, axis=1)
        right += int((scores.argmax(1) == part[:, 3]).sum())
    return {"accuracy": right / len(asked), "questions": len(asked), "skipped": len(questions) - len(asked)}


def unit_vectors(bundle: Bundle) -> np.ndarray:
    """Returns the word vectors, divided by their lengths.

    Args:
      bundle: Word vectors.

    Returns:
      float32 ``[V, D]``.
    """
    model: Any = bundle.model
    vectors_VD = np.asarray(model.input[...])
    return vectors_VD / np.maximum(np.linalg.norm(vectors_VD, axis=1, keepdims=True), 1e-30)


def _trained(bundle: Bundle) -> np.ndarray:
    """Returns True for the words that training has seen: only their output vectors are not 0."""
    model: Any = bundle.model
    return np.asarray(np.asarray(model.output[...]).any(1))
