"""Finds the passages of documents that fit a question, by their words or by embeddings."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from transformer_jax.data import Conversation, Message, encode_prompt, read_documents
from transformer_jax.data.conversations import AnyTokenizer, as_prompt
from transformer_jax.decoding.batch import whole_number
from transformer_jax.decoding.embed import embed
from transformer_jax.inspection.space import nearest
from transformer_jax.training.bundle import Bundle

_SUFFIXES = (".txt", ".md", ".json", ".jsonl", ".txt.gz", ".jsonl.gz")
_PARAGRAPHS = re.compile(r"\n\s*\n")
_SENTENCES = re.compile(r"(?<=[.!?…])\s+")
_TEXTS_AT_ONCE = 16


@dataclasses.dataclass(frozen=True)
class Passage:
    """A part of a document.

    Attributes:
      text: the passage.
      source: the name of its file, relative to the directory of the documents.
      number: its place among the passages of the file, from 1.
      score: how well it fits the question: BM25, or the cosine of the embeddings.
    """

    text: str
    source: str
    number: int
    score: float = 0.0

    def describe(self) -> str:
        """Says in one line where the passage is, and how it begins.

        Returns:
          The line.
        """
        words = " ".join(self.text.split())
        return f"{self.source}, passage {self.number} (score {self.score:.2f}): {words[:80]}{'…' * (len(words) > 80)}"


class Passages:
    """The passages of documents, which can be searched."""

    def __init__(self, passages: Sequence[Passage], *, encoder: Bundle | None = None):
        """Indexes passages.

        Args:
          passages: the passages.
          encoder: an encoder or a decoder with its tokenizer, whose mean embeddings are compared;
            ``None`` compares words by BM25 (Robertson and Zaragoza 2009).

        Raises:
          ImportError: if there is no encoder, and bm25s is not installed.
          ValueError: if there is no passage.
        """
        self.passages = list(passages)
        if not self.passages:
            raise ValueError("there is no passage to search; pass documents with text")
        self._scores: Callable[[str], np.ndarray] = (
            _word_scores(self.passages) if encoder is None else _embedding_scores(self.passages, encoder))
        self._least = 0.0 if encoder is None else -2.0  # a passage that shares no word has the score 0

    @classmethod
    def read(cls, directory: str | pathlib.Path, *, max_words: int = 120, encoder: Bundle | None = None) -> Passages:
        """Reads all text files in a directory and its folders: .txt, .md, .json, .jsonl.

        Args:
          directory: the directory, or one file.
          max_words: the largest number of words of a passage. A passage consists of whole
            paragraphs, or of whole sentences of a longer paragraph.
          encoder: as in ``Passages``.

        Returns:
          The indexed passages.

        Raises:
          ImportError: if there is no encoder, and bm25s is not installed.
          ValueError: if there is no such directory, it has no text, or a file is not UTF-8 text.
        """
        root, max_words = pathlib.Path(directory), whole_number("max_words", max_words)
        files = [root] if root.is_file() else sorted(
            path for path in root.rglob("*") if path.name.lower().endswith(_SUFFIXES) and path.is_file())
        if not files:
            raise ValueError(f"{directory} is not a directory with files named {', '.join(_SUFFIXES)}")
        found = []
        for path in files:
            name = path.name if path == root else path.relative_to(root).as_posix()
            parts = [part for document in read_documents(path) for part in split_passages(document, max_words)]
            found += [Passage(text, name, number) for number, text in enumerate(parts, start=1)]
        return cls(found, encoder=encoder)

    def find(self, question: str, top_k: int = 3) -> list[Passage]:
        """Finds the passages that fit a question best.

        Args:
          question: the question.
          top_k: the largest number of passages.

        Returns:
          The passages with their scores, the best first. By BM25, a passage that has no word of the
          question is left out, so there may be fewer.
        """
        top_k = whole_number("top_k", top_k)
        scores_P = self._scores(question)
        best = np.argsort(-scores_P, kind="stable")[:top_k]
        return [dataclasses.replace(self.passages[place], score=float(scores_P[place]))
                for place in best if scores_P[place] > self._least]


def split_passages(text: str, max_words: int) -> Iterator[str]:
    """Splits a text into passages of whole paragraphs.

    Args:
      text: the text.
      max_words: the largest number of words. Longer paragraphs are split after sentences, and
        longer sentences after this many words.

    Yields:
      The passages, without white space around them.
    """
    passage: list[str] = []
    num_words = 0
    for part, separator in _parts(text, max_words):
        size = len(part.split())
        if passage and num_words + size > max_words:
            yield "".join(passage).strip()
            passage, num_words = [], 0
        passage += [part, separator]
        num_words += size
    if "".join(passage).strip():
        yield "".join(passage).strip()


def _parts(text: str, max_words: int) -> Iterator[tuple[str, str]]:
    """Yields paragraphs, or the sentences of long ones, each with the white space after it."""
    for paragraph in _PARAGRAPHS.split(text):
        if len(paragraph.split()) <= max_words:
            if paragraph.strip():
                yield paragraph, "\n\n"
            continue
        for sentence in _SENTENCES.split(paragraph):
            words = sentence.split()
            for start in range(0, len(words), max_words):
                yield " ".join(words[start:start + max_words]), " "


def _words(text: str) -> list[str]:
    """The words of a text in lower case, of any alphabet."""
    return re.findall(r"\w+", text.lower())


def _word_scores(passages: Sequence[Passage]) -> Callable[[str], np.ndarray]:
    """Returns a function from a question to the BM25 score of each passage."""
    try:
        import bm25s  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError('finding passages by their words needs: pip install "transformer_jax[documents]"') from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs each index that it makes
    words = [_words(passage.text) for passage in passages]
    known = set().union(*words)
    index = bm25s.BM25()
    index.index([found or [""] for found in words], show_progress=False)

    def scores(question: str) -> np.ndarray:
        asked = [word for word in _words(question) if word in known]
        return index.get_scores(asked) if asked else np.zeros(len(passages), np.float32)

    return scores


def _embedding_scores(passages: Sequence[Passage], encoder: Bundle) -> Callable[[str], np.ndarray]:
    """Returns a function from a question to the cosine of its embedding and that of each
    passage."""
    def vectors(texts: Sequence[str]) -> np.ndarray:
        # Batches of equal size, filled up with the last text, so that few shapes are compiled.
        rows: list[Any] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            part = list(texts[start:start + _TEXTS_AT_ONCE])
            padded = part + part[-1:] * (_TEXTS_AT_ONCE - len(part)) if len(texts) > 1 else part
            rows.append(np.asarray(embed(encoder.model, padded, tokenizer=encoder.tokenizer))[:len(part)])
        return np.concatenate(rows)

    vectors_PD = vectors([passage.text for passage in passages])

    def scores(question: str) -> np.ndarray:
        rows_P, cosines_P = nearest(vectors_PD, vectors([question])[0], len(passages))
        return np.asarray(cosines_P)[np.argsort(np.asarray(rows_P))]

    return scores


def with_passages(prompt: Conversation | str, passages: Sequence[Passage], tokenizer: AnyTokenizer,
                  room: int) -> tuple[tuple[Message, ...], list[Passage]]:
    """Puts passages before the question in the last message of a prompt, as FaQuAD and SQuAD do in
    fine-tuning: the passages, a blank line, and the question.

    Args:
      prompt: a conversation that ends with the user, or a question.
      passages: the passages, the best first.
      tokenizer: the model's tokenizer.
      room: the largest number of tokens of the prompt.

    Returns:
      The conversation, and the passages in it: as many of the first ones as there is room for.

    Raises:
      ValueError: if the prompt without passages has no room, or does not end with the user.
    """
    *before, question = as_prompt(prompt)
    if question.role != "user":
        raise ValueError(f"passages are put before a question of the user, but the last message is the "
                         f"{question.role}'s")
    for num_used in range(len(passages), -1, -1):
        used = list(passages[:num_used])
        text = "\n\n".join([*(passage.text for passage in used), question.content])
        messages = (*before, dataclasses.replace(question, content=text))
        size = len(encode_prompt(messages, tokenizer))
        if size <= room:
            return messages, used
    raise ValueError(f"the prompt alone has {size} tokens, but there is room for {room}; shorten it, or ask for fewer "
                     "new tokens")
