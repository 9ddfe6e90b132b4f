"""Generated Portuguese sentences in which agreement, or what is plausible, tells two nouns
apart."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence

from transformer_jax.data import agreement_words as words
from transformer_jax.data.agreement_words import DETERMINERS, JUDGEMENTS, Noun
from transformer_jax.settings import nearest

SPLITS = ("train", "pairs", "nouns")
_ONE_NOUN_EVERY = 4  # one in so many training sentences has a single noun


@dataclasses.dataclass(frozen=True)
class AgreementSentence:
    """A sentence with two nouns and one word to predict, which only the right noun explains.

    Words are separated by single spaces, and positions count words from 0.

    Attributes:
      text: The sentence, without a full stop.
      family: The kind of sentence, one of ``AGREEMENT_FAMILIES``.
      answer_at: The position of the word to predict.
      alternatives: Words that would be right in its place if the sentence spoke of something else.
      referent_at: The position of the noun that decides the answer.
      other_at: The position of the other noun.
      is_last: Whether the answer is the last word, so that the words before it decide it.
    """

    text: str
    family: str
    answer_at: int
    alternatives: tuple[str, ...]
    referent_at: int
    other_at: int
    is_last: bool

    @property
    def answer(self) -> str:
        """The word to predict."""
        return self.text.split(" ")[self.answer_at]

    @property
    def referent(self) -> str:
        """The noun that decides the answer."""
        return self.text.split(" ")[self.referent_at]

    @property
    def prefix(self) -> str:
        """The words before the answer, without a space at the end."""
        return " ".join(self.text.split(" ")[:self.answer_at])

    def masked(self, mask: str = "<mask>") -> str:
        """Returns the sentence with another word in place of the answer.

        Args:
          mask: The word.

        Returns:
          The changed sentence.
        """
        found = self.text.split(" ")
        return " ".join([*found[:self.answer_at], mask, *found[self.answer_at + 1:]])


def _pour(first: Noun, second: Noun, referent: Noun, is_last: bool, rng: random.Random) -> AgreementSentence:
    """"Verteu água da jarra para o copo até que ele ficasse cheio"."""
    verb = rng.choice(("Verti", "Verteu", "Vertemos", "Verteram", "Despejei", "Despejou", "Despejamos", "Despejaram",
                       "Passei", "Passou", "Passamos", "Passaram"))
    liquid = rng.choice(("água", "leite", "suco", "vinho", "café", "chá", "azeite", "caldo"))
    kind = rng.randrange(4)
    before = [verb, liquid, f"d{DETERMINERS[first.ending][kind]}", first.word,
              "para", DETERMINERS[second.ending][kind], second.word, "até", "que"]
    copula, verbs = rng.choice(("ficasse", "estivesse")), rng.choice(("se enchesse", "transbordasse"))
    if is_last:
        full, empty = f"chei{referent.ending}", f"vazi{referent.ending}"
        answer, other = (full, empty) if referent is second else (empty, full)
        return _made("pour", [*before, referent.pronoun, copula], answer, [], (other,), (3, 6), referent is second)
    after = verbs if referent is second else "se esvaziasse"
    return _made("pour", before, referent.pronoun, after.split(" "), (_other_pronoun(referent),), (3, 6),
                 referent is second)


def _cross(first: Noun, second: Noun, referent: Noun, is_last: bool, rng: random.Random) -> AgreementSentence:
    """"O animal não atravessou a rua porque ele estava cansado"."""
    verb, kind = rng.choice(("atravessou", "cruzou")), rng.randrange(4)
    before = [DETERMINERS[first.ending][kind].capitalize(), first.word, "não", verb,
              DETERMINERS[second.ending][kind], second.word, "porque"]
    of_first = rng.choice(("tinha medo", "tinha sono"))
    of_second = rng.choice(("dava medo", "tinha lama", f"era larg{second.ending}"))
    if is_last:
        found = [f"{stem}{referent.ending}" for stem in ("cansad", "alagad")]
        answer, other = found if referent is first else found[::-1]
        return _made("cross", [*before, referent.pronoun, "estava"], answer, [], (other,), (1, 5), referent is second)
    after = of_first if referent is first else of_second
    return _made("cross", before, referent.pronoun, after.split(" "), (_other_pronoun(referent),), (1, 5),
                 referent is second)


def _part(first: Noun, second: Noun, referent: Noun, is_last: bool, rng: random.Random) -> AgreementSentence:
    """"Acho os anéis de Saturno bonitos" and "Vi os anéis de Saturno porque eles eram enormes"."""
    kind = rng.randrange(4)
    middle = [DETERMINERS[first.ending][kind], first.word, "de", second.word]
    verb, stem = rng.choice(JUDGEMENTS)
    saw, quality = rng.choice(words.LOOKS), rng.choice(words.QUALITIES)
    if is_last:  # the adjective always describes the first noun
        others = tuple(f"{stem}{ending}" for ending in DETERMINERS if ending != referent.ending)
        return _made("part", [verb, *middle], f"{stem}{referent.ending}", [], others, (2, 4), referent is second)
    after = ["eram", f"{quality}s"] if referent.is_plural else ["era", quality]
    others = tuple(pronoun for pronoun in ("ele", "ela", "eles", "elas") if pronoun != referent.pronoun)
    return _made("part", [saw, *middle, "porque"], referent.pronoun, after, others, (2, 4), referent is second)


def _voice(first: Noun, second: Noun, referent: Noun, is_last: bool, rng: random.Random) -> AgreementSentence:
    """"O cachorro viu a gata e ela começou a miar"."""
    verb, kind = rng.choice(words.MEETINGS), rng.randrange(4)
    before = [DETERMINERS[first.ending][kind].capitalize(), first.word, verb, DETERMINERS[second.ending][kind],
              second.word, "e"]
    if is_last:
        other = first if referent is second else second
        return _made("voice", [*before, referent.pronoun, "começou", "a"], referent.sound, [], (other.sound,), (1, 4),
                     referent is second)
    return _made("voice", before, referent.pronoun, ["começou", "a", referent.sound], (_other_pronoun(referent),),
                 (1, 4), referent is second)


def _made(family: str, before: Sequence[str], answer: str, after: Sequence[str], alternatives: tuple[str, ...],
          places: tuple[int, int], is_second: bool) -> AgreementSentence:
    """Puts a sentence together."""
    return AgreementSentence(" ".join([*before, answer, *after]), family, len(before), alternatives,
                             places[is_second], places[not is_second], not after)


def _other_pronoun(noun: Noun) -> str:
    return {"ele": "ela", "ela": "ele"}[noun.pronoun]


_WRITERS: dict[str, Callable[[Noun, Noun, Noun, bool, random.Random], AgreementSentence]] = {
    "pour": _pour, "cross": _cross, "part": _part, "voice": _voice}
AGREEMENT_FAMILIES = tuple(_WRITERS)


def generate_agreement(num: int, seed: int, *, split: str = "train",
                       family: str | None = None) -> list[AgreementSentence]:
    """Draws sentences in which one of two nouns decides a word.

    There are four families. ``"pour"``: "Verteu água da jarra para o copo até que ele ficasse
    cheio"; what water leaves becomes empty. ``"cross"``: "O animal não atravessou a rua porque ele
    estava cansado"; ways are never tired. ``"part"``: "Vi os anéis de Saturno porque eles eram
    enormes"; number and gender decide. ``"voice"``: "O cachorro viu a gata e ela começou a miar".
    In half of the sentences the word to predict is the last one; in the other half it is the
    pronoun, and the words after it decide.

    Args:
      num: Number of sentences. A sentence can occur more than once.
      seed: The same seed gives the same sentences.
      split: ``"train"``; ``"pairs"``, for pairs of nouns that no training sentence has together; or
        ``"nouns"``, for two nouns that no training sentence of any family has.
      family: Draws sentences of this family only.

    Returns:
      The sentences.

    Raises:
      ValueError: If there is no such split or family.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not one of {', '.join(SPLITS)}")
    families = AGREEMENT_FAMILIES if family is None else (_checked(family),)
    rng = random.Random(f"{split} {seed}")
    found = []
    for _ in range(num):
        chosen, is_last = rng.choice(families), rng.random() < 0.5
        first, second = _draw(chosen, rng, lambda pair: _split_of(*pair) == split)
        found.append(_WRITERS[chosen](first, second, _referent(chosen, first, second, is_last, rng), is_last, rng))
    return found


