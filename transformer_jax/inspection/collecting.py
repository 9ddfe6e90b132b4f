"""Activations of a corpus, written to disk or passed on to a training step."""

from __future__ import annotations

import hashlib
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from transformer_jax.decoding.batch import whole_number
from transformer_jax.files import locked_directory
from transformer_jax.inspection.activations import (
    INDEX,
    Activations,
    Index,
    check_digest,
    need_safetensors,
    read_index,
    write_index,
    write_shard,
)
from transformer_jax.inspection.reading_activations import PLACES, ActivationReader
from transformer_jax.settings import checked_path


def collect(bundle_or_model: Any, texts: Iterable[Any], sites: str | Sequence[str], directory: str | pathlib.Path, *,
            tokenizer: Any = None, batch_size: int = 32, dtype: str = "float32", rows_per_shard: int = 1 << 16,
            mesh: Mesh | None = None) -> Activations:
    """Computes activations for all tokens of a corpus and writes them to a directory.

    Call it again with the same arguments after an interruption: it continues after the last whole
    shard, and the files are the same as those of a call that was never stopped. The memory that it
    needs depends on ``rows_per_shard`` and not on the length of the corpus.

    Args:
      bundle_or_model: The result of ``tj.load``, or a model.
      texts: The texts: strings, or lists of token ids; for an encoder-decoder, pairs of a source
        and a target. A text that is longer than the model's context is cut into pieces.
      sites: The names of the activations, as in ``trace.names()``: ``"layers.3.mlp_output"``, or
        ``"mlp_output"`` for all layers. Heads are joined: ``head_output`` has N * H values.
      directory: The directory to write to.
      tokenizer: The tokenizer; by default that of the bundle.
      batch_size: Rows of a batch of the model.
      dtype: ``"float32"`` or ``"bfloat16"``.
      rows_per_shard: A shard ends with the batch that brings it to this number of tokens.
      mesh: Devices that share each batch, from ``tj.sharding.make_mesh``.

    Returns:
      The activations, which are read from disk when they are used.

    Raises:
      ValueError: If an argument is not valid; if the directory holds activations of another model,
        of other texts or with other settings; if a shard is damaged; or if another program
        writes to the directory.
      ImportError: If safetensors is not installed.
    """
    need_safetensors("collect writes safetensors files (tj.inspection.ActivationBatches needs no disk)")
    reader = ActivationReader.make(bundle_or_model, texts, sites, tokenizer=tokenizer, batch_size=batch_size,
                                   dtype=dtype, mesh=mesh)
    rows_per_shard = whole_number("rows_per_shard", rows_per_shard)
    directory = checked_path("directory", directory)
    with locked_directory(directory):
        return _collect(reader, directory, rows_per_shard)


def _collect(reader: ActivationReader, directory: pathlib.Path, rows_per_shard: int) -> Activations:
    """Writes what the directory does not hold yet, and opens it."""
    index = _index(directory, reader, rows_per_shard)
    digest = hashlib.sha256()
    batches = reader.rows()
    for rows in itertools.islice(batches, sum(shard["batches"] for shard in index["shards"])):
        _add(digest, rows)
    if digest.hexdigest() != index["texts"]:
        raise ValueError(f"{directory} holds activations of other texts; use another directory")
    if index["finished"] and next(batches, None) is not None:
        raise ValueError(f"{directory} holds activations of fewer texts; use another directory")
    if not index["finished"]:
        _write(directory, index, reader, batches, digest, rows_per_shard)
    return Activations(directory)


def _write(directory: pathlib.Path, index: Index, reader: ActivationReader, batches: Iterator[Any], digest: Any,
           rows_per_shard: int) -> None:
    """Writes all shards that the index does not list."""
    parts: list[dict[str, np.ndarray]] = []

    def finish_shard(finished: bool) -> None:
        if parts:
            index["shards"].append(write_shard(directory, len(index["shards"]), parts))
            parts.clear()
        index["texts"], index["finished"] = digest.hexdigest(), finished
        write_index(directory, index)

    with tqdm(desc="collecting", unit=" tokens", unit_scale=True,
              initial=sum(shard["rows"] for shard in index["shards"])) as progress:
        for values, rows in reader.read(batches):
            _add(digest, rows)
            parts.append(values)
            progress.update(len(values[PLACES[0]]))
            if sum(len(part[PLACES[0]]) for part in parts) >= rows_per_shard:
                finish_shard(False)
    if not parts and not index["shards"]:
        raise ValueError("there are no texts; pass at least one")
    finish_shard(True)


