"""The decode contract, against a plain loop of full forward passes, row by row and without a
cache."""

import collections
import concurrent.futures
import contextlib
import functools
import math
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from tests.long_cases import mostly_long
from transformer_jax.decoding import prepare as prepare_module
from transformer_jax.decoding.logits import Settings
from transformer_jax.decoding.loop import decode, prefill

VOCAB = 40
SMALL = tj.ModelConfig(vocab_size=VOCAB, max_len=64, num_layers=2, num_heads=4, model_dim=32, init_std=0.4)
CONFIGS = {
    "learned": SMALL,
    "rope-grouped-queries": SMALL.replace(positions="rope", num_kv_heads=2, use_qk_norm=True),
    "alibi-sliding-window": SMALL.replace(positions="alibi", num_kv_heads=1, sliding_window=4, tie_embeddings=False),
    "post-norm": SMALL.replace(positions="sinusoidal", norm_position="post", activation="relu", tie_embeddings=False,
                               init_std=0.7),
}
PROMPTS = [[7, 1, 33, 2, 18, 5, 5, 21, 9, 30], [4], [11, 39, 0, 12]]
NUM_NEW = 16
GREEDY = tj.Sampling(temperature=0)


@functools.cache
def make_model(config: tj.ModelConfig) -> tj.Decoder:
    return tj.Decoder(config, key=jax.random.key(1))


@jax.jit
def full_forward(model: tj.Decoder, tokens_1T: jax.Array) -> jax.Array:
    return model(tokens_1T).logits[0]


