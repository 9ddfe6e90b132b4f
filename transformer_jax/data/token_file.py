"""A corpus that is tokenized once and stored in a memory-mapped file."""

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.files import naming
from transformer_jax.json_files import read_json
from transformer_jax.settings import check_text

_LAYOUT = 1  # part of the cache key: increase it if the tokens of the same text and tokenizer change
_MIN_DOCUMENTS_TO_CUT_BETWEEN = 20


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of a corpus: for every document ``<|endoftext|>``, then its tokens.

    The last token of a document predicts the ``<|endoftext|>`` of the next one, so no target must
    be masked.

    Attributes:
      tokens: Memory-mapped token ids, uint16 if the vocabulary fits, otherwise uint32.
      num_documents: Number of documents.
      num_bytes: Total length of the documents in UTF-8, in bytes.
      end_of_text_id: The id of ``<|endoftext|>``.
    """

    tokens: np.ndarray
    num_documents: int
    num_bytes: int
    end_of_text_id: int

    @classmethod
    def build(cls, documents: Iterable[str], tokenizer: Tokenizer, cache_dir: str | Path) -> "TokenFile":
        """Tokenizes documents and writes their tokens to a file.

        If ``cache_dir`` has a file for the same documents and tokenizer, that file is used.

        Args:
          documents: A list, or the result of ``read_documents`` or ``read_tfds``. They are iterated
            twice, because the first iteration computes a digest; a generator is not allowed.
          tokenizer: Encodes the documents.
          cache_dir: The directory of the file, which is created if it does not exist. A damaged
            file is detected by its digest and written again.

        Returns:
          The tokens.

        Raises:
          ValueError: If there is no document, or if ``documents`` can be iterated only once.
        """
        if isinstance(documents, Iterator):
            raise ValueError("documents are read twice: pass a list or another iterable, not an iterator")
        content = measure(documents)
        key = {"layout": _LAYOUT, "content": content, "tokenizer": tokenizer.digest}
        before, _ = tokenizer.frame("prompt")
        key |= {"before": before} if before else {}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        path = Path(cache_dir) / f"tokens-{name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        if not is_intact(path, key):
            write_with_digest(path, key, (block.astype(dtype) for block in tokenizer.encode_corpus(documents)))
        tokens = np.memmap(path, dtype, mode="r")
        return cls(tokens, content["documents"], content["bytes"], tokenizer.end_of_text_id)

    def split(self, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Splits the tokens into a training part and a validation part.

        The second part starts at token ``int(len(tokens) * (1 - validation_fraction))``. If there
        are 20 documents or more, it starts at the nearest start of a document.

        Args:
          validation_fraction: The fraction of the tokens, at the end, for validation.

        Returns:
          The tokens for training and the tokens for validation.

        Raises:
          ValueError: If the fraction is not between 0 and 1, or if a part would have no tokens.
        """
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {validation_fraction}")
        cut = int(len(self.tokens) * (1 - validation_fraction))
        if self.num_documents >= _MIN_DOCUMENTS_TO_CUT_BETWEEN:
            cut = self._nearest_document_start(cut)
        if not 0 < cut < len(self.tokens):
            raise ValueError(
                f"validation_fraction={validation_fraction} of {len(self.tokens)} tokens leaves a part empty"
            )
        return self.tokens[:cut], self.tokens[cut:]

    def _nearest_document_start(self, index: int) -> int:
        # The search starts near the index, so that a corpus of billions of tokens is not read
        # completely.
        """Returns the position of the ``<|endoftext|>`` that is nearest to an index."""
        radius = 1 << 16
        while True:
            low, high = max(1, index - radius), min(len(self.tokens), index + radius + 1)
            starts = low + np.flatnonzero(self.tokens[low:high] == self.end_of_text_id)
            if starts.size:
                return int(starts[np.argmin(np.abs(starts - index))])
            radius *= 2


def measure(documents: Iterable[str]) -> dict[str, Any]:
    """Reads documents once, to tell whether they are the same as before.

    Args:
      documents: The documents.

    Returns:
      Their digest ``sha256``, their number ``documents`` and their total size ``bytes``.

    Raises:
      ValueError: If there is no document, or one is not a string or has half a surrogate pair.
    """
    digest, num_documents, num_bytes = hashlib.sha256(), 0, 0
    for document in documents:
        check_text(document)
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        num_documents += 1
        num_bytes += len(data)
    if not num_documents:
        raise ValueError("the corpus has no documents")
    return {"sha256": digest.hexdigest(), "documents": num_documents, "bytes": num_bytes}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_intact(path: Path, key: dict) -> bool:
    """Tells whether ``write_with_digest`` wrote the file for this key and the file is unchanged. If
    it is damaged, this is logged."""
    description = path.with_suffix(".json")
    if not path.is_file() or not description.is_file():
        return False
    try:
        found = read_json(description, dict[str, Any])
    except ValueError:
        found = None
    if found == {"key": key, "size": path.stat().st_size, "sha256": _sha256(path)}:
        return True
    logging.warning("%s does not match its digest: it is damaged and will be written again", path)
    return False


def write_with_digest(path: Path, key: dict, blocks: Iterable[np.ndarray]) -> None:
    """Writes blocks to a file, and their description to a second file. Each file has a temporary
    name until it is complete."""
    digest, size = hashlib.sha256(), 0
    with renamed_when_complete(path) as stream:
        for block in blocks:
            digest.update(block.tobytes())
            size += stream.write(block.tobytes())
    with renamed_when_complete(path.with_suffix(".json")) as stream:
        stream.write(json.dumps({"key": key, "size": size, "sha256": digest.hexdigest()}).encode())


@contextlib.contextmanager
def renamed_when_complete(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing, and renames it to ``path`` when it is complete.

    Args:
      path: The file.

    Yields:
      The temporary file.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path), temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
