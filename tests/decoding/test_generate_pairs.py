"""generate and stream with an encoder-decoder, against a plain loop of full forward passes without
a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import count_compiles, log_softmax

import transformer_jax as tj
from transformer_jax.models.functional import make_model

TOKENIZER = tj.Tokenizer.train(["the cat sat on the mat"], kind="char")
VOCAB, MAX_LEN = TOKENIZER.vocab_size, 24
PAPER = tj.ModelConfig(
    family="encoder_decoder", vocab_size=VOCAB, max_len=MAX_LEN, num_layers=2, num_heads=4, model_dim=32,
    positions="sinusoidal", norm_position="post", activation="relu", scale_embeddings=True, tie_embeddings=False,
    init_std=None)
CONFIGS = {
    "paper": PAPER,
    "rope-grouped-queries": PAPER.replace(positions="rope", norm_position="pre", num_kv_heads=2, num_encoder_layers=1),
    "alibi-sliding-window": PAPER.replace(positions="alibi", sliding_window=3, use_qk_norm=True),
    "relative": PAPER.replace(positions="relative", relative_buckets=8, relative_max_distance=12, norm_position="pre",
                              norm="rmsnorm", use_bias=False, attention_scale=1.0),
}
SOURCES = [[5, 1, 9, 2, 11, 4, 8, 8], [6], [10, 10, 1, 7]]
# Seeds of models that do not only repeat one token.
SEEDS = {"paper": 3, "rope-grouped-queries": 1, "alibi-sliding-window": 3, "relative": 3}
START, NUM_NEW = 2, 10
GREEDY = tj.Sampling(temperature=0)


@functools.cache
def make(name="paper"):
    """A model whose weights are large, so that distributions are peaked and the earlier tokens
    matter."""
    model = tj.EncoderDecoder(CONFIGS[name], key=jax.random.key(SEEDS[name]))
    for attention in (model.decoder.blocks.attention, model.decoder.blocks.cross_attention):
        attention.output.kernel[...] *= 2
    model.embeddings.output[...] *= 2
    return model


@jax.jit
def full_forward(model, source_BS, target_BT, source_mask_BS):
    return model(source_BS, target_BT, source_segment_ids_BS=source_mask_BS).logits[0]


def plain_loop(model, source, choose=lambda logits, step: int(logits.argmax()), num_new=NUM_NEW, start=START):
    """Generates for a single source. Returns the tokens and their log-probabilities."""
    source_BS, target_BT = np.zeros((2, 1, MAX_LEN), np.int32)
    source_BS[0, :len(source)], target_BT[0, 0] = source, start
    mask_BS = np.arange(MAX_LEN)[None] < len(source)
    tokens, logprobs = [], []
    for step in range(num_new):
        logits = np.asarray(full_forward(model, source_BS, target_BT, mask_BS)[step], np.float64)
        tokens.append(choose(logits, step))
        logprobs.append(log_softmax(logits)[tokens[-1]])
        target_BT[0, step + 1] = tokens[-1]
    return tokens, logprobs


@pytest.mark.long
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_batch_equals_uncached_sources_alone(name):
    model = make(name)
    result = tj.generate(model, SOURCES, start_id=START, max_new_tokens=NUM_NEW, sampling=GREEDY)
    for row, source in enumerate(SOURCES):
        tokens, logprobs = plain_loop(model, source)
        assert result.tokens[row] == tokens
        np.testing.assert_allclose(result.logprobs[row], logprobs, rtol=1e-5, atol=1e-5)
    assert len(set(map(tuple, result.tokens))) == 3  # the sources matter
    assert any(len(set(tokens)) > 1 for tokens in result.tokens)
    assert (result.lengths, result.finish_reasons, result.texts) == ([NUM_NEW] * 3, ["length"] * 3, None)


@pytest.mark.long
def test_a_source_alone_is_as_in_a_batch():
    generate = functools.partial(tj.generate, make(), start_id=START, max_new_tokens=NUM_NEW, sampling=GREEDY)
    batch, longer = generate(SOURCES), generate([*SOURCES, [*range(VOCAB), 1]])  # sources padded to more places
    assert longer.tokens[:3] == batch.tokens
    alone = generate(SOURCES[1:2])
    assert alone.tokens == batch.tokens[1:2]
    np.testing.assert_allclose(alone.logprobs, batch.logprobs[1:2], rtol=1e-5, atol=1e-5)


def test_sampled_rows_depend_on_their_own_key_only():
    keys = jax.random.split(jax.random.key(5), 3)
    generate = functools.partial(tj.generate, make(), start_id=START, max_new_tokens=NUM_NEW,
                                 sampling=tj.Sampling(temperature=0.8))
    batch = generate(SOURCES, key=keys)
    for row, source in enumerate(SOURCES):
        def choose(logits, step, key=keys[row]):  # inverse CDF in float64
            probabilities = np.exp(log_softmax(logits / 0.8))
            return int((probabilities.cumsum() <= float(jax.random.uniform(jax.random.fold_in(key, step)))).sum())

        tokens, logprobs = plain_loop(make(), source, choose)
        assert batch.tokens[row] == tokens
        np.testing.assert_allclose(batch.logprobs[row], logprobs, rtol=1e-5, atol=1e-5)
    order = [2, 0, 1]
    shuffled = generate([SOURCES[row] for row in order], key=keys[jnp.array(order)])
    assert shuffled.tokens == [batch.tokens[row] for row in order]
    assert generate(SOURCES, key=keys[::-1]).tokens != batch.tokens


@pytest.mark.long
def test_samples_of_a_source_are_neighbours():
    generate = functools.partial(tj.generate, make(), start_id=START, max_new_tokens=NUM_NEW)
    greedy = generate([SOURCES[0], SOURCES[1]], sampling=GREEDY, num_samples=2)
    assert greedy.tokens == [plain_loop(make(), source)[0] for source in SOURCES[:2] for _ in range(2)]
    key = jax.random.key(8)
    sampled = generate([SOURCES[0], SOURCES[1]], key=key, num_samples=2)
    assert len(set(map(tuple, sampled.tokens))) == 4
    assert sampled == generate([SOURCES[0], SOURCES[0], SOURCES[1], SOURCES[1]], key=key)


def test_end_ids_and_the_start_matter():
    model = make("rope-grouped-queries")
    free = [plain_loop(model, source)[0] for source in SOURCES]
    end = free[0][2]
    generate = functools.partial(tj.generate, model, SOURCES, max_new_tokens=NUM_NEW, sampling=GREEDY)
    ended = generate(start_id=START, end_ids=[end])
    for tokens, reason, without in zip(ended.tokens, ended.finish_reasons, free, strict=True):
        assert tokens == (without[:without.index(end) + 1] if end in without else without)
        assert reason == ("eos" if end in without else "length")
    assert ended.lengths == [3, NUM_NEW, NUM_NEW]
    other = generate(start_id=START + 1)
    assert other.tokens == [plain_loop(model, source, start=START + 1)[0] for source in SOURCES] != free


@pytest.mark.long
def test_strings_are_read_and_written_by_the_tokenizer():
    texts = ["the cat", "sat"]
    generate = functools.partial(tj.generate, make(), max_new_tokens=NUM_NEW)
    arguments = dict(tokenizer=TOKENIZER, key=jax.random.key(0), sampling=tj.Sampling(bias={TOKENIZER.eos_id: 2.0}))
    result = generate(texts, **arguments)
    ends = [TOKENIZER.eos_id, TOKENIZER.end_of_text_id]
    by_ids = generate([[*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in texts], start_id=TOKENIZER.bos_id,
                      end_ids=ends, **{**arguments, "tokenizer": None})
    assert by_ids.tokens == result.tokens and by_ids.finish_reasons == result.finish_reasons
    assert result.texts == [TOKENIZER.decode([token for token in row if token not in ends]) for row in result.tokens]
    assert "eos" in result.finish_reasons
    pieces = tj.stream(make(), "the cat", max_new_tokens=NUM_NEW, **arguments)
    assert "".join(pieces) == generate("the cat", **arguments).texts[0] == result.texts[0]


def test_stop_strings_end_a_text():
    arguments = dict(tokenizer=TOKENIZER, sampling=tj.Sampling(temperature=0, banned=range(6)), max_new_tokens=NUM_NEW)
    model = make("rope-grouped-queries")
    text = tj.generate(model, "the cat", **arguments).texts[0]
    stop = text[3:5]
    result = tj.generate(model, "the cat", stop=stop, **arguments)
    assert text.index(stop) > 0 and (result.texts, result.finish_reasons) == ([text[:text.index(stop)]], ["stop"])


@pytest.mark.long
def test_a_full_context():
    tokens = tj.generate(make(), SOURCES[:1], start_id=START, max_new_tokens=MAX_LEN - 1, sampling=GREEDY).tokens
    assert tokens == [plain_loop(make(), SOURCES[0], num_new=MAX_LEN - 1)[0]]


def test_lengths_within_a_bucket_compile_nothing():
    generate = functools.partial(tj.generate, make(), start_id=START, key=jax.random.key(0))
    generate(SOURCES, max_new_tokens=NUM_NEW)
    with count_compiles() as compiles:
        generate([[1] * 16, [2], [3, 4]], max_new_tokens=3, sampling=tj.Sampling(top_k=3), end_ids=[4])
    assert compiles == []


ERRORS = [
    (dict(slide=True), "slide=True is for decoders; an encoder-decoder cannot continue beyond its context"),
    (dict(start_id=None), "an encoder-decoder without a tokenizer needs start_id=..., the token that starts a target"),
    (dict(start_id=VOCAB), f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
    (dict(prompts=[[1] * 25]), "a text of 25 tokens is longer than the model's context of 24; shorten it"),
    (dict(max_new_tokens=24), "1 tokens and 24 new ones exceed the model's context of 24; ask for at most 23$"),
    (dict(prompts=[[VOCAB]]), f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
    (dict(prompts=[]), "the list of prompts or sources is empty"),
    (dict(prompts=[[]]), "is empty"),
    (dict(prompts="text"), "strings need tokenizer"),
    (dict(end_ids=[-1]), "end_ids: token id -1"),
    (dict(key=None), "sampling needs key"),
]


@pytest.mark.parametrize(("arguments", "words"), ERRORS, ids=[str(arguments)[:30] for arguments, _ in ERRORS])
def test_errors(arguments, words):
    defaults = dict(prompts=[[1, 2]], start_id=START, key=jax.random.key(0), max_new_tokens=4)
    with count_compiles() as compiles, pytest.raises(ValueError, match=words):
        tj.generate(make(), **{**defaults, **arguments})
    assert compiles == []


WRONG_FAMILIES = {
    "encoder": {"generate": tj.generate, "beam_search": tj.beam_search,
                "score": functools.partial(tj.score, tokenizer=TOKENIZER)},
    "encoder_decoder": {"embed": tj.embed, "fill_mask": functools.partial(tj.fill_mask, tokenizer=TOKENIZER),
                        "score": functools.partial(tj.score, tokenizer=TOKENIZER)},
    "decoder": {"fill_mask": functools.partial(tj.fill_mask, tokenizer=TOKENIZER)},
}


@pytest.mark.parametrize("family", WRONG_FAMILIES)
def test_models_of_another_family_are_refused(family):
    model = jax.eval_shape(lambda key: make_model(PAPER.replace(family=family), key=key), jax.random.key(0))
    for name, function in WRONG_FAMILIES[family].items():
        with pytest.raises(ValueError, match=f"{name} is for models of family .*, not {family}$"):
            function(model, "<mask>")


def test_a_decoder_has_no_start():
    model = tj.Decoder(PAPER.replace(family="decoder"), key=jax.random.key(0))
    with pytest.raises(ValueError, match="start_id starts the targets of an encoder-decoder; leave it out"):
        tj.generate(model, [[1]], start_id=0, sampling=GREEDY)


@pytest.mark.long
def test_targets_start_as_the_config_says_and_hold_nothing_banned():
    """In greedy decoding and in beam search; the token that is banned would otherwise be drawn."""
    model = make()
    plain = tj.generate(model, SOURCES, sampling=GREEDY, max_new_tokens=NUM_NEW, start_id=START, end_ids=())
    banned = plain.tokens[0][1]
    told = jax.tree.map(lambda leaf: leaf, model)
    told.config = model.config.replace(start_ids=(START, plain.tokens[0][0]), banned_ids=(banned,))
    found = tj.generate(told, SOURCES[:1], sampling=GREEDY, max_new_tokens=NUM_NEW, end_ids=())
    tokens = jnp.asarray([[START, plain.tokens[0][0], *found.tokens[0]]])
    logits = np.array(tj.forward(model, jnp.asarray(SOURCES[:1]), tokens))[0, 1:-1]
    assert logits[0].argmax() == banned
    logits[:, banned] = -np.inf
    assert found.tokens[0] == logits.argmax(-1).tolist()
    search = functools.partial(tj.beam_search, sources=SOURCES[:1], beam_size=3, n_best=3, max_new_tokens=4, end_ids=())
    assert any(banned in hypothesis.tokens for hypothesis in search(model, start_id=START).n_best[0])
    assert not any(banned in hypothesis.tokens for hypothesis in search(told).n_best[0])
