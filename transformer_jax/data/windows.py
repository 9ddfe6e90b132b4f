"""Fixed-length windows of a token stream, and the batches for training and evaluation."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from transformer_jax.data.evaluation import fixed_batches
from transformer_jax.data.mixture import Mixture

_FOREVER = 1 << 48  # rows. grain's endless repeat has 2**63 - 1 rows, which its batch() rounds up to 2**63 and fails.


class BatchSource(Protocol):
    """The input of ``make_batches``: examples with numbers from 0, which can be read many at a
    time."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices_B: np.ndarray, /) -> Mapping[str, np.ndarray]: ...


class Windows:
    """Windows of a token stream that do not overlap.

    Window i covers ``tokens[i * length : (i + 1) * length + 1]``. The last token of a window is its
    last target, and is also the first input of the next window.

    Args:
      tokens: Token ids [num_tokens], for instance one part of ``TokenFile.split``.
      length: T, the number of inputs and of targets in a window.
      end_of_text_id: For streams of several documents. If it is given, examples have segment ids,
        which grow by 1 at each token with this id.

    Raises:
      ValueError: If there are fewer than ``length`` + 1 tokens, or if ``tokens`` is not an array of
        integers [num_tokens].
    """

    def __init__(self, tokens: np.ndarray, length: int, *, end_of_text_id: int | None = None):
        if length < 1:
            raise ValueError(f"a window must have at least 1 token, got length={length}")
        tokens = np.asanyarray(tokens)  # a memory-mapped array stays memory-mapped
        if tokens.ndim != 1 or (tokens.size and not np.issubdtype(tokens.dtype, np.integer)):
            raise ValueError(f"tokens must be integers [num_tokens], got {tokens.dtype} {list(tokens.shape)}")
        if len(tokens) < length + 1:
            raise ValueError(
                f"the text is shorter than one window: {len(tokens)} tokens available, {length + 1} needed "
                f"(length {length} and the last target); give more text or a smaller length"
            )
        self.tokens = tokens
        self.length = length
        self.end_of_text_id = end_of_text_id

    @property
    def num_tokens(self) -> int:
        """The number of tokens in all windows."""
        return len(self) * self.length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.length

    def __getitem__(self, index: int | Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Returns ``tokens``, ``targets`` and, if ``end_of_text_id`` is given, ``segment_ids``,
        int32.

        Args:
          index: One window, for arrays [T], or B windows, for arrays [B, T].

        Returns:
          The arrays by name.
        """
        end = len(self) * self.length
        inputs = self.tokens[:end].reshape(-1, self.length)[index]
        targets = self.tokens[1 : end + 1].reshape(-1, self.length)[index]
        return self._example(inputs, targets)

    def _example(self, inputs: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the arrays of an example, given its inputs and targets."""
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
    """Creates an iterator over batches that shuffles each epoch and prefetches in one thread.

    Epochs follow each other without a gap: a batch may hold the end of one epoch and the start of
    the next. If several processes share a batch, their rows, in the order of the processes, are the
    rows of the batch of a single process.

    Args:
      source: The examples. ``source[indices_B]`` returns arrays of B rows. Rows of a ``Mixture``
        are drawn with its weights, and each of its corpora has its own epochs.
      batch_size: Rows of a batch, over all processes together.
      seed: Determines the order of every epoch; from 0 to 2**32 - 1.
      process_index: The number of this process, such as ``jax.process_index()``.
      process_count: The number of processes, such as ``jax.process_count()``.
      shuffle: Whether to shuffle. False keeps the order of the source.
      num_epochs: The number of epochs. Rows at the end that do not fill a batch are left out. None
        repeats without end, which a mixture always does.
      transform: A function of a batch and a random generator, such as ``Masking``, that is applied
        to each batch. The generator depends only on the seed, on the number of the batch and, if
        there are several processes, on their number and on ``process_index``.

    Returns:
      A grain iterator. ``get_state()`` returns its position, which can be stored as JSON, and
      ``set_state()`` continues from that position.

    Raises:
      ImportError: If grain is not installed.
      ValueError: If the batch size is not a multiple of the number of processes, if the seed is out
        of range, if there are too few examples for a batch, or if ``num_epochs`` is given for a
        mixture.
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
    if isinstance(source, Mixture):
        if num_epochs is not None:
            raise ValueError(f"num_epochs={num_epochs}: each corpus of a mixture has its own number of epochs; leave "
                             "num_epochs out")
        indices = _mixed_order(source, seed, shuffle)
    else:
        indices = _order(len(source), seed, shuffle, num_epochs)
    # grain processes each element in Python, so it gets indices only. One NumPy call collects the
    # rows of a batch.
    indices = indices[: len(indices) // batch_size * batch_size]
    index_batches = indices.batch(batch_size // process_count)
    if transform is None:
        batches = index_batches.map(lambda indices_B: source[indices_B])
    else:  # before the split over processes, so that each process has its own generators
        batches = index_batches.random_map(lambda indices_B, rng: transform(source[indices_B], rng))
    share = batches[process_index::process_count]
    return iter(share.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def _order(num_rows: int, seed: int, shuffle: bool, num_epochs: int | None = None):
    """Returns a grain data set of the numbers of rows, in the order of the epochs."""
    import grain

    indices = grain.MapDataset.range(num_rows).seed(seed)
    if shuffle:
        indices = indices.shuffle()
    return indices.repeat(num_epochs or _FOREVER // num_rows)


def _mixed_order(mixture: Mixture, seed: int, shuffle: bool):
    """Returns a grain data set of the numbers of the rows of a mixture, drawn with its weights."""
    import grain

    seeds = np.random.SeedSequence(seed).generate_state(len(mixture.parts))
    orders = [_order(len(part), int(own_seed), shuffle)
              for part, own_seed in zip(mixture.parts.values(), seeds, strict=True)]
    return grain.MapDataset.range(_FOREVER).seed(seed).map(mixture.order(orders))


def evaluation_batches(windows: Windows, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields every window in order, and the rest of the tokens after the last window.

    So every token except the first is a target exactly once.

    Args:
      windows: The windows to evaluate on.
      batch_size: Rows of every batch. The last batch is filled with padding.

    Returns:
      An iterator over batches, as ``windows`` returns them, with ``weights`` float32 [B, T] in
      addition: 1 for targets and 0 for padding. Tokens and segment ids of the padding are 0.

    Raises:
      ValueError: If ``batch_size`` is not positive.
    """
    num_targets = len(windows.tokens) - 1

    def read(rows: range) -> dict[str, np.ndarray]:
        start, end = rows.start * windows.length, min(rows.stop * windows.length, num_targets)
        padding = (0, len(rows) * windows.length - (end - start))
        inputs, targets, weights = (np.pad(values, padding).reshape(len(rows), -1) for values in (
            windows.tokens[start:end], windows.tokens[start + 1:end + 1], np.ones(end - start, np.float32)))
        batch = windows._example(inputs, targets)
        if "segment_ids" in batch:
            batch["segment_ids"] *= weights.astype(np.int32)
        return batch | {"weights": weights}

    return fixed_batches(-(-num_targets // windows.length), batch_size, read)
