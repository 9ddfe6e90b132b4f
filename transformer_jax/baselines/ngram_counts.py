"""Counts of n-grams: how often each sequence of up to n tokens occurs in a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from transformer_jax.ops.checks import check_ids

LARGEST_ORDER = 5


@dataclasses.dataclass(frozen=True, eq=False)
class NgramCounts:
    """The n-grams of a text, in one sorted array for each length.

    An n-gram is its prefix (the n-gram without the last token) and its last token. It is stored as
    one number, ``prefix * vocab_size + token``, where ``prefix`` is the position of the prefix in
    the array of the shorter n-grams. All n-grams with one prefix are therefore next to each other,
    and any n-gram is found by one binary search for each of its tokens.

    Attributes:
      vocab_size: V, the number of tokens in the vocabulary.
      end_of_text_id: The token that separates documents; an n-gram may begin or end with it, but
        never contains it in the middle. ``None`` if there is no such token.
      codes: For each length from 2, the numbers of the n-grams, sorted; int64.
      counts: For each length from 1, the number of times that each n-gram occurs as a target with
        its context; int64. The array of length 1 has one entry for each token of the vocabulary.
      suffixes: For each length from 2, the position of each n-gram without its first token, in the
        array of the n-grams that are one token shorter; int64.
    """

    vocab_size: int
    end_of_text_id: int | None
    codes: tuple[np.ndarray, ...]
    counts: tuple[np.ndarray, ...]
    suffixes: tuple[np.ndarray, ...]

    @property
    def order(self) -> int:
        """The length of the longest n-grams."""
        return len(self.counts)

    def up_to(self, order: int) -> NgramCounts:
        """Selects the n-grams that are not longer than a number of tokens.

        Args:
          order: The length of the longest ones.

        Returns:
          The counts of these n-grams.
        """
        return dataclasses.replace(self, codes=self.codes[:order - 1], counts=self.counts[:order],
                                   suffixes=self.suffixes[:order - 1])

    def prefixes(self, length: int) -> np.ndarray:
        """Finds the prefix of each n-gram.

        Args:
          length: The length of the n-grams, from 2.

        Returns:
          The position of each prefix among the n-grams that are one token shorter.
        """
        return self.codes[length - 2] // self.vocab_size

    def last_tokens(self, length: int) -> np.ndarray:
        """Lists the last token of each n-gram.

        Args:
          length: The length of the n-grams, from 2.

        Returns:
          The tokens.
        """
        return self.codes[length - 2] % self.vocab_size

    def find(self, length: int, prefixes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Finds n-grams.

        Args:
          length: The length of the n-grams, from 2.
          prefixes: The position of each prefix, as this function returns it; -1 is never found.
          tokens: The last token of each n-gram.

        Returns:
          The position of each n-gram in ``codes[length - 2]``; -1 for one that does not occur.
        """
        codes, wanted = self.codes[length - 2], prefixes * self.vocab_size + tokens
        places = np.searchsorted(codes, wanted)
        if not len(codes):
            return np.full(len(wanted), -1)
        return np.where(codes[np.minimum(places, len(codes) - 1)] == wanted, places, -1)

    def first_tokens(self) -> Iterator[np.ndarray]:
        """Lists the first token of each n-gram, of one length after the other, from 2.

        Yields:
          The tokens.
        """
        firsts = np.arange(self.vocab_size)
        for length in range(2, self.order + 1):
            firsts = firsts[self.prefixes(length)]
            yield firsts

    def context_lengths(self, tokens: np.ndarray) -> np.ndarray:
        """Counts the tokens before each token that belong to its document.

        Args:
          tokens: A token stream ``[num_tokens]``.

        Returns:
          The numbers, in which the separator at the beginning of the document is included.
        """
        places = np.arange(len(tokens))
        starts = np.zeros(len(tokens), np.int64)
        if self.end_of_text_id is not None:
            separators = np.where(tokens == self.end_of_text_id, places, 0)
            starts[1:] = np.maximum.accumulate(separators)[:-1]
        return places - starts

    def positions(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Finds the n-grams of a token stream, of one length after the other, from 1.

        Args:
          tokens: A token stream ``[num_tokens]``.

        Yields:
          The position of the n-gram that ends at each token; -1 if it does not occur in the counts,
          or would reach beyond its document.
        """
        available, found = self.context_lengths(tokens), tokens
        yield found
        for length in range(2, self.order + 1):
            longer = np.full(len(tokens), -1)
            longer[1:] = self.find(length, found[:-1], tokens[1:])
            found = np.where(available >= length - 1, longer, -1)
            yield found


def count_ngrams(tokens: np.ndarray, order: int, *, vocab_size: int,
                 end_of_text_id: int | None = None) -> NgramCounts:
    """Counts all n-grams of a token stream, of every length up to ``order``.

    The first token of the stream is never a target, as in a language model. The context of a token
    does not reach beyond the separator that begins its document.

    Args:
      tokens: Token ids ``[num_tokens]``, such as ``TokenFile.tokens``.
      order: The length of the longest n-grams, from 1 to 5.
      vocab_size: The number of tokens in the vocabulary.
      end_of_text_id: The token that separates documents, if there is one.

    Returns:
      The counts.

    Raises:
      ValueError: If the order is not from 1 to 5, there are fewer than two tokens, or a token is
        outside the vocabulary.
    """
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= LARGEST_ORDER:
        raise ValueError(f"order={order!r} must be a whole number from 1 to {LARGEST_ORDER}: the number of tokens in "
                         "the longest n-grams")
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or len(tokens) < 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be at least 2 integers [num_tokens], got {tokens.dtype} {list(tokens.shape)}")
    check_ids("token id", tokens, vocab_size, "the vocabulary")
    tokens = tokens.astype(np.int64)
    codes, counts, suffixes = [], [np.bincount(tokens[1:], minlength=vocab_size)], []
    empty = NgramCounts(vocab_size, end_of_text_id, (), (), ())
    available, index = empty.context_lengths(tokens), tokens
    for length in range(2, order + 1):
        places = np.flatnonzero(available >= length - 1)
        found, counted, inverse = _unique(index[places - 1] * vocab_size + tokens[places])
        suffix = np.empty(len(found), np.int64)
        suffix[inverse] = index[places]  # the same for every place of an n-gram
        index = np.full(len(tokens), -1)
        index[places] = inverse
        codes.append(found)
        counts.append(counted)
        suffixes.append(suffix)
    return NgramCounts(vocab_size, end_of_text_id, tuple(codes), tuple(counts), tuple(suffixes))


def _unique(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the sorted distinct values, the count of each, and the position of every value among
    them. ``np.unique`` does the same with a slower, stable sort."""
    order = np.argsort(values)
    ranked = values[order]
    is_first = np.ones(len(values), bool)
    is_first[1:] = ranked[1:] != ranked[:-1]
    inverse = np.empty(len(values), np.int64)
    inverse[order] = np.cumsum(is_first) - 1
    starts = np.flatnonzero(is_first)
    return ranked[starts], np.diff(starts, append=len(values)), inverse
