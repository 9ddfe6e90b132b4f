"""Rows of fixed length that are filled with pairs of sentences, for translation."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from transformer_jax.data.evaluation import fixed_batches
from transformer_jax.data.packing import needed_ids, pack
from transformer_jax.data.pairs import Pairs
from transformer_jax.data.token_file import is_intact, write_with_digest
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.windows import BatchSource

_LAYOUT = 1  # part of the cache key: increase it if the rows of the same pairs and tokenizer change
_GATHERED_PAIRS = 1 << 16  # pairs whose tokens are reordered at a time, to bound the memory


@dataclasses.dataclass(frozen=True, eq=False)
class PackedPairs:
    """Rows of S source tokens and T target tokens, in the form that ``make_batches`` accepts.

    Several pairs share a row. Each sentence is its tokens and ``</s>``. The source and the target
    of a pair are in the same row and have the same segment id.

    Attributes:
      num_read: Number of pairs that were read.
      num_empty: How many of them are left out because a side is empty.
      num_overlong: How many of them are left out because a side, with its ``</s>``, is longer than
        a row.
      source_length: S, the number of source tokens in a row.
      target_length: T, the number of target tokens in a row.
      digest: The SHA-256 digest, in hexadecimal, of everything that determines the rows: pairs,
        tokenizer and lengths.
      bos_id: The token before the first token of a target, such as ``<s>``.
      first_pairs: The first pair of every row, followed by the number of pairs, int64 [rows + 1].
      source_starts: The position in ``source_tokens`` at which the source of every pair starts,
        followed by the length of ``source_tokens``, int64 [pairs + 1].
      target_starts: The same for the targets.
      source_tokens: The sources of all pairs in the order of the rows, uint16 if the vocabulary
        fits, otherwise uint32.
      target_tokens: The same for the targets.
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

    def __post_init__(self):
        if self.bos_id is None:
            raise ValueError("translation needs a token that starts a target, <s> (bos_id), which this tokenizer does "
                             "not have; name it in tokenizer_config.json, or use a tokenizer that has it")

    @classmethod
    def build(
        cls,
        pairs: Pairs | Iterable[tuple[str, str]],
        tokenizer: Tokenizer,
        source_length: int,
        target_length: int,
        cache_dir: str | Path | None = None,
        start_ids: Sequence[int] = (),
    ) -> "PackedPairs":
        """Tokenizes pairs and packs them into rows.

        If ``cache_dir`` has a file for the same pairs, tokenizer and lengths, that file is used.

        Args:
          pairs: The result of ``read_pairs``, or a list. It is read twice.
          tokenizer: Encodes both sides.
          source_length: S, the number of source tokens in a row and the longest source, with its
            ``</s>``.
          target_length: T, the same for targets.
          cache_dir: The directory of the cache file, which is created if it does not exist. The
            arrays are memory-mapped. A damaged file is detected by its digest and written again.
            None keeps the arrays in memory.
          start_ids: The tokens that start a target, if they are not the tokenizer's ``<s>``. The
            decoder gets the first one as input, and learns the others like the target.

        Returns:
          The rows.

        Raises:
          ValueError: If a length is not positive, if ``pairs`` can be iterated only once, if an
            entry is not a pair of texts, if no pair fits into a row, or if the tokenizer has no
            token that ends a sentence or starts a target.
        """
        if source_length < 1 or target_length < 1:
            raise ValueError(f"rows need at least 1 token on each side, got {source_length=}, {target_length=}")
        pairs = pairs if isinstance(pairs, Pairs) else Pairs(pairs)
        needed_ids(tokenizer, "translation", eos_id="</s>")
        lengths = (source_length, target_length)
        key = {"layout": _LAYOUT, "content": pairs.content, "tokenizer": tokenizer.digest, "lengths": list(lengths)}
        start_ids = tuple(start_ids) or (tokenizer.bos_id,)
        is_own = isinstance(tokenizer, Tokenizer) and len(start_ids) == 1
        key |= {} if is_own else {"frames": [*map(tokenizer.frame, ("source", "target")), start_ids]}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        if cache_dir is None:
            blocks = _blocks(pairs, tokenizer, lengths, dtype, start_ids)
            data = np.concatenate([block.view(np.uint8) for block in blocks])
        else:
            path = Path(cache_dir) / f"pairs-{digest[:32]}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            if not is_intact(path, key):
                write_with_digest(path, key, _blocks(pairs, tokenizer, lengths, dtype, start_ids))
            data = np.memmap(path, np.uint8, mode="r")
        arrays = _arrays(data, dtype)
        num_overlong = len(pairs) - (len(arrays["source_starts"]) - 1)
        return cls(pairs.num_read, pairs.num_empty, num_overlong, *lengths, digest, start_ids[0], **arrays)

    @property
    def num_pairs(self) -> int:
        """The number of pairs in the rows."""
        return len(self.source_starts) - 1

    def summary(self) -> str:
        """Describes the rows in one line.

        Returns:
          How many pairs were read and left out, the number of rows, and how much of them is filled.
        """
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
          indices_B: The numbers of the rows, from 0.

        Returns:
          ``source`` [B, S] and ``targets`` [B, T], the sentences; ``source_segment_ids`` [B, S] and
          ``segment_ids`` [B, T], the number of the pair in its row, from 1, and 0 for padding;
          ``tokens`` [B, T], the input of the decoder: ``<s>`` and the targets, shifted by one
          position. All of these are int32. ``weights`` [B, T], float32, is 1 where there is a
          target.

        Raises:
          IndexError: If there is no such row.
        """
        indices_B = np.asarray(indices_B)
        if (indices_B < 0).any() or (indices_B >= len(self)).any():
            raise IndexError(f"rows {indices_B.tolist()} must be from 0 to {len(self) - 1}")
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
        """Returns the tokens and the segment ids of one side of the rows."""
        first_B1, next_B1 = (self.first_pairs[indices_B + shift][..., None] for shift in (0, 1))
        places_BL = starts[first_B1] + np.arange(length)
        is_token_BL = places_BL < starts[next_B1]
        tokens_BL = flat[np.minimum(places_BL, len(flat) - 1)] * is_token_BL
        segments_BL = (np.searchsorted(starts, places_BL, side="right") - first_B1) * is_token_BL
        return tokens_BL.astype(np.int32), segments_BL.astype(np.int32)


def pair_evaluation_batches(rows: BatchSource, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields every row once, in order.

    Args:
      rows: The rows to evaluate on: ``PackedPairs``, or other rows whose padding is 0.
      batch_size: Rows of every batch. The last batch is filled with rows of padding, in which all
        values are 0.

    Returns:
      An iterator over batches, as ``rows[indices_B]`` returns them.

    Raises:
      ValueError: If ``batch_size`` is not positive.
    """
    return fixed_batches(len(rows), batch_size, lambda numbers: dict(rows[np.asarray(numbers)]))


