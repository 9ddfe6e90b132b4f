"""Unusual settings, inputs and weights: the result is right, or one clear error is raised; a wrong
token is never returned silently."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import count_compiles

import transformer_jax as tj
from transformer_jax import decoding

VOCAB = 40
CONFIG = tj.ModelConfig(vocab_size=VOCAB, max_len=64, num_layers=1, num_heads=2, model_dim=16, init_std=0.4)
TOKENIZER = tj.Tokenizer.train(["abcdefgh"], kind="char")
KEY = jax.random.key(0)
GREEDY = tj.Sampling(temperature=0)
NAN, INF = np.nan, np.inf


@functools.cache
def make(family="decoder"):
    return tj.Encoder(CONFIG.replace(family="encoder"), key=KEY) if family == "encoder" else tj.Decoder(CONFIG, key=KEY)


def generated(**arguments):
    return tj.generate(make(), **dict(prompts=[[1, 2]], key=KEY, max_new_tokens=3) | arguments).tokens


def searched(**arguments):
    return tj.beam_search(make(), **dict(sources=[[1, 2]], max_new_tokens=3, end_ids=[3]) | arguments).tokens


BAD_SAMPLING = [
    ("temperature", [-1, NAN, INF, 1e39, 10**400, "hot", None, True, [1.0], np.array([1.0]), 1 + 2j]),
    ("repetition_penalty", [0, -1, 1e-40, 1e39, NAN, INF, "x", None]),
    ("top_k", [-1, 2.5, NAN, INF, "3", None, True]),
    ("no_repeat_ngram", [-1, 0.5, NAN]),
    ("min_new_tokens", [-1, 1.5, NAN]),
    ("top_p", [0, -0.1, 1.5, NAN, None]),
    ("min_p", [-0.1, 1.1, NAN]),
    ("typical_p", [0, 1.1, NAN]),
    ("bias", [{1: 1e300}, {1: NAN}, {1: INF}, {1: "x"}, [1], None]),
]


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_SAMPLING for value in values],
                         ids=str)
def test_settings_of_sampling_are_finite_and_in_range(name, value):
    with pytest.raises(ValueError, match=f"{name}="):
        tj.Sampling(**{name: value})


RULES = {"temperature": decoding.Temperature, "repetition_penalty": decoding.RepetitionPenalty, "top_k": decoding.TopK,
         "no_repeat_ngram": decoding.NoRepeatNgram, "min_new_tokens": decoding.MinNewTokens, "top_p": decoding.TopP,
         "min_p": decoding.MinP, "typical_p": decoding.TypicalP}


@pytest.mark.parametrize("name", RULES)
def test_rules_check_as_the_settings_do(name):
    for value in dict(BAD_SAMPLING)[name]:
        with pytest.raises(ValueError, match=f"{name}="):
            RULES[name](value)


RIGHT_RESULTS = [
    dict(max_new_tokens=np.int64(3)), dict(max_new_tokens=np.int8(3)), dict(max_new_tokens=jnp.int32(3)),
    dict(num_samples=np.int64(1)), dict(prompts=np.array([[1, 2]])), dict(prompts=jnp.array([[1, 2]])),
    dict(prompts=[np.array([1, 2], np.uint8)]), dict(end_ids=np.array([], int)), dict(end_ids=[np.int64(39)]),
    dict(sampling=tj.Sampling(top_k=2**31)), dict(sampling=tj.Sampling(top_k=10**400)),
    dict(sampling=tj.Sampling(top_k=40.0)), dict(sampling=tj.Sampling(no_repeat_ngram=2**40)),
    dict(sampling=tj.Sampling(temperature=np.float64(1), top_p=np.float32(1), top_k=np.int64(0))),
    dict(sampling=tj.Sampling(temperature=jnp.float32(1))), dict(sampling=tj.Sampling(min_p=1e-50)),
    dict(sampling=tj.Sampling(bias={np.int64(1): np.float64(0)}, banned=np.array([], int))),
]


@pytest.mark.long
@pytest.mark.parametrize("arguments", RIGHT_RESULTS, ids=str)
def test_numbers_of_numpy_and_large_ones_change_nothing(arguments):
    wanted = generated()
    with count_compiles() as compiles:
        assert generated(**arguments) == wanted
    assert len(compiles) <= 2  # of JAX's own scalars; no program of decoding


def test_min_new_tokens_beyond_int32_forbids_the_end():
    end = generated()[0][0]
    assert generated(end_ids=[end]) == [[end]]
    assert end not in generated(end_ids=[end], sampling=tj.Sampling(min_new_tokens=2**40))[0]


@pytest.mark.parametrize("seed", [-1, -2**31, 2**31, 2**32 - 1, 2**40])
def test_any_seed_that_jax_takes_draws(seed):
    assert generated(key=jax.random.key(seed)) == generated(key=jax.random.key(seed))


BAD_CALLS = [
    (generated, dict(max_new_tokens=3.0), "max_new_tokens=3.0 must be a whole number"),
    (generated, dict(max_new_tokens="3"), "max_new_tokens='3'"), (generated, dict(max_new_tokens=None), "None"),
    (generated, dict(max_new_tokens=True), "max_new_tokens=True"), (generated, dict(max_new_tokens=-1), "at least 1"),
    (generated, dict(num_samples=10**10), r"num_samples=10000000000 .* ask for at most num_samples=\d+,"),
    (generated, dict(num_samples=10**30), "ask for at most num_samples"), (generated, dict(num_samples=0.5), "whole"),
    (generated, dict(prompts=None), "None, which is not a text"),
    (generated, dict(prompts=5), "5, which is not a text"),
    (generated, dict(prompts=[]), "list of prompts or sources is empty"),
    (generated, dict(prompts=np.zeros((0, 3), int)), "list of prompts or sources is empty"),
    (generated, dict(prompts=[None]), "is not a prompt"), (generated, dict(prompts=[["a"]]), "is not a prompt"),
    (generated, dict(prompts=[[2**70]]), "is not a prompt"), (generated, dict(prompts=[[2**40]]), "outside the vocab"),
    (generated, dict(prompts=b"abc"), "is not a text"), (generated, dict(prompts=[[True]]), "is not a prompt"),
    (generated, dict(prompts=[[]]), "is empty"), (generated, dict(prompts=np.zeros((1, 0), int)), "is empty"),
    (generated, dict(end_ids=5), "end_ids=5 is not a list"), (generated, dict(end_ids=[1.5]), "end_ids"),
    (generated, dict(end_ids=[2**70]), "end_ids: token id"),
    (generated, dict(sampling={"top_k": 1}), "not a tj.Sampling"),
    (generated, dict(sampling=tj.Sampling(banned=3)), "banned=3"),
    (generated, dict(sampling=tj.Sampling(banned=[1.5])), "banned"),
    (generated, dict(sampling=tj.Sampling(bias={1.5: 0.0})), "bias"), (generated, dict(sampling=None), "tj.Sampling"),
    (generated, dict(stop=[1], tokenizer=TOKENIZER), r"stop=\[1\] must be a string"),
    (generated, dict(processors=decoding.TopK(3)), r"write processors=\[...\]"),
    (generated, dict(processors=[decoding.TopK]), "processors has"), (generated, dict(intervene=3), "intervene=3"),
    (generated, dict(processors=[lambda logits, history: logits[:, :3]]), r"returns \(1, 3\); expected .* \(1, 40\)"),
    (generated, dict(processors=[lambda logits, history: None]), "returns no array"),
    (searched, dict(beam_size=10**10), "beam_size=10000000000"), (searched, dict(beam_size=2.5), "beam_size=2.5"),
    (searched, dict(n_best="x"), "n_best='x'"), (searched, dict(length_penalty="x"), "length_penalty=x"),
    (searched, dict(length_penalty=1e30), "length_penalty=1e"), (searched, dict(sources=None), "not a text"),
    (searched, dict(max_new_tokens=2.0), "max_new_tokens=2.0"),
    (searched, dict(sources=[]), "list of prompts or sources is empty"),
    (lambda: tj.stream(make(), "a", tokenizer=None), {}, "stream yields text, so it needs a tokenizer"),
    (lambda: tj.stream(make(), [], tokenizer=TOKENIZER, sampling=GREEDY), {}, "is empty"),
    (lambda: tj.score(make(), None, tokenizer=TOKENIZER), {}, "None, which is not a text"),
    (lambda: tj.score(make(), [[1, 2]], tokenizer=TOKENIZER), {}, "each must be a string"),
    (lambda: tj.score(make(), "ab", tokenizer=None), {}, "tokenizer"),
    (lambda: tj.embed(make(), None), {}, "None, which is not a text"),
    (lambda: tj.embed(make(), []), {}, "at least one"),
    (lambda: tj.embed(make(), [[1, 2]], layer=0.5), {}, "layer=0.5"),
    (lambda: tj.fill_mask(make("encoder"), None, tokenizer=TOKENIZER), {}, "None, which is not a text"),
    (lambda: tj.fill_mask(make("encoder"), [3], tokenizer=TOKENIZER), {}, "expected a string"),
    (lambda: tj.fill_mask(make("encoder"), "<mask>", tokenizer=TOKENIZER, top_k=1.5), {}, "top_k=1.5"),
    (lambda: tj.fill_mask(make("encoder"), "<mask>", tokenizer=None), {}, "tokenizer"),
]


@pytest.mark.parametrize(("call", "arguments", "words"), BAD_CALLS, ids=[words for _, _, words in BAD_CALLS])
def test_bad_calls_are_refused(call, arguments, words):
    with pytest.raises(ValueError, match=words):
        call(**arguments)


def test_a_tokenizer_larger_than_the_model():
    """The tokenizer has tokens that the model does not have. They end no text and are never
    proposed."""
    class Larger(tj.Tokenizer):
        end_ids = (2, VOCAB + 5)

    tokenizer = Larger(TOKENIZER.to_bytes())
    assert generated(tokenizer=tokenizer) == generated(tokenizer=TOKENIZER, end_ids=[2])
    large = tj.Tokenizer.train(["abcdefgh"], kind="bpe", vocab_size=280)
    model = tj.Encoder(CONFIG.replace(family="encoder", vocab_size=270), key=KEY)
    assert len(tj.fill_mask(model, "<mask>", tokenizer=large, top_k=270)[0][0]) == 270
    with pytest.raises(ValueError, match="from 1 to the 270 tokens"):
        tj.fill_mask(model, "<mask>", tokenizer=large, top_k=271)


@functools.cache
def ruined(value, family="decoder"):
    model = (tj.Encoder if family == "encoder" else tj.Decoder)(CONFIG.replace(family=family), key=KEY)
    kernel = model.stack.blocks.mlp.up.kernel
    kernel[...] = kernel[...].at[0, 1, 2].set(value)
    return model


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_that_are_not_finite_are_an_error_that_names_them(value):
    model, prompt = ruined(value), [[1, 2]]
    for call in (lambda: tj.generate(model, prompt, sampling=GREEDY, max_new_tokens=3),
                 lambda: tj.generate(model, prompt, key=KEY, max_new_tokens=3),
                 lambda: list(tj.stream(model, [1, 2], tokenizer=TOKENIZER, key=KEY, max_new_tokens=3)),
                 lambda: tj.beam_search(model, prompt, max_new_tokens=3),
                 lambda: tj.score(model, "ab", tokenizer=TOKENIZER),
                 lambda: tj.embed(model, prompt),
                 lambda: tj.fill_mask(ruined(value, "encoder"), "a<mask>", tokenizer=TOKENIZER)):
        with pytest.raises(ValueError, match=r"are NaN or infinite, because weights .* stack\.blocks.*mlp\.up\.kernel"):
            call()


def test_logits_that_become_infinite_later_are_an_error_where_they_do():
    def spoil(site, layer, value):
        return jnp.where(value.shape[1] == 1, jnp.inf, value) if site == "final" else value

    with pytest.raises(ValueError, match=r"new token 2 of row 0 are NaN or infinite, though all weights"):
        generated(intervene=spoil)


@jax.tree_util.Partial
def last_token_only(logits_BV, history):
    """A rule that allows no token after the first new one."""
    return jnp.where(history.num_new > 0, -jnp.inf, logits_BV)


def test_rules_that_leave_nothing_to_draw_are_an_error():
    for sampling in (GREEDY, tj.Sampling()):
        with pytest.raises(ValueError, match="the sampling rules leave nothing to draw for new token 2 of row 0"):
            generated(processors=[last_token_only], sampling=sampling)
