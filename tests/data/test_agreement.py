"""The generated Portuguese sentences agree by a table of genders and by rules of this test, and
held-out words and pairs do not occur in training sentences."""

import itertools
import re

import pytest

from transformer_jax.data import (
    AGREEMENT_FAMILIES,
    agreement_contrasts,
    agreement_corpus,
    generate_agreement,
)


def words_of(text):
    return set(text.split(" "))


MASCULINE = words_of(
    "copo balde jarro pote frasco tanque barril bule caneco regador cálice cantil tacho cachorro gato boi cavalo lobo "
    "porco burro pato pombo sapo leão carneiro touro animal bicho urso coelho veado rio campo riacho túnel pátio beco "
    "canal viaduto parque bosque Saturno Júpiter Urano Marte Mercúrio Netuno Plutão anéis polos vulcões satélites "
    "desertos museus jardins bairros mercados teatros palácios")
FEMININE = words_of(
    "jarra garrafa xícara caneca tigela panela taça bacia chaleira vasilha moringa cuia tina cadela gata vaca ovelha "
    "galinha porca mula pata cobra abelha leoa égua loba pomba raposa cabra onça zebra rua estrada ponte avenida "
    "praça trilha rodovia ladeira passarela alameda Lisboa Roma Paris Veneza Londres Olinda Manaus Florença Sevilha "
    "luas nuvens tempestades crateras montanhas igrejas casas escolas pontes feiras torres")
PLURAL = {noun for noun in MASCULINE | FEMININE if re.search("[^s]s$", noun) and noun not in ("Paris", "Londres",
                                                                                            "Manaus")}
HELD_OUT = words_of(
    "cálice cantil tacho moringa cuia tina carneiro touro égua loba pomba veado zebra parque bosque passarela alameda "
    "Netuno Plutão Florença Sevilha desertos montanhas palácios torres")
SOUNDS = {"cachorro": "latir", "cadela": "latir", "gato": "miar", "gata": "miar", "vaca": "mugir", "boi": "mugir",
          "touro": "mugir", "lobo": "uivar", "loba": "uivar", "égua": "relinchar", "cavalo": "relinchar",
          "galinha": "cacarejar", "pato": "grasnar", "pata": "grasnar", "abelha": "zumbir", "leão": "rugir"}
PEOPLE = {"menino": "ele", "rapaz": "ele", "homem": "ele", "aluno": "ele",
          "menina": "ela", "moça": "ela", "mulher": "ela", "aluna": "ela"}
ENDINGS = {("m", False): "o", ("f", False): "a", ("m", True): "os", ("f", True): "as"}
DETERMINERS = {"o": {"o", "este", "esse", "aquele"}, "a": {"a", "esta", "essa", "aquela"},
               "os": {"os", "estes", "esses", "aqueles"}, "as": {"as", "estas", "essas", "aquelas"}}
PRONOUNS = {"o": "ele", "a": "ela", "os": "eles", "as": "elas"}


def ending(noun):
    assert (noun in MASCULINE) != (noun in FEMININE), noun
    return ENDINGS["f" if noun in FEMININE else "m", noun in PLURAL]


def check_determiners(words):
    """Every determiner agrees with the noun behind it; names have none. Returns the number of
    nouns."""
    found = 0
    for word, noun in itertools.pairwise(words):
        if noun in MASCULINE | FEMININE and noun.islower():
            assert re.sub("^d(?=[aeo])", "", word.lower()) in DETERMINERS[ending(noun)], (words, noun)
            found += 1
    return found


