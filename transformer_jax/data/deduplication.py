"""Finds exact and near duplicates among texts.

Near duplicates are found by MinHash (Broder 1997) with locality-sensitive hashing, through the
library datasketch.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from transformer_jax.data.text import check_texts

NUM_HASHES = 128  # the standard error of an estimated similarity s is sqrt(s * (1 - s) / 128), at most 0.044
_WORDS_IN_SHINGLE = 5
_SHINGLES_AT_ONCE = 1 << 12  # datasketch computes an array [shingles, NUM_HASHES], which a long text must not fill
_WORD = re.compile(r"\w+")
_SCHEME = "affine32"  # of datasketch; it decides what the numbers of a stored signature mean
_COST_OF_MISSES = 0.95  # a missed pair costs more than a false candidate, which is compared again


class Duplicate(NamedTuple):
    """A text that repeats an earlier one.

    Attributes:
      index: The number of the text, counted from 0.
      of: The number of the earlier text, which is kept.
      similarity: The Jaccard similarity of the two; it is 1 for exact duplicates, and otherwise
        estimated from their signatures.
      is_exact: Whether the texts are equal up to upper case, white space and Unicode forms.
    """

    index: int
    of: int
    similarity: float
    is_exact: bool


@dataclasses.dataclass(frozen=True)
class Deduplicated:
    """The result of ``deduplicate``.

    Attributes:
      kept: The numbers of the texts to keep, counted from 0.
      duplicates: The other texts.
    """

    kept: list[int]
    duplicates: list[Duplicate]


def deduplicate(texts: Iterable[str], threshold: float = 0.8) -> Deduplicated:
    """Finds the texts that repeat earlier ones, exactly or nearly.

    A text is a near duplicate if its Jaccard similarity with an earlier kept text reaches the
    threshold. The similarity is that of the sets of 5 consecutive words, in lower case and without
    punctuation. It is estimated, so that pairs near the threshold may be decided either way.

    Args:
      texts: The texts.
      threshold: Texts with at least this similarity are duplicates, in (0, 1].

    Returns:
      The numbers of the texts to keep, and the duplicates.

    Raises:
      ValueError: If there is no text, an entry is not a text, or the threshold is out of range.
      ImportError: If datasketch is not installed.
    """
    exact, near = ExactIndex(), NearIndex(threshold)
    kept, duplicates = [], []
    for index, text in enumerate(tqdm(check_texts(texts), unit="text", desc="deduplicating")):
        if (of := exact.find_or_add(index, digest(text))) is not None:
            duplicates.append(Duplicate(index, of, 1.0, True))
            continue
        text_signature = near.signature(text)
        if (found := near.find(text_signature)) is not None:
            duplicates.append(Duplicate(index, *found, False))
            continue
        near.add(index, text_signature)
        kept.append(index)
    return Deduplicated(kept, duplicates)


def digest(text: str) -> bytes:
    """Returns 16 bytes that are equal for texts that differ only in case, white space or Unicode
    forms."""
    same = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(same.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def shingles(text: str) -> Iterator[str]:
    """Yields the parts of a text that are compared: every 5 consecutive words, in lower case and
    without punctuation.

    Args:
      text: A text. If it has fewer than 5 words, all of them are one part. If it has no word, the
        text itself is.

    Yields:
      One part; equal parts are not left out.
    """
    words = (match[0] for match in _WORD.finditer(text.lower()))
    window = collections.deque(itertools.islice(words, _WORDS_IN_SHINGLE), _WORDS_IN_SHINGLE)
    yield " ".join(window) or text
    for word in words:
        window.append(word)
        yield " ".join(window)


class ExactIndex:
    """The digests of texts, to find equal ones."""

    def __init__(self):
        self._numbers: dict[bytes, int] = {}

    def find_or_add(self, number: int, text_digest: bytes) -> int | None:
        """Finds an equal text, or adds this one.

        Args:
          number: The number of the text.
          text_digest: Its digest.

        Returns:
          The number of the first text with this digest, or ``None`` if this is the first.
        """
        first = self._numbers.setdefault(text_digest, number)
        return None if first == number else first


class NearIndex:
    """The signatures of texts, to find similar ones. It holds about 7 kB for each text.

    Args:
      threshold: Texts with at least this Jaccard similarity are similar, in (0, 1].

    Raises:
      ValueError: If the threshold is out of range.
      ImportError: If datasketch is not installed.
    """

    def __init__(self, threshold: float = 0.8):
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold={threshold} must be in (0, 1], the smallest similarity of duplicates")
        try:
            import datasketch  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("finding near duplicates needs: pip install 'transformer_jax[corpus]'") from error
        self._threshold = threshold
        self._minhash = datasketch.MinHash
        self._empty = datasketch.MinHash(NUM_HASHES, scheme=_SCHEME)
        # Candidates are compared again, so a lower threshold only gives more of them; datasketch
        # refuses 1.
        self._buckets = datasketch.MinHashLSH(min(threshold, 0.9), NUM_HASHES,
                                              weights=(1 - _COST_OF_MISSES, _COST_OF_MISSES))
        self._signatures: dict[int, np.ndarray] = {}

    def signature(self, text: str) -> np.ndarray:
        """Computes the signature of a text.

        Args:
          text: The text.

        Returns:
          For each of 128 hash functions, the smallest hash of a part of the text, uint32 [128].
        """
        minhash = self._as_minhash(self._empty.hashvalues)
        parts = shingles(text)
        while some := [part.encode("utf-8", "surrogatepass") for part in itertools.islice(parts, _SHINGLES_AT_ONCE)]:
            minhash.update_batch(some)
        return np.asarray(minhash.hashvalues, np.uint32)

    def find(self, signature: np.ndarray) -> tuple[int, float] | None:
        """Finds the most similar text.

        Args:
          signature: The signature of a text.

        Returns:
          The number of the text that was added with the most similar signature (the smallest number
          of several), and its estimated similarity. ``None`` if no similarity reaches the
          threshold.
        """
        candidates: list[Any] = self._buckets.query(self._as_minhash(signature))
        similarities = [(float(np.mean(self._signatures[number] == signature)), -number) for number in candidates]
        similarity, number = max(similarities, default=(0.0, 0))
        return (-number, similarity) if similarity >= self._threshold else None

    def add(self, number: int, signature: np.ndarray) -> None:
        """Adds a text.

        Args:
          number: The number of the text, which was not added before.
          signature: Its signature.
        """
        self._signatures[number] = signature
        self._buckets.insert(number, self._as_minhash(signature))

    def _as_minhash(self, signature: np.ndarray):
        """Returns datasketch's form of a signature."""
        return self._minhash(scheme=_SCHEME, hashvalues=signature, permutations=self._empty.permutations)
