"""Rows of several corpora, drawn with weights."""

import json
import math

import numpy as np
import pytest

from transformer_jax.data import LineRows, Masking, Mixture, Tokenizer, Windows, make_batches

# Brown et al. 2020, table 2.2: tokens in billions, the printed weight in percent, the printed
# epochs of 300 billion tokens, and the epochs that the printed weight gives.
GPT3 = {"Common Crawl": (410, 60, 0.44, 0.439), "WebText2": (19, 22, 2.9, 3.474), "Books1": (12, 8, 1.9, 2.0),
        "Books2": (55, 8, 0.43, 0.436), "Wikipedia": (3, 3, 3.4, 3.0)}


class Counted:
    """A corpus of which only the size is known."""

    def __init__(self, num_tokens, length=2048):
        self.num_tokens, self._length = num_tokens, length

    def __len__(self):
        return self.num_tokens // self._length


def corpus(first, num_rows, length=4):
    """Windows whose tokens are all >= first."""
    return Windows(np.arange(first, first + num_rows * length + 1, dtype=np.uint16), length, end_of_text_id=0)


@pytest.fixture
def mixture():
    return Mixture({"a": corpus(1000, 30), "b": corpus(2000, 7), "c": corpus(3000, 50)},
                   {"a": 0.65, "b": 0.25, "c": 0.1})


def batches_of(mixture, count, **options):
    batches = make_batches(mixture, **{"batch_size": 20, "seed": 3, **options})
    return [next(batches) for _ in range(count)]


