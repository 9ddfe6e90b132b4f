"""N-gram models against nltk, against an example that is computed by hand, and against counting
with dictionaries."""

import collections
import fractions
import hashlib
import io
import itertools
import json
import math
import pathlib

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.baselines import NgramModel, Smoothing, count_ngrams, generate_ngrams, load_ngrams, save_ngrams

NLTK = json.loads((pathlib.Path(__file__).with_name("fixtures") / "nltk_ngrams.json").read_text())
HAMLET = "Ser ou não ser, eis a questão: será mais nobre em nosso espírito sofrer"
TEXTS = ["the cat sat on the mat", "the cat ate the rat", "a rat sat"]


@pytest.fixture(scope="module")
def letters():
    return tj.Tokenizer.train(TEXTS, kind="char")


def ids(text):
    return np.array([ord(letter) - ord("a") for letter in text], np.int64)


def test_the_13_bigrams_of_hamlet():
    """The sources count pairs of neighbouring words, and 14 words have 13 of them."""
    tokenizer = tj.Tokenizer.train([HAMLET], kind="word")
    tokens = np.array(tokenizer.encode(HAMLET))
    counts = count_ngrams(tokens, 2, vocab_size=tokenizer.vocab_size)
    pairs = [(tokenizer.decode([a]).strip(), tokenizer.decode([b]).strip()) for a, b in zip(
        *divmod(counts.codes[0], tokenizer.vocab_size), strict=True)]
    assert len(pairs) == 13 and counts.counts[1].tolist() == [1] * 13
    words = HAMLET.split()
    assert sorted(pairs) == sorted(itertools.pairwise(words))


