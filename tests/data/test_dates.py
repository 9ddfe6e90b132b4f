import calendar
import collections
import datetime
import random
import re

import pytest

from transformer_jax.data import dates_corpus, generate_dates
from transformer_jax.data.dates import (
    english_number,
    english_ordinal,
    english_years,
    portuguese_number,
    write_date,
)


def words_of(text: str) -> list[str]:
    return text.split()


@pytest.mark.parametrize(("number", "words"), [
    (0, "zero"), (7, "seven"), (10, "ten"), (12, "twelve"), (13, "thirteen"), (15, "fifteen"), (18, "eighteen"),
    (20, "twenty"), (21, "twenty-one"), (40, "forty"), (55, "fifty-five"), (80, "eighty"), (99, "ninety-nine"),
])
def test_english_numbers(number, words):
    assert english_number(number) == words


def test_english_ordinals():
    assert [english_ordinal(number) for number in range(1, 32)] == words_of(
        "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
        "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth twenty-first twenty-second twenty-third "
        "twenty-fourth twenty-fifth twenty-sixth twenty-seventh twenty-eighth twenty-ninth thirtieth thirty-first"
    )


@pytest.mark.parametrize(("year", "ways"), [
    (1800, {"eighteen hundred"}),
    (1805, {"eighteen oh five", "eighteen hundred and five"}),
    (1812, {"eighteen twelve"}),
    (1900, {"nineteen hundred"}),
    (1998, {"nineteen ninety-eight"}),
    (2000, {"two thousand"}),
    (2007, {"two thousand and seven", "two thousand seven"}),
    (2011, {"twenty eleven", "two thousand and eleven", "two thousand eleven"}),
    (2099, {"twenty ninety-nine", "two thousand and ninety-nine", "two thousand ninety-nine"}),
])
def test_english_years(year, ways):
    assert set(english_years(year)) == ways


@pytest.mark.parametrize(("number", "words"), [
    (1, "um"), (3, "três"), (14, "catorze"), (16, "dezesseis"), (17, "dezessete"), (19, "dezenove"), (20, "vinte"),
    (21, "vinte e um"), (31, "trinta e um"), (50, "cinquenta"), (66, "sessenta e seis"), (100, "cem"),
    (101, "cento e um"), (500, "quinhentos"), (999, "novecentos e noventa e nove"), (1000, "mil"), (1100, "mil e cem"),
    (1500, "mil e quinhentos"), (1800, "mil e oitocentos"), (1801, "mil oitocentos e um"),
    (1822, "mil oitocentos e vinte e dois"), (1900, "mil e novecentos"), (1910, "mil novecentos e dez"),
    (1998, "mil novecentos e noventa e oito"), (2000, "dois mil"), (2007, "dois mil e sete"),
    (2023, "dois mil e vinte e três"), (2099, "dois mil e noventa e nove"),
])
def test_portuguese_numbers(number, words):
    assert portuguese_number(number) == words


@pytest.mark.parametrize(("date", "texts"), [
    ((1998, 4, 23), [
        "the twenty-third of April, nineteen ninety-eight", "April twenty-third, 1998", "April the 23rd, 1998",
        "23 Apr 1998", "Thursday, April 23, 1998", "Thursday, 04/23/1998", "THURSDAY, THE 23RD OF APRIL 1998",
        "vinte e três de abril de 1998", "dia 23 de abril de mil novecentos e noventa e oito",
        "quinta-feira, 23 de abril do ano de 1998", "quinta-feira, 23/04/1998", "DIA 23/04/1998",
        "aos vinte e três dias do mês de abril de 1998",
    ]),
    ((2011, 3, 3), ["March 3rd, 2011", "thursday, march third, twenty eleven", "três de março de dois mil e onze",
                    "QUINTA-FEIRA, TRÊS DE MARÇO DE DOIS MIL E ONZE"]),
    ((2007, 5, 5), ["the fifth of May, two thousand and seven", "sábado, 5 de maio de dois mil e sete"]),
    ((1901, 1, 1), ["January 1st, nineteen oh one", "primeiro de janeiro de mil novecentos e um",
                    "dia 1º de jan de 1901", "ao primeiro dia do mês de janeiro de 1901", "terça-feira, 01/01/1901"]),
    ((1812, 8, 11), ["August 11th, 1812", "August the eleventh, eighteen twelve", "Tuesday, 08/11/1812"]),
    ((1822, 9, 22), ["September 22nd, 1822", "domingo, vinte e dois de set de 1822"]),
])
def test_ways_to_write_a_date(date, texts):
    rng = random.Random(0)
    written = {write_date(datetime.date(*date), rng) for _ in range(30_000)}
    assert set(texts) <= written


ENGLISH_MONTHS = [month.lower() for month in calendar.month_name]
PORTUGUESE_MONTHS = words_of(
    "- janeiro fevereiro março abril maio junho julho agosto setembro outubro novembro dezembro"
)
WEEKDAYS = {name.lower(): number for number, name in enumerate(calendar.day_name)}
WEEKDAYS |= {name: number for number, name in enumerate(words_of(
    "segunda-feira terça-feira quarta-feira quinta-feira sexta-feira sábado domingo"
))}
# The values of words are added, except for "hundred" and "thousand" ("mil"), which multiply.
VALUES = {"oh": 0, "and": 0, "e": 0, "oitocentos": 800, "novecentos": 900, "primeiro": 1}
VALUES |= {word: value for value, word in enumerate(words_of(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
))}
VALUES |= {word: value for value, word in enumerate(words_of(
    "um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezesseis dezessete dezoito "
    "dezenove vinte"
), start=1)}
for tens in ("thirty forty fifty sixty seventy eighty ninety",
             "trinta quarenta cinquenta sessenta setenta oitenta noventa"):
    VALUES |= {word: 30 + 10 * place for place, word in enumerate(words_of(tens))}