def drawn_from(batches):
    return np.concatenate([batch["tokens"][:, 0] // 1000 for batch in batches])


def test_the_drawn_shares_are_the_weights(mixture):
    drawn = drawn_from(batches_of(mixture, 500, shuffle=False))
    for number, share in enumerate(mixture.shares.values(), start=1):
        deviation = math.sqrt(len(drawn) * share * (1 - share))  # of a random draw; taking turns varies much less
        assert abs((drawn == number).sum() - share * len(drawn)) < 3 * deviation
        # Any number of first rows has the shares too, up to one row for each corpus.
        counts = np.cumsum(drawn == number)
        assert np.abs(counts - share * np.arange(1, len(drawn) + 1)).max() < len(mixture.parts)
    assert mixture.counts(len(drawn)) == [int((drawn == number).sum()) for number in (1, 2, 3)]


def test_every_corpus_has_its_own_epochs_in_a_new_order_each(mixture):
    batches = batches_of(mixture, 20)
    firsts = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    small = firsts[firsts // 1000 == 2]
    epochs = small[: len(small) // 7 * 7].reshape(-1, 7)
    assert len(epochs) > 10 and (np.sort(epochs) == np.arange(2000, 2028, 4)).all()
    assert len({tuple(epoch) for epoch in epochs}) > len(epochs) // 2
    in_order = batches_of(mixture, 3, shuffle=False)
    firsts = np.concatenate([batch["tokens"][:, 0] for batch in in_order])
    assert firsts[firsts // 1000 == 1].tolist() == [1000 + 4 * (i % 30) for i in range((firsts // 1000 == 1).sum())]
    drawn = mixture.drawn(400)
    assert drawn["b"].rows == 100 == len(small) and drawn["b"].epochs == pytest.approx(100 / 7)
    assert drawn["b"].tokens == pytest.approx(100 * 4)


def test_rows_are_those_of_the_corpora(mixture):
    indices = np.array([86, 0, 30, 36, 37, 29])
    found = mixture[indices]
    for row, (name, index) in enumerate([("c", 49), ("a", 0), ("b", 0), ("b", 6), ("c", 0), ("a", 29)]):
        for key, array in mixture.parts[name][index].items():
            assert found[key][row].tolist() == array.tolist() and found[key].dtype == array.dtype
    assert len(mixture) == 87


def test_a_position_and_the_seed_give_the_batches_to_the_bit(mixture):
    whole = batches_of(mixture, 12)
    batches = make_batches(mixture, batch_size=20, seed=3)
    for _ in range(5):
        next(batches)
    position = json.loads(json.dumps(batches.get_state()))
    resumed = make_batches(mixture, batch_size=20, seed=3)
    resumed.set_state(position)
    for expected in whole[5:]:
        found = next(resumed)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert any(not np.array_equal(a["tokens"], b["tokens"])
               for a, b in zip(whole, batches_of(mixture, 12, seed=4), strict=True))


def test_processes_share_the_rows_of_a_batch(mixture):
    whole = batches_of(mixture, 4)
    shares = [batches_of(mixture, 4, process_index=index, process_count=2) for index in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert np.array_equal(batch["tokens"], np.concatenate([part["tokens"] for part in parts]))


def test_masks_of_mixed_lines_are_new_for_every_batch():
    lines = ["the cat sat", "a dog ran off", "two birds sang"]
    tokenizer = Tokenizer.train(lines, kind="char")
    masking = Masking.of(tokenizer, 0.3)
    rows = Mixture({"one": LineRows.build(lines, tokenizer, 24), "two": LineRows.build(lines[:1], tokenizer, 24)},
                   {"one": 1, "two": 1})
    assert rows.parts["two"].num_tokens == len("the cat sat") + 2
    one, two = batches_of(rows, 2, batch_size=4, transform=masking)
    assert {"masked_positions", "masked_targets"} <= set(one)
    assert not np.array_equal(one["masked_positions"], two["masked_positions"])
    again = batches_of(rows, 2, batch_size=4, transform=masking)[1]
    assert all(np.array_equal(two[name], again[name]) for name in two)


def test_the_epochs_of_the_table_of_gpt3():
    """The printed weights are rounded and add up to 101 %. Three printed epochs agree with them;
    WebText2 and Wikipedia do not."""
    billion = 10**9
    parts = {name: Counted(tokens * billion) for name, (tokens, *_) in GPT3.items()}
    mixture = Mixture(parts, {name: weight for name, (_, weight, *_) in GPT3.items()})
    drawn = mixture.drawn(round(1.01 * 300 * billion / 2048))  # 1.01, so that the shares are those of 300 billion
    for name, (tokens, weight, printed, expected) in GPT3.items():
        assert drawn[name].epochs == pytest.approx(300 * weight / 100 / tokens, rel=1e-4)
        assert drawn[name].epochs == pytest.approx(expected, abs=5e-4)
        assert drawn[name].tokens == pytest.approx(300 * billion * weight / 100, rel=1e-4)
        assert (abs(drawn[name].epochs / printed - 1) < 0.06) == (name not in ("WebText2", "Wikipedia"))
    name, share, size, tokens, epochs = mixture.table(10**6).split("\n")[2].split()
    assert (name, share, size, epochs) == ("WebText2", "21.78%", "19,000,000,000", "0.02")
    assert int(tokens.replace(",", "")) == pytest.approx(22 / 101 * 10**6 * 2048, rel=1e-5)


def test_without_weights_all_corpora_have_the_same_number_of_epochs(mixture):
    drawn = Mixture(mixture.parts).drawn(870)
    assert [corpus.epochs for corpus in drawn.values()] == pytest.approx([10, 10, 10], rel=0.01)


@pytest.mark.parametrize(("weights", "message"), [
    ({"a": 1}, "the data has the corpus 'b', but the mixture gives it no weight; the mixture has 'a'"),
    ({"a": 1, "b": 1, "c": 1}, "the mixture names the corpus 'c', but the data has no texts for it; the data has 'a'"),
    ({"a": 1, "b": 0}, "the weight 0 of the corpus 'b' must be positive and finite"),
    ({"a": -1, "b": 1}, "the weight -1 of the corpus 'a' must be positive and finite"),
    ({"a": 1, "b": math.nan}, "the weight nan of the corpus 'b' must be positive and finite"),
    ({"a": 1, "b": math.inf}, "the weight inf of the corpus 'b' must be positive and finite"),
])
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        Mixture({"a": corpus(0, 2), "b": corpus(0, 2)}, weights)


def test_bad_mixtures(mixture):
    with pytest.raises(ValueError, match="at least one corpus"):
        Mixture({}, {})
    with pytest.raises(ValueError, match="the corpus 'a' has no rows"):
        Mixture({"a": Counted(0)}, {"a": 1})
    with pytest.raises(ValueError, match="num_epochs=2: each corpus of a mixture has its own number of epochs"):
        make_batches(mixture, batch_size=2, seed=0, num_epochs=2)