def agreement_contrasts(num: int, seed: int, family: str) -> list[tuple[AgreementSentence, AgreementSentence]]:
    """Draws pairs of sentences that differ only in nouns and their articles, and so in the answer.

    The answer is the last word. The words between the nouns and the answer are the same, also the
    pronoun. In "pour" the two nouns change places; in "voice" only the referent changes, to a noun
    of the same gender with another voice; in "part" only the referent and its article change; in
    "cross" both nouns change, to nouns of the other gender. The nouns are those of training.

    Args:
      num: Number of pairs.
      seed: The same seed gives the same pairs.
      family: One of ``AGREEMENT_FAMILIES``.

    Returns:
      The pairs. Both sentences of a pair have the same number of words.

    Raises:
      ValueError: If there is no such family.
    """
    write, rng = _WRITERS[_checked(family)], random.Random(f"contrasts {seed}")
    found = []
    for number in range(num):
        first, second = _draw(family, rng, _is_seen)
        referent = _referent(family, first, second, True, rng)
        pair = (second, first)
        if family != "pour":
            pair = _draw(family, rng, functools.partial(_contrasts, family, (first, second), referent))
        other = {"pour": referent, "cross": pair[referent is first]}.get(family, pair[referent is second])
        found.append((write(first, second, referent, True, random.Random(f"{seed} {number}")),
                      write(*pair, other, True, random.Random(f"{seed} {number}"))))
    return found


