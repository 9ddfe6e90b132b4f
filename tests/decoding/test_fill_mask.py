"""fill_mask against the softmax of all logits."""

import functools

import jax
import numpy as np
import pytest

import transformer_jax as tj

TOKENIZER = tj.Tokenizer.train(["digo que o amor e a dor e o coração"] * 3, kind="bpe", vocab_size=290)
VOCAB = TOKENIZER.vocab_size
CONFIG = tj.ModelConfig(family="encoder", vocab_size=VOCAB, max_len=20, num_layers=2, num_heads=2, model_dim=16,
                        num_token_types=2, norm_position="post", activation="gelu", use_embedding_norm=True,
                        init_std=0.3)
BOS, EOS, MASK = [TOKENIZER.bos_id], [TOKENIZER.eos_id], [TOKENIZER.mask_id]


@functools.cache
def make(vocab_size=VOCAB):
    return tj.Encoder(CONFIG.replace(vocab_size=vocab_size), key=jax.random.key(0))


def encode(text):
    return TOKENIZER.encode(text)


def probabilities(model, ids):
    """Computes the probabilities ``[T, V]`` with one forward pass of the row alone and a softmax in
    float64."""
    tokens_BT = np.zeros((1, CONFIG.max_len), np.int32)
    tokens_BT[0, :len(ids)] = ids
    logits = np.asarray(tj.forward(model, tokens_BT, mask_BT=np.arange(CONFIG.max_len)[None] < len(ids))[0], np.float64)
    return (exponentials := np.exp(logits - logits.max(-1, keepdims=True))) / exponentials.sum(-1, keepdims=True)


# A text, and the token ids that the encoder is to read.
TEXTS = {
    "digo que o <mask>": [*BOS, *encode("digo que o"), *MASK, *EOS],
    "digo que o <mask> e a dor": [*BOS, *encode("digo que o"), *MASK, *encode(" e a dor"), *EOS],
    "<mask>": [*BOS, *MASK, *EOS],
    "<mask> que<mask>o": [*BOS, *MASK, *encode(" que"), *MASK, *encode("o"), *EOS],
    "o <mask> <mask> e  <mask>": [*BOS, *encode("o"), *MASK, *MASK, *encode(" e "), *MASK, *EOS],
    "<s> o <mask>": [*BOS, *encode("<s> o"), *MASK, *EOS],  # only <mask> is special in a text
}


def test_candidates_are_the_most_probable_tokens_of_each_mask():
    assert encode("<s>") != BOS and encode(" o") != encode("o")
    found = tj.fill_mask(make(), list(TEXTS), tokenizer=TOKENIZER, top_k=4)
    assert len(found) == len(TEXTS)
    for (text, ids), masks in zip(TEXTS.items(), found, strict=True):
        wanted_TV = probabilities(make(), ids)
        places = np.flatnonzero(np.equal(ids, TOKENIZER.mask_id))
        assert len(masks) == len(places) == text.count("<mask>")
        for place, candidates in zip(places, masks, strict=True):
            best = np.argsort(-wanted_TV[place])[:4]
            assert [candidate.token_id for candidate in candidates] == best.tolist()
            np.testing.assert_allclose([candidate.probability for candidate in candidates], wanted_TV[place][best],
                                       rtol=1e-4)
            for candidate in candidates:
                assert candidate.token == TOKENIZER.pieces([candidate.token_id])[0]


def test_a_text_alone_is_as_in_a_batch():
    together = tj.fill_mask(make(), list(TEXTS), tokenizer=TOKENIZER)
    for text, wanted in zip(TEXTS, together, strict=True):
        alone, = tj.fill_mask(make(), text, tokenizer=TOKENIZER)
        for got_mask, wanted_mask in zip(alone, wanted, strict=True):
            assert [candidate.token_id for candidate in got_mask] == [candidate.token_id for candidate in wanted_mask]
            np.testing.assert_allclose([candidate.probability for candidate in got_mask],
                                       [candidate.probability for candidate in wanted_mask], rtol=1e-5)


