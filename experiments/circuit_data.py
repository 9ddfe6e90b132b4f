"""The generated data of the studies of circuits: sequences that repeat, and sentences with an
indirect object."""

from __future__ import annotations

from typing import Any

import numpy as np

NUM_TOKENS, LENGTH = 64, 64  # of the repeating sequences
SHORTEST, LONGEST = 12, 32  # periods; they vary, so that a head cannot just look a fixed distance back
NAMES = ["Ann", "Tom", "Mary", "John", "Eve", "Paul", "Kate", "Mark", "Lucy", "Jack", "Rose", "Luke", "Emma", "Noah",
         "Jane", "Dan", "Lily", "Max", "Ruth", "Sam"]
PLACES = ["park", "shop", "school", "beach", "house", "garden", "library", "station"]
THINGS = ["book", "ring", "ball", "drink", "letter", "apple", "coin", "hat"]
OTHERS = ["then", "and", "went", "to", "the", ".", "gave", "a"]
WORDS = [*NAMES, *PLACES, *THINGS, *OTHERS]
IDS = {word: number for number, word in enumerate(WORDS)}


def draw_repeating(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    """Draws sequences of random tokens that repeat with a random period, ``[B, T + 1]``."""
    periods = rng.integers(SHORTEST, LONGEST + 1, num_rows)
    tokens = rng.permuted(np.tile(np.arange(NUM_TOKENS), (num_rows, 1)), axis=1)
    return np.take_along_axis(tokens, np.arange(LENGTH + 1) % periods[:, None], 1)


def sentences(rng: np.random.Generator, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws sentences ``[B, 16]``, and the names of each ``[B, 3]``: the indirect object, the
    subject, and a name that does not occur."""
    names = rng.permuted(np.tile(np.arange(len(NAMES)), (num_rows, 1)), axis=1)[:, :3]
    rows = []
    for (answer, subject, _), is_first, place, thing in zip(
            names, rng.random(num_rows) < 0.5, rng.choice(PLACES, num_rows), rng.choice(THINGS, num_rows), strict=True):
        first, second = (answer, subject) if is_first else (subject, answer)
        rows.append([IDS["then"], first, IDS["and"], second, *(IDS[word] for word in ("went", "to", "the", place, ".")),
                     subject, *(IDS[word] for word in ("gave", "a", thing, "to")), answer, IDS["."]])
    return np.array(rows), names


def draw_sentences(rng: np.random.Generator, num_rows: int) -> np.ndarray:
    """Draws sentences to train on, ``[B, 16]``."""
    return sentences(rng, num_rows)[0]


class Questions:
    """Sentences without their last name, and the same ones in which a third name gives something."""

    def __init__(self, seed: int, num_rows: int):
        """Draws the sentences."""
        rows, self.names = sentences(np.random.default_rng((777, seed)), num_rows)
        self.clean = rows[:, :-2].astype(np.int32)
        self.corrupted = self.clean.copy()
        self.corrupted[:, 9] = self.names[:, 2]

    def difference(self, logits_BTV: Any) -> Any:
        """Returns the mean logit of the indirect object minus that of the subject."""
        rows = np.arange(len(self.names))
        return (logits_BTV[rows, -1, self.names[:, 0]] - logits_BTV[rows, -1, self.names[:, 1]]).mean()
