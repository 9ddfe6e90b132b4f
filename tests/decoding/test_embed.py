"""embed against the residual stream of a trace, and similarity against NumPy."""

import functools

import jax
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.decoding.embed import _stream
from transformer_jax.models.functional import make_model

TOKENIZER = tj.Tokenizer.train(["o coração da praça e o banco da praça"] * 3, kind="bpe", vocab_size=295)
SHAPE = dict(vocab_size=TOKENIZER.vocab_size, max_len=40, num_layers=2, num_heads=2, model_dim=16, init_std=0.3)
CONFIGS = {
    "encoder": tj.ModelConfig(family="encoder", norm_position="post", num_token_types=1, use_embedding_norm=True,
                              activation="gelu", **SHAPE),
    "decoder": tj.ModelConfig(positions="rope", **SHAPE),
}
TEXTS = ["o banco da praça", "o", "a 🎉 do coração, xyz coração"]


@functools.cache
def make(family):
    return make_model(CONFIGS[family], key=jax.random.key(0))


def ids_of(family, text):
    ids = TOKENIZER.encode(text)
    return [TOKENIZER.bos_id, *ids, TOKENIZER.eos_id] if family == "encoder" else ids


@functools.cache
def streams(family, text):
    """The residual stream of a text alone, ``[L + 1, T, D]``, in a row of the same length for every
    text."""
    ids = ids_of(family, text)
    padding = (0, SHAPE["max_len"] - len(ids))
    trace = tj.trace(make(family), np.pad(ids, padding)[None], segment_ids_BT=np.pad(np.ones_like(ids), padding)[None])
    return np.asarray(trace.residual)[:, 0, :len(ids)]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_layer_and_pooling(family):
    embed = functools.partial(tj.embed, make(family), TEXTS, tokenizer=TOKENIZER)
    for layer in (0, 1, 2, -1, -3):
        wanted = [streams(family, text)[layer] for text in TEXTS]
        every = embed(layer=layer, pooling="none")
        assert [x.shape for x in every] == [(len(ids_of(family, text)), 16) for text in TEXTS]
        for got, row in zip(every, wanted, strict=True):
            np.testing.assert_allclose(got, row, rtol=1e-5, atol=1e-5)
        for pooling, pool in (("mean", lambda x: x.mean(0)), ("first", lambda x: x[0]), ("last", lambda x: x[-1])):
            got = embed(layer=layer, pooling=pooling)
            assert got.shape == (3, 16) and got.dtype == np.float32
            np.testing.assert_allclose(got, [pool(x) for x in wanted], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(embed(), embed(layer=2, pooling="mean"))


def test_changing_the_layer_compiles_nothing():
    tj.embed(make("encoder"), TEXTS, tokenizer=TOKENIZER)
    before = _stream._cache_size()
    for layer in range(-3, 3):
        tj.embed(make("encoder"), TEXTS, tokenizer=TOKENIZER, layer=layer)
    assert _stream._cache_size() == before


def test_strings_ids_and_one_text():
    model, embed = make("encoder"), functools.partial(tj.embed, make("encoder"))
    by_text = embed(TEXTS, tokenizer=TOKENIZER)
    np.testing.assert_array_equal(embed([ids_of("encoder", text) for text in TEXTS]), by_text)
    np.testing.assert_array_equal(embed([np.array(ids_of("encoder", text)) for text in TEXTS]), by_text)
    one = embed(TEXTS[0], tokenizer=TOKENIZER)
    assert one.shape == (1, 16)
    np.testing.assert_allclose(one[0], by_text[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tj.embed(model, np.array([[1, 2, 3]])), tj.embed(model, [[1, 2, 3]]))


WORDS = ["coração", "banco", "praça", "🎉", "o", "a", " da", "xyz", "ração", "a 🎉 do coração, xyz coração", "ç"]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("word", WORDS)
def test_the_tokens_of_a_word(family, word):
    """Checks the tokens with a byte of the word's first occurrence, which the test finds by
    decoding longer and longer prefixes of the text."""
    checked = 0
    for text in TEXTS:
        if word not in text:
            continue
        ids = ids_of(family, text)
        before = len(text.partition(word)[0].encode())
        ends = [len(TOKENIZER.decode_bytes(ids[:i + 1])) for i in range(len(ids))]
        held = [i for i, end in enumerate(ends)
                if end > before and (ends[i - 1] if i else 0) < before + len(word.encode())
                and end > (ends[i - 1] if i else 0)]
        got, = tj.embed(make(family), text, tokenizer=TOKENIZER, pooling="none", word=word)
        wanted = streams(family, text)[-1][held]
        assert got.shape == wanted.shape and held == list(range(held[0], held[-1] + 1))
        assert word in TOKENIZER.decode(ids[held[0]:held[-1] + 1]) or word == "ç"
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
        pooled = tj.embed(make(family), text, tokenizer=TOKENIZER, word=word)
        np.testing.assert_allclose(pooled[0], wanted.mean(0), rtol=1e-5, atol=1e-5)
        checked += 1
    assert checked


def test_a_word_without_bytes_in_common_is_left_out():
    """The first "coração" of the text, and neither the comma nor the second one."""
    text = TEXTS[2]
    got, = tj.embed(make("decoder"), text, tokenizer=TOKENIZER, pooling="none", word="coração")
    start = len(TOKENIZER.encode("a 🎉 do"))
    length = len(TOKENIZER.encode(" coração"))
    assert TOKENIZER.decode(TOKENIZER.encode(text)[start:start + length]) == " coração"
    np.testing.assert_allclose(got, streams("decoder", text)[-1][start:start + length], rtol=1e-5, atol=1e-5)


def test_a_word_among_characters_that_the_tokenizer_does_not_know():
    """"é" and "ü" share one <unk>, the space and the letters are tokens of their own."""
    characters, text = tj.Tokenizer.train(["o banco"], kind="char"), "éü o banco ü"
    ids = characters.encode(text)
    assert ids[0] == characters.unk_id and characters.decode(ids[4:9]) == "banco"
    got, = tj.embed(make("decoder"), text, tokenizer=characters, pooling="none", word="banco")
    wanted, = tj.embed(make("decoder"), [ids], pooling="none")
    np.testing.assert_allclose(got, wanted[4:9], rtol=1e-5, atol=1e-5)


def test_the_same_word_differs_by_its_context():
    texts = ["o banco da praça", "coração e o banco"]
    banks = tj.embed(make("encoder"), texts, tokenizer=TOKENIZER, word="banco")
    assert tj.similarity(banks[0], banks[1]) < 0.999
    static = tj.embed(make("decoder"), texts, tokenizer=TOKENIZER, word="banco", layer=0)
    np.testing.assert_allclose(tj.similarity(static[0], static[1]), 1, rtol=1e-5)  # rotations come later


def test_similarity_equals_plain_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 8)), rng.normal(size=(5, 8))
    wanted = a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    for x, y, expected in ((a, b, wanted), (a[0], b, wanted[0]), (a, b[2], wanted[:, 2]), (a[0], b[2], wanted[0, 2])):
        got = tj.similarity(x, y)
        assert got.shape == expected.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(tj.similarity(a, a).diagonal(), 1, rtol=1e-6)
    np.testing.assert_allclose(tj.similarity(a[0], -3 * a[0]), -1, rtol=1e-6)
    assert (tj.similarity(np.zeros(8), b) == 0).all()


