"""What counting tokens achieves at masked positions: the baselines that a masked language model is
compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from transformer_jax.data import LineRows, Masking, Tokenizer

NUM_GUESSES = 5

Guess = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def unigram_guesses(train: LineRows, tokenizer: Tokenizer) -> Guess:
    """A function from a batch to the five most frequent ordinary tokens, for every masked position
    alike."""
    best_K = _most_frequent(_ordinary(train.tokens[train.segment_ids != 0], tokenizer), tokenizer.vocab_size)
    return lambda batch: np.broadcast_to(best_K, (*batch["masked_targets"].shape, NUM_GUESSES))


def bigram_guesses(train: LineRows, tokenizer: Tokenizer) -> Guess:
    """A function from a batch to the five tokens seen most often after the token to the left of
    each masked position.

    Where fewer were seen, or the token to the left is masked too, the most frequent of all tokens
    complete them.
    """
    tokens_RT, segments_RT = train.tokens.astype(np.int64), train.segment_ids
    same_RT = segments_RT[:, 1:] == segments_RT[:, :-1]
    followers: dict[int, list[int]] = {}
    for left, token in _pairs(tokens_RT[:, :-1][same_RT], tokens_RT[:, 1:][same_RT], tokenizer):
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
    return tokens[Masking.of(tokenizer).is_ordinary_V[tokens]]


def _most_frequent(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return np.argsort(-np.bincount(tokens, minlength=vocab_size), kind="stable")[:NUM_GUESSES]


def _pairs(left: np.ndarray, right: np.ndarray, tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Pairs of neighbours of which the second is an ordinary token, the most frequent first."""
    ordinary = Masking.of(tokenizer).is_ordinary_V[right]
    codes, counts = np.unique(left[ordinary] * tokenizer.vocab_size + right[ordinary], return_counts=True)
    for code in codes[np.argsort(-counts, kind="stable")].tolist():
        yield divmod(code, tokenizer.vocab_size)
