"""The encoder against plain NumPy, against Hugging Face's BERT and RoBERTa, and by its
properties."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_families
from flax import nnx
from reference_families import random_model

import transformer_jax as tj
from transformer_jax.config import LayerKind, LossConfig
from transformer_jax.models import functional
from transformer_jax.nn import stack
from transformer_jax.ops.attention import attention_weights
from transformer_jax.training.objectives import masked_logits, masked_token_loss

BASE = tj.ModelConfig(family="encoder", vocab_size=19, max_len=12, num_layers=2, num_heads=4, model_dim=16,
                      num_token_types=2, norm_position="post", activation="gelu", use_embedding_norm=True)
VARIANTS = {
    "bert": {},
    "albert": dict(embedding_dim=6, shared_layers=True, num_layers=3),
    "pre-norm": dict(norm_position="pre", use_embedding_norm=False),
    "rope": dict(positions="rope", rope_base=100.0, num_kv_heads=2, num_token_types=0),
    "no biases": dict(use_bias=False, norm="rmsnorm", activation="swiglu", mlp_dim=24, positions="rope"),
    "alibi": dict(positions="alibi", num_heads=3, head_dim=4),
    "sinusoidal": dict(positions="sinusoidal", scale_embeddings=True, activation="relu", use_qk_norm=True),
    "relative": dict(positions="relative", relative_buckets=8, relative_max_distance=6, activation="silu"),
    "modernbert": dict(
        norm_position="pre", use_first_norm=False, use_bias=False, activation="geglu_erf", positions="rope",
        rope_base=500.0, num_token_types=0, num_layers=4,
        layer_pattern=(LayerKind(), LayerKind(3, rope_base=20.0), LayerKind(2, rope_base=20.0))),
    "sliding window": dict(sliding_window=3, tie_embeddings=False, norm_position="pre"),
}
LENGTHS = (9, 4)
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def make(variant="bert", **changes):
    return random_model(BASE.replace(**{**VARIANTS[variant], **changes}))


def row(length):
    rng = np.random.default_rng(length)
    return rng.integers(2, BASE.vocab_size, length, np.int32), rng.integers(0, 2, length, np.int32)


def types_of(model, types):
    return {"token_types_BT": jnp.asarray(types)} if model.config.num_token_types else {}


@functools.cache
def expected(variant, length):
    """Hidden states, logits and maps of one row alone, in float64."""
    tokens, types = row(length)
    return reference_families.encode(make(variant), tokens, types)


def assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


@functools.partial(jax.jit, static_argnames="intervene")
def run(model, tokens_BT, options, intervene=None):
    return model(tokens_BT, **options, intervene=intervene)


# The whole of RoBERTa trained on one book; the others as Hugging Face counts them: BertForMaskedLM
# of bert-base-uncased and bert-large-uncased, and RobertaForMaskedLM of roberta-base less the two
# rows of its position table that no token ever reads.
@pytest.mark.parametrize(("preset", "count"), [
    ("roberta-book", 83_502_880), ("bert-base", 109_514_298), ("bert-large", 335_174_458),
    ("roberta-base", 124_697_433 - 2 * 768)])
def test_parameter_counts(preset, count):
    assert tj.count_parameters(tj.presets.get(preset)) == count


@pytest.mark.parametrize("variant", VARIANTS)
def test_single_padded_and_packed_rows_equal_numpy(variant):
    """Four rows of 12 places: one text and padding on either side, a shorter one likewise, and two
    in one row."""
    model = make(variant)
    tokens, types = np.ones((4, 12), np.int32), np.ones((4, 12), np.int32)
    segments = np.zeros((4, 12), np.int32)
    places = [(0, 0, 9), (1, 3, 9), (2, 5, 4), (3, 0, 4), (3, 5, 4)]
    for number, (line, start, length) in enumerate(places):
        here = line, slice(start, start + length)
        tokens[here], types[here] = row(length)
        segments[here] = number + 1
    out = run(model, jnp.asarray(tokens), {"segment_ids_BT": jnp.asarray(segments), **types_of(model, types)})
    assert out.logits.dtype == jnp.float32 and out.logits.shape == (4, 12, 19)
    assert np.isfinite(out.logits).all() and np.isfinite(out.hidden).all()
    for line, start, length in places:
        hidden, logits, _ = expected(variant, length)
        assert_close(out.hidden[line, start : start + length], hidden)
        assert_close(out.logits[line, start : start + length], logits)
    assert out.cache is None


@pytest.mark.parametrize("variant", ["bert", "pre-norm"])
def test_without_padding_no_mask_is_needed(variant):
    tokens, types = row(9)
    assert_close(tj.forward(make(variant), tokens[None], token_types_BT=types[None])[0], expected(variant, 9)[1])


def test_a_mask_is_the_same_as_segment_ids():
    tokens, types = (np.stack([x, x]) for x in row(9))
    mask = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1]])
    segments = np.array([[1, 1, 2, 2, 2, 1, 1, 3, 3]] * 2)
    forward = functools.partial(tj.forward, make(), tokens, token_types_BT=types)
    by_mask = forward(mask_BT=mask)
    np.testing.assert_array_equal(by_mask, forward(mask_BT=mask.astype(bool)))
    np.testing.assert_array_equal(by_mask, forward(segment_ids_BT=mask))
    both = forward(mask_BT=mask.astype(bool), segment_ids_BT=segments)
    np.testing.assert_array_equal(both, forward(segment_ids_BT=segments * mask))
    assert np.abs(both - by_mask).max() > 1e-2


def test_attention_goes_both_ways():
    tokens, _ = row(9)
    changed = np.where(np.arange(9) == 5, (tokens + 1) % 19, tokens)
    before, after = (tj.forward(make(), x[None])[0] for x in (tokens, changed))
    assert (np.abs(after - before).max(-1) > 1e-3).all()


def test_positions_may_be_given():
    tokens, types = row(9)
    positions = np.array([4, 0, 1, 7, 2, 2, 11, 3, 5])
    logits = tj.forward(make(), tokens[None], token_types_BT=types[None], positions_BT=positions[None])
    assert_close(logits[0], reference_families.encode(make(), tokens, types, positions)[1])


def test_token_types_are_zero_by_default():
    tokens, types = row(9)
    without = tj.forward(make(), tokens[None])
    np.testing.assert_array_equal(without, tj.forward(make(), tokens[None], token_types_BT=np.zeros((1, 9), np.int32)))
    assert np.abs(without - tj.forward(make(), tokens[None], token_types_BT=types[None])).max() > 1e-2


def copied_to_hugging_face(model, theirs, body, transform, transform_norm, output_bias, first_position):
    """``theirs`` with the weights of ``model``, each of which is written, in evaluation mode."""
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    for parameter in theirs.parameters():
        torch.nn.init.constant_(parameter, float("nan"))

    def copy(to, parameter, layer=None, transposed=False):
        values = np.asarray(parameter[...] if layer is None else parameter[...][layer])
        with torch.no_grad():
            to.copy_(torch.tensor(values.T if transposed else values))

    def copy_linear(to, ours, layer=None):
        copy(to.weight, ours.kernel, layer, transposed=True)
        copy(to.bias, ours.bias, layer)

    def copy_norm(to, ours, layer=None):
        copy(to.weight, ours.scale, layer)
        copy(to.bias, ours.bias, layer)

    tables, embeddings, blocks = body.embeddings, model.embeddings, model.stack.blocks
    torch.nn.init.zeros_(tables.position_embeddings.weight)
    copy(tables.word_embeddings.weight, embeddings.token)
    copy(tables.position_embeddings.weight[first_position:], embeddings.position)
    copy(tables.token_type_embeddings.weight, embeddings.token_type)
    copy_norm(tables.LayerNorm, embeddings.norm)
    for layer, block in enumerate(body.encoder.layer):
        for name in ("query", "key", "value"):
            copy_linear(getattr(block.attention.self, name), getattr(blocks.attention, name), layer)
        copy_linear(block.attention.output.dense, blocks.attention.output, layer)
        copy_norm(block.attention.output.LayerNorm, blocks.attention_norm, layer)
        copy_linear(block.intermediate.dense, blocks.mlp.up, layer)
        copy_linear(block.output.dense, blocks.mlp.down, layer)
        copy_norm(block.output.LayerNorm, blocks.mlp_norm, layer)
    copy_linear(transform, model.head.transform)
    copy_norm(transform_norm, model.head.norm)
    copy(output_bias, model.head.bias)
    return theirs.eval()


@pytest.mark.parametrize("name", ["BERT", "RoBERTa"])
def test_logits_equal_hugging_face(name):
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    model, lengths = make(), [9, 6, 2]
    config = model.config
    shape = dict(vocab_size=config.vocab_size, hidden_size=config.model_dim, num_hidden_layers=config.num_layers,
                 num_attention_heads=config.num_heads, intermediate_size=config.mlp_dim, hidden_act="gelu",
                 type_vocab_size=config.num_token_types, layer_norm_eps=config.norm_epsilon, pad_token_id=1)
    if name == "BERT":
        theirs = transformers.BertForMaskedLM(transformers.BertConfig(max_position_embeddings=config.max_len, **shape))
        head = theirs.cls.predictions
        copied_to_hugging_face(model, theirs, theirs.bert, head.transform.dense, head.transform.LayerNorm, head.bias, 0)
        starts = [0, 0, 0]  # its positions count padding too, so that it may come last only
    else:
        theirs = transformers.RobertaForMaskedLM(
            transformers.RobertaConfig(max_position_embeddings=config.max_len + 2, **shape))
        head = theirs.lm_head
        copied_to_hugging_face(model, theirs, theirs.roberta, head.dense, head.layer_norm, head.bias, 2)
        starts = [0, 3, 5]
    tokens, types, mask = np.ones((3, 9), np.int32), np.zeros((3, 9), np.int32), np.zeros((3, 9), np.int32)
    for line, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        here = line, slice(start, start + length)
        (tokens[here], types[here]), mask[here] = row(length), 1
    with torch.no_grad():
        wanted = theirs(**{key: torch.tensor(value.astype(np.int64)) for key, value in dict(
            input_ids=tokens, token_type_ids=types, attention_mask=mask).items()}).logits.numpy()
    got = np.asarray(tj.forward(model, tokens, mask_BT=mask, token_types_BT=types))
    assert_close(got[mask == 1], wanted[mask == 1])


def batch_with_masks():
    rng = np.random.default_rng(3)
    return {
        "tokens": jnp.asarray(rng.integers(0, 19, (3, 12))),
        "segment_ids": jnp.asarray([[1] * 12, [1] * 7 + [0] * 5, [1] * 5 + [2] * 6 + [0]]),
        "masked_positions": jnp.asarray([[0, 3, 11, 7], [6, 2, 0, 0], [4, 5, 10, 0]]),
        "masked_targets": jnp.asarray(rng.integers(0, 19, (3, 4))),
        "masked_weights": jnp.asarray([[1.0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]),
    }


def loss_in_float64(model, batch, smoothing):
    """Sums the losses of the masked tokens, computed from the NumPy logits of each text."""
    losses = []
    for line, start, stop in ((0, 0, 12), (1, 0, 7), (2, 0, 5), (2, 5, 11)):
        logits = reference_families.encode(model, batch["tokens"][line, start:stop])[1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += [-(1 - smoothing) * log_p[position - start, target] - smoothing * log_p[position - start].mean()
                   for position, target, weight in zip(
                       *(np.asarray(batch[f"masked_{name}"][line]) for name in ("positions", "targets", "weights")),
                       strict=True) if weight and start <= position < stop]
    assert len(losses) == 9
    return np.sum(losses)


@pytest.mark.long
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_token_loss_and_its_gradient_equal_those_of_all_logits(smoothing):
    model, batch = make(), batch_with_masks()
    at = jnp.arange(3)[:, None], batch["masked_positions"]
    smooth = (1 - smoothing) * jax.nn.one_hot(batch["masked_targets"], 19) + smoothing / 19

    def full(model):
        logits = model(batch["tokens"], segment_ids_BT=batch["segment_ids"]).logits
        losses = -(smooth * jax.nn.log_softmax(logits)[at]).sum(-1)
        return (losses * batch["masked_weights"]).sum(), batch["masked_weights"].sum()

    loss_fn = masked_token_loss(LossConfig(label_smoothing=smoothing))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def both(model):
        return [jax.value_and_grad(function, has_aux=True)(model)
                for function in (full, lambda model: loss_fn(model, batch))]

    ((wanted, weight), wanted_gradient), ((got, got_weight), got_gradient) = both(model)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert got_weight == weight == 9
    in_float64 = loss_in_float64(model, batch, smoothing)
    np.testing.assert_allclose(got, in_float64, rtol=1e-5)
    # The bias of the keys adds the same number to all scores of a query, which does not change the
    # softmax, so the loss does not depend on it. Its gradient is a sum of terms that cancel to
    # rounding errors, which differ from one matrix product kernel of XLA to another. The terms are
    # those of the gradient of the keys' kernel, and errors are measured by their size.
    shifted = nnx.clone(model)
    bias = shifted.stack.blocks.attention.key.bias
    bias[...] = bias[...] + jnp.linspace(-1.0, 1.0, bias[...].size).reshape(bias[...].shape)
    assert abs(loss_in_float64(shifted, batch, smoothing) - in_float64) < 1e-12 * in_float64
    keys = wanted_gradient.stack.blocks.attention.key
    for a, b in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(wanted_gradient), strict=True):
        is_zero = b is keys.bias[...]
        wanted, scale = (0.0, np.abs(keys.kernel[...]).max()) if is_zero else (b, np.abs(b).max())
        np.testing.assert_allclose(a, wanted, rtol=1e-5, atol=1e-5 * max(scale, 1e-2))


def test_masked_token_loss_never_computes_the_other_logits():
    model = make(vocab_size=37)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch_with_masks().items()}

    def sizes_with_vocabulary(function):
        text = jax.jit(function).lower(model, batch).compile(QUICK).as_text()
        return {int(np.prod([int(n) for n in shape.split(",")])) // 37
                for shape in re.findall(r"f32\[([\d,]*\b37\b[\d,]*)\]", text)}

    tables = {1, 16}  # the bias, and the embeddings of width 16
    assert sizes_with_vocabulary(lambda model, batch: masked_logits(model, batch)) <= tables | {3 * 4}
    assert 3 * 12 in sizes_with_vocabulary(lambda model, batch: model(batch["tokens"]).logits)


@pytest.mark.parametrize("variant", ["bert", "rope", "alibi"])
def test_attention_of_the_trace(variant):
    model = make(variant)
    (tokens, types), (short, short_types) = row(9), row(4)
    tokens, types = np.stack([tokens, np.pad(short, (2, 3))]), np.stack([types, np.pad(short_types, (2, 3))])
    segments = np.array([[1] * 9, [0] * 2 + [1] * 4 + [0] * 3])
    trace = tj.trace(model, tokens, segment_ids_BT=segments, **types_of(model, types))
    maps = np.asarray(trace.attention())
    assert maps.shape == (2, 2, model.config.num_heads, 9, 9)
    sums = np.broadcast_to((segments != 0)[None, :, None], maps.shape[:-1])
    np.testing.assert_allclose(maps.sum(-1), sums, atol=1e-6)
    np.testing.assert_allclose(maps[:, 0], expected(variant, 9)[2], atol=3e-6)
    np.testing.assert_allclose(maps[:, 1, :, 2:6, 2:6], expected(variant, 4)[2], atol=3e-6)
    for layer in range(2):
        direct = attention_weights(trace.queries[layer], trace.keys[layer], trace.mask, bias=trace.bias)
        np.testing.assert_allclose(maps[layer], direct, atol=1e-6)
    assert trace.residual.shape == (3, 2, 9, 16)


def test_the_residual_stream_is_normed_after_each_addition():
    trace = tj.trace(make(), row(9)[0][None])
    layers, blocks = trace.layers, make().stack.blocks
    assert trace.layers.cross is None
    for layer in range(2):
        x = np.asarray(layers.residual[layer], np.float64)
        for norm, added in ((blocks.attention_norm, layers.attention_output), (blocks.mlp_norm, layers.mlp_output)):
            x = x + np.asarray(added[layer], np.float64)
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * np.asarray(norm.scale[...][layer]) + np.asarray(norm.bias[...][layer])
        assert_close(trace.residual[layer + 1], x)


@pytest.mark.long
@pytest.mark.parametrize(("variant", "is_packed"), [
    ("bert", False), ("relative", False), *((name, True) for name in ("bert", "rope", "alibi", "relative",
                                                                      "sliding window"))])
def test_a_large_batch_goes_through_the_layers_in_parts(variant, is_packed, monkeypatch):
    """Outputs, every field of the trace, its maps, and gradients equal those of all rows computed
    together."""
    model = make(variant)
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, BASE.vocab_size, (6, 8), np.int32)
    options = {"segment_ids_BT": jnp.asarray(np.sort(rng.integers(0, 4, (6, 8))))} if is_packed else {}
    if model.config.num_token_types:
        options["token_types_BT"] = jnp.asarray(rng.integers(0, 2, (6, 8)))

    def everything(model):
        gradient = jax.grad(lambda model: jnp.sin(model(tokens, **options).hidden).sum())(model)
        return model(tokens, **options), gradient

    together = jax.jit(everything)(model)
    monkeypatch.setattr(stack, "_CACHED_TOKENS", 16)
    assert stack.rows_at_a_time(6, 8) == 2
    in_parts = jax.jit(lambda model: everything(model))(model)
    assert jax.tree.structure(in_parts) == jax.tree.structure(together)
    for got, wanted in zip(jax.tree.leaves(in_parts), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(in_parts[0].trace.attention(), together[0].trace.attention(), atol=1e-6)


def test_parts_of_a_large_batch():
    assert stack.rows_at_a_time(64, 128) == 16
    assert stack.rows_at_a_time(16, 128) is None, "it fits as it is"
    assert stack.rows_at_a_time(61, 128) is None, "single rows are too small"
    assert stack.rows_at_a_time(4, 4096) is None, "a row is more than a part"


def test_a_large_batch_keeps_only_the_outputs_that_are_read(monkeypatch):
    model, tokens = make("bert"), np.ones((64, 12), np.int32)
    monkeypatch.setattr(stack, "_CACHED_TOKENS", 96)

    def temporaries(read):
        return jax.jit(lambda model: read(model(tokens))).lower(model).compile().memory_analysis().temp_size_in_bytes

    hidden = temporaries(lambda output: output.hidden)
    queries = 2 * 64 * 12 * 16 * 4  # bytes, of two layers
    assert hidden < temporaries(lambda output: (output.hidden, output.trace.queries.sum())) - 0.9 * queries


SITES = ["residual", "queries", "keys", "values", "attention_bias", "head_output", "attention_output",
         "residual_middle", "mlp_input", "neurons", "mlp_output", "final"]


def test_interventions_see_every_site_and_the_identity_changes_nothing():
    sites = []

    def identity(site, layer, value):
        sites.append(site)
        return value

    tokens, types = row(9)
    out = run(make(), tokens[None], {"token_types_BT": types[None]}, identity)
    assert sites == SITES
    assert_close(out.logits[0], expected("bert", 9)[1])
    np.testing.assert_allclose(out.trace.attention()[:, 0], expected("bert", 9)[2], atol=3e-6)


@pytest.mark.parametrize("chosen", SITES)
def test_an_intervention_reaches_what_comes_after_it(chosen):
    def change(site, layer, value):
        if site != chosen:
            return value
        noise = np.random.default_rng(0).normal(size=value.shape).astype(np.float32)
        return value + jnp.where(layer == 1, 1.0, 0.0) * noise

    tokens, types = row(9)
    plain, out = (run(make(), tokens[None], {"token_types_BT": types[None]}, f) for f in (None, change))
    np.testing.assert_allclose(out.trace.queries[0], plain.trace.queries[0], atol=1e-5)
    assert np.abs(out.logits - plain.logits).max() > 1e-2


def test_a_silenced_head_is_one_with_no_output_rows():
    def silence(site, layer, value):
        return jnp.where(layer == 1, value.at[:, :, 2].set(0.0), value) if site == "head_output" else value

    edited = jax.tree.map(lambda leaf: leaf, make())
    kernel = edited.stack.blocks.attention.output.kernel
    kernel.set_value(kernel[...].at[1, 8:12].set(0.0))
    tokens, types = row(9)
    out = run(make(), tokens[None], {"token_types_BT": types[None]}, silence)
    assert_close(out.logits[0], reference_families.encode(edited, tokens, types)[1])


def test_dropout_is_decided_by_the_key():
    model, tokens = make(dropout=0.3), row(9)[0][None]
    plain, first, again, other = (run(model, tokens, options).logits for options in (
        {}, *({"key": jax.random.key(seed, impl="unsafe_rbg")} for seed in (1, 1, 2))))
    np.testing.assert_array_equal(plain, run(make(), tokens, {}).logits)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-2) and not np.allclose(first, plain, atol=1e-2)


def test_bfloat16_is_near():
    tokens, types = row(9)
    model = make(dtype="bfloat16")
    out = run(model, tokens[None], {"token_types_BT": types[None]})
    assert out.logits.dtype == jnp.float32 and out.hidden.dtype == jnp.bfloat16
    wanted = expected("bert", 9)[1]
    assert 1e-6 < np.abs(out.logits[0] - wanted).max() / np.abs(wanted).max() < 0.05


def test_logits_compile_once_for_equal_shapes():
    before = functional._logits._cache_size()
    for seed in (0, 1):
        tj.forward(random_model(BASE.replace(mlp_dim=20), seed), row(9)[0][None])
    assert functional._logits._cache_size() == before + 1


ERRORS = [
    (lambda: make("rope")(jnp.zeros((1, 3), int), token_types_BT=jnp.zeros((1, 3), int)),
     "token_types_BT was given, but config.num_token_types is 0"),
    (lambda: make()(jnp.zeros((1, 13), int)), "13 tokens are longer than the 12 that config.max_len has room for"),
    (lambda: make()(jnp.zeros((1, 3))), r"tokens must be integers \[B, T\], but they are float32 \(1, 3\)"),
    (lambda: make()(jnp.zeros(3, int)), r"but they are int32 \(3,\)"),
    (lambda: tj.forward(make(), jnp.asarray([[19]])), "token id 19 is outside the vocabulary of 19"),
    (lambda: tj.Encoder(BASE.replace(family="decoder"), key=jax.random.key(0)),
     "the config has family='decoder', but this model needs family='encoder'"),
    (lambda: tj.Decoder(BASE, key=jax.random.key(0)), "family='encoder', but this model needs family='decoder'"),
    (lambda: tj.Encoder(BASE.replace(vocab_size=None), key=jax.random.key(0)), "vocab_size is not set"),
]


@pytest.mark.parametrize(("call", "words"), ERRORS, ids=[words[:30] for _, words in ERRORS])
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