def _index(directory: pathlib.Path, reader: ActivationReader, rows_per_shard: int) -> Index:
    """Returns the index of an earlier call, whose shards are verified, or an empty one.

    Raises:
      ValueError: If the earlier call had another model or other settings, or a shard is damaged.
    """
    key = f"{reader.digest()}-{rows_per_shard}"
    if not (directory / INDEX).is_file():
        return Index(dims=reader.dims, dtype=reader.dtype, reader=key, texts=hashlib.sha256().hexdigest(),
                     finished=False, shards=[])
    index = read_index(directory)
    if index["reader"] != key:
        raise ValueError(f"{directory} holds activations of another model, or of other sites, batch_size, dtype or "
                         "rows_per_shard; use another directory")
    for shard in index["shards"]:
        check_digest(directory, shard)
    return index


def _add(digest: Any, rows: Sequence[Any]) -> None:
    """Adds the token ids of a batch to a digest."""
    for _, _, *ids in rows:
        for part in ids:
            digest.update(b"none" if part is None else np.asarray(part, np.int64).tobytes() + b";")


class ActivationBatches:
    """An endless iterator over shuffled activations, computed while they are used and never
    written to disk.

    The model fills a buffer of ``buffer_size`` tokens. The buffer is shuffled and handed out in
    batches, then filled again from the following texts. The corpus is repeated without end. The
    tokens that do not fill a batch at the end of a buffer are left out.

    Use it as the data of ``tj.train``. ``get_state`` and ``set_state`` make the run exactly
    resumable: the position is stored and the buffer is computed again.

    Args:
      bundle_or_model: The result of ``tj.load``, or a model.
      texts: The texts, as for ``collect``.
      sites: The names of the activations, as for ``collect``.
      batch_size: Tokens of each batch that the iterator yields.
      buffer_size: Tokens in the buffer.
      seed: Determines the order.
      tokenizer: The tokenizer; by default that of the bundle.
      model_batch_size: Rows of a batch of the model.
      dtype: ``"float32"`` or ``"bfloat16"``.
      mesh: Devices that share each batch of the model.

    Raises:
      ValueError: If an argument is not valid.
    """

    def __init__(self, bundle_or_model: Any, texts: Iterable[Any], sites: str | Sequence[str], *, batch_size: int,
                 buffer_size: int = 1 << 16, seed: int = 0, tokenizer: Any = None, model_batch_size: int = 32,
                 dtype: str = "float32", mesh: Mesh | None = None):
        self.reader = ActivationReader.make(bundle_or_model, texts, sites, tokenizer=tokenizer,
                                            batch_size=model_batch_size, dtype=dtype, mesh=mesh)
        self._batch_size = whole_number("batch_size", batch_size)
        self._buffer_size = whole_number("buffer_size", buffer_size, least=batch_size)
        self._seed = seed
        self.set_state({"buffer": 0, "batch": 0, "row": 0})

    @property
    def dims(self) -> dict[str, int]:
        """The number of values of each site for one token."""
        return self.reader.dims

    def get_state(self) -> dict[str, int]:
        """Describes the position.

        Returns:
          Numbers by name, which JSON can store.
        """
        return dict(self._state)

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a position.

        Args:
          state: What ``get_state`` returned.
        """
        self._state = dict(state)
        self._values = self.reader.read(itertools.islice(self._endless(), state["row"], None))
        self._buffer: dict[str, np.ndarray] | None = None
        self._rows_of_buffer = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._buffer is None:
            self._fill()
        buffer, batch = self._buffer, self._state["batch"]
        assert buffer is not None
        result = {name: values[batch * self._batch_size:(batch + 1) * self._batch_size]
                  for name, values in buffer.items()}
        self._state["batch"] += 1
        if (batch + 2) * self._batch_size > len(buffer[PLACES[0]]):
            self._state = {"buffer": self._state["buffer"] + 1, "batch": 0,
                           "row": self._state["row"] + self._rows_of_buffer}
            self._buffer = None
        return result

    def _endless(self) -> Iterator[Any]:
        """Yields the batches of rows of the corpus, again and again."""
        while True:
            empty = True
            for rows in self.reader.rows():
                empty = False
                yield rows
            if empty:
                raise ValueError("there are no texts; pass at least one")

    def _fill(self) -> None:
        """Fills the buffer and shuffles it."""
        parts, count = [], 0
        while count < self._buffer_size:
            values, _ = next(self._values)
            parts.append(values)
            count += len(values[PLACES[0]])
        self._rows_of_buffer = len(parts)
        order = np.random.default_rng([self._seed, self._state["buffer"]]).permutation(count)
        self._buffer = {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}
