"""The nouns of ``transformer_jax.data.agreement``, with their genders and the sounds of animals,
and sentences about one noun."""

from __future__ import annotations

import dataclasses
import random
import zlib

DETERMINERS = {"o": ("o", "este", "esse", "aquele"), "a": ("a", "esta", "essa", "aquela"),
               "os": ("os", "estes", "esses", "aqueles"), "as": ("as", "estas", "essas", "aquelas")}
JUDGEMENTS = (("Acho", "bonit"), ("Considero", "lind"), ("Julgo", "bel"))
LOOKS = ("Vi", "Observei", "Admirei", "Fotografei")
QUALITIES = ("enorme", "grande", "diferente")
MEETINGS = ("viu", "ouviu", "seguiu", "encontrou", "acordou")


@dataclasses.dataclass(frozen=True)
class Noun:
    """A noun.

    Attributes:
      word: The noun as it is written in the sentences.
      gender: ``"m"`` (masculine) or ``"f"`` (feminine).
      held_out: Whether the training sentences with two nouns leave it out.
      is_plural: Whether the word is a plural.
      sound: The verb for the sound that the animal makes; empty for all other nouns.
    """

    word: str
    gender: str
    held_out: bool
    is_plural: bool = False
    sound: str = ""

    @property
    def ending(self) -> str:
        """The ending of adjectives that agree with the noun: ``o``, ``a``, ``os`` or ``as``."""
        return {"m": "o", "f": "a"}[self.gender] + "s" * self.is_plural

    @property
    def pronoun(self) -> str:
        """The personal pronoun that agrees with the noun."""
        return {"o": "ele", "a": "ela", "os": "eles", "as": "elas"}[self.ending]


def _nouns(masculine: str, feminine: str, *, is_plural: bool = False) -> tuple[Noun, ...]:
    """Reads two lists of nouns; those after the bar are held out."""
    found = []
    for gender, words in (("m", masculine), ("f", feminine)):
        seen, _, held_out = words.partition("|")
        found += [Noun(word, gender, False, is_plural) for word in seen.split()]
        found += [Noun(word, gender, True, is_plural) for word in held_out.split()]
    return tuple(found)


def _animals(masculine: str, feminine: str) -> tuple[Noun, ...]:
    """Reads two lists of ``noun:verb``; those after the bar are held out."""
    return tuple(dataclasses.replace(noun, word=noun.word.partition(":")[0], sound=noun.word.partition(":")[2])
                 for noun in _nouns(masculine, feminine))


VESSELS = _nouns("copo balde jarro pote frasco tanque barril bule caneco regador | cálice cantil tacho",
                 "jarra garrafa xícara caneca tigela panela taça bacia chaleira vasilha | moringa cuia tina")
ANIMALS = _animals(
    "cachorro:latir gato:miar boi:mugir cavalo:relinchar lobo:uivar porco:grunhir burro:zurrar pato:grasnar "
    "pombo:arrulhar sapo:coaxar leão:rugir | carneiro:balir touro:mugir",
    "cadela:latir gata:miar vaca:mugir ovelha:balir galinha:cacarejar porca:grunhir mula:zurrar pata:grasnar "
    "cobra:sibilar abelha:zumbir leoa:rugir | égua:relinchar loba:uivar pomba:arrulhar")
PEOPLE = _nouns("menino rapaz homem aluno", "menina moça mulher aluna")
SOUNDS_OF_PEOPLE = ("chorar", "rir", "cantar", "gritar")
WALKERS = _nouns("animal bicho cachorro gato boi cavalo lobo porco burro pato urso coelho | carneiro veado",
                 "vaca cadela gata ovelha galinha porca mula raposa cabra onça | égua loba zebra")
WAYS = _nouns("rio campo riacho túnel pátio beco canal viaduto | parque bosque",
              "rua estrada ponte avenida praça trilha rodovia ladeira | passarela alameda")