def next_logits(model: tj.Decoder, context: list[int]) -> np.ndarray:
    """Computes log-probabilities with one uncached pass over the row alone. Tokens after the last
    one keep the shape and change no result."""
    tokens_1T = np.zeros((1, model.config.max_len), np.int32)
    tokens_1T[0, :len(context)] = context
    return np.asarray(full_forward(model, tokens_1T))[len(context) - 1].astype(np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def plain_loop(model, prompt, num_new, choose=lambda logits, step: int(logits.argmax())):
    """Returns the tokens and their log-probabilities. When the context is full, generation
    continues from its last half."""
    context, tokens, logprobs = list(prompt), [], []
    for step in range(num_new):
        if len(context) == model.config.max_len:
            context = context[-(model.config.max_len // 2):]
        logits = next_logits(model, context)
        tokens.append(choose(logits, step))
        logprobs.append(log_softmax(logits)[tokens[-1]])
        context.append(tokens[-1])
    return tokens, logprobs


@contextlib.contextmanager
def count_compiles():
    """A list that gets one entry for each program that is compiled."""
    compiles = []

    def listen(event: str, duration: float, **_) -> None:
        if "backend_compile" in event:
            compiles.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("name", mostly_long(CONFIGS, "rope-grouped-queries", "alibi-sliding-window"))
def test_greedy_batch_equals_uncached_rows_alone(name):
    model = make_model(CONFIGS[name])
    result = tj.generate(model, PROMPTS, max_new_tokens=NUM_NEW, sampling=GREEDY)
    for row, prompt in enumerate(PROMPTS):
        tokens, logprobs = plain_loop(model, prompt, NUM_NEW)
        assert result.tokens[row] == tokens
        np.testing.assert_allclose(result.logprobs[row], logprobs, rtol=1e-5, atol=1e-5)
    assert len({token for tokens in result.tokens for token in tokens}) > 3  # the text does not only repeat one token
    assert result.lengths == [NUM_NEW] * 3
    assert result.finish_reasons == ["length"] * 3
    assert result.texts is None


@jax.jit
def read(model: tj.Decoder, tokens_BT: jax.Array, segment_ids_BT: jax.Array, cache: tj.KVCache):
    out = model(tokens_BT, segment_ids_BT=segment_ids_BT, cache=cache)
    return out.logits, out.cache


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_on_either_side_equals_alone(name):
    """Prompts of 3 and 6 tokens in rows of 8 through a cache driven by hand, then four more tokens
    one by one."""
    model = make_model(CONFIGS[name])
    texts, lengths = [PROMPTS[0][:7], PROMPTS[0][::-1]], [3, 6]
    expected = [np.asarray(full_forward(model, np.array([text + [0] * (64 - len(text))]))) for text in texts]
    for side in ("left", "right"):
        tokens_BP, segment_ids_BP = np.zeros((2, 8), np.int32), np.zeros((2, 8), np.int32)
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            slots = slice(8 - length, 8) if side == "left" else slice(0, length)
            tokens_BP[row, slots], segment_ids_BP[row, slots] = text[:length], 1
        logits, cache = read(model, tokens_BP, segment_ids_BP, tj.KVCache.empty(model.config, 2, 12))
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(logits[row][segment_ids_BP[row] != 0], expected[row][:length],
                                       rtol=1e-4, atol=1e-5)
        if side == "right" and (model.config.positions == "alibi" or model.config.sliding_window):
            continue  # these measure distance in slots, so that a text cannot go on behind its padding
        for step in range(4):
            last_B1 = np.array([[text[length + step]] for text, length in zip(texts, lengths, strict=True)], np.int32)
            logits, cache = read(model, last_B1, np.ones((2, 1), np.int32), cache)
            for row, length in enumerate(lengths):
                np.testing.assert_allclose(logits[row, 0], expected[row][length + step], rtol=1e-4, atol=1e-5)


def test_sampled_rows_depend_on_their_own_key_only():
    model = make_model(SMALL)
    keys = jax.random.split(jax.random.key(5), 3)
    sampling = tj.Sampling(temperature=0.8)
    batch = tj.generate(model, PROMPTS, key=keys, max_new_tokens=NUM_NEW, sampling=sampling)

    for row, prompt in enumerate(PROMPTS):
        def choose(logits, step, key=keys[row]):  # inverse CDF in float64
            probabilities = np.exp(log_softmax(logits / 0.8))
            return int((probabilities.cumsum() <= float(jax.random.uniform(jax.random.fold_in(key, step)))).sum())

        tokens, logprobs = plain_loop(model, prompt, NUM_NEW, choose)
        assert batch.tokens[row] == tokens
        np.testing.assert_allclose(batch.logprobs[row], logprobs, rtol=1e-5, atol=1e-5)

    order = [2, 0, 1]
    shuffled = tj.generate(model, [PROMPTS[row] for row in order], key=keys[jnp.array(order)], max_new_tokens=NUM_NEW,
                           sampling=sampling)
    assert shuffled.tokens == [batch.tokens[row] for row in order]
    alone = tj.generate(model, [PROMPTS[2]], key=keys[2:], max_new_tokens=NUM_NEW, sampling=sampling)
    assert alone.tokens == batch.tokens[2:]
    assert batch.tokens != tj.generate(model, PROMPTS, key=keys[::-1], max_new_tokens=NUM_NEW, sampling=sampling).tokens


def test_one_key_is_divided_among_rows_and_samples():
    model, key = make_model(SMALL), jax.random.key(8)
    result = tj.generate(model, [PROMPTS[1]], key=key, max_new_tokens=NUM_NEW, num_samples=3)
    assert len({tuple(tokens) for tokens in result.tokens}) == 3
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(3))
    assert tj.generate(model, [PROMPTS[1]] * 3, key=keys, max_new_tokens=NUM_NEW).tokens == result.tokens
    assert tj.generate(model, [PROMPTS[1]], key=key, max_new_tokens=NUM_NEW).tokens == result.tokens[:1]


def test_samples_of_a_prompt_are_neighbours():
    model = make_model(SMALL)
    result = tj.generate(model, [PROMPTS[1]], max_new_tokens=NUM_NEW, sampling=GREEDY, num_samples=3)
    assert result.tokens == [plain_loop(model, PROMPTS[1], NUM_NEW)[0]] * 3


CHANGES = [dict(temperature=0.3), dict(temperature=0), dict(temperature=2), dict(top_k=3), dict(top_p=0.5),
           dict(min_p=0.1), dict(typical_p=0.5), dict(repetition_penalty=1.4), dict(no_repeat_ngram=2),
           dict(min_new_tokens=5), dict(banned=[1, 2]), dict(bias={1: 2.0, 3: -1.0})]


def test_changing_any_setting_compiles_nothing():
    model, key = make_model(SMALL), jax.random.key(0)
    generate = functools.partial(tj.generate, model, PROMPTS, max_new_tokens=NUM_NEW)
    plain = generate(key=key).tokens
    with count_compiles() as compiles:
        changed = [generate(key=key, sampling=tj.Sampling(**change), end_ids=[3]).tokens for change in CHANGES]
        generate(key=jax.random.key(1), end_ids=[4, 5])
    assert compiles == []
    assert len({str(tokens) for tokens in [plain, *changed]}) > len(CHANGES) / 2
    with count_compiles() as compiles:
        jax.jit(lambda x: x + 1)(np.float32(1))
    assert len(compiles) == 1  # the counter works


def test_twenty_lengths_compile_one_program_a_bucket():
    model, key = make_model(SMALL), jax.random.key(0)
    calls = [(1 + 3 * i, 1 + (7 * i) % 16) for i in range(10)] + [(30 - 3 * i, 16 - i) for i in range(10)]
    tj.generate(model, [[1]], key=key, max_new_tokens=NUM_NEW)  # the bucket of 16 and, with new tokens, 32
    before = prefill._cache_size(), decode.num_programs
    with count_compiles() as compiles:
        for index, (length, num_new) in enumerate(calls):
            sampling = tj.Sampling(temperature=index % 3, top_k=index % 5, min_p=0.01 * index)
            result = tj.generate(model, [[1] * length], key=key, max_new_tokens=num_new, sampling=sampling)
            assert result.lengths == [num_new]
    # Prompts of 17 to 30 tokens, with up to 16 new ones: the bucket of 32, and 64.
    assert (prefill._cache_size(), decode.num_programs) == (before[0] + 1, before[1] + 1)
    assert len(compiles) == 2


def test_eos_min_new_tokens_and_banned_tokens():
    model = make_model(SMALL)
    free = [plain_loop(model, prompt, NUM_NEW)[0] for prompt in PROMPTS]
    end = free[0][4]
    generate = functools.partial(tj.generate, model, PROMPTS, max_new_tokens=NUM_NEW)

    ended = generate(sampling=GREEDY, end_ids=[end])
    for tokens, reason, length, without in zip(ended.tokens, ended.finish_reasons, ended.lengths, free, strict=True):
        assert tokens == (without[:without.index(end) + 1] if end in without else without)
        assert (reason, length) == ("eos" if end in without else "length", len(tokens))
    assert "eos" in ended.finish_reasons and ended.lengths[0] < NUM_NEW
    assert [len(logprobs) for logprobs in ended.logprobs] == ended.lengths

    def without_end(logits, step):
        logits[end] = logits[end] if step >= 9 else -np.inf
        return int(logits.argmax())

    later = generate(sampling=tj.Sampling(temperature=0, min_new_tokens=9), end_ids=[end])
    for row, prompt in enumerate(PROMPTS):
        tokens, _ = plain_loop(model, prompt, NUM_NEW, without_end)
        assert later.tokens[row] == (tokens[:tokens.index(end) + 1] if end in tokens else tokens)
        assert end not in later.tokens[row][:9]

    banned = generate(sampling=tj.Sampling(temperature=0, banned=[end]))
    for row, prompt in enumerate(PROMPTS):
        tokens, logprobs = plain_loop(model, prompt, NUM_NEW, lambda logits, _: int(np.argsort(
            np.where(np.arange(VOCAB) == end, -np.inf, logits))[-1]))
        assert banned.tokens[row] == tokens
        np.testing.assert_allclose(banned.logprobs[row], logprobs, rtol=1e-5, atol=1e-5)  # the end token of the model

    assert generate(key=jax.random.key(0), sampling=tj.Sampling(bias={6: 1e4})).tokens == [[6] * NUM_NEW] * 3
    assert generate(sampling=GREEDY, end_ids=range(VOCAB)).lengths == [1] * 3


def test_no_repeated_ngram_and_repetition_penalty_see_prompt_and_new_tokens():
    model = make_model(SMALL)

    def choose(logits, _, history):
        bigrams = {tuple(history[i:i + 2]) for i in range(len(history) - 1)}
        for token in set(history):
            logits[token] = logits[token] / 1.2 if logits[token] > 0 else logits[token] * 1.2
        for token in range(VOCAB):
            if (history[-1], token) in bigrams:
                logits[token] = -np.inf
        history.append(int(logits.argmax()))
        return history[-1]

    sampling = tj.Sampling(temperature=0, no_repeat_ngram=2, repetition_penalty=1.2)
    result = tj.generate(model, PROMPTS, max_new_tokens=NUM_NEW, sampling=sampling)
    for row, prompt in enumerate(PROMPTS):
        expected, _ = plain_loop(model, prompt, NUM_NEW, functools.partial(choose, history=list(prompt)))
        assert result.tokens[row] == expected
        assert result.tokens[row] != plain_loop(model, prompt, NUM_NEW)[0]


def test_one_new_token():
    model = make_model(SMALL)
    assert tj.generate(model, PROMPTS, max_new_tokens=1, sampling=GREEDY).tokens == [
        plain_loop(model, prompt, 1)[0] for prompt in PROMPTS]


@pytest.mark.long
def test_a_full_context_and_beyond_by_sliding():
    """Rows fill the context at different times: each row continues from its last half when its own
    context is full."""
    model = make_model(SMALL.replace(max_len=16))
    generate = functools.partial(tj.generate, model, PROMPTS, sampling=GREEDY)
    end_ids = [plain_loop(model, PROMPTS[0], 8)[0][-1]]
    full, slid, ended = (generate(max_new_tokens=6), generate(max_new_tokens=45, slide=True),
                         generate(max_new_tokens=45, slide=True, end_ids=end_ids))
    for row, prompt in enumerate(PROMPTS):
        tokens, logprobs = plain_loop(model, prompt, 45)
        assert full.tokens[row] == tokens[:6]
        assert slid.tokens[row] == tokens
        np.testing.assert_allclose(slid.logprobs[row], logprobs, rtol=1e-5, atol=1e-5)
        assert ended.tokens[row] == (tokens[:tokens.index(end_ids[0]) + 1] if end_ids[0] in tokens else tokens)
    assert len(set(ended.lengths)) > 1
    with pytest.raises(ValueError, match=r"10 tokens and 45 new ones exceed the model's context of 16; .* at most 6"):
        generate(max_new_tokens=45)


def test_the_cache_is_updated_in_place():
    """Donated buffers go straight through the loop: the optimized program never copies a layer's
    keys."""
    config = SMALL.replace(num_kv_heads=2)
    model = prepare_module._separate_layers(make_model(config))
    settings = Settings.of(tj.Sampling(), VOCAB)
    ones_BP = jax.ShapeDtypeStruct((3, 16), jnp.int32)
    keys_B = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    state = jax.eval_shape(functools.partial(prefill, capacity=64), model, ones_BP, ones_BP, keys_B, jnp.int32(0),
                           settings)
    compiled = decode.lower(model, state, settings, jnp.int32(5)).compile()
    size = 3 * 64 * 2 * 8
    assert [x.size for x in (*state.cache.keys, *state.cache.values)] == [size] * 4
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * 4 * size
    made = collections.Counter()  # instructions whose result is as large as a layer's keys
    for shape, instruction in re.findall(r"= f32\[([\d,]+)\]\S* ([\w-]+)\(", compiled.as_text()):
        if math.prod(map(int, shape.split(","))) == size:
            made[instruction] += 1
    assert made["dynamic-update-slice"] == 4  # keys and values of two layers, each the root of a fusion
    assert made["fusion"] == 4
    assert set(made) <= {"dynamic-update-slice", "fusion", "parameter", "get-tuple-element", "bitcast"}


def test_donated_state_leaves_the_callers_keys_alive():
    model, keys = make_model(SMALL), jax.random.split(jax.random.key(0), 3)
    results = [tj.generate(model, PROMPTS, key=keys, max_new_tokens=NUM_NEW) for _ in range(2)]
    assert results[0] == results[1]


def test_a_model_that_several_threads_decode_is_prepared_once(monkeypatch):
    separate, calls, together = prepare_module._separate_layers, [], threading.Barrier(8)

    def slow(model):
        calls.append(model)
        time.sleep(0.05)
        return separate(model)

    def prepare(model):
        together.wait()
        return prepare_module.prepared(model)

    monkeypatch.setattr(prepare_module, "_separate_layers", slow)
    model = tj.Decoder(SMALL, key=jax.random.key(3))
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(prepare, [model] * 8))
    assert calls == [model] and all(one is found[0] for one in found)


MODEL_ERRORS = [
    (dict(prompts=[[1] * 64]), "64 tokens leaves no room in the model's context of 64; shorten it"),
    (dict(prompts=[[1] * 64], slide=True), "leaves no room"),
    (dict(prompts=[[1] * 60], max_new_tokens=5), "60 tokens and 5 new ones.* ask for at most 4, or pass slide=True"),
    (dict(prompts=[]), "the list of prompts or sources is empty"),
    (dict(prompts=[[1], []]), "a prompt of token ids is empty"),
    (dict(prompts=[1, 2]), "list of lists of token ids"),
    (dict(prompts=[[1.0, 2.0]]), "list of lists of token ids"),
    (dict(prompts=[[0, VOCAB]]), "token id 40 is outside the vocabulary of 40"),
    (dict(prompts=[[-1]]), "token id -1"),
    (dict(prompts="text"), "strings need tokenizer"),
    (dict(stop="x"), "stop strings need a tokenizer; without one, pass end_ids"),
    (dict(key=None), "sampling needs key=jax.random.key"),
    (dict(key=0), r"key=0 is not a PRNG key; pass jax.random.key\(seed\)"),
    (dict(key=jax.random.PRNGKey(0)), "is not a PRNG key"),
    (dict(key=jax.random.split(jax.random.key(0), 2)), r"key has shape \(2,\); pass one key, or one for each of the 1"),
    (dict(max_new_tokens=0), "max_new_tokens=0"),
    (dict(num_samples=0), "num_samples=0"),
    (dict(end_ids=[VOCAB]), "end_ids: token id 40"),
    (dict(sampling=tj.Sampling(banned=range(VOCAB))), "none of 40 tokens"),
]


@pytest.mark.parametrize(("arguments", "words"), MODEL_ERRORS, ids=[words[:30] for _, words in MODEL_ERRORS])
def test_invalid_arguments_raise_before_any_compile(arguments, words):
    model, key = make_model(SMALL), jax.random.key(0)
    defaults = dict(prompts=[[1, 2]], key=key, max_new_tokens=4)
    with count_compiles() as compiles, pytest.raises(ValueError, match=words):
        tj.generate(model, **{**defaults, **arguments})
    assert compiles == []
