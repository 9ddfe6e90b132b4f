"""A translation task that needs no file: dates in Portuguese or English words, and their ISO
form."""

import datetime
import random
from collections.abc import Collection

FIRST_DATE, LAST_DATE = datetime.date(1800, 1, 1), datetime.date(2099, 12, 31)

_ENGLISH_TO_19 = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]
_ENGLISH_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_ENGLISH_IRREGULAR_ORDINALS = {
    "one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth", "nine": "ninth",
    "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth",
}
_ENGLISH_MONTHS = [
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
]
_ENGLISH_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]

_PORTUGUESE_TO_19 = [
    "zero", "um", "dois", "três", "quatro", "cinco", "seis", "sete", "oito", "nove", "dez", "onze", "doze", "treze",
    "catorze", "quinze", "dezesseis", "dezessete", "dezoito", "dezenove",
]
_PORTUGUESE_TENS = ["-", "-", "vinte", "trinta", "quarenta", "cinquenta", "sessenta", "setenta", "oitenta", "noventa"]
_PORTUGUESE_HUNDREDS = [
    "-", "cento", "duzentos", "trezentos", "quatrocentos", "quinhentos", "seiscentos", "setecentos", "oitocentos",
    "novecentos",
]
_PORTUGUESE_MONTHS = [
    "janeiro", "fevereiro", "março", "abril", "maio", "junho", "julho", "agosto", "setembro", "outubro", "novembro",
    "dezembro",
]
_PORTUGUESE_WEEKDAYS = [
    "segunda-feira", "terça-feira", "quarta-feira", "quinta-feira", "sexta-feira", "sábado", "domingo",
]


def generate_dates(num: int, seed: int, *, exclude: Collection[datetime.date] = ()) -> list[tuple[str, str]]:
    """Draws dates from 1800 to 2099 and writes each one in one of many ways.

    Half of the dates are Portuguese and half are English. Days and years are words or digits, the
    day of the week may come first, and letters may be lower-case or upper-case. If a date consists
    of digits only, the language of the word before it decides which number is the day: Portuguese
    writes the day first, English the month.

    Args:
      num: Number of dates. A date can occur more than once.
      seed: The same seed gives the same dates.
      exclude: Dates that are not drawn.

    Returns:
      Pairs of a written date and its ISO form, such as ("vinte e três de abril de 1998",
      "1998-04-23").

    Raises:
      ValueError: If all dates are excluded.
    """
    excluded = frozenset(exclude)
    num_days = (LAST_DATE - FIRST_DATE).days + 1
    if sum(FIRST_DATE <= date <= LAST_DATE for date in excluded) == num_days:
        raise ValueError(f"all {num_days:,} dates from {FIRST_DATE} to {LAST_DATE} are excluded")
    rng = random.Random(seed)
    pairs = []
    while len(pairs) < num:
        date = FIRST_DATE + datetime.timedelta(days=rng.randrange(num_days))
        if date not in excluded:
            pairs.append((write_date(date, rng), date.isoformat()))
    return pairs


