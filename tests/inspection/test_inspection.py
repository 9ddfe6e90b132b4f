"""One text, every family: maps against float64, against generation step by step, and document by
document."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.inspection import parts
from transformer_jax.models.functional import make_model

TEXT = "the cat sat on the mat"
L, N = 3, 4
BASE = tj.ModelConfig(max_len=48, num_layers=L, num_heads=N, model_dim=16, init_std=0.4)
FAMILIES = {
    "decoder": dict(positions="rope", num_kv_heads=2),
    "alibi": dict(positions="alibi", sliding_window=5, norm_position="post"),
    "encoder": dict(family="encoder", positions="learned"),
    "encoder_decoder": dict(family="encoder_decoder", num_encoder_layers=2, positions="sinusoidal"),
}


@functools.cache
def tokenizer():
    return tj.Tokenizer.train([TEXT, "o gato comeu a maçã"], kind="char")


@functools.cache
def make(family):
    config = BASE.replace(**FAMILIES[family], vocab_size=tokenizer().vocab_size + 3)  # rows without a token too
    return make_model(config, key=jax.random.key(1))


@functools.cache
def inspect(family, text=TEXT, target=None):
    return tj.inspect_text(make(family), text, tokenizer(), target=target)


def float64_maps(trace, causal, window=None, slopes=None):
    q, k = (np.asarray(x, np.float64)[:, 0] for x in (trace.queries, trace.keys))
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.einsum("ltnh,lsnh->lnts", q, k) / np.sqrt(q.shape[-1])
    apart = np.arange(q.shape[1])[:, None] - np.arange(k.shape[1])
    if slopes is not None:
        scores -= np.asarray(slopes, np.float64)[:, None, None] * np.abs(apart)
    allowed = (apart >= 0 if causal else True) & (np.abs(apart) < (window or 1000))
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * allowed
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("family", ["decoder", "alibi", "encoder"])
def test_maps_equal_an_explicit_softmax(family):
    inspected = inspect(family)
    pieces = tokenizer().pieces(tokenizer().encode(TEXT))
    assert inspected.tokens == (["<s>", *pieces, "</s>"] if family == "encoder" else pieces)
    assert inspected.kinds == ("self",) and inspected.source_tokens == []
    assert inspected.labels() == (inspected.tokens, inspected.tokens)
    T = len(inspected.tokens)
    maps = inspected.attention()
    assert maps.shape == (L, N, T, T) and maps.dtype == jnp.float32
    alibi = dict(window=5, slopes=[2.0 ** (-8 * (n + 1) / N) for n in range(N)]) if family == "alibi" else {}
    np.testing.assert_allclose(maps, float64_maps(inspected.trace, family != "encoder", **alibi), atol=1e-6)
    np.testing.assert_array_equal(inspected.trace.residual[0], tj.trace(make(family), inspected.ids[None]).residual[0])


def test_the_three_kinds_of_an_encoder_decoder():
    inspected = inspect("encoder_decoder", "the cat", "o gato")
    assert inspected.tokens == ["<s>", *"o gato"] and inspected.source_tokens == [*"the cat", "</s>"]
    wanted = {"self": (inspected.trace.decoder, (L, N, 7, 7), (inspected.tokens, inspected.tokens)),
              "encoder": (inspected.trace.encoder, (2, N, 8, 8), (inspected.source_tokens, inspected.source_tokens)),
              "cross": (inspected.trace.cross, (L, N, 7, 8), ([*"o gato", "(next)"], inspected.source_tokens))}
    assert inspected.kinds == tuple(wanted)
    for kind, (trace, shape, labels) in wanted.items():
        maps = inspected.attention(kind)
        assert maps.shape == shape and inspected.labels(kind) == labels
        np.testing.assert_allclose(maps, float64_maps(trace, kind == "self"), atol=1e-6)
        assert set(inspected.summaries(kind)) >= {"entropy", "sink"} and ("distance" in inspected.summaries(kind)) != (
            kind == "cross")
    np.testing.assert_allclose(inspected.attention("cross", layers=-1, heads=[2, 0], queries=[-1]),
                               inspected.attention("cross")[-1, [2, 0], -1:], atol=1e-6)


def test_attention_returns_only_the_requested_layers_heads_and_queries():
    inspected = inspect("decoder")
    maps = np.asarray(inspected.attention())
    for wanted, rows in ((dict(layers=1), maps[1]), (dict(heads=-1), maps[:, -1]), (dict(queries=3), maps[:, :, 3]),
                         (dict(layers=[2, 0], heads=1, queries=range(4)), maps[[2, 0], 1, :4]),
                         (dict(layers=0, heads=0, queries=-1), maps[0, 0, -1])):
        np.testing.assert_allclose(inspected.attention(**wanted), rows, atol=1e-6)


@pytest.mark.long
def test_a_generated_text_has_the_maps_of_its_teacher_forced_pass():
    model, prompt = make("decoder"), tokenizer().encode("the cat")
    generated = tj.generate(model, [prompt], max_new_tokens=6, sampling=tj.Sampling(temperature=0), end_ids=[])
    inspected = inspect("decoder", "the cat", tuple(generated.tokens[0]))
    assert inspected.ids.tolist() == [*prompt, *generated.tokens[0]]
    # Computes the same as generation: one token at a time, with a cache.
    @jax.jit
    def step(token, cache):
        out = model(token, cache=cache)
        return out.trace.attention()[:, 0, :, 0], out.cache

    cache = tj.KVCache.empty(model.config, 1, 16)
    for t, token in enumerate(inspected.ids):
        row, cache = step(np.array([[token]]), cache)
        np.testing.assert_allclose(row[..., :t + 1], inspected.attention(queries=t)[..., :t + 1], atol=2e-6)
        assert (row[..., t + 1:] == 0).all()


@pytest.mark.long
def test_the_target_is_the_models_own_translation_by_default():
    model = make("encoder_decoder")
    inspected = tj.inspect_text(model, "the cat", tokenizer())
    result = tj.generate(model, ["the cat"], tokenizer=tokenizer(), sampling=tj.Sampling(temperature=0),
                         max_new_tokens=model.config.max_len - 1)
    ends = (tokenizer().eos_id, tokenizer().end_of_text_id)
    assert inspected.ids.tolist() == [tokenizer().bos_id, *(t for t in result.tokens[0] if t not in ends)]
    # What is predicted at each place is the next token: it is a teacher-forced pass over the
    # translation.
    assert inspected.logit_lens(top_k=1).ids[-1, :-1, 0].tolist() == inspected.ids[1:].tolist()
    ids = [*tokenizer().encode("the cat"), tokenizer().eos_id]
    without = tj.inspect_text(model, ids, target=result.tokens[0], start_id=tokenizer().bos_id)
    np.testing.assert_array_equal(without.ids[:len(inspected.ids)], inspected.ids)
    assert without.tokens[0] == str(tokenizer().bos_id)


def assert_same(one, other):
    assert one.tokens == other.tokens and one.source_tokens == other.source_tokens
    for kind in one.kinds:
        np.testing.assert_allclose(one.attention(kind), other.attention(kind), atol=2e-6)
        part, wanted = parts.trace_of(one.trace, kind), parts.trace_of(other.trace, kind)
        np.testing.assert_allclose(part.residual, wanted.residual, atol=2e-5)
    np.testing.assert_allclose(one.logit_lens(-1, top_k=3).probabilities, other.logit_lens(-1, top_k=3).probabilities,
                               atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("family", ["alibi", "encoder"])
def test_the_documents_of_a_packed_row(family):
    first, second = inspect(family).ids[:9], inspect(family).ids[4:]
    row, segments = np.concatenate([first, second, [0, 0]]), np.repeat([1, 2, 0], [len(first), len(second), 2])
    packed = tj.inspect_text(make(family), row, tokenizer(), segment_ids=segments)
    assert (packed.attention()[:, :, :9, 9:] == 0).all()
    documents = packed.documents()
    assert len(documents) == 2
    for document, ids in zip(documents, (first, second), strict=True):
        assert_same(document, tj.inspect_text(make(family), ids, tokenizer()))


@pytest.mark.long
def test_the_pairs_of_a_packed_row():
    model, sizes = make("encoder_decoder"), ((5, 4), (3, 6))
    rng = np.random.default_rng(0)
    (source, target), (other_source, other_target) = ([rng.integers(6, 20, n) for n in size] for size in sizes)
    packed = tj.inspect_text(model, np.concatenate([source, other_source]), tokenizer(),
                             target=np.concatenate([other_target, target, [0]]), segment_ids=np.repeat([1, 2], [5, 3]),
                             target_segment_ids=np.repeat([2, 1, 0], [6, 4, 1]))
    named = tokenizer().pieces([*other_target[1:], *target[1:]])
    assert packed.labels("cross")[0] == [*named[:5], "(next)", *named[5:], "(next)", "(next)"]
    for document, (one, two) in zip(packed.documents(), ((other_source, other_target), (source, target)), strict=True):
        alone = tj.inspect_text(model, one, tokenizer(), target=two[1:], start_id=int(two[0]))
        assert_same(document, alone)


def test_masks_are_tokens_of_an_encoder_only():
    inspected = tj.inspect_text(make("encoder"), "the <mask> sat", tokenizer())
    assert inspected.tokens == ["<s>", *"the", "<mask>", *" sat", "</s>"]
    assert "<mask>" not in inspect("decoder", "<mask>").tokens


@pytest.mark.long
@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder_decoder"])
def test_methods_have_no_batch_axis(family):
    inspected = inspect(family, TEXT, "o gato" if family == "encoder_decoder" else None)
    T, V = len(inspected.tokens), make(family).config.vocab_size
    inputs = (inspected.ids,) if inspected.source_ids is None else (inspected.source_ids, inspected.ids)
    logits = tj.forward(make(family), *(ids[None] for ids in inputs))[0]
    lens = inspected.logit_lens(top_k=V)
    assert lens.ids.shape == (L + 1, T, V)
    np.testing.assert_array_equal(lens.ids[-1, :, 0], logits.argmax(-1))
    np.testing.assert_array_equal(inspected.logit_lens(2, top_k=2).ids, lens.ids[:, 2, :2])
    assert len(inspected.strings(lens.ids[-1, 2])) == V and str(V - 1) in inspected.strings(lens.ids[-1, 2])
    parts_of = inspected.attribution(-2)
    assert parts_of.heads.shape == (L, N) and parts_of.mlp.shape == (L,)
    np.testing.assert_allclose(parts_of.total, logits[-2].max(), atol=1e-4)
    np.testing.assert_allclose(inspected.attribution(1, target=7).total, logits[1, 7], atol=1e-4)
    norms = tj.inspection.value_norms(inspected.model, inspected.trace)[1, 0, 3]
    np.testing.assert_allclose(inspected.value_weighted(layers=1, heads=[3])[0],
                               inspected.attention(layers=1, heads=3) * norms, atol=1e-6)
    np.testing.assert_allclose(inspected.rollout(), tj.inspection.rollout(inspected.attention().mean(1)), atol=1e-6)
    assert all(values.shape == (L, N) for values in inspected.summaries().values())


def test_a_bundle_brings_its_tokenizer(tmp_path):
    model = make("decoder")
    tj.save(tmp_path, tj.Bundle(model=model, tokenizer=tokenizer(), config=model.config))
    inspected = tj.inspect_text(tj.load(tmp_path), TEXT)
    assert inspected.tokens == inspect("decoder").tokens
    np.testing.assert_allclose(inspected.attention(), inspect("decoder").attention(), atol=1e-7)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: tj.inspect_text(make("decoder"), TEXT), "strings need tokenizer="),
    (lambda: tj.inspect_text(make("decoder"), [1, 400]), "400 is outside the vocabulary"),
    (lambda: tj.inspect_text(make("decoder"), []), "a prompt of token ids is empty"),
    (lambda: tj.inspect_text(make("decoder"), [1] * 49), "49 tokens are longer than the 48"),
    (lambda: tj.inspect_text(make("encoder"), TEXT, tokenizer(), target="x"), "an encoder reads one text"),
    (lambda: tj.inspect_text(make("decoder"), [1, 2], segment_ids=[1]), r"shape \(1,\); expected \(2,\)"),
    (lambda: tj.inspect_text(make("decoder"), [1, 2], segment_ids=[1, 1], target=[3]), "a packed row has no separate"),
    (lambda: tj.inspect_text(make("encoder_decoder"), [1, 2], target=[3]), "needs start_id="),
    (lambda: tj.inspect_text(make("encoder_decoder"), [1, 2], segment_ids=[1, 1]), "need target=.* and target_"),
    (lambda: tj.inspect_text(make("decoder"), [1], start_id=2), "are only for an encoder-decoder"),
    (lambda: inspect("decoder").attention("cross"), "kind='cross' is not one of self, the attention of a Decoder"),
    (lambda: inspect("decoder").attention(layers=3), "index 3 is out of range for 3 layers"),
    (lambda: inspect("decoder").logit_lens(99), "index 99 is out of range for 22 positions"),
    (lambda: inspect("decoder").documents(), "this inspection has no segment ids"),
    (lambda: tj.inspect_text(make("decoder"), [1, 2, 3], segment_ids=[1, 2, 1]).documents(),
     "document 1 are not contiguous"),
    (lambda: inspect("encoder_decoder", "the cat", "o gato").rollout("cross"),
     "rollout needs kind='self' or 'encoder'"),
])
def test_wrong_arguments_raise_errors_that_say_what_to_pass(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_row_of_every_head_of_a_long_context():
    # 16,384 tokens, 8 layers, 8 heads: the trace and one row of each map, compiled and not run.
    length = 16_384
    config = tj.ModelConfig(vocab_size=64, max_len=length, num_layers=8, num_heads=8, model_dim=64, positions="rope",
                            mlp_dim=64)
    model = jax.eval_shape(lambda key: tj.Decoder(config, key=key), jax.random.key(0))

    def rows(model, tokens_BT):
        trace = model(tokens_BT).trace
        return trace, trace.attention(queries=[-1])

    compiled = jax.jit(rows).lower(model, jax.ShapeDtypeStruct((1, length), jnp.int32)).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes < 1.5e9
    assert not re.search(rf"\[[\d,]*{length},{length}\]", compiled.as_text())
