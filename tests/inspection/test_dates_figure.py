"""The figure of experiments.dates: pieces of a date merged into its year, month and day, pieces of
a text into its words."""

import numpy as np
import pytest

import transformer_jax as tj
from experiments.dates_figure import fields, words
from transformer_jax.data.dates import generate_dates
from transformer_jax.inspection.characters import joined


@pytest.mark.parametrize(("tokens", "expected"), [
    (list("1998-04-23"), [[1 / 4] * 4 + [0] * 6, [0] * 5 + [1 / 2] * 2 + [0] * 3, [0] * 8 + [1 / 2] * 2]),
    # A piece that extends into the next field belongs to the field in which it starts, after a
    # hyphen.
    (["199", "8-0", "4", "-23"], [[1 / 2, 1 / 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
    (["1998-", "0", "4-2", "3"], [[1, 0, 0, 0], [0, 1 / 2, 1 / 2, 0], [0, 0, 0, 1]]),
    # A field in which no piece begins gets the piece that contains it.
    (["1998-04-23"], [[1], [1], [1]]),
    (["199", "8-04-2", "3"], [[1 / 2, 1 / 2, 0], [0, 1, 0], [0, 0, 1]]),
])
def test_pieces_of_a_date(tokens, expected):
    labels, shares_FT = fields(tokens)
    assert labels == ["year=1998", "month=04", "day=23"]
    np.testing.assert_allclose(shares_FT, expected)


def test_pieces_of_a_text():
    pairs = generate_dates(40, 3)
    tokenizer = tj.Tokenizer.train([text for text, _ in pairs], vocab_size=420)
    for text in ["sexta-feira, vinte e três de abril de 1998", "1º 日/x ", *(text for text, _ in pairs)]:
        ids = tokenizer.encode_source(text)
        labels, members_WS = words(tokenizer, ids)
        assert "".join(labels).replace(" ", "") == f"{text}</s>".replace(" ", "")
        assert (members_WS.sum(0) == 1).all(), "each piece belongs to one word"
        for label, members_S in zip(labels, members_WS, strict=True):
            assert joined(tokenizer.pieces(np.asarray(ids)[members_S == 1])) == label
    # The words on the figure are in the language of the date.
    assert words(tokenizer, tokenizer.encode_source("sexta-feira, vinte e três"))[0] == [
        "sexta-feira", ",", "vinte", "e", "três", "</s>"]
