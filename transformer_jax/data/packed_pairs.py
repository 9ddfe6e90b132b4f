"""Pairs of sentences, tokenised once and packed into rows."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from transformer_jax.data.packing import pack
from transformer_jax.data.pairs import Pairs
from transformer_jax.data.token_file import is_intact, write_with_digest
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.windows import BatchSource

_LAYOUT = 1  # part of the cache key: raise it when the rows of the same pairs by the same tokenizer change
_GATHERED_PAIRS = 1 << 16  # at a time, while tokens are put in the order of the rows: what bounds the memory for it


@dataclasses.dataclass(frozen=True, eq=False)
class PackedPairs:
    """Rows of S source and T target tokens, in each of which several pairs lie end to end; a source
    for `make_batches`.

    A sentence is its tokens and `</s>`. A pair is in one row on both sides, with the same number
    there.

    Attributes:
        num_read: How many pairs there were.
        num_empty: How many of them are left out because a side is empty.
        num_overlong: How many of them are left out because a side, with its `</s>`, is longer than
          a row.
        source_length: S.
        target_length: T.
        digest: SHA-256, in hexadecimal, of all that decides the rows: pairs, tokenizer and lengths.
        bos_id: The id of `<s>`.
        first_pairs: The first pair of every row, and the number of pairs, int64 [rows + 1].
        source_starts: Where the source of every pair starts in `source_tokens`, and its length,
          int64 [pairs + 1].
        target_starts: The same of the target.
        source_tokens: The sources of all pairs in the order of the rows, uint16 when the vocabulary
          fits, else uint32.
        target_tokens: The targets.
    """

    num_read: int
    num_empty: int
    num_overlong: int
    source_length: int
    target_length: int
    digest: str
    bos_id: int
    first_pairs: np.ndarray
    source_starts: np.ndarray
    target_starts: np.ndarray
    source_tokens: np.ndarray
    target_tokens: np.ndarray

    @classmethod
    def build(
        cls,
        pairs: Pairs | Iterable[tuple[str, str]],
        tokenizer: Tokenizer,
        source_length: int,
        target_length: int,
        cache_dir: str | Path | None = None,
    ) -> "PackedPairs":
        """Tokenises and packs pairs, or reuses the file of the same content, tokenizer and lengths
        in `cache_dir`.

        Args:
            pairs: What `read_pairs` returns, or a list; read twice.
            tokenizer: Encodes both sides.
            source_length: S, the most tokens of a source, `</s>` included, and of all sources in a
              row.
            target_length: T, the same of targets.
            cache_dir: Made when absent; the arrays are memory-mapped from a file in it, and a
                damaged file is found out by its digest and written again. None holds them in
                memory.

        Raises:
            ValueError: a length that is not positive, `pairs` can be iterated only once, or none of
              them fits.
        """
        if source_length < 1 or target_length < 1:
            raise ValueError(f"rows need at least 1 token a side, got {source_length=}, {target_length=}")
        pairs = pairs if isinstance(pairs, Pairs) else Pairs(pairs)
        lengths = (source_length, target_length)
        key = {"layout": _LAYOUT, "content": pairs.content, "tokenizer": tokenizer.digest, "lengths": list(lengths)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        if cache_dir is None:
            data = np.concatenate([block.view(np.uint8) for block in _blocks(pairs, tokenizer, lengths, dtype)])
        else:
            path = Path(cache_dir) / f"pairs-{digest[:32]}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not is_intact(path, key):
                write_with_digest(path, key, _blocks(pairs, tokenizer, lengths, dtype))
            data = np.memmap(path, np.uint8, mode="r")
        arrays = _arrays(data, dtype)
        num_overlong = len(pairs) - (len(arrays["source_starts"]) - 1)
        return cls(pairs.num_read, pairs.num_empty, num_overlong, *lengths, digest, tokenizer.bos_id, **arrays)

    @property
    def num_pairs(self) -> int:
        """How many pairs are in the rows."""
        return len(self.source_starts) - 1

    def summary(self) -> str:
        """Returns one line: how many pairs were read, left out, and in how many rows how densely
        the others are."""
        lengths = " and ".join(map(str, dict.fromkeys([self.source_length, self.target_length])))
        num_tokens = len(self.source_tokens) + len(self.target_tokens)
        full = num_tokens / (len(self) * (self.source_length + self.target_length))
        return (
            f"{self.num_read:,} pairs, {self.num_empty:,} with an empty side, {self.num_overlong:,} longer than "
            f"{lengths} tokens left out, {len(self):,} rows, {100 * full:.0f} % full"
        )

    def __len__(self) -> int:
        return len(self.first_pairs) - 1

    def __getitem__(self, indices_B: np.ndarray) -> dict[str, np.ndarray]:
        """Returns rows, padded with 0 at their ends.

        Args:
            indices_B: Which rows, from 0.

        Returns:
            `source` [B, S] and `targets` [B, T], the sentences; `source_segment_ids` [B, S] and
            `segment_ids` [B, T], the numbers of the pairs in their row, from 1, and 0 for padding;
            `tokens` [B, T], the decoder's input, the targets one place on behind `<s>`; all int32.
            `weights` [B, T], float32, 1 where there is a target.

        Raises:
            IndexError: there is no such row.
        """
        indices_B = np.asarray(indices_B)
        if (indices_B < 0).any() or (indices_B >= len(self)).any():
            raise IndexError(f"rows {indices_B.tolist()} of {len(self)}")
        source, source_segment_ids = self._side(self.source_tokens, self.source_starts, self.source_length, indices_B)
        targets, segment_ids = self._side(self.target_tokens, self.target_starts, self.target_length, indices_B)
        is_first = np.diff(segment_ids, prepend=0) > 0
        return {
            "source": source,
            "source_segment_ids": source_segment_ids,
            "tokens": np.where(is_first, np.int32(self.bos_id), np.roll(targets, 1, axis=-1)) * (segment_ids != 0),
            "targets": targets,
            "segment_ids": segment_ids,
            "weights": (segment_ids != 0).astype(np.float32),
        }

    def _side(self, flat: np.ndarray, starts: np.ndarray, length: int, indices_B: np.ndarray):
        first_B1, next_B1 = (self.first_pairs[indices_B + shift][..., None] for shift in (0, 1))
        places_BL = starts[first_B1] + np.arange(length)
        is_token_BL = places_BL < starts[next_B1]
        tokens_BL = flat[np.minimum(places_BL, len(flat) - 1)] * is_token_BL
        segments_BL = (np.searchsorted(starts, places_BL, side="right") - first_B1) * is_token_BL
        return tokens_BL.astype(np.int32), segments_BL.astype(np.int32)


def pair_evaluation_batches(rows: BatchSource, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields every row once, in order.

    Args:
        rows: The split to evaluate: `PackedPairs`, or other rows whose padding is 0.
        batch_size: Rows of every batch; the last one is filled up with rows of padding, which are 0
          throughout.

    Returns:
        Batches as `rows[indices_B]` gives them.

    Raises:
        ValueError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    return _evaluation_batches(rows, batch_size)


def _evaluation_batches(rows: BatchSource, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(rows), batch_size):
        indices_B = np.arange(start, min(start + batch_size, len(rows)))
        missing = batch_size - len(indices_B)
        yield {name: np.pad(array, ((0, missing), (0, 0))) for name, array in rows[indices_B].items()}


def _blocks(pairs: Pairs, tokenizer: Tokenizer, lengths: tuple[int, int], dtype: type) -> Iterator[np.ndarray]:
    """Yields what `_arrays` reads."""
    tokens, starts_N2, lengths_N2 = _tokenise(pairs, tokenizer, dtype)
    fitting_P = np.flatnonzero((lengths_N2 <= lengths).all(1))
    if not fitting_P.size:
        raise ValueError(
            f"none of {len(pairs):,} pairs fits a row: the shortest source has {lengths_N2[:, 0].min()} tokens and the "
            f"shortest target {lengths_N2[:, 1].min()}, `</s>` included; rows have {lengths[0]} and {lengths[1]}"
        )
    rows_P = pack(lengths_N2[fitting_P], lengths)
    order_P = fitting_P[np.argsort(rows_P, kind="stable")]
    row_sizes = np.bincount(rows_P)
    yield np.array([len(row_sizes), len(order_P)], np.int64)
    for sizes in (row_sizes, *lengths_N2[order_P].T):
        yield np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    for side in (0, 1):
        for begin in range(0, len(order_P), _GATHERED_PAIRS):
            part = order_P[begin : begin + _GATHERED_PAIRS]
            sizes = lengths_N2[part, side]
            shifts = starts_N2[part, side] - (np.cumsum(sizes) - sizes)
            yield tokens[np.repeat(shifts, sizes) + np.arange(sizes.sum())]


def _tokenise(pairs: Pairs, tokenizer: Tokenizer, dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all sentences, each with `</s>` after it, and where they start and how long they are,
    both [N, 2]."""
    stream = bytearray()
    for block in tokenizer.encode_corpus(itertools.chain.from_iterable(pairs)):
        stream += block.astype(dtype).tobytes()
    stream += dtype(tokenizer.end_of_text_id).tobytes()
    tokens = np.frombuffer(stream, dtype)
    # `<|endoftext|>` stands before every sentence: so after every one but the last, which has just
    # got one.
    ends = np.flatnonzero(tokens == tokenizer.end_of_text_id)
    tokens[ends] = tokenizer.eos_id
    return tokens, (ends[:-1] + 1).reshape(-1, 2), np.diff(ends).reshape(-1, 2)


def _arrays(data: np.ndarray, dtype: type) -> dict[str, np.ndarray]:
    """Returns the arrays that lie one after another in the bytes of a file."""
    offset = 0

    def take(count: int, kind: type) -> np.ndarray:
        nonlocal offset
        begin, offset = offset, offset + count * np.dtype(kind).itemsize
        return data[begin:offset].view(kind)

    num_rows, num_pairs = take(2, np.int64).tolist()
    arrays = {"first_pairs": take(num_rows + 1, np.int64)}
    arrays |= {name: take(num_pairs + 1, np.int64) for name in ("source_starts", "target_starts")}
    arrays |= {f"{side}_tokens": take(int(arrays[f"{side}_starts"][-1]), dtype) for side in ("source", "target")}
    return arrays
