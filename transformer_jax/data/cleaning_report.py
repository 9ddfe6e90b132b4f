"""What the cleaning of a corpus removed: counts, and examples to look at."""

import dataclasses
import textwrap
from typing import Any

import numpy as np

_NUM_EXAMPLES = 3  # of each reason
_SHOWN = 160  # characters of an example


@dataclasses.dataclass(frozen=True)
class CleaningReport:
    """What the cleaning of a corpus removed.

    Attributes:
      documents: The number of documents, by ``"read"``, ``"exact"``, ``"quality"``, ``"near"`` and
        ``"kept"``. The middle three are the numbers that each step removed.
      bytes: The sizes of these documents in UTF-8, by the same names.
      examples: Up to three removed documents for each step: ``step``, ``document`` (its number,
        counted from 0), ``text`` (its beginning), and ``of``, ``of_text`` and ``similarity`` of the
        document that it repeats, or its ``score``. They are the decisions nearest to the limit: the
        least similar pairs and the highest scores.
    """

    documents: dict[str, int]
    bytes: dict[str, int]
    examples: list[dict[str, Any]]

    @classmethod
    def of(cls, is_equal: np.ndarray, is_left: np.ndarray, is_kept: np.ndarray, sizes: np.ndarray,
           examples: list[dict[str, Any]]) -> "CleaningReport":
        """Makes the report.

        Args:
          is_equal: Which documents are exact duplicates, bool [N].
          is_left: Which documents the first two steps keep, bool [N].
          is_kept: Which documents all steps keep, bool [N].
          sizes: The sizes of the documents in bytes [N].
          examples: The examples.

        Returns:
          The report.
        """
        parts = {"read": np.ones_like(is_equal), "exact": is_equal, "quality": ~is_equal & ~is_left,
                 "near": is_left & ~is_kept, "kept": is_kept}
        return cls({name: int(part.sum()) for name, part in parts.items()},
                   {name: int(sizes[part].sum()) for name, part in parts.items()}, examples)

    def __str__(self) -> str:
        """Formats the counts in a table, and the examples."""
        names = {"read": "read", "exact": "exact duplicates", "quality": "quality filter", "near": "near duplicates",
                 "kept": "kept"}
        total, total_bytes = max(1, self.documents["read"]), max(1, self.bytes["read"])
        lines = [f"{'':16}  {'documents':>11}  {'':>7}  {'bytes':>15}"]
        for name, shown in names.items():
            count, size = self.documents[name], self.bytes[name]
            lines.append(f"{shown:16}  {count:11,}  {count / total:7.2%}  {size:15,}  {size / total_bytes:7.2%}")
        for example in self.examples:
            why = (f"score {example['score']:.3f}" if "score" in example else
                   f"repeats document {example['of']}, similarity {example['similarity']:.3f}")
            lines.append(f"{names[example['step']]}: document {example['document']}, {why}")
            lines += [f"  {textwrap.shorten(example[key], 96, placeholder=' ...')}" for key in ("text", "of_text")
                      if key in example]
        return "\n".join(lines)


class Examples:
    """Chooses the examples of a report, and collects their texts.

    Args:
      equal_to: For each document, the number of an equal document, or a negative number, [N].
      is_left: Which documents the first two steps keep, bool [N].
      scores: The scores of the documents; NaN for those without one, [N].
      similar_to: For each document, the number of a similar document, or a negative number, [N].
      similarities: The similarities to these documents [N].
    """

    def __init__(self, equal_to: np.ndarray, is_left: np.ndarray, scores: np.ndarray, similar_to: np.ndarray,
                 similarities: np.ndarray):
        self._examples: list[dict[str, Any]] = []
        for number in np.flatnonzero(equal_to >= 0)[:_NUM_EXAMPLES]:
            self._add("exact", number, of=int(equal_to[number]), similarity=1.0)
        for number in _first(np.flatnonzero(~is_left & (equal_to < 0)), -scores):
            self._add("quality", number, score=float(scores[number]))
        for number in _first(np.flatnonzero(similar_to >= 0), similarities):
            self._add("near", number, of=int(similar_to[number]), similarity=float(similarities[number]))
        self._texts = {example[key]: "" for example in self._examples for key in ("document", "of") if key in example}

    def see(self, number: int, text: str) -> None:
        """Keeps the beginning of a text, if it is an example.

        Args:
          number: The number of the document.
          text: Its text.
        """
        if number in self._texts:
            self._texts[number] = text[:_SHOWN]

    def found(self) -> list[dict[str, Any]]:
        """Returns the examples with their texts."""
        return [example | {f"{'of_' * (key == 'of')}text": self._texts[example[key]] for key in ("document", "of")
                           if key in example} for example in self._examples]

    def _add(self, step: str, number: np.integer, **why: Any) -> None:
        self._examples.append({"step": step, "document": int(number), **why})


def _first(numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Returns the numbers of the documents with the smallest values, the smallest first."""
    return numbers[np.argsort(values[numbers], kind="stable")[:_NUM_EXAMPLES]]