def dates_corpus(
    num_train: int, num_held_out: int, seed: int
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Generates training pairs and held-out pairs that have no date in common.

    Args:
      num_train: Number of training pairs.
      num_held_out: Number of held-out pairs.
      seed: The same seed gives the same pairs.

    Returns:
      The training pairs and the held-out pairs, in the form of ``generate_dates``.

    Raises:
      ValueError: If so many pairs are held out that no date is left for training.
    """
    held_out = generate_dates(num_held_out, 2 * seed)
    dates = {datetime.date.fromisoformat(iso) for _, iso in held_out}
    return generate_dates(num_train, 2 * seed + 1, exclude=dates), held_out


def write_date(date: datetime.date, rng: random.Random) -> str:
    """Writes a date in one of the ways of ``generate_dates``.

    Args:
      date: The date.
      rng: Chooses the language and the format.

    Returns:
      The written date.
    """
    write, weekdays = rng.choice([(_in_english, _ENGLISH_WEEKDAYS), (_in_portuguese, _PORTUGUESE_WEEKDAYS)])
    text = write(date, rng)
    needs_cue = "/" in text and text[0].isdecimal()
    if needs_cue or rng.random() < 0.5:
        text = f"{weekdays[date.weekday()]}, {text}"
    return rng.choice([str, str, str.lower, str.upper])(text)


def english_number(number: int) -> str:
    """Returns a number from 0 to 99 in English words."""
    if number < 20:
        return _ENGLISH_TO_19[number]
    tens, ones = divmod(number, 10)
    return _ENGLISH_TENS[tens] + (f"-{_ENGLISH_TO_19[ones]}" if ones else "")


def english_ordinal(number: int) -> str:
    """Returns an ordinal from 1 to 31 in English words, such as "twenty-third"."""
    tens, hyphen, last = english_number(number).rpartition("-")
    return tens + hyphen + _ENGLISH_IRREGULAR_ORDINALS.get(last, f"{last}th")


def english_years(year: int) -> list[str]:
    """Returns all ways to write a year from 1800 to 2099 in English words."""
    century, rest = divmod(year, 100)
    if century == 20:
        if rest == 0:
            return ["two thousand"]
        ways = [f"two thousand and {english_number(rest)}", f"two thousand {english_number(rest)}"]
        return ways if rest < 10 else [f"twenty {english_number(rest)}", *ways]
    if rest == 0:
        return [f"{english_number(century)} hundred"]
    if rest < 10:
        return [f"{english_number(century)} {joint} {english_number(rest)}" for joint in ("oh", "hundred and")]
    return [f"{english_number(century)} {english_number(rest)}"]


def portuguese_number(number: int) -> str:
    """Returns a number from 1 to 2999 in Brazilian Portuguese words."""
    thousands, rest = divmod(number, 1000)
    hundreds, small = divmod(rest, 100)
    tens, ones = (0, small) if small < 20 else divmod(small, 10)
    hundred = "cem" if rest == 100 else _PORTUGUESE_HUNDREDS[hundreds]
    named = [(hundreds, hundred), (tens, _PORTUGUESE_TENS[tens]), (ones, _PORTUGUESE_TO_19[ones])]
    below = " e ".join(word for count, word in named if count)
    if not thousands:
        return below
    above = "mil" if thousands == 1 else f"{_PORTUGUESE_TO_19[thousands]} mil"
    if not rest:
        return above
    # "mil e oitocentos" and "dois mil e sete", but "mil oitocentos e sete".
    return f"{above} {below}" if hundreds and small else f"{above} e {below}"


def _in_english(date: datetime.date, rng: random.Random) -> str:
    """Writes a date in one of several English formats."""
    name = _ENGLISH_MONTHS[date.month - 1]
    month = rng.choice([name, name, name[:3]])
    year = rng.choice([str(date.year), rng.choice(english_years(date.year))])
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10 if date.day // 10 != 1 else 0, "th")
    day = rng.choice([f"{date.day}{suffix}", english_ordinal(date.day)])
    return rng.choice([
        f"{month} {day}, {year}",
        f"{month} the {day}, {year}",
        f"the {day} of {month}, {year}",
        f"the {day} of {month} {year}",
        f"{month} {date.day}, {year}",
        f"{date.day} {month} {year}",
        f"{date.month:02}/{date.day:02}/{date.year}",
    ])


def _in_portuguese(date: datetime.date, rng: random.Random) -> str:
    """Writes a date in one of several Portuguese formats."""
    name = _PORTUGUESE_MONTHS[date.month - 1]
    month = rng.choice([name, name, name[:3]])
    year = rng.choice([str(date.year), portuguese_number(date.year)])
    digits, words = ("1º", "primeiro") if date.day == 1 else (str(date.day), portuguese_number(date.day))
    day = rng.choice([digits, words])
    days = f"ao {day} dia" if date.day == 1 else f"aos {day} dias"
    slashes = f"{date.day:02}/{date.month:02}/{date.year}"
    return rng.choice([
        f"{day} de {month} de {year}",
        f"{day} de {month} de {year}",
        f"dia {day} de {month} de {year}",
        f"{days} do mês de {name} de {year}",
        f"{day} de {month} do ano de {year}",
        f"dia {slashes}",
        slashes,
    ])
