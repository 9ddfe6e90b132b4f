"""Writes the probabilities that nltk's n-gram models give, which the tests compare with ours.

Needs nltk (3.10.4 was used):  python tests/baselines/make_nltk_values.py
"""

import itertools
import json
import pathlib
import random

from nltk.lm import KneserNeyInterpolated, Lidstone
from nltk.util import everygrams

FIXTURE = pathlib.Path(__file__).with_name("fixtures") / "nltk_ngrams.json"


def main():
    # nltk subtracts a discount also where only the first n-gram of a text has a context, which has
    # no token before it. The text therefore ends as it begins, so that every n-gram occurs with a
    # token before it.
    draw = random.Random(0)
    body = draw.choices("abcd", weights=[8, 4, 2, 1], k=60)
    text = [*body, *body[:4]]
    values = {"text": "".join(text), "order": 3, "discount": 0.1, "k": 0.3}
    models = {"kneser_ney": KneserNeyInterpolated(values["order"], discount=values["discount"]),
              "add_k": Lidstone(values["k"], values["order"])}
    for name, model in models.items():
        model.fit([everygrams(text, max_len=values["order"])], text)
        values[name] = {"".join(context): [model.unmasked_score(token, tuple(context)) for token in "abcd"]
                        for length in range(values["order"]) for context in itertools.product("abcd", repeat=length)
                        if name == "kneser_ney" or length == values["order"] - 1}
    FIXTURE.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
