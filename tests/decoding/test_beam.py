"""Beam search against a plain-Python one without a cache, teacher forcing, greedy decoding and
exhaustive search."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import count_compiles, log_softmax

import transformer_jax as tj
from transformer_jax.config import LayerKind
from transformer_jax.decoding import beam_loop
from transformer_jax.models.functional import make_model

VOCAB, START, ENDS, LIMIT, K = 12, 0, (3, 7), 9, 4
PAIRS = tj.ModelConfig(
    family="encoder_decoder", vocab_size=VOCAB, max_len=16, num_layers=1, num_heads=2, model_dim=16, mlp_dim=32,
    positions="sinusoidal", norm_position="post", activation="relu", scale_embeddings=True, tie_embeddings=False,
    init_std=None)
TEXT = tj.ModelConfig(vocab_size=VOCAB, max_len=20, num_layers=1, num_heads=4, model_dim=16, mlp_dim=32, init_std=0.7,
                      tie_embeddings=False)
CONFIGS = {
    "paper": PAIRS,
    "pre-norm-rope": PAIRS.replace(positions="rope", norm_position="pre", num_heads=4, num_kv_heads=2, use_qk_norm=True,
                                   num_encoder_layers=2),
    "relative": PAIRS.replace(positions="relative", relative_buckets=8, relative_max_distance=12, norm_position="pre"),
    "decoder-alibi": TEXT.replace(positions="alibi", num_kv_heads=2),
    "decoder-learned": TEXT,
    "decoder-rope": TEXT.replace(positions="rope", num_kv_heads=2, num_layers=2, layer_pattern=(
        LayerKind(sliding_window=3), LayerKind(rope_base=100.0))),
}
LONG = {"pairs-long": PAIRS.replace(positions="learned", max_len=64),
        "relative-long": CONFIGS["relative"].replace(max_len=64), "decoder-long": TEXT.replace(max_len=64)}
SOURCES = [[5, 1, 9, 2, 11, 4, 8, 8], [6], [10, 10, 1]]
SEEDS = (0, 1, 4)
SETTINGS = [("gnmt", 0.6), ("gnmt", 0.0), ("gnmt", 2.5), ("length", 1.0), ("length", 0.3)]


@functools.cache
def make(name, seed=0):
    """A model whose weights are large, so that distributions are peaked, no two hypotheses tie, and
    the earlier tokens matter."""
    model = make_model((CONFIGS | LONG)[name], key=jax.random.key(seed))
    if isinstance(model, tj.Decoder):
        model.stack.blocks.attention.output.kernel[...] *= 2
    else:
        model.decoder.blocks.attention.output.kernel[...] *= 1.5
        model.decoder.blocks.cross_attention.output.kernel[...] *= 1.5
        model.embeddings.output[...] *= 2
    return model


@jax.jit
def full_forward(model, *tokens, **options):
    return model(*tokens, **options).logits


def next_logprobs(model, source, texts):
    """log P of the next token of each text, float64 ``[texts, V]``: one full pass, which has room
    for 4 texts."""
    width = model.config.max_len
    tokens_BT = np.zeros((K, width), np.int32)
    lasts = []
    is_pair = isinstance(model, tj.EncoderDecoder)
    for row, text in enumerate(texts):
        line = [START, *text] if is_pair else [*source, *text]
        tokens_BT[row, :len(line)] = line
        lasts.append(len(line) - 1)
    if is_pair:
        source_BS = np.zeros((K, width), np.int32)
        source_BS[:, :len(source)] = source
        mask_BS = np.broadcast_to(np.arange(width) < len(source), source_BS.shape)
        logits_BTV = full_forward(model, source_BS, tokens_BT, source_segment_ids_BS=mask_BS)
    else:
        logits_BTV = full_forward(model, tokens_BT)
    return [log_softmax(np.asarray(logits_BTV[row, last], np.float64)) for row, last in enumerate(lasts)]


def divisor(penalty, alpha, length):
    return length**alpha if penalty == "length" else ((5 + length) / 6) ** alpha


@functools.cache
def searched(name, seed, source, beam_size=K, limit=LIMIT):
    """Searches without stopping early, and returns every hypothesis that ended or was cut off, as
    ``(tokens, log P)``."""
    model, alive, ended = make(name, seed), [((), 0.0)], []
    for step in range(1, limit + 1):
        following = next_logprobs(model, source, [tokens for tokens, _ in alive])
        extensions = [((*tokens, token), logprob + following[i][token])
                      for i, (tokens, logprob) in enumerate(alive) for token in range(VOCAB)]
        alive = []
        for tokens, logprob in sorted(extensions, key=lambda extension: -extension[1])[:beam_size]:
            (ended if tokens[-1] in ENDS or step == limit else alive).append((tokens, logprob))
        if not alive:
            break
    return ended


def ranked(hypotheses, penalty, alpha):
    """Returns ``(score, tokens, log P)`` of each hypothesis, the best first."""
    return sorted(((logprob / divisor(penalty, alpha, len(tokens)), list(tokens), logprob)
                   for tokens, logprob in hypotheses), reverse=True)


def search(model, sources=SOURCES, **arguments):
    start_id = START if isinstance(model, tj.EncoderDecoder) else None
    return tj.beam_search(model, sources, **dict(beam_size=K, n_best=K, max_new_tokens=LIMIT, start_id=start_id,
                                                 end_ids=ENDS) | arguments)


def check_hypotheses(found, wanted):
    assert [hypothesis.tokens for hypothesis in found] == [tokens for _, tokens, _ in wanted]
    np.testing.assert_allclose([h.score for h in found], [score for score, _, _ in wanted], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose([h.logprob for h in found], [logprob for _, _, logprob in wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("name", "n_best"), [("paper", 1), *((name, K) for name in CONFIGS)])
def test_equals_a_plain_search_that_never_stops_early(name, n_best):
    """Compares several models and length penalties, which shows that stopping early changes no
    result."""
    settings = SETTINGS if name == "paper" else [setting for setting in SETTINGS if setting[0] == "gnmt"]
    lengths, reasons = set(), set()
    for seed in SEEDS:
        for penalty, alpha in settings:
            result = search(make(name, seed), n_best=n_best, length_penalty=alpha, penalty=penalty)
            assert len(result.n_best) == len(SOURCES)
            for source, found in zip(SOURCES, result.n_best, strict=True):
                check_hypotheses(found, ranked(searched(name, seed, tuple(source)), penalty, alpha)[:n_best])
                lengths |= {len(hypothesis.tokens) for hypothesis in found}
                reasons |= {hypothesis.finish_reason for hypothesis in found}
    assert len(lengths) > 4 and reasons == {"eos", "length"}  # there was something to search for


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_long_searches_equal_the_plain_one(name):
    """The search is long enough that the cache grows and that finished sources are dropped."""
    sources, lengths = [[5, 1, 9, 2, 11, 4, 8, 8], [10, 10, 1], [2, 4], [8, 9, 1, 1]], []
    for seed, alpha in itertools.product((0, 1, 2, 3), (0.6, 1.2)):
        result = search(make(name, seed), sources, n_best=2, length_penalty=alpha, max_new_tokens=40)
        for source, found in zip(sources, result.n_best, strict=True):
            check_hypotheses(found, ranked(searched(name, seed, tuple(source), limit=40), "gnmt", alpha)[:2])
        lengths.append([len(found[0].tokens) for found in result.n_best])
    longest, shortest = np.max(lengths, axis=1), np.min(lengths, axis=1)
    assert (longest > 32).any() and ((longest > 16) & (shortest < 8)).any()


@pytest.mark.parametrize(("size", "k"), [(128, 1), (640, 5), (1000, 4), (2049, 16), (700, 1)])
def test_the_largest_of_many_are_those_of_top_k(size, k):
    rng = np.random.default_rng(size)
    x = rng.permutation(np.arange(6 * size, dtype=np.float32)).reshape(2, 3, size)
    x[0, 0] = np.sort(x[0, 0])  # all in the last blocks
    x[0, 1] = np.sort(x[0, 1])[::-1]
    x[0, 2, k:] = -np.inf
    values, places = jax.jit(beam_loop._largest, static_argnums=1)(x, k)
    expected_values, expected_places = jax.lax.top_k(x, k)
    np.testing.assert_array_equal(values, expected_values)
    np.testing.assert_array_equal(places, expected_places)


def test_a_long_hypothesis_may_overtake_one_that_ended_before():
    """Shows that the test above would fail if the search stopped at the first end, or at the first
    full list."""
    overtaken = 0
    for seed, source in itertools.product(SEEDS, SOURCES):
        ended = searched("paper", seed, tuple(source))
        first_full = len(ended[min(K, len(ended)) - 1][0])  # the length at which K had ended
        overtaken += len(ranked(ended, "gnmt", 2.5)[0][1]) > first_full
    assert overtaken >= 2


@pytest.mark.parametrize("name", ["paper", "decoder-rope"])
def test_scores_equal_teacher_forcing(name):
    model = make(name, 1)
    for source, found in zip(SOURCES, search(model).n_best, strict=True):
        for hypothesis in found:
            logprob = sum(next_logprobs(model, source, [hypothesis.tokens[:i]])[0][token]
                          for i, token in enumerate(hypothesis.tokens))
            assert abs(hypothesis.logprob - logprob) < 1e-4
            assert abs(hypothesis.score - logprob / ((5 + len(hypothesis.tokens)) / 6) ** 0.6) < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("name", ["paper", "decoder-learned"])
def test_a_beam_of_one_is_greedy(name):
    for seed in range(2):
        model = make(name, seed)
        start_id = START if name == "paper" else None
        greedy = tj.generate(model, SOURCES, max_new_tokens=LIMIT, sampling=tj.Sampling(temperature=0), end_ids=ENDS,
                             start_id=start_id)
        for penalty, alpha in SETTINGS if name == "paper" else SETTINGS[:2]:
            result = search(model, beam_size=1, n_best=1, length_penalty=alpha, penalty=penalty)
            assert result.tokens == greedy.tokens
            found = [hypotheses[0] for hypotheses in result.n_best]
            assert [hypothesis.finish_reason for hypothesis in found] == greedy.finish_reasons
            np.testing.assert_allclose([hypothesis.logprob for hypothesis in found], list(map(sum, greedy.logprobs)),
                                       rtol=1e-5, atol=1e-5)


def test_a_wider_beam_finds_more():
    """On average, beam search finds more probable texts than greedy decoding."""
    narrow, wide = (np.array([search(make("paper", seed), beam_size=k, n_best=1, length_penalty=0.0).scores
                              for seed in SEEDS]) for k in (1, K))
    assert (wide > narrow + 1e-3).sum() >= 2 and wide.mean() > narrow.mean()


def test_n_best_is_in_order_and_says_how_each_ended():
    result = search(make("paper", 2))
    assert result.tokens == [found[0].tokens for found in result.n_best]
    assert result.scores == [found[0].score for found in result.n_best]
    assert result.texts == [None] * 3
    for found in result.n_best:
        scores = [hypothesis.score for hypothesis in found]
        assert len(found) == K and scores == sorted(scores, reverse=True)
        assert len({tuple(hypothesis.tokens) for hypothesis in found}) == K
        for hypothesis in found:
            *rest, last = hypothesis.tokens
            assert not set(rest) & set(ENDS)
            assert hypothesis.finish_reason == ("eos" if last in ENDS else "length")
            assert last in ENDS or len(hypothesis.tokens) == LIMIT


def test_a_source_alone_is_as_in_a_batch():
    model = make("paper")
    batch = search(model)
    for row, source in enumerate(SOURCES):
        found, = search(model, [source]).n_best
        check_hypotheses(found, [(h.score, h.tokens, h.logprob) for h in batch.n_best[row]])


def test_two_tokens_are_searched_exhaustively():
    """With one end token and one other token, at most one hypothesis continues, and its two
    extensions fit into a beam of two: every possible text gets a score."""
    config = PAIRS.replace(vocab_size=2)
    for seed in range(3):
        model = tj.EncoderDecoder(config, key=jax.random.key(seed))
        texts = [[0] * length + [1] for length in range(LIMIT)] + [[0] * LIMIT]
        logits_BTV = full_forward(model, np.array([[0, 1, 1]]), np.zeros((1, LIMIT), np.int32))
        logprobs_TV = np.stack([log_softmax(row) for row in np.asarray(logits_BTV[0], np.float64)])
        hypotheses = [(text, logprobs_TV[np.arange(len(text)), text].sum()) for text in texts]
        for alpha in (0.0, 0.6, 3.0):
            found, = tj.beam_search(model, [[0, 1, 1]], beam_size=2, n_best=2, length_penalty=alpha, start_id=0,
                                    end_ids=[1], max_new_tokens=LIMIT).n_best
            check_hypotheses(found, ranked(hypotheses, "gnmt", alpha)[:2])


@pytest.mark.parametrize(("num_tokens", "limit"), [(4, 3), (3, 4)])
def test_a_beam_that_holds_every_prefix_is_exhaustive(num_tokens, limit):
    """Of 64 tokens all but the first few are too improbable to be kept beside any text of those
    few.

    With n of them, one of which ends a text, at most (n - 1)^(limit - 1) * n texts are extended at
    once, at most 36, and at most 40 are ever complete: a beam of 40 drops none, and so ranks all of
    them.
    """
    config = TEXT.replace(vocab_size=64, norm_position="post")
    for seed in range(2):
        model = tj.Decoder(config, key=jax.random.key(seed))
        norm = model.stack.blocks.mlp_norm  # the last of the model: its first channel becomes the constant 1
        norm.scale[...] = norm.scale[...].at[:, 0].set(0.0)
        norm.bias[...] = norm.bias[...].at[:, 0].set(1.0)
        model.embeddings.output[...] = model.embeddings.output[...].at[num_tokens:, 0].add(-80.0)
        end, prompt = num_tokens - 1, [1, 0, 2]
        texts = [list(text) for length in range(1, limit + 1)
                 for text in itertools.product(range(num_tokens), repeat=length)
                 if end not in text[:-1] and (text[-1] == end or length == limit)]
        assert len(texts) <= 40
        rows_BT = np.array([prompt + text + [0] * (limit - len(text)) for text in texts])
        logits_BTV = np.asarray(full_forward(model, rows_BT), np.float64)
        hypotheses = [(text, sum(log_softmax(logits_TV[len(prompt) - 1 + i])[token] for i, token in enumerate(text)))
                      for text, logits_TV in zip(texts, logits_BTV, strict=True)]
        assert min(logprob for _, logprob in hypotheses) > -70
        for alpha in (0.0, 1.0):
            found, = tj.beam_search(model, [prompt], beam_size=40, n_best=40, length_penalty=alpha, end_ids=[end],
                                    max_new_tokens=limit).n_best
            check_hypotheses(found[:len(texts)], ranked(hypotheses, "gnmt", alpha))


MAX_LEN = 24


def position_model(probabilities_TV):
    """A decoder whose next token depends on the position alone, with the given probabilities.

    Blocks add nothing to the stream, which holds a one-hot position; RMSNorm makes its one
    sqrt(width).
    """
    config = TEXT.replace(vocab_size=5, max_len=MAX_LEN, model_dim=MAX_LEN, num_heads=1, norm="rmsnorm",
                          norm_epsilon=1e-30)
    model = tj.Decoder(config, key=jax.random.key(0))
    for parameter in (model.embeddings.token, model.stack.blocks.attention.output.kernel,
                      model.stack.blocks.mlp.down.kernel):
        parameter[...] = jnp.zeros_like(parameter[...])
    model.embeddings.position[...] = jnp.eye(MAX_LEN)
    rows_TV = np.log(np.resize(probabilities_TV, (MAX_LEN, 5)))
    model.embeddings.output[...] = jnp.asarray(rows_TV.T / np.sqrt(MAX_LEN))
    return model


@pytest.fixture
def steps(monkeypatch):
    """A list that grows by one with every call of the model while a search runs (one for the
    prompt)."""
    calls = []
    original = beam_loop.read

    def read(*arguments, **options):
        jax.debug.callback(lambda: calls.append(1))
        return original(*arguments, **options)

    monkeypatch.setattr(beam_loop, "read", read)
    return calls


@pytest.mark.long
def test_a_search_stops_as_soon_as_nothing_better_can_come(steps):
    """Token 4 ends a text with probability 0.6 at every place; the best other one has 0.2."""
    model = position_model([[0.2, 0.1, 0.06, 0.04, 0.6]])
    log = np.log

    def turns(prompts=((1,),), **arguments):
        steps.clear()
        result = tj.beam_search(model, prompts, **dict(beam_size=3, end_ids=[4], max_new_tokens=16) | arguments)
        jax.effects_barrier()
        return result, len(steps) - 1

    # The search stops at once: the hypothesis that continues has log 0.2, and no length penalty can
    # make up for it.
    result, count = turns(length_penalty=0.0)
    assert (result.tokens, count) == ([[4]], 0)
    np.testing.assert_allclose(result.scores, log(0.6), rtol=1e-5)
    # The largest penalty is that of 16 tokens, ((5 + 16) / 6)^alpha: log 0.2 / 3.5^alpha < log 0.6
    # up to here.
    alpha = log(log(0.2) / log(0.6)) / log(3.5)
    assert turns(length_penalty=alpha - 0.01)[1] == 0
    assert turns(length_penalty=alpha + 0.01)[1] == 1
    # At the limit of 3 tokens the largest penalty is smaller.
    assert turns(length_penalty=alpha + 0.01, max_new_tokens=3)[1] == 0
    # Three results: 4 ends first, then 0 4 and 1 4. The best hypothesis that continues after two
    # tokens has 0.04 < 0.1 * 0.6.
    result, count = turns(length_penalty=0.0, n_best=3)
    assert ([h.tokens for h in result.n_best[0]], count) == ([[4], [0, 4], [1, 4]], 1)
    # With a strong penalty and a limit, no hypothesis can be excluded before the end.
    result, count = turns(length_penalty=3.0, penalty="length", max_new_tokens=5)
    assert (result.tokens, count) == ([[0, 0, 0, 0, 4]], 4)
    # A batch continues until its last row is finished; here the second row ends later.
    model = position_model([[0.2, 0.1, 0.06, 0.04, 0.6]] * 4 + [[0.9, 0.02, 0.02, 0.05, 0.01]] * 2)
    result, count = turns([(1,), (1,) * 5], length_penalty=0.0)
    assert result.tokens[0] == [4] and result.tokens[1] == [0, 0, 4] and count == 2


TOKENIZER = tj.Tokenizer.train(["the cat sat on the mat"], kind="char")
SPOKEN = PAIRS.replace(vocab_size=TOKENIZER.vocab_size, max_len=64)


def test_strings_are_read_and_written_by_the_tokenizer():
    model = tj.EncoderDecoder(SPOKEN, key=jax.random.key(5))
    norm = model.decoder.blocks.mlp_norm  # the last of the model: its first channel, the constant 1, favours </s>
    norm.scale[...], norm.bias[...] = norm.scale[...].at[:, 0].set(0.0), norm.bias[...].at[:, 0].set(1.0)
    model.embeddings.output[...] = model.embeddings.output[...].at[TOKENIZER.eos_id, 0].add(1.5)
    texts = ["the cat", "sat"]
    search = functools.partial(tj.beam_search, model, beam_size=3, n_best=3, max_new_tokens=10)
    found = search(texts, tokenizer=TOKENIZER)
    by_ids = search([[*TOKENIZER.encode(text), TOKENIZER.eos_id] for text in texts], start_id=TOKENIZER.bos_id,
                    end_ids=[TOKENIZER.eos_id, TOKENIZER.end_of_text_id])
    assert by_ids.tokens == found.tokens and by_ids.scores == found.scores
    reasons = set()
    for hypothesis in itertools.chain(*found.n_best):
        ended = hypothesis.tokens[-1] in (TOKENIZER.eos_id, TOKENIZER.end_of_text_id)
        assert hypothesis.text == TOKENIZER.decode(hypothesis.tokens[:-1] if ended else hypothesis.tokens)
        assert hypothesis.finish_reason == ("eos" if ended else "length")
        reasons.add(hypothesis.finish_reason)
    assert reasons == {"eos", "length"}
    assert found.texts == [hypotheses[0].text for hypotheses in found.n_best]


def test_the_default_length_is_that_of_the_longest_source_and_fifty():
    search = functools.partial(tj.beam_search, start_id=0, beam_size=1)
    model = tj.EncoderDecoder(SPOKEN, key=jax.random.key(0))
    assert [len(tokens) for tokens in search(model, [[1] * 9, [1]]).tokens] == [59, 59]
    assert [len(tokens) for tokens in search(model, [[1] * 14, [1]]).tokens] == [63, 63]


def test_settings_and_lengths_within_a_bucket_compile_nothing():
    model = make("paper")
    search(model)
    with count_compiles() as compiles:
        for alpha, limit, ends in ((0.0, 9, [3]), (1.5, 3, ()), (0.6, 15, ENDS), (2, 1, [1, 2])):
            search(model, [[1, 2], [3] * 12, [4]], length_penalty=alpha, max_new_tokens=limit, end_ids=ends)
        search(make("paper", 1))
    # The program that prepares a model for decoding was compiled before, once for this shape.
    assert compiles == []


ERRORS = [
    (dict(beam_size=0), "beam_size=0 must be from 1 to the 12 tokens of the vocabulary"),
    (dict(beam_size=13), "beam_size=13 must be from 1 to the 12"),
    (dict(n_best=0), "n_best=0 must be from 1 to beam_size=4"),
    (dict(n_best=5), "n_best=5 must be from 1 to beam_size=4"),
    (dict(length_penalty=-0.1), r"length_penalty=-0.1 must be 0 \(off\) or positive"),
    (dict(length_penalty=np.inf), "length_penalty=inf"),
    (dict(length_penalty=np.nan), "length_penalty=nan"),
    (dict(penalty="gmnt"), "penalty='gmnt' is not one of gnmt, length"),
    (dict(max_new_tokens=0), "max_new_tokens=0 must be from 1 to 15; the model's context of 16 already holds 1"),
    (dict(max_new_tokens=16), "max_new_tokens=16 must be from 1 to 15"),
    (dict(start_id=None), "an encoder-decoder without a tokenizer needs start_id=..., the token that starts a target"),
    (dict(start_id=12), "token id 12 is outside the vocabulary of 12"),
    (dict(end_ids=[12]), "token id 12 is outside the vocabulary of 12"),
    (dict(end_ids=[-1]), "token id -1 is outside"),
    (dict(sources=[[1] * 17]), "a text of 17 tokens is longer than the model's context of 16; shorten it"),
    (dict(sources=[[1, 12]]), "token id 12 is outside"),
    (dict(sources=[]), "the list of prompts or sources is empty"),
    (dict(sources=[[1], []]), "is empty"),
    (dict(sources=[1, 2]), "list of lists of token ids"),
    (dict(sources="text"), "strings need tokenizer"),
]


@pytest.mark.parametrize(("arguments", "words"), ERRORS, ids=[str(arguments)[:30] for arguments, _ in ERRORS])
def test_errors(arguments, words):
    with count_compiles() as compiles, pytest.raises(ValueError, match=words):
        search(make("paper"), **arguments)
    assert compiles == []


def test_errors_of_decoders():
    model = make("decoder-learned")
    for prompts, arguments, words in (
            ([[1] * 20], {}, "a prompt of 20 tokens leaves no room in the model's context of 20; shorten it"),
            ([[1] * 15, [2]], dict(max_new_tokens=6), "from 1 to 5; the model's context of 20 already holds 15"),
            ([[1]], dict(start_id=0), "start_id starts the targets of an encoder-decoder; leave it out for a decoder")):
        with pytest.raises(ValueError, match=words):
            search(model, prompts, **arguments)
