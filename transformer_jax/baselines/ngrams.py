"""N-gram language models: the next token depends on the n - 1 tokens before it."""

from __future__ import annotations

import math
import pathlib
import tempfile
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from transformer_jax.baselines.ngram_counts import NgramCounts, count_ngrams
from transformer_jax.baselines.smoothing import Smoothing, smooth
from transformer_jax.data import TokenFile, read_documents
from transformer_jax.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer_jax.data.text import check_texts
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.ops.checks import check_ids

_TOKENS_AT_A_TIME = 1 << 20


class NgramModel:
    """An n-gram language model over any tokenizer (Shannon, 1948; Jelinek and Mercer, 1980).

    Args:
      counts: The counts of the n-grams.
      smoothing: How the counts become probabilities.
      tokenizer: The tokenizer of the counts, or ``None`` to work with token ids only.

    Raises:
      ValueError: If the vocabulary of the tokenizer has another size than that of the counts, or
        the smoothing does not fit the counts.
    """

    def __init__(self, counts: NgramCounts, smoothing: Smoothing = Smoothing(),
                 tokenizer: Tokenizer | HuggingFaceTokenizer | None = None):
        if tokenizer is not None and tokenizer.vocab_size != counts.vocab_size:
            raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, but the counts are of a vocabulary of "
                             f"{counts.vocab_size}; use the tokenizer that encoded the text")
        self.counts, self.smoothing, self.tokenizer = counts, smoothing, tokenizer
        self._weights = smooth(counts, smoothing)

    @classmethod
    def train(cls, texts: Iterable[str], *, order: int, tokenizer: Tokenizer,
              smoothing: Smoothing = Smoothing()) -> Self:
        """Counts the n-grams of texts.

        Args:
          texts: The documents: a list, or the result of ``tj.data.read_documents``.
          order: The length of the longest n-grams, from 1 to 5.
          tokenizer: Encodes the documents.
          smoothing: How the counts become probabilities.

        Returns:
          The model.

        Raises:
          ValueError: If the order is not from 1 to 5, or there is no text.
        """
        blocks = list(tokenizer.encode_corpus(texts))
        if not blocks:
            raise ValueError("there is no text to count; give at least one document")
        counts = count_ngrams(np.concatenate(blocks), order, vocab_size=tokenizer.vocab_size,
                              end_of_text_id=tokenizer.end_of_text_id)
        return cls(counts, smoothing, tokenizer)

    @property
    def order(self) -> int:
        """The length of the longest n-grams."""
        return self.counts.order

    def log_probabilities(self, tokens: np.ndarray | Sequence[int]) -> np.ndarray:
        """Computes the log-probability of every token but the first, given the tokens before it.

        Args:
          tokens: Token ids ``[num_tokens]``.

        Returns:
          The log-probabilities in nats, float64 ``[num_tokens - 1]``.

        Raises:
          ValueError: If there are fewer than two tokens, or one is outside the vocabulary.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 1 or len(tokens) < 2:
            raise ValueError(f"tokens must be at least 2 integers [num_tokens], got the shape {list(tokens.shape)}")
        check_ids("token id", tokens, self.counts.vocab_size, "the n-gram model's vocabulary")
        parts = []
        for start in range(1, len(tokens), _TOKENS_AT_A_TIME):
            # The tokens before the part are the context of its first tokens.
            first = max(start - self.order, 0)
            part = self._probabilities(tokens[first:start + _TOKENS_AT_A_TIME].astype(np.int64))
            parts.append(part[start - first - 1:])
        with np.errstate(divide="ignore"):  # without smoothing, a probability can be 0
            return np.log(np.concatenate(parts))

    def _probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the probability of every token but the first."""
        available, uniform = self.counts.context_lengths(tokens)[1:], 1 / self.counts.vocab_size
        contexts, found = np.zeros(len(tokens) - 1, np.int64), uniform
        for length, ends in enumerate(self.counts.positions(tokens), start=1):
            own, left_over = self._weights.own[length - 1], self._weights.left_over[length - 1]
            shorter = found if self._weights.uses_shorter else uniform
            longer = _at(own, ends[1:], 0.0) + _at(left_over, contexts, 1.0) * shorter
            found = np.where(available >= length - 1, longer, found)
            contexts = ends[:-1]
        return np.asarray(found)

    def next_token_probabilities(self, context: Sequence[int] | np.ndarray) -> np.ndarray:
        """Computes the probability of every token of the vocabulary after a context.

        Args:
          context: The token ids before. Only the last n - 1 of them, and of these the ones after
            the last separator of documents, change the result.

        Returns:
          The probabilities, float64 ``[V]``.

        Raises:
          ValueError: If a token is outside the vocabulary.
        """
        tokens = np.asarray(context, np.int64).reshape(-1)
        check_ids("token id", tokens, self.counts.vocab_size, "the n-gram model's vocabulary")
        counts, uniform = self.counts, np.full(self.counts.vocab_size, 1 / self.counts.vocab_size)
        found = self._weights.own[0] + self._weights.left_over[0] * uniform
        # A token in the place of the target makes the positions of all contexts known.
        padded = np.append(tokens[max(len(tokens) - self.order, 0):], 0)
        available, ends = counts.context_lengths(padded)[-1], list(counts.positions(padded))
        for length in range(2, min(int(available), self.order - 1) + 2):
            place = int(ends[length - 2][-2])
            base = found if self._weights.uses_shorter else uniform
            if place < 0:
                found = base
                continue
            codes = counts.codes[length - 2]
            first, last = np.searchsorted(codes, [place * counts.vocab_size, (place + 1) * counts.vocab_size])
            found = self._weights.left_over[length - 1][place] * base
            found[codes[first:last] - place * counts.vocab_size] += self._weights.own[length - 1][first:last]
        return found

    def measure(self, data: str | pathlib.Path | Iterable[str]) -> dict[str, float]:
        """Measures the loss, the perplexity and the bits per byte of a text.

        The same tokens count, and the result has the same keys, as in ``tj.evaluate`` of a language
        model.

        Args:
          data: A path, in the same form as ``config.data.path``, or a list of documents.

        Returns:
          ``loss`` (nats per token), ``perplexity``, ``bits_per_byte``, ``tokens``, ``bytes``,
          ``window`` (the number of tokens before a token that the model reads) and ``unknown`` (the
          number of tokens that replace characters outside the vocabulary).

        Raises:
          ValueError: If the model has no tokenizer, or the data cannot be read.
        """
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise ValueError("the model has no tokenizer, so its data cannot be read; pass tokenizer=... when it is "
                             "made")
        documents = read_documents(data) if isinstance(data, (str, pathlib.Path)) else check_texts(data)
        with tempfile.TemporaryDirectory() as directory:
            file = TokenFile.build(documents, tokenizer, directory)  # pyright: ignore[reportArgumentType]
            return self.measure_tokens(np.array(file.tokens), file.num_bytes)

    def measure_tokens(self, tokens: np.ndarray, num_bytes: int) -> dict[str, float]:
        """Measures the same numbers as ``measure`` on a token stream.

        Args:
          tokens: Token ids ``[num_tokens]``.
          num_bytes: The length of their text in bytes.

        Returns:
          The numbers by name.
        """
        log_probabilities = self.log_probabilities(tokens)
        loss = -float(log_probabilities.mean())
        unknown = None if self.tokenizer is None else self.tokenizer.unk_id
        return {"loss": loss, "perplexity": math.exp(loss) if loss < math.inf else math.inf,
                "bits_per_byte": -float(log_probabilities.sum()) / math.log(2) / num_bytes,
                "tokens": len(log_probabilities), "bytes": num_bytes, "window": self.order - 1,
                "unknown": 0 if unknown is None else int((tokens == unknown).sum())}


def _at(values: np.ndarray, places: np.ndarray, missing: float) -> np.ndarray:
    """Returns the values at some places, and ``missing`` where the place is -1."""
    return np.append(values, missing)[places]