def agreement_corpus(num_train: int, num_held_out: int, seed: int) -> tuple[list[str], list[str]]:
    """Generates the texts to train on and the held-out texts.

    One in four training sentences is about a single noun, as "A jarra mudou e ela ficou limpa" and
    "A loba viu o menino e ela começou a uivar". Only these have the held-out nouns, from which a
    model can learn their genders and sounds; every second one of these sentences has a held-out
    noun. A held-out animal meets people, who laugh and cry, and never another animal.

    Args:
      num_train: Number of training sentences.
      num_held_out: Number of held-out sentences. One half is from the split ``"pairs"``, the other
        from ``"nouns"``.
      seed: The same seed gives the same sentences.

    Returns:
      The training sentences and the held-out sentences.
    """
    rng = random.Random(f"one noun {seed}")
    num_single = num_train // _ONE_NOUN_EVERY
    train = [sentence.text for sentence in generate_agreement(num_train - num_single, seed)]
    train += [words.about_one_noun(rng) for _ in range(num_single)]
    rng.shuffle(train)
    sizes = {"pairs": num_held_out - num_held_out // 2, "nouns": num_held_out // 2}
    held_out = [one.text for split, num_of in sizes.items() for one in generate_agreement(num_of, seed, split=split)]
    return train, held_out


def _draw(family: str, rng: random.Random, accepts: Callable[[tuple[Noun, Noun]], bool]) -> tuple[Noun, Noun]:
    """Draws two nouns for a family. Only in ``"part"`` may they have the same gender."""
    while True:
        pools = {"pour": (words.VESSELS, words.VESSELS), "cross": (words.WALKERS, words.WAYS),
                 "voice": (words.ANIMALS, words.ANIMALS),
                 "part": rng.choice(((words.PLANET_PARTS, words.PLANETS), (words.CITY_PARTS, words.CITIES)))}[family]
        first, second = map(rng.choice, pools)
        if (family != "part" and first.gender == second.gender) or (family == "voice" and first.sound == second.sound):
            continue
        if accepts((first, second)):
            return first, second


def _referent(family: str, first: Noun, second: Noun, is_last: bool, rng: random.Random) -> Noun:
    """Draws the noun that decides the answer."""
    return first if family == "part" and is_last else rng.choice((first, second))


def _contrasts(family: str, pair: tuple[Noun, Noun], referent: Noun, drawn: tuple[Noun, Noun]) -> bool:
    """True if other training nouns change the answer but not the rest of the sentence."""
    if not _is_seen(drawn):
        return False
    if family == "cross":
        return drawn[0].gender != pair[0].gender
    place = pair.index(referent)
    changes = drawn[place].sound != referent.sound if family == "voice" else drawn[place].gender != referent.gender
    return changes and drawn[1 - place] == pair[1 - place]


def _split_of(first: Noun, second: Noun) -> str | None:
    """Returns the split of a pair; ``None`` if only one of the nouns is held out."""
    if first.held_out or second.held_out:
        return "nouns" if first.held_out and second.held_out else None
    return "pairs" if words.is_held_out_pair(first, second) else "train"


def _is_seen(pair: tuple[Noun, Noun]) -> bool:
    return not any(noun.held_out for noun in pair)


def _checked(family: str) -> str:
    """Returns the family; raises ValueError if there is none of this name."""
    if family not in _WRITERS:
        raise ValueError(f"family={family!r} is not one of {', '.join(_WRITERS)}{nearest(family, _WRITERS)}")
    return family