VALUES |= dict(zip(words_of("first second third fifth eighth ninth twelfth twentieth thirtieth"),
                   [1, 2, 3, 5, 8, 9, 12, 20, 30], strict=True))


def number(words: str) -> int:
    """Reads a year or a day, in digits or words; "nineteen" before tens is a century."""
    if found := re.fullmatch(r"(\d+)(st|nd|rd|th|º)?", words):
        return int(found[1])
    total = 0
    parts = re.split(r"[ -]", words)
    for place, word in enumerate(parts):
        if word == "mil":
            total = (total or 1) * 1000
        elif word in ("hundred", "thousand"):
            total *= 100 if word == "hundred" else 1000
        else:
            total += VALUES[word.removesuffix("th") if word not in VALUES else word]
            is_century = place == 0 and total in (18, 19, 20) and len(parts) > 1 and parts[1] not in ("hundred", "e")
            if is_century and not words.startswith("twenty-"):
                total *= 100
    return total


def read(text: str) -> datetime.date:
    """Reads a date back, by rules of the test's own."""
    text = text.lower()
    first, _, rest = text.partition(", ")
    weekday = WEEKDAYS.get(first)
    text = rest if weekday is not None else text
    portuguese = "feira" in first or first in ("sábado", "domingo") or " de " in text or text.startswith("dia ")
    if found := re.fullmatch(r"(dia )?(\d\d)/(\d\d)/(\d{4})", text):
        day, month = (int(found[2]), int(found[3])) if portuguese else (int(found[3]), int(found[2]))
        year = found[4]
    elif portuguese:
        found = re.fullmatch(r"(?:dia |aos |ao )?(.+?)(?: dias?)?(?: do mês)? de (\w+) (?:de|do ano de) (.+)", text)
        day, month, year = number(found[1]), found[2], found[3]
    elif found := re.fullmatch(r"the (\S+) of (\w+),? (.+)", text):
        day, month, year = number(found[1]), found[2], found[3]
    elif found := re.fullmatch(r"(\w+) (?:the )?(\S+), (.+)", text):
        day, month, year = number(found[2]), found[1], found[3]
    else:
        found = re.fullmatch(r"(\d+) (\w+) (.+)", text)
        day, month, year = number(found[1]), found[2], found[3]
    if isinstance(month, str):
        names = PORTUGUESE_MONTHS if portuguese else ENGLISH_MONTHS
        (month,) = [i for i, name in enumerate(names) if i and (name == month or name[:3] == month)]
    date = datetime.date(number(year), month, day)
    assert weekday in (None, date.weekday()), text
    return date


def test_written_files_are_read_back():
    for text, iso in generate_dates(20_000, 3):
        assert read(text).isoformat() == iso, text


def test_digits_alone_come_with_a_language():
    texts = [text for text, _ in generate_dates(5_000, 4) if "/" in text]
    assert len(texts) > 300
    assert all(re.match(r"[^\d/]+ \d\d/\d\d/\d{4}$", text) for text in texts)


def test_the_range_and_the_variety():
    pairs = generate_dates(20_000, 5)
    years = collections.Counter(int(iso[:4]) for _, iso in pairs)
    assert min(years) == 1800 and max(years) == 2099 and len(years) == 300
    assert len({iso[5:] for _, iso in pairs}) == 366
    share = {name: sum(map(kind, (text for text, _ in pairs))) / len(pairs) for name, kind in [
        ("upper", str.isupper), ("lower", str.islower),
        ("portuguese", lambda text: bool(re.search(r" d[eo] |^dia |feira|sábado|domingo", text.lower()))),
    ]}
    assert 0.2 < share["upper"] < 0.3 and 0.35 < share["lower"] < 0.7 and 0.45 < share["portuguese"] < 0.55


def test_the_seed_decides():
    assert generate_dates(50, 1) == generate_dates(50, 1) == generate_dates(80, 1)[:50]
    assert generate_dates(50, 1) != generate_dates(50, 2)
    assert generate_dates(2, 0) == [
        ("aos dois dias do mês de abril de mil novecentos e trinta e oito", "1938-04-02"),
        ("quarta-feira, dia 13 de jan de 1971", "1971-01-13"),
    ]  # on every version of Python


def test_excluded_dates_are_not_drawn():
    days = [datetime.date(1800, 1, 1) + datetime.timedelta(days=i) for i in range(109_573)]
    assert days[-1] == datetime.date(2099, 12, 31)
    left = days[::10_000]
    drawn = {iso for _, iso in generate_dates(100, 0, exclude=set(days) - set(left))}
    assert drawn == {day.isoformat() for day in left}
    with pytest.raises(ValueError, match="all 109,573 dates from 1800-01-01 to 2099-12-31 are excluded"):
        generate_dates(1, 0, exclude=days)
    assert generate_dates(0, 0) == []


def test_no_held_out_date_is_trained_on():
    train, held_out = dates_corpus(30_000, 1_000, 7)
    assert (len(train), len(held_out)) == (30_000, 1_000)
    assert not {iso for _, iso in train} & {iso for _, iso in held_out}
    assert (train, held_out) == dates_corpus(30_000, 1_000, 7)
    assert dates_corpus(30_000, 1_000, 8)[1] != held_out
