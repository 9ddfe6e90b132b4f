"""A corpus tokenised once into a memory-mapped file."""

import contextlib
import dataclasses
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from absl import logging

from transformer_jax.data.tokenizer import Tokenizer

_LAYOUT = 1  # part of the cache key: raise it when the tokens of the same text by the same tokenizer change
_MIN_DOCUMENTS_TO_CUT_BETWEEN = 20


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """The tokens of a corpus: for every document `<|endoftext|>`, then its tokens.

    So a document opens with `<|endoftext|>`, its last token predicts the next one's, and no target
    needs masking.

    Attributes:
        tokens: Memory-mapped ids, uint16 when the vocabulary fits, else uint32.
        num_documents: How many documents there are.
        num_bytes: Length of the documents in UTF-8.
        end_of_text_id: The id of `<|endoftext|>`.
    """

    tokens: np.ndarray
    num_documents: int
    num_bytes: int
    end_of_text_id: int

    @classmethod
    def build(cls, documents: Iterable[str], tokenizer: Tokenizer, cache_dir: str | Path) -> "TokenFile":
        """Tokenises documents, or reuses the file of the same content and tokenizer in `cache_dir`.

        Args:
            documents: Iterated twice, once for the digest: a list, `read_documents` or `read_tfds`,
              no generator.
            tokenizer: Encodes them.
            cache_dir: Made when absent. A damaged file in it is found out by its digest and written
              again.

        Raises:
            ValueError: there is no document, or `documents` can be iterated only once.
        """
        if isinstance(documents, Iterator):
            raise ValueError("documents are read twice: give a list or another re-iterable, not an iterator")
        content = _measure(documents)
        key = {"layout": _LAYOUT, "content": content, "tokenizer": tokenizer.digest}
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        path = Path(cache_dir) / f"tokens-{name}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        if not is_intact(path, key):
            write_with_digest(path, key, (block.astype(dtype) for block in tokenizer.encode_corpus(documents)))
        tokens = np.memmap(path, dtype, mode="r")
        return cls(tokens, content["documents"], content["bytes"], tokenizer.end_of_text_id)

    def split(self, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Cuts the tokens in two, of which the second is the validation split.

        The cut is at token `int(len(tokens) * (1 - validation_fraction))`, or at the start of the
        document nearest to it when there are 20 documents or more.

        Raises:
            ValueError: the fraction is not within (0, 1), or leaves one part without tokens.
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
        # In growing circles, so that a corpus of billions of tokens is not read through to be cut.
        radius = 1 << 16
        while True:
            low, high = max(1, index - radius), min(len(self.tokens), index + radius + 1)
            starts = low + np.flatnonzero(self.tokens[low:high] == self.end_of_text_id)
            if starts.size:
                return int(starts[np.argmin(np.abs(starts - index))])
            radius *= 2


def _measure(documents: Iterable[str]) -> dict:
    digest, num_documents, num_bytes = hashlib.sha256(), 0, 0
    for document in documents:
        data = document.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
        num_documents += 1
        num_bytes += len(data)
    if not num_documents:
        raise ValueError("the corpus holds no document")
    return {"sha256": digest.hexdigest(), "documents": num_documents, "bytes": num_bytes}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_intact(path: Path, key: dict) -> bool:
    """Returns whether `write_with_digest` wrote the file for this key and it is as it was; damage
    is logged."""
    description = path.with_suffix(".json")
    if not path.exists() or not description.exists():
        return False
    try:
        found = json.loads(description.read_bytes())
    except ValueError:
        found = None
    if found == {"key": key, "size": path.stat().st_size, "sha256": _sha256(path)}:
        return True
    logging.warning("%s does not match its digest: it is damaged and will be written again", path)
    return False


def write_with_digest(path: Path, key: dict, blocks: Iterable[np.ndarray]) -> None:
    """Writes blocks and then their description, each file under a temporary name that is renamed
    when complete."""
    digest, size = hashlib.sha256(), 0
    with _renamed_when_complete(path) as stream:
        for block in blocks:
            digest.update(block.tobytes())
            size += stream.write(block.tobytes())
    with _renamed_when_complete(path.with_suffix(".json")) as stream:
        stream.write(json.dumps({"key": key, "size": size, "sha256": digest.hexdigest()}).encode())


@contextlib.contextmanager
def _renamed_when_complete(path: Path) -> Iterator[BinaryIO]:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
