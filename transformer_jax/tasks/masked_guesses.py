"""Baselines for masked language models, which predict masked tokens by counting the tokens and the
pairs of tokens of the training text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from transformer_jax.data import LineRows, Masking, Tokenizer

NUM_GUESSES = 5

Guess = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def unigram_guesses(train: LineRows, tokenizer: Tokenizer) -> Guess:
    """Makes a baseline that predicts the most frequent tokens at every masked position.

    Args:
      train: The training rows, in which tokens are counted.
      tokenizer: The tokenizer of the rows. Its special tokens are not counted.

    Returns:
      A function from a batch to the five most frequent tokens, ``[B, P, 5]``.
    """
    best_K = _most_frequent(_ordinary(train.tokens[train.segment_ids != 0], tokenizer), tokenizer.vocab_size)
    return lambda batch: np.broadcast_to(best_K, (*batch["masked_targets"].shape, NUM_GUESSES))


def bigram_guesses(train: LineRows, tokenizer: Tokenizer) -> Guess:
    """Makes a baseline that predicts from the token to the left of each masked position.

    It predicts the five tokens that follow the left token most often. If fewer than five tokens
    follow it in the training rows, or if the left token is masked too, the most frequent tokens of
    the whole text fill the remaining places.

    Args:
      train: The training rows, in which pairs of neighbouring tokens are counted.
      tokenizer: The tokenizer of the rows. Its special tokens are not predicted.

    Returns:
      A function from a batch to five tokens for each masked position, ``[B, P, 5]``.
    """
    tokens_RT, segments_RT = train.tokens.astype(np.int64), train.segment_ids
    is_same_segment_RT = segments_RT[:, 1:] == segments_RT[:, :-1]
    followers: dict[int, list[int]] = {}
    for left, token in _pairs(tokens_RT[:, :-1][is_same_segment_RT], tokens_RT[:, 1:][is_same_segment_RT], tokenizer):
        best = followers.setdefault(left, [])
        if len(best) < NUM_GUESSES:
            best.append(token)
    frequent = unigram_guesses(train, tokenizer)({"masked_targets": np.zeros(1)})[0].tolist()
    table_VK = np.tile(np.asarray(frequent), (tokenizer.vocab_size, 1))
    for left, best in followers.items():
        table_VK[left] = (best + [token for token in frequent if token not in best])[:NUM_GUESSES]

    def guess(batch: Mapping[str, np.ndarray]) -> np.ndarray:
        left_BP = np.take_along_axis(batch["tokens"], np.maximum(batch["masked_positions"] - 1, 0), axis=1)
        return table_VK[left_BP]

    return guess


def _ordinary(tokens: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Returns the tokens that are not special tokens."""
    return tokens[Masking.of(tokenizer).is_ordinary_V[tokens]]


def _most_frequent(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns the ``NUM_GUESSES`` most frequent tokens, the most frequent first."""
    return np.argsort(-np.bincount(tokens, minlength=vocab_size), kind="stable")[:NUM_GUESSES]


def _pairs(left: np.ndarray, right: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Yields the pairs of neighbouring tokens whose second token is not a special token, the most
    frequent pair first."""
    ordinary = Masking.of(tokenizer).is_ordinary_V[right]
    codes, counts = np.unique(left[ordinary] * tokenizer.vocab_size + right[ordinary], return_counts=True)
    for code in codes[np.argsort(-counts, kind="stable")].tolist():
        yield divmod(code, tokenizer.vocab_size)
