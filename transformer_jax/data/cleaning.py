"""Cleans a corpus: it removes exact duplicates, texts of low quality and near duplicates.

The work has four steps, each of which reads the documents once, one at a time, and appends its
decisions to a file. If the process ends, the same call continues after the last decision.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from transformer_jax.data.cleaning_report import CleaningReport, Examples
from transformer_jax.data.deduplication import NUM_HASHES, ExactIndex, NearIndex, digest
from transformer_jax.data.quality import QualityClassifier, is_kept
from transformer_jax.data.step_file import Appended, Records
from transformer_jax.data.text import read_documents
from transformer_jax.data.token_file import measure, renamed_when_complete
from transformer_jax.json_files import read_json
from transformer_jax.settings import require

_EXACT = np.dtype([("content", "<u8"), ("digest", "V16"), ("of", "<i8")])
_QUALITY = np.dtype([("score", "<f8"), ("kept", "?")])
_NEAR = np.dtype([("of", "<i8"), ("similarity", "<f4"), ("signature", "<u4", NUM_HASHES)])
_NONE = -1  # in the field "of": the document repeats no other one
_UNSEEN = -2  # an earlier step has removed the document
_SETTINGS, _REPORT = "settings.json", "report.json"


@dataclasses.dataclass(frozen=True)
class Cleaning:
    """The settings of a cleaning.

    Attributes:
      data: The corpus: a file, a directory or a glob pattern, as in ``data.path``.
      good: Examples of good texts, in the same form. ``None`` leaves the quality filter out.
      bad: Examples of bad texts, in the same form.
      threshold: Documents with at least this Jaccard similarity are near duplicates, in (0, 1].
      text_key: The key of the text in JSON objects.
      seed: The seed of the random draws of the quality filter.
    """

    data: str
    good: str | None = None
    bad: str | None = None
    threshold: float = 0.8
    text_key: str = "text"
    seed: int = 0

    def __post_init__(self):
        for field in ("data", "good", "bad"):
            if isinstance(value := getattr(self, field), os.PathLike):
                object.__setattr__(self, field, os.fspath(value))
        require(0 < self.threshold <= 1, f"threshold={self.threshold} must be in (0, 1], the smallest similarity "
                                         "of duplicates")
        require(self.seed >= 0, f"seed={self.seed} must not be negative")
        require((self.good is None) == (self.bad is None), "the quality filter needs both good and bad examples, but "
                f"got good={self.good!r} and bad={self.bad!r}")


def clean_corpus(cleaning: Cleaning, output: str | Path, before_each: Callable[[], None] | None = None
                 ) -> CleaningReport:
    """Cleans a corpus and writes the documents that are kept to ``corpus.jsonl`` in a directory.

    The steps are: exact duplicates, equal up to case, white space and Unicode forms; the quality
    filter, if there are examples; near duplicates (see ``tj.data.deduplicate``); writing. The same
    call continues a cleaning that was stopped, and the files are then the same to the byte. Memory
    grows by about 7 kB for each document that is kept, not with the length of the documents.

    Args:
      cleaning: The settings.
      output: The directory, which is created if it does not exist. ``report.json`` in it holds the
        report, and the other files hold the decisions of each step.
      before_each: A function that is called before each document of each step. It may raise an
        exception to stop the cleaning, after which the same call continues it.

    Returns:
      The report.

    Raises:
      ValueError: If the settings or the data are not valid, if the directory belongs to another
        cleaning, or if the data has changed since the first start.
      ImportError: If datasketch or, for the quality filter, scikit-learn is not installed.
    """
    output = Path(output)
    documents = read_documents(cleaning.data, key=cleaning.text_key)
    NearIndex(cleaning.threshold)  # raises ImportError before the first step
    job = _Job(cleaning, output, documents, before_each)
    return job.run(job.claim())


class _Job:
    """One call of ``clean_corpus``."""

    def __init__(self, cleaning: Cleaning, output: Path, documents: Any, before_each: Callable[[], None] | None):
        self._cleaning, self._output, self._documents = cleaning, output, documents
        self._before_each = before_each
        self._exact = Records(output / "1_exact.bin", _EXACT)
        self._quality = Records(output / "2_quality.bin", _QUALITY)
        self._near = Records(output / "3_near.bin", _NEAR)
        self._corpus = Appended(output / "corpus.jsonl")

    def claim(self) -> QualityClassifier | None:
        """Records the settings in the directory, or compares them with the record. Returns the
        classifier, which is trained at the first start."""
        cleaning = self._cleaning
        settings = dataclasses.asdict(cleaning)
        for field in ("good", "bad"):
            if (path := settings[field]) is not None:
                settings[f"{field}_sha256"] = measure(read_documents(path, key=cleaning.text_key))["sha256"]
        path = self._output / _SETTINGS
        if path.exists():
            recorded = read_json(path, dict[str, Any])
            changed = [f"{name}: {recorded.get(name)!r} -> {value!r}" for name, value in settings.items()
                       if recorded.get(name) != value]
            require(not changed, f"{self._output} holds a cleaning with other settings: {'; '.join(changed)}; use "
                                 "another directory, or the old settings")
        classifier, model = None, self._output / "quality.npz"
        if cleaning.good is not None and cleaning.bad is not None:
            if path.exists():
                return QualityClassifier.load(model)
            classifier = QualityClassifier.train(*(list(read_documents(examples, key=cleaning.text_key))
                                                   for examples in (cleaning.good, cleaning.bad)))
        self._output.mkdir(parents=True, exist_ok=True)
        if classifier is not None:
            classifier.save(model)
        if not path.exists():
            _write_json(path, settings)
        return classifier

    def run(self, classifier: QualityClassifier | None) -> CleaningReport:
        """Runs the steps that are not finished."""
        if (self._output / _REPORT).exists():
            return CleaningReport(**read_json(self._output / _REPORT, dict[str, Any]))
        self._find_equal()
        if classifier is not None:
            self._filter(classifier)
        self._find_similar()
        report = self._write()
        _write_json(self._output / _REPORT, dataclasses.asdict(report))
        return report

    def _find_equal(self) -> None:
        """Finds exact duplicates."""
        index = ExactIndex()
        for number, record in enumerate(self._exact.read()):
            index.find_or_add(number, record["digest"].tobytes())

        def decide(number: int, text: str) -> tuple:
            key = digest(text)
            of = index.find_or_add(number, key)
            return _content(text), key, _NONE if of is None else of

        self._decide(self._exact, "exact duplicates", decide)

    def _filter(self, classifier: QualityClassifier) -> None:
        """Scores the documents, and draws which of them are kept."""
        of = self._exact.read()["of"]

        def decide(number: int, text: str) -> tuple:
            if of[number] != _NONE:
                return np.nan, False
            score = float(classifier([text])[0])
            return score, is_kept(score, number, self._cleaning.seed)

        self._decide(self._quality, "quality", decide)

    def _find_similar(self) -> None:
        """Finds near duplicates."""
        is_left, index = self._left(), NearIndex(self._cleaning.threshold)
        for number, record in enumerate(tqdm(self._near.read(), unit="doc", desc="reading signatures")):
            if record["of"] == _NONE:
                index.add(number, np.array(record["signature"]))

        def decide(number: int, text: str) -> tuple:
            if not is_left[number]:
                return _UNSEEN, 0.0, np.zeros(NUM_HASHES, np.uint32)
            signature = index.signature(text)
            of, similarity = index.find(signature) or (_NONE, 0.0)
            if of == _NONE:
                index.add(number, signature)
            return of, similarity, signature

        self._decide(self._near, "near duplicates", decide)

    def _left(self) -> np.ndarray:
        """Returns which documents the first two steps keep, bool [number of documents]."""
        is_left = self._exact.read()["of"] == _NONE
        return is_left & self._quality.read()["kept"] if self._quality.is_finished else is_left

    def _write(self) -> CleaningReport:
        """Writes the documents that all steps keep, and makes the report."""
        exact, near = self._exact.read(), self._near.read()
        scores = self._quality.read()["score"] if self._quality.is_finished else np.full(len(exact), np.nan)
        examples = Examples(exact["of"], self._left(), scores, near["of"], near["similarity"])
        is_kept_N = near["of"] == _NONE
        num_lines, num_bytes = self._corpus.whole_lines()
        sizes, num_kept = np.zeros(len(exact), np.int64), 0
        with contextlib.nullcontext() if self._corpus.is_finished else self._corpus.appending(num_bytes) as stream:
            for number, text in self._read("writing"):
                sizes[number] = len(text.encode())
                examples.see(number, text)
                num_kept += int(is_kept_N[number])
                if stream is not None and is_kept_N[number] and num_kept > num_lines:
                    stream.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
        return CleaningReport.of(exact["of"] >= 0, self._left(), is_kept_N, sizes, examples.found())

    def _decide(self, records: Records, what: str, decide: Callable[[int, str], tuple]) -> None:
        """Appends a record for each document that has none yet."""
        if records.is_finished:
            return
        start = len(records.read())
        with records.appending(start * records.dtype.itemsize) as stream:
            for number, text in self._read(what):
                if number >= start:
                    stream.write(np.array(decide(number, text), records.dtype).tobytes())

    def _read(self, what: str) -> Iterator[tuple[int, str]]:
        """Yields the documents, and checks that those that the first step has seen are
        unchanged."""
        known, is_whole = self._exact.read()["content"], self._exact.is_finished
        number = -1
        for number, text in enumerate(tqdm(self._documents, total=len(known) if is_whole else None, unit="doc",
                                           desc=what)):
            is_known = number < len(known)
            if (is_known and known[number] != _content(text)) or (is_whole and not is_known):
                break
            if self._before_each is not None:
                self._before_each()
            yield number, text
        else:
            if number + 1 >= len(known):
                return
        raise ValueError(f"document {number + 1} of {self._cleaning.data} is not the one that was there at the first "
                         f"start; restore the data, or use another directory than {self._output}")


def _content(text: str) -> int:
    """Returns a number that changes with the text, to notice a changed corpus."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, which is complete as soon as it has its name."""
    with renamed_when_complete(path) as stream:
        stream.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")