def _blocks(pairs: Pairs, tokenizer: Tokenizer, lengths: tuple[int, int], dtype: type,
            start_ids: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yields the arrays of the cache file, in the order in which ``_arrays`` reads them."""
    is_own = isinstance(tokenizer, Tokenizer) and len(start_ids) == 1
    tokens, starts_N2, lengths_N2 = (_tokenise(pairs, tokenizer, dtype) if is_own
                                     else _tokenise_each(pairs, tokenizer, dtype, start_ids))
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
    """Returns all sentences, each followed by ``</s>``, with their starts and lengths, both [N,
    2]."""
    stream = bytearray()
    for block in tokenizer.encode_corpus(itertools.chain.from_iterable(pairs)):
        stream += block.astype(dtype).tobytes()
    stream += dtype(tokenizer.end_of_text_id).tobytes()
    tokens = np.frombuffer(stream, dtype)
    # `<|endoftext|>` precedes every sentence, so it also follows every sentence but the last. The
    # line above adds it there.
    ends = np.flatnonzero(tokens == tokenizer.end_of_text_id)
    tokens[ends] = tokenizer.eos_id
    return tokens, (ends[:-1] + 1).reshape(-1, 2), np.diff(ends).reshape(-1, 2)


def _tokenise_each(pairs: Pairs, tokenizer: Tokenizer, dtype: type,
                   start_ids: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Does the same as ``_tokenise``, with the tokens that an imported tokenizer puts around
    sources and targets."""
    (before, after), (_, end) = tokenizer.frame("source"), tokenizer.frame("target")
    stream, sizes = bytearray(), []
    for source, target in pairs:
        sides = ([*before, *tokenizer.encode(source, allow_special=False), *after],
                 [*start_ids[1:], *tokenizer.encode_target(target, after=start_ids, allow_special=False), *end])
        sizes.append(list(map(len, sides)))
        stream += np.asarray([*sides[0], *sides[1]], dtype).tobytes()
    lengths_N2 = np.asarray(sizes, np.int64).reshape(-1, 2)
    ends = np.cumsum(lengths_N2.ravel()).reshape(-1, 2)
    return np.frombuffer(stream, dtype), ends - lengths_N2, lengths_N2


def _arrays(data: np.ndarray, dtype: type) -> dict[str, np.ndarray]:
    """Returns the arrays that the bytes of a cache file hold one after another."""
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