EMBED = functools.partial(tj.embed, make("encoder"), tokenizer=TOKENIZER)
ERRORS = [
    (lambda: EMBED([]), "embed needs at least one text, and no empty one"),
    (lambda: EMBED(""), "and no empty one"),
    (lambda: EMBED(["o", ""]), "and no empty one"),
    (lambda: EMBED([[1], []]), "and no empty one"),
    (lambda: EMBED([1, 2]), "1 is not a text; pass strings or lists of token ids"),
    (lambda: EMBED([[1.5, 2.0]]), "[1.5, 2.0] is not a text"),
    (lambda: EMBED([[1, 295]]), "token id 295 is outside the vocabulary of 295"),
    (lambda: tj.embed(make("encoder"), "o"), "texts that are strings need tokenizer=..."),
    (lambda: EMBED("o", pooling="max"), "pooling='max' is not one of mean, first, last, none"),
    (lambda: EMBED("o", layer=3), "layer=3 is out of range for 2 layers (0 to 2)"),
    (lambda: EMBED("o", layer=-4), "layer=-4 is out of range"),
    (lambda: EMBED("x" * 39), "a text of 41 tokens is longer than the model's context of 40; shorten it"),
    (lambda: EMBED(["o banco", "o"], word="banco"), "the text 'o' does not contain the word 'banco'"),
    (lambda: EMBED("o", word=""), "does not contain the word ''"),
    (lambda: EMBED([[1, 2]], word="o"), "word='o' cannot be found in token ids; pass texts that are strings"),
    (lambda: tj.similarity(np.ones(3), np.ones(4)),
     "similarity takes [X, D] and [Y, D] (or vectors [D]), not (3,) and (4,)"),
    (lambda: tj.similarity(np.ones((2, 2, 3)), np.ones(3)), "not (2, 2, 3) and (3,)"),
]


@pytest.mark.parametrize(("call", "words"), ERRORS, ids=[words[:40] for _, words in ERRORS])
def test_errors(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)
