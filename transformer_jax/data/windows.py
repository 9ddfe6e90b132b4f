"""Windows of a token stream, shuffled into training batches or read through for evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

_FOREVER = 1 << 48  # rows; grain's own endless repeat has 2**63 - 1, which its batch() rounds up to 2**63 and fails


class BatchSource(Protocol):
    """What `make_batches` reads: examples numbered from 0, taken many at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices_B: np.ndarray, /) -> Mapping[str, np.ndarray]: ...


class Windows:
    """Non-overlapping windows of a token stream: window i covers `tokens[i * length : (i + 1) *
    length + 1]`.

    The last token of a window, its last target, is also the first of the next, its first input.

    Args:
        tokens: Token ids [num_tokens], for instance one part of `TokenFile.split`.
        length: T, the number of inputs and of targets in a window.
        end_of_text_id: When given, examples carry segment ids, which grow by 1 at each token with
            this id; for streams of several documents.

    Raises:
        ValueError: fewer than `length` + 1 tokens.
    """

    def __init__(self, tokens: np.ndarray, length: int, *, end_of_text_id: int | None = None):
        if length < 1:
            raise ValueError(f"a window must have at least 1 token, got length={length}")
        if len(tokens) < length + 1:
            raise ValueError(
                f"the text is shorter than one window: {len(tokens)} tokens available, {length + 1} needed "
                f"(length {length} and the last target); give more text or a smaller length"
            )
        self.tokens = tokens
        self.length = length
        self.end_of_text_id = end_of_text_id

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int | Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns `tokens`, `targets` and, for several documents, `segment_ids`, int32.

        Args:
            index: One window, for arrays [T], or B of them, for arrays [B, T].
        """
        end = len(self) * self.length
        inputs = self.tokens[:end].reshape(-1, self.length)[index]
        targets = self.tokens[1 : end + 1].reshape(-1, self.length)[index]
        return self._example(inputs, targets)

    def _example(self, inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        example = {"tokens": inputs.astype(np.int32), "targets": targets.astype(np.int32)}
        if self.end_of_text_id is not None:
            starts = np.cumsum(inputs == self.end_of_text_id, axis=-1, dtype=np.int32)
            example["segment_ids"] = starts + 1 - starts[..., :1]
        return example


def make_batches(
    source: BatchSource,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    num_epochs: int | None = None,
    transform: Callable[[Mapping[str, np.ndarray], np.random.Generator], Mapping[str, np.ndarray]] | None = None,
):
    """Returns an iterator over batches, each epoch in another order, prefetched in one thread.

    Epochs follow each other without a gap: a batch may hold the end of one and the start of the
    next. The rows that the processes read, process 0's first, are the rows of the one-process batch
    in order.

    Args:
        source: Examples; `source[indices_B]` returns arrays of B rows.
        batch_size: Rows of a batch over all processes together.
        seed: Orders every epoch; from 0 to 2**32 - 1.
        process_index: Which share to read, such as `jax.process_index()`.
        process_count: How many shares there are, such as `jax.process_count()`.
        shuffle: False for the source's own order.
        num_epochs: None repeats for ever; otherwise rows that fill no batch at the end are left
          out.
        transform: Applied to the rows of each batch, as a `Masking` is, with a generator that
            depends only on the seed, the batch's number and, with several processes, on their count
            and this one's index.

    Returns:
        A grain iterator; `get_state()` returns its position, which JSON can hold, and `set_state()`
        continues from it.

    Raises:
        ImportError: grain is not installed.
        ValueError: a batch size that the processes cannot share, a seed out of range, or too few
          examples for a batch.
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError("shuffling and prefetching batches needs: pip install grain") from error
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size} must be a positive multiple of process_count={process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index} must be from 0 to process_count - 1 = {process_count - 1}")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={seed} must be from 0 to 2**32 - 1")
    if not len(source) or (num_epochs is not None and num_epochs * len(source) < batch_size):
        raise ValueError(f"{len(source)} examples, num_epochs={num_epochs}, do not fill a batch of {batch_size}")
    # Only indices go through grain's per-element Python; the rows are gathered by one NumPy call a
    # batch.
    indices = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        indices = indices.shuffle()
    indices = indices.repeat(num_epochs or _FOREVER // len(source))
    indices = indices[: len(indices) // batch_size * batch_size]
    index_batches = indices.batch(batch_size // process_count)
    if transform is None:
        batches = index_batches.map(lambda indices_B: source[indices_B])
    else:  # before the processes part, so that each has generators of its own
        batches = index_batches.random_map(lambda indices_B, rng: transform(source[indices_B], rng))
    share = batches[process_index::process_count]
    return iter(share.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def evaluation_batches(windows: Windows, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields every window in order and the tail after the last, so that each token but the first is
    a target once.

    Args:
        windows: The split to evaluate.
        batch_size: Rows of every batch; the last one is filled up with padding.

    Returns:
        Batches as `windows` gives them, with `weights` float32 [B, T] beside: 1 for targets, 0 for
        padding, whose tokens and segment ids are 0.

    Raises:
        ValueError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    return _evaluation_batches(windows, batch_size)


def _evaluation_batches(windows: Windows, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    num_targets = len(windows.tokens) - 1
    batch_tokens = batch_size * windows.length
    for start in range(0, num_targets, batch_tokens):
        end = min(start + batch_tokens, num_targets)
        inputs, targets = np.zeros((2, batch_tokens), np.int32)
        inputs[: end - start] = windows.tokens[start:end]
        targets[: end - start] = windows.tokens[start + 1 : end + 1]
        weights = (np.arange(batch_tokens) < end - start).astype(np.float32)
        inputs, targets, weights = (array.reshape(batch_size, -1) for array in (inputs, targets, weights))
        batch = windows._example(inputs, targets)
        if "segment_ids" in batch:
            batch["segment_ids"] *= weights.astype(np.int32)
        yield batch | {"weights": weights}