@pytest.mark.parametrize("end_of_text_id", [None, 0])
def test_counts_are_those_of_dictionaries(end_of_text_id):
    tokens = np.random.default_rng(0).integers(0, 5, 300)
    counts = count_ngrams(tokens, 4, vocab_size=5, end_of_text_id=end_of_text_id)
    expected = collections.Counter()
    for end in range(1, len(tokens)):
        for length in range(1, min(4, end + 1) + 1):
            gram = tuple(tokens[end - length + 1:end + 1].tolist())
            if end_of_text_id is None or end_of_text_id not in gram[1:-1]:
                expected[gram] += 1
    grams = {1: [(token,) for token in range(5)]}
    for length in range(2, 5):
        grams[length] = [(*grams[length - 1][code // 5], int(code) % 5) for code in counts.codes[length - 2]]
        assert [grams[length - 1][place] for place in counts.suffixes[length - 2]] == [gram[1:] for gram in
                                                                                      grams[length]]
    found = {gram: int(count) for length in grams for gram, count in zip(grams[length], counts.counts[length - 1],
                                                                         strict=True)}
    assert found == expected


def test_kneser_ney_of_an_example_by_hand():
    """The text a b a c a b, with the discount 1/2. Different tokens before a: 2, b: 1, c: 1."""
    model = NgramModel(count_ngrams(ids("abacab"), 2, vocab_size=3), Smoothing(discounts=(0.5, 0.5)))
    half, third, quarter = (fractions.Fraction(1, number) for number in (2, 3, 4))
    # P(a) = (2 - 1/2) / 4 + (3 * 1/2) / 4 * 1/3, and so on; after a: b twice, c once, so 2 * 1/2 /
    # 3 is left over.
    single = [half, quarter, quarter]
    after_a = [third * single[0], (2 - half) / 3 + third * single[1], (1 - half) / 3 + third * single[2]]
    assert sum(single) == sum(after_a) == 1
    np.testing.assert_allclose(model.next_token_probabilities([0]), [float(p) for p in after_a], rtol=1e-15)
    np.testing.assert_allclose(model.next_token_probabilities([]), [float(p) for p in single], rtol=1e-15)


@pytest.mark.parametrize(("name", "smoothing"), [
    ("kneser_ney", Smoothing(discounts=(0.0, NLTK["discount"], NLTK["discount"]))),
    ("add_k", Smoothing("add_k", k=NLTK["k"])),
])
def test_probabilities_are_those_of_nltk(name, smoothing):
    """nltk has no discount for single tokens, and its vocabulary has one more token, for unknown
    words."""
    model = NgramModel(count_ngrams(ids(NLTK["text"]), NLTK["order"], vocab_size=5), smoothing)
    for context, expected in NLTK[name].items():
        np.testing.assert_allclose(model.next_token_probabilities(ids(context))[:4], expected, rtol=1e-12, atol=1e-15)
    text = "dabbacadabcab"
    expected = [NLTK[name][text[max(end - 2, 0):end]]["abcd".index(text[end])] for end in range(2, len(text))]
    np.testing.assert_allclose(np.exp(model.log_probabilities(ids(text))[1:]), expected, rtol=1e-12)


def test_estimated_discounts_are_those_of_chen_and_goodman():
    from transformer_jax.baselines.smoothing import kneser_ney

    counts = count_ngrams(np.random.default_rng(1).zipf(1.5, 3000) % 2000, 1, vocab_size=2000)
    one, two, three, four = ((counts.counts[0] == count).sum() for count in (1, 2, 3, 4))
    single = one / (one + 2 * two)
    discounts = [0, 1 - 2 * single * two / one, 2 - 3 * single * three / two, 3 - 4 * single * four / three]
    expected = [(count - discounts[min(count, 3)]) / 2999 for count in counts.counts[0].tolist()]
    np.testing.assert_allclose(kneser_ney(counts).own[0], expected, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [Smoothing(), Smoothing("add_k", k=0.1), Smoothing(discounts=(0.5,) * 5)])
def test_probabilities_sum_to_one_and_a_context_ends_at_its_document(smoothing):
    tokens = np.random.default_rng(0).integers(1, 4, 500)
    tokens[::40] = 0
    model = NgramModel(count_ngrams(tokens, 5, vocab_size=6, end_of_text_id=0), smoothing)
    scored = model.log_probabilities(tokens[:150])
    for end in range(1, 150):
        probabilities = model.next_token_probabilities(tokens[:end])
        assert probabilities.sum() == pytest.approx(1, abs=1e-12) and (probabilities > 0).all()
        assert math.log(probabilities[tokens[end]]) == pytest.approx(scored[end - 1], abs=1e-12)
    np.testing.assert_array_equal(model.next_token_probabilities([1, 2, 3, 0]), model.next_token_probabilities([0]))


def test_long_streams_are_scored_in_parts(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 4, 1000)
    model = NgramModel(count_ngrams(tokens, 4, vocab_size=4, end_of_text_id=0))
    whole = model.log_probabilities(tokens)
    monkeypatch.setattr("transformer_jax.baselines.ngrams._TOKENS_AT_A_TIME", 7)
    np.testing.assert_array_equal(model.log_probabilities(tokens), whole)


def test_measures_have_the_keys_and_the_tokens_of_a_language_model(letters):
    config = tj.ModelConfig(vocab_size=letters.vocab_size, max_len=64, num_layers=1, num_heads=1, model_dim=8)
    gpt = tj.Bundle(model=tj.Decoder(config, key=jax.random.key(0)), tokenizer=letters, config=config)
    model = NgramModel.train(TEXTS, order=3, tokenizer=letters)
    ours, theirs = model.measure(["the bat", "a cat"]), tj.evaluate(gpt, ["the bat", "a cat"])
    assert ours.keys() == theirs.keys() and ours["unknown"] == theirs["unknown"]
    assert (ours["tokens"], ours["bytes"]) == (theirs["tokens"], theirs["bytes"])
    assert ours["bits_per_byte"] == pytest.approx(ours["loss"] * ours["tokens"] / math.log(2) / ours["bytes"])
    assert ours["perplexity"] == pytest.approx(math.exp(ours["loss"])) and ours["window"] == 2
    certain = NgramModel.train(TEXTS, order=2, tokenizer=letters, smoothing=Smoothing("add_k", k=0))
    assert certain.measure(["xx"])["loss"] == certain.measure(["xx"])["perplexity"] == math.inf


def test_text_in_the_manner_of_an_order(letters):
    model = NgramModel.train(TEXTS, order=3, tokenizer=letters, smoothing=Smoothing("add_k", k=0))
    result = generate_ngrams(model, ["the ", "the "], key=jax.random.key(0), max_new_tokens=30)
    assert result.texts == generate_ngrams(model, ["the ", "the "], key=jax.random.key(0), max_new_tokens=30).texts
    known = {text[place:place + 3] for text in TEXTS for place in range(len(text) - 2)}
    for text in result.texts:
        assert all(("the " + text)[place:place + 3] in known for place in range(len(text) + 2))
    assert set(result.finish_reasons) <= {"eos", "length"} and result.lengths == list(map(len, result.tokens))
    for row in range(2):
        start = letters.encode("the ")
        scored = model.log_probabilities([*start, *result.tokens[row]])[len(start) - 1:]
        np.testing.assert_allclose(result.logprobs[row], scored, rtol=1e-5, atol=1e-6)


def test_sampling_has_the_frequencies_of_the_model():
    model = NgramModel(count_ngrams(ids("abacabacab" * 3), 2, vocab_size=3), Smoothing("add_k", k=1))
    drawn = generate_ngrams(model, [[0]] * 400, key=jax.random.key(1), max_new_tokens=1)
    frequencies = np.bincount([tokens[0] for tokens in drawn.tokens], minlength=3) / 400
    np.testing.assert_allclose(frequencies, model.next_token_probabilities([0]), atol=0.08)
    greedy = generate_ngrams(model, [[0]], max_new_tokens=3, sampling=tj.Sampling(temperature=0)).tokens
    assert greedy == [[1, 0, 1]]
    assert generate_ngrams(model, [[0]], key=jax.random.key(0), max_new_tokens=3,
                           sampling=tj.Sampling(top_k=1)).tokens == greedy


def test_a_saved_model_is_the_same(letters, tmp_path):
    model = NgramModel.train(TEXTS, order=4, tokenizer=letters, smoothing=Smoothing(discounts=(0.5, 0.6, 0.7, 0.8)))
    save_ngrams(tmp_path / "model", model)
    loaded = load_ngrams(tmp_path / "model")
    assert loaded.smoothing == model.smoothing and loaded.tokenizer.digest == letters.digest
    tokens = letters.encode("the cat sat on a rat")
    np.testing.assert_array_equal(loaded.log_probabilities(tokens), model.log_probabilities(tokens))
    save_ngrams(tmp_path / "bare", NgramModel(model.counts))
    assert load_ngrams(tmp_path / "bare").tokenizer is None


@pytest.mark.parametrize(("damage", "message"), [
    (lambda path: (path / "counts.npz").write_bytes((path / "counts.npz").read_bytes()[:-3]), "counts.npz is damaged"),
    (lambda path: (path / "counts.npz").unlink(), "there is no file .*counts.npz"),
    (lambda path: (path / "ngrams.json").unlink(), "there is no n-gram model in"),
    (lambda path: (path / "ngrams.json").write_text("{"), "ngrams.json, line 1 is not JSON"),
    (lambda path: change(path, order=2), "expected the arrays of n-grams up to length 2"),
    (lambda path: change(path, order=9), "order=9 is not from 1 to 5"),
    (lambda path: change(path, order=5), "expected the arrays of n-grams up to length 5"),
    (lambda path: reseal(path, b"PK"), "counts.npz.* cannot be read"),
    (lambda path: reseal(path, arrays(path, codes_1=np.array([7, 7]))), "different sizes"),
    (lambda path: reseal(path, arrays(path, counts_0=np.array([-1]))), "whole numbers from 0"),
    (lambda path: reseal(path, arrays(path, counts_0=np.array([{}]))), "cannot be read"),
    (lambda path: change(path, vocab_size=3), "expected the counts of 3 tokens"),
    (lambda path: change(path, smoothing={"name": "kneser"}), "did you mean 'kneser_ney'"),
    (lambda path: change(path, smoothing={"discounts": [0.5]}), "1 discounts are given"),
])
def test_damaged_files_are_reported_in_one_line(letters, tmp_path, damage, message):
    save_ngrams(tmp_path, NgramModel.train(TEXTS, order=3, tokenizer=letters))
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_ngrams(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def reseal(path, content):
    """Writes other arrays with their digest."""
    (path / "counts.npz").write_bytes(content)
    files = json.loads((path / "ngrams.json").read_text())["files"]
    change(path, files=files | {"counts.npz": hashlib.sha256(content).hexdigest()})


def arrays(path, **changes):
    with np.load(path / "counts.npz") as stored:
        stream = io.BytesIO()
        np.savez(stream, **dict(stored) | changes)
        return stream.getvalue()


def change(path, **fields):
    description = json.loads((path / "ngrams.json").read_text())
    (path / "ngrams.json").write_text(json.dumps(description | fields))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: count_ngrams(ids("ab"), 6, vocab_size=2), "order=6 must be a whole number from 1 to 5"),
    (lambda: count_ngrams(ids("a"), 1, vocab_size=2), "at least 2 integers"),
    (lambda: count_ngrams(ids("ac"), 1, vocab_size=2), "token id 2 is outside the vocabulary of 2"),
    (lambda: NgramModel(count_ngrams(ids("ab"), 1, vocab_size=2)).measure(["a"]), "has no tokenizer"),
    (lambda: NgramModel(count_ngrams(ids("ab"), 1, vocab_size=2)).log_probabilities([0, 5]), "token id 5 is outside"),
    (lambda: NgramModel(count_ngrams(ids("ab"), 1, vocab_size=2), Smoothing(discounts=(0.1, 0.1))), "2 discounts"),
    (lambda: Smoothing("add_k", k=-1.0), "k=-1.0 must be 0 or a positive number"),
    (lambda: Smoothing(discounts=(2.0,)), "must be numbers from 0 to 1"),
    (lambda: generate_ngrams(NgramModel(count_ngrams(ids("ab"), 1, vocab_size=2)), [[0]]), "sampling needs key"),
])
def test_wrong_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