def expected(words):
    """The answers by rules of the test: which noun the sentence speaks of, and the word that it
    needs."""
    if words[4:5] == ["para"]:
        first, second, pronoun = words[3], words[6], words[9]
        if words[-1][:-1] in ("chei", "vazi"):
            referent = first if PRONOUNS[ending(first)] == pronoun else second
            return referent, ("vazi" if referent is first else "chei") + ending(referent), len(words) - 1
        referent = first if words[-1] == "esvaziasse" else second
        return referent, PRONOUNS[ending(referent)], 9
    if "não" in words:
        first, second, pronoun = words[1], words[5], words[7]
        if words[8] == "estava":
            referent = first if PRONOUNS[ending(first)] == pronoun else second
            return referent, ("cansad" if referent is first else "alagad") + ending(referent), len(words) - 1
        referent = first if words[8:] in (["tinha", "medo"], ["tinha", "sono"]) else second
        assert words[8] != "era" or words[9] == f"larg{ending(referent)}"
        return referent, PRONOUNS[ending(referent)], 7
    if words[3] == "de":
        first, second = words[2], words[4]
        if len(words) == 6:
            stem = {"Acho": "bonit", "Considero": "lind", "Julgo": "bel"}[words[0]]
            return first, stem + ending(first), 5
        is_plural = words[7] == "eram"
        assert words[8].endswith("s") == is_plural
        referent = first if is_plural else second
        return referent, PRONOUNS[ending(referent)], 6
    first, second, sound = words[1], words[4], words[-1]
    assert words[5] == "e" and words[7:9] == ["começou", "a"]
    referent = first if PRONOUNS[ending(first)] == words[6] else second
    assert SOUNDS.get(referent, sound) == sound
    return referent, None, None


@pytest.mark.parametrize("family", AGREEMENT_FAMILIES)
def test_every_sentence_agrees(family):
    sentences = [one for split in ("train", "pairs", "nouns")
                 for one in generate_agreement(300, 3, split=split, family=family)]
    lasts = 0
    for sentence in sentences:
        words = sentence.text.split(" ")
        assert check_determiners(words) == (1 if family == "part" else 2), sentence.text
        referent, answer, place = expected(words)
        assert sentence.referent == referent and words[sentence.other_at] != referent
        assert {words[sentence.referent_at], words[sentence.other_at]} == set(words) & (MASCULINE | FEMININE)
        if answer is not None:
            assert (sentence.answer, sentence.answer_at) == (answer, place), sentence.text
        elif sentence.is_last:
            other = SOUNDS.get(words[sentence.other_at], sentence.alternatives[0])
            assert sentence.answer == words[-1] and sentence.alternatives == (other,)
        else:
            assert sentence.answer == words[6] == PRONOUNS[ending(referent)]
        assert sentence.is_last == (sentence.answer_at == len(words) - 1)
        assert sentence.answer not in sentence.alternatives
        assert sentence.prefix == " ".join(words[:sentence.answer_at])
        assert sentence.masked().split(" ").index("<mask>") == sentence.answer_at
        lasts += sentence.is_last
    assert 0.4 < lasts / len(sentences) < 0.6


def nouns_of(text):
    return [word for word in text.split(" ") if word in MASCULINE | FEMININE]


def test_held_out_nouns_and_pairs_are_not_in_training():
    train, held_out = agreement_corpus(8_000, 800, 7)
    assert (len(train), len(held_out)) == (8_000, 800)
    twos = [nouns for nouns in map(nouns_of, train) if len(nouns) == 2]
    ones = [nouns[0] for nouns in map(nouns_of, train) if len(nouns) == 1]
    assert len(twos) == 6_000 and len(ones) == 2_000
    assert not {noun for nouns in twos for noun in nouns} & HELD_OUT
    assert set(ones) > HELD_OUT  # whose genders can still be learned
    halves = [list(map(nouns_of, held_out[start:start + 400])) for start in (0, 400)]
    trained_pairs, trained = {frozenset(nouns) for nouns in twos}, {noun for nouns in twos for noun in nouns}
    assert not {frozenset(nouns) for nouns in halves[0]} & trained_pairs
    assert {noun for nouns in halves[0] for noun in nouns} <= trained
    assert all(set(nouns) <= HELD_OUT for nouns in halves[1])
    assert len({frozenset(nouns) for nouns in halves[0]}) > 60
    vocabulary = {word for text in train for word in text.split(" ")}
    sentences = [one for split in ("pairs", "nouns") for one in generate_agreement(300, 1, split=split)]
    assert {word for one in sentences for word in (*one.text.split(" "), *one.alternatives)} <= vocabulary