def test_all_candidates_together_have_probability_one():
    (candidates,), = tj.fill_mask(make(), "o <mask>", tokenizer=TOKENIZER, top_k=VOCAB)
    assert sorted(candidate.token_id for candidate in candidates) == list(range(VOCAB))
    chances = [candidate.probability for candidate in candidates]
    assert chances == sorted(chances, reverse=True)
    np.testing.assert_allclose(sum(chances), 1, rtol=1e-5)


def test_texts_are_the_given_ones_with_one_mask_replaced():
    """A token includes the space before it if it has one."""
    by_token = {}
    for text in ("digo que o <mask> e", "o<mask>", "<mask> <mask>!"):
        masks, = tj.fill_mask(make(), text, tokenizer=TOKENIZER, top_k=VOCAB)
        by_token[text] = [{candidate.token: candidate.text for candidate in candidates} for candidates in masks]
    first, = by_token["digo que o <mask> e"]
    assert first[" d"] == "digo que o d e" and first["d"] == "digo que od e" and first["</s>"] == "digo que o</s> e"
    second, = by_token["o<mask>"]
    assert second[" d"] == "o d" and second["d"] == "od"
    third, fourth = by_token["<mask> <mask>!"]
    assert third[" d"] == " d <mask>!" and third["d"] == "d <mask>!"
    assert fourth[" d"] == "<mask> d!" and fourth["d"] == "<mask>d!"


def test_rows_of_the_model_beyond_the_tokenizer_are_never_proposed():
    """The vocabulary is rounded up for a mesh: its last rows take part in the softmax, but they are
    not tokens."""
    model = make(VOCAB + 30)
    model.head.bias[...] = model.head.bias[...].at[VOCAB:].set(3.0)
    (candidates,), = tj.fill_mask(model, "digo que o <mask>", tokenizer=TOKENIZER, top_k=VOCAB)
    assert {candidate.token_id for candidate in candidates} == set(range(VOCAB))
    wanted = probabilities(model, TEXTS["digo que o <mask>"])[len(encode("digo que o")) + 1]
    assert wanted[VOCAB:].sum() > 0.3
    np.testing.assert_allclose([c.probability for c in candidates], np.sort(wanted[:VOCAB])[::-1], rtol=1e-4)


FILL = functools.partial(tj.fill_mask, make(), tokenizer=TOKENIZER)
ERRORS = [
    (lambda: FILL("no mask here"), r"the text 'no mask here' has no <mask>; write <mask> in place of a token"),
    (lambda: FILL(["o <mask>", "o <maks>"]),
     "the text 'o <maks>' has no <mask>: <maks> is not a token; did you mean <mask>?"),
    (lambda: FILL("o <|mask|>"), "has no <mask>: <|mask|> is not a token; did you mean <mask>?"),
    (lambda: FILL("o <MASK>"), "has no <mask>"),
    (lambda: FILL("<s> o <b>"), "has no <mask>; write <mask>"),
    (lambda: FILL(""), "has no <mask>"),
    (lambda: FILL([]), "the list of texts is empty"),
    (lambda: FILL("x" * 18 + "<mask>"), "a text of 21 tokens is longer than the model's context of 20; shorten it"),
    (lambda: FILL("<mask>", top_k=0), f"top_k=0 must be from 1 to the {VOCAB} tokens of the vocabulary"),
    (lambda: FILL("<mask>", top_k=VOCAB + 1), f"top_k={VOCAB + 1} must be"),
    (lambda: tj.fill_mask(make(100), "x<mask>", tokenizer=TOKENIZER), "token id 126 is outside the vocabulary of 100"),
]


@pytest.mark.parametrize(("call", "words"), ERRORS, ids=[words[:40] for _, words in ERRORS])
def test_errors(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert words in str(error.value)