PLANETS = _nouns("Saturno Júpiter Urano Marte Mercúrio | Netuno Plutão", "")
CITIES = _nouns("", "Lisboa Roma Paris Veneza Londres Olinda Manaus | Florença Sevilha")
PLANET_PARTS = _nouns("anéis polos vulcões satélites | desertos", "luas nuvens tempestades crateras | montanhas",
                      is_plural=True)
CITY_PARTS = _nouns("museus jardins bairros mercados teatros | palácios",
                    "igrejas casas escolas pontes feiras | torres", is_plural=True)


def is_held_out_pair(first: Noun, second: Noun) -> bool:
    """Tells whether training sentences leave a pair of nouns out, although both nouns occur in them
    with other nouns. The order of the two nouns does not matter.

    Args:
      first: A noun.
      second: Another noun.

    Returns:
      Whether both nouns are for training, and the pair is one of about a sixth of all pairs.
    """
    if first.held_out or second.held_out:
        return False
    return zlib.crc32(" ".join(sorted((first.word, second.word))).encode()) % 6 == 0


def about_one_noun(rng: random.Random) -> str:
    """Writes a sentence about one noun of the families, in which the gender of the noun shows, and
    for an animal also its sound.

    Some sentences have the form of those with two nouns. An animal then meets a person of the other
    gender, and one of them makes a sound: "A loba viu o menino e ela começou a uivar", "A loba viu o
    menino e ele começou a chorar". The word "lá" takes the place of a planet or city: "Acho as torres
    de lá bonitas".

    Args:
      rng: Chooses the noun and the words.

    Returns:
      The sentence.
    """
    of_parts = ("clar", "escur", "antig")
    stems = {VESSELS: ("limp", "quebrad", "suj"), WALKERS: ("velh", "mans", "magr"),
             WAYS: ("long", "antig", "estreit"), PLANET_PARTS: of_parts, CITY_PARTS: of_parts}
    pool = ANIMALS if rng.random() < 0.4 else rng.choice((*stems, PLANETS, CITIES))
    is_held_out = rng.random() < 0.5
    noun = rng.choice([one for one in pool if one.held_out == is_held_out])
    subject = f"{rng.choice(DETERMINERS[noun.ending])} {noun.word}"
    if pool in (PLANETS, CITIES):
        verb, stem = rng.choice(JUDGEMENTS)
        kind = "O planeta" if pool is PLANETS else "A cidade de"
        return rng.choice((f"{kind} {noun.word} é enorme", f"{verb} {noun.word} {stem}{noun.ending}",
                           f"Observei {noun.word} porque {noun.pronoun} era grande"))
    if pool is ANIMALS:
        if rng.random() < 0.5:
            howls = f"acordou e {noun.pronoun} começou a {noun.sound}"
            return rng.choice((f"{subject.capitalize()} {howls}", f"Ouvi {subject} {noun.sound}"))
        person = rng.choice([one for one in PEOPLE if one.gender != noun.gender])
        nouns = [subject, f"{rng.choice(DETERMINERS[person.ending])} {person.word}"]
        rng.shuffle(nouns)
        pronoun, sound = rng.choice(((noun.pronoun, noun.sound), (person.pronoun, rng.choice(SOUNDS_OF_PEOPLE))))
        return f"{nouns[0].capitalize()} {rng.choice(MEETINGS)} {nouns[1]} e {pronoun} começou a {sound}"
    if pool in (PLANET_PARTS, CITY_PARTS) and rng.random() < 0.5:
        verb, stem = rng.choice(JUDGEMENTS)
        return rng.choice((f"{verb} {subject} de lá {stem}{noun.ending}", f"{rng.choice(LOOKS)} {subject} de lá porque "
                           f"{noun.pronoun} eram {rng.choice(QUALITIES)}s"))  # all parts are plural
    changed, became = ("mudaram", "ficaram") if noun.is_plural else ("mudou", "ficou")
    return f"{subject.capitalize()} {changed} e {noun.pronoun} {became} {rng.choice(stems[pool])}{noun.ending}"