def test_sentences_about_one_noun_agree():
    train, _ = agreement_corpus(4_000, 10, 1)
    singles = [text for text in train if len(nouns_of(text)) == 1]
    assert len(singles) == 1_000
    speakers = set()
    for text in singles:
        words, (noun,) = text.split(" "), nouns_of(text)
        assert check_determiners(words) == noun.islower(), text
        people = [word for word in words if word in PEOPLE]
        if people:  # a person of the other gender, who makes the sounds of people
            (person,) = people
            pronoun = PEOPLE[person]
            determiner = words[words.index(person) - 1].lower()
            assert determiner in DETERMINERS[{"ele": "o", "ela": "a"}[pronoun]], text
            assert pronoun != PRONOUNS[ending(noun)] and words[5] == "e", text
            is_person = words[6] == pronoun
            assert is_person == (words[-1] in ("chorar", "rir", "cantar", "gritar")), text
            assert is_person or (words[6] == PRONOUNS[ending(noun)] and words[-1] == SOUNDS.get(noun, words[-1])), text
            speakers.add(is_person)
            continue
        assert not {"ele", "ela", "eles", "elas"} & set(words) - {PRONOUNS[ending(noun)]}, text
        if words[-1].endswith("r"):
            assert words[-1] == SOUNDS.get(noun, words[-1]), text
        elif words[-1] in ("enormes", "grandes", "diferentes"):
            assert words[-3] == PRONOUNS[ending(noun)] and noun in PLURAL, text
        elif words[-1] not in ("enorme", "grande"):
            assert re.search("(os|as|o|a)$", words[-1])[0] == ending(noun), text
        if "planeta" in words or "cidade" in words:
            assert words[:-3] == (["O", "planeta"] if noun in MASCULINE else ["A", "cidade", "de"])
        assert ("ficaram" in words or "mudaram" in words) <= (noun in PLURAL)
    assert speakers == {True, False}


@pytest.mark.parametrize("family", AGREEMENT_FAMILIES)
def test_contrasts_differ_in_nouns_and_the_answer_alone(family):
    for clean, corrupted in agreement_contrasts(100, 5, family):
        pair = [one.text.split(" ") for one in (clean, corrupted)]
        assert len(pair[0]) == len(pair[1]) and clean.is_last and corrupted.is_last
        changed = {place for place, words in enumerate(zip(*pair, strict=True)) if len(set(words)) == 2}
        nouns = {clean.referent_at, clean.other_at}
        allowed = {"pour": nouns, "cross": nouns}.get(family, {clean.referent_at})
        assert clean.answer_at in changed and allowed <= changed
        assert changed <= {clean.answer_at, *allowed, *(place - 1 for place in allowed)}
        if family == "voice":
            assert changed == {clean.answer_at, clean.referent_at}
        for one, words in zip((clean, corrupted), pair, strict=True):
            assert expected(words)[0] == one.referent and not set(nouns_of(one.text)) & HELD_OUT
    assert len({clean.text for clean, _ in agreement_contrasts(100, 5, family)}) > 90


def test_the_seed_decides():
    assert generate_agreement(30, 1) == generate_agreement(30, 1) == generate_agreement(50, 1)[:30]
    assert generate_agreement(30, 1) != generate_agreement(30, 2)
    assert agreement_corpus(60, 10, 3) == agreement_corpus(60, 10, 3) != agreement_corpus(60, 10, 4)
    assert agreement_contrasts(5, 3, "pour") == agreement_contrasts(5, 3, "pour") != agreement_contrasts(5, 4, "pour")
    assert [one.text for one in generate_agreement(2, 0)] == FIRST  # on every version of Python


FIRST = ["Acho estas crateras de Mercúrio bonitas",
         "Passaram café dessa xícara para esse tanque até que ele estivesse cheio"]


def test_unknown_splits_and_families_are_refused_by_name():
    with pytest.raises(ValueError, match=r"split='test' is not one of train, pairs, nouns"):
        generate_agreement(1, 0, split="test")
    with pytest.raises(ValueError, match=r"family='poor' is not one of pour, cross, part, voice"):
        generate_agreement(1, 0, family="poor")
    with pytest.raises(ValueError, match=r"family='poor' is not one of"):
        agreement_contrasts(1, 0, "poor")
