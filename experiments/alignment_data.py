"""Generated English sentences with their Portuguese translations, and the source word of each target
word: "the small red house" is "a casa vermelha pequena", with 0 3 2 1."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

NOUNS = {"house": "casa f", "table": "mesa f", "window": "janela f", "letter": "carta f", "street": "rua f",
         "cow": "vaca f", "flower": "flor f", "boat": "barco m", "book": "livro m", "garden": "jardim m",
         "dog": "cachorro m", "cat": "gato m", "horse": "cavalo m", "bird": "pássaro m"}
ADJECTIVES = {"red": "vermelh", "small": "pequen", "old": "velh", "new": "nov", "black": "pret", "white": "branc",
              "cold": "fri", "pretty": "bonit", "slow": "lent", "clean": "limp"}
DETERMINERS = {"the": "o a", "this": "este esta", "that": "aquele aquela", "my": "meu minha"}
VERBS = {"saw": "viu", "found": "encontrou", "wanted": "queria", "left": "deixou", "drew": "desenhou", "lost": "perdeu"}
OTHERS = {"yesterday": "ontem", "today": "hoje", "again": "novamente", "with": "com", "without": "sem"}
WORDS = ["<pad>", "<s>", "</s>", *NOUNS, *ADJECTIVES, *DETERMINERS, *VERBS, *OTHERS,
         *(noun.split()[0] for noun in NOUNS.values()), *(stem + ending for stem in ADJECTIVES.values()
                                                          for ending in "oa"),
         *(word for pair in DETERMINERS.values() for word in pair.split()), *VERBS.values(), *OTHERS.values()]
IDS = {word: number for number, word in enumerate(WORDS)}
LENGTH = 16  # of a row: at most 15 words, and the token that ends a source or starts a target

Words = list[tuple[str, str, int]]  # of a target, in its order: source word, target word, place in the source


def _noun_phrase(rng: np.random.Generator, start: int) -> Words:
    """Draws a determiner, up to two adjectives and a noun. In Portuguese, the adjectives follow the
    noun in the opposite order, and all agree with it."""
    noun, determiner = rng.choice(list(NOUNS)), rng.choice(list(DETERMINERS))
    adjectives = rng.choice(list(ADJECTIVES), rng.integers(3), replace=False)
    word, gender = NOUNS[noun].split()
    at_noun = start + 1 + len(adjectives)
    return [(determiner, DETERMINERS[determiner].split()[gender == "f"], start), (noun, word, at_noun), *(
        (adjective, ADJECTIVES[adjective] + ("a" if gender == "f" else "o"), at_noun - 1 - number)
        for number, adjective in enumerate(reversed(adjectives)))]


def draw_sentence(rng: np.random.Generator) -> Words:
    """Draws a sentence, such as "yesterday my old cat saw the bird with that cow"."""
    words: Words = []

    def add(choices: list[str]) -> None:
        word = rng.choice(choices)
        words.append((word, (VERBS | OTHERS)[word], len(words)))

    if rng.random() < 0.5:
        add(["yesterday", "today", "again"])
    words += _noun_phrase(rng, len(words))
    add(list(VERBS))
    words += _noun_phrase(rng, len(words))
    if rng.random() < 0.5:
        add(["with", "without"])
        words += _noun_phrase(rng, len(words))
    return words


class Translations:
    """Pairs of sentences as the model reads them.

    Attributes:
      batch: ``source``, ``source_segment_ids``, ``tokens``, ``targets``, ``segment_ids`` and
        ``weights``, each ``[B, LENGTH]``. Target t is predicted at position t, which reads the
        target before it.
      aligned: for each target its word in the source; -1 for the end of the sentence and for
        padding, ``[B, LENGTH]``.
      texts: the words of each source and of each target, with those that start or end them.
    """

    def __init__(self, rng: np.random.Generator, num_rows: int):
        """Draws the pairs."""
        self.texts: list[tuple[list[str], list[str]]] = []
        source, tokens, targets = (np.zeros((num_rows, LENGTH), np.int32) for _ in range(3))
        self.aligned: Int[np.ndarray, "B T"] = np.full((num_rows, LENGTH), -1)
        for row in range(num_rows):
            words = draw_sentence(rng)
            in_source_order = sorted(words, key=lambda word: word[2])
            read, written = [word for word, _, _ in in_source_order] + ["</s>"], [word for _, word, _ in words]
            self.texts.append((read, [*written, "</s>"]))
            source[row, :len(read)] = [IDS[word] for word in read]
            tokens[row, :len(read)] = [IDS[word] for word in ("<s>", *written)]
            targets[row, :len(read)] = [IDS[word] for word in (*written, "</s>")]
            self.aligned[row, :len(words)] = [place for _, _, place in words]
        is_used = (source > 0).astype(np.int32)
        self.batch = {"source": source, "source_segment_ids": is_used, "tokens": tokens, "segment_ids": is_used,
                      "targets": targets, "weights": is_used.astype(np.float32)}


def draw_translations(rng: np.random.Generator, num_rows: int) -> dict[str, np.ndarray]:
    """Draws a batch to train on."""
    return Translations(rng, num_rows).batch
