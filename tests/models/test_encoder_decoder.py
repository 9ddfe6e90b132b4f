"""The encoder-decoder against plain NumPy, against Hugging Face, with its cache, and by its
properties."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_families
from reference_families import random_model

import transformer_jax as tj
from tests.long_cases import mostly_long
from transformer_jax.config import ExperimentConfig, LossConfig
from transformer_jax.decoding.sample import prepared
from transformer_jax.models.inputs import positions_in_segments
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.ops import AttentionMask
from transformer_jax.ops.attention import attention_weights
from transformer_jax.settings import from_dict, to_dict
from transformer_jax.training.objectives import translation_loss

BASE = tj.ModelConfig(
    family="encoder_decoder", vocab_size=19, max_len=12, num_layers=2, num_heads=4, model_dim=16,
    positions="sinusoidal", norm_position="post", activation="relu", scale_embeddings=True, num_encoder_layers=3)
PRE = dict(norm_position="pre")
VARIANTS = {
    "paper": {},
    "pre-norm": PRE,
    "learned": dict(positions="learned", use_embedding_norm=True, scale_embeddings=False, activation="gelu"),
    "rope": dict(positions="rope", rope_base=100.0, num_kv_heads=2),
    "rope, pre-norm": dict(positions="rope", rope_base=100.0, norm="rmsnorm", use_bias=False, activation="swiglu",
                           mlp_dim=24, num_kv_heads=1, use_qk_norm=True, tie_embeddings=False, **PRE),
    "alibi": dict(positions="alibi"),
    "alibi, pre-norm": dict(positions="alibi", num_heads=3, head_dim=4, sliding_window=3, **PRE),
    "no positions": dict(positions="none", num_decoder_layers=1),
    "learned, pre-norm": dict(positions="learned", num_kv_heads=2, **PRE),
    "bart": dict(positions="learned", position_offset=2, use_embedding_norm=True, use_output_bias=True),
    "marian": dict(positions="sinusoidal_halves", activation="silu", use_output_bias=True),
    "m2m100": dict(positions="sinusoidal_fairseq", position_offset=2, **PRE),
    "t5": dict(positions="relative", relative_buckets=8, relative_max_distance=6, attention_scale=1.0, head_dim=3,
               norm="rmsnorm", use_bias=False, activation="geglu", scale_embeddings=False, scale_logits=True, **PRE),
}
PAIRS = ((9, 7), (4, 3))  # lengths of source and target
QUICK = {"xla_backend_optimization_level": 0}


@functools.cache
def make(variant="paper", **changes):
    return random_model(BASE.replace(**{**VARIANTS[variant], **changes}))


def tokens(length, seed=0):
    return np.random.default_rng([length, seed]).integers(0, BASE.vocab_size, length, np.int32)


@functools.cache
def expected(variant, source_length, target_length):
    """Logits and maps of one pair alone, in float64."""
    return reference_families.translate(make(variant), tokens(source_length), tokens(target_length))


def assert_close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def key_of(seed):
    return jax.random.key(seed, impl="unsafe_rbg")  # compiles in a fraction of the default's time


@functools.partial(jax.jit, static_argnames="intervene")
def run(model, source_BS, target_BT, options, intervene=None):
    return model(source_BS, target_BT, **options, intervene=intervene)


def parts(trace):
    return trace.encoder, trace.decoder, trace.cross


def place(lines):
    """Rows of 12 tokens, in which each ``(length, start, id)`` of a line is written."""
    ids, segments = np.ones((len(lines), 12), np.int32), np.zeros((len(lines), 12), np.int32)
    for line, texts in enumerate(lines):
        for length, start, segment in texts:
            ids[line, start : start + length] = tokens(length)
            segments[line, start : start + length] = segment
    return ids, segments


# A pair with padding on either side, and a shorter one with more of it; of the last, the id is 2.
SOURCES, SOURCE_SEGMENTS = place([[(9, 0, 1)], [(9, 3, 1)], [(4, 5, 1)], [(4, 0, 1)], [(4, 8, 2)]])
TARGETS, TARGET_SEGMENTS = place([[(7, 2, 1)], [(7, 0, 1)], [(3, 0, 1)], [(3, 9, 1)], [(3, 1, 2)]])
SINGLE = [(0, 2, PAIRS[0]), (1, 0, PAIRS[0]), (2, 0, PAIRS[1]), (3, 9, PAIRS[1]), (4, 1, PAIRS[1])]
MASKS = {"source_segment_ids_BS": jnp.asarray(SOURCE_SEGMENTS), "target_segment_ids_BT": jnp.asarray(TARGET_SEGMENTS)}


def packed(order=(0, 1)):
    """Two pairs in one row; the targets come in the given order."""
    rng = np.random.default_rng(7)
    sources = [rng.integers(0, 19, 5, np.int32), rng.integers(0, 19, 4, np.int32)]
    targets = [rng.integers(0, 19, 4, np.int32), rng.integers(0, 19, 6, np.int32)]
    source = np.concatenate([*sources, [0, 0, 0]])[None]
    target = np.concatenate([*(targets[i] for i in order), [0, 0]])[None]
    source_ids = np.repeat([1, 2, 0], [5, 4, 3])[None]
    target_ids = np.concatenate([*(np.full(len(targets[i]), i + 1) for i in order), [0, 0]])[None]
    ids = {"source_segment_ids_BS": source_ids, "target_segment_ids_BT": target_ids}
    return sources, targets, (source, target, ids)


def stack_parameters(layers, attentions, width, hidden):
    """Computes the number from the paper: projections of D x D with biases, two matrices of the
    feed-forward layer, and one norm for each sub-layer."""
    feed_forward = 2 * width * hidden + hidden + width
    return layers * (attentions * 4 * (width * width + width) + feed_forward + (attentions + 1) * 2 * width)


# Vaswani et al. (2017), table 3: parameters as printed there, in millions.
@pytest.mark.parametrize(("preset", "width", "printed"), [
    ("transformer-base", 512, 65), ("transformer-big", 1024, 213)])
def test_parameter_counts(preset, width, printed):
    config = tj.presets.get(preset)
    count = 37_000 * width + stack_parameters(6, 1, width, 4 * width) + stack_parameters(6, 2, width, 4 * width)
    assert tj.count_parameters(config) == count
    assert abs(count / 1e6 / printed - 1) < 0.03
    assert config.num_heads * 64 == width and config.dropout == {512: 0.1, 1024: 0.3}[width]


@pytest.mark.long
@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_pairs_equal_plain_numpy_of_each_alone(variant):
    out = run(make(variant), SOURCES, TARGETS, MASKS)
    assert out.logits.dtype == jnp.float32 and out.logits.shape == (5, 12, 19)
    assert np.isfinite(out.logits).all()
    for line, start, lengths in SINGLE:
        assert_close(out.logits[line, start : start + lengths[1]], expected(variant, *lengths)[0])


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("variant", ["paper", "rope, pre-norm", "alibi"])
def test_packed_pairs_equal_each_alone(variant, order):
    sources, targets, (source, target, options) = packed(order)
    logits = run(make(variant), source, target, options).logits[0]
    assert np.isfinite(logits).all()
    for i in range(2):
        here = options["target_segment_ids_BT"][0] == i + 1
        assert_close(logits[here], reference_families.translate(make(variant), sources[i], targets[i])[0])


@pytest.mark.long
def test_the_gradient_of_packed_pairs_is_that_of_each_alone():
    sources, targets, (source, target, ids) = packed((1, 0))
    names = ("source", "tokens", "source_segment_ids", "segment_ids")

    @functools.partial(jax.jit, compiler_options=QUICK)
    def gradient(model, batch):
        weights = (batch["segment_ids"] != 0).astype(jnp.float32)
        batch = {**batch, "weights": weights, "targets": (batch["tokens"] + 3) % 19}
        return jax.grad(lambda model: translation_loss()(model, batch)[0])(model)

    alone = [np.stack([np.pad(row, (0, 12 - len(row))) for row in rows]) for rows in (
        sources, targets, map(np.ones_like, sources), map(np.ones_like, targets))]
    one_row = gradient(make(), dict(zip(names, (source, target, *ids.values()), strict=True)))
    two_rows = gradient(make(), dict(zip(names, alone, strict=True)))
    for got, wanted in zip(jax.tree.leaves(one_row), jax.tree.leaves(two_rows), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * max(np.abs(wanted).max(), 1e-1))


def test_without_padding_no_ids_are_needed():
    wanted = expected("paper", 9, 7)[0]
    source, target = tokens(9)[None], tokens(7)[None]
    assert_close(run(make(), source, target, {}).logits[0], wanted)
    ones = {"source_segment_ids_BS": np.ones((1, 9), bool), "target_segment_ids_BT": np.ones((1, 7), bool)}
    assert_close(tj.forward(make(), source, target, **ones)[0], wanted)


def test_boolean_masks_are_the_same_as_ids():
    by_ids = run(make(), SOURCES, TARGETS, MASKS).logits
    options = {name: ids != 0 for name, ids in MASKS.items()}
    np.testing.assert_array_equal(np.asarray(run(make(), SOURCES[:4], TARGETS[:4], {
        name: ids[:4] for name, ids in options.items()}).logits)[TARGET_SEGMENTS[:4] != 0],
        np.asarray(by_ids[:4])[TARGET_SEGMENTS[:4] != 0])


def test_padding_of_the_source_is_never_read():
    noise = np.random.default_rng(1).integers(0, 19, SOURCES.shape, np.int32)
    other = np.where(SOURCE_SEGMENTS == 0, noise, SOURCES)
    assert (other != SOURCES).any()
    before, after = (run(make(), x, TARGETS, MASKS).logits for x in (SOURCES, other))
    np.testing.assert_array_equal(after, before)


def test_a_target_reads_its_own_source_only():
    _, _, (source, target, options) = packed()
    second = options["source_segment_ids_BS"] == 2
    other = np.where(second, (source + 1) % 19, source)
    before, after = (np.asarray(run(make(), x, target, options).logits[0]) for x in (source, other))
    here = options["target_segment_ids_BT"][0]
    np.testing.assert_array_equal(after[here == 1], before[here == 1])
    assert (np.abs(after - before)[here == 2].max(-1) > 1e-3).all()


def test_a_later_target_token_changes_nothing_before_it():
    source, target = tokens(9)[None], tokens(7)[None]
    changed = np.where(np.arange(7) == 4, (target + 1) % 19, target)
    before, after = (np.asarray(run(make(), source, x, {}).logits) for x in (target, changed))
    np.testing.assert_array_equal(after[:, :4], before[:, :4])
    assert (np.abs(after - before)[:, 4:].max(-1) > 1e-3).all()


def copied_to_hugging_face(model, theirs):
    """``theirs`` with the weights of ``model``; Marian, BART and Pegasus name their parts alike."""
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    for parameter in theirs.parameters():
        torch.nn.init.constant_(parameter, float("nan"))

    def write(to, values):
        with torch.no_grad():
            to.copy_(torch.tensor(np.asarray(values)))

    def copy_linear(to, ours, layer):
        write(to.weight, ours.kernel[...][layer].T)
        write(to.bias, ours.bias[...][layer])

    def copy_norm(to, ours, layer=...):
        write(to.weight, ours.scale[...][layer])
        write(to.bias, ours.bias[...][layer])

    def copy_attention(to, ours, layer):
        for theirs, part in ((to.q_proj, ours.query), (to.k_proj, ours.key), (to.v_proj, ours.value),
                             (to.out_proj, ours.output)):
            copy_linear(theirs, part, layer)

    config, embeddings = model.config, model.embeddings
    write(theirs.model.shared.weight, embeddings.token[...])
    for half, stack, own, final_norm in (
            (theirs.model.encoder, model.encoder, embeddings, model.encoder_norm),
            (theirs.model.decoder, model.decoder, model.target_embeddings, model.decoder_norm)):
        table = half.embed_positions.weight  # Marian and Pegasus have all sines before all cosines
        if config.positions == "sinusoidal":
            write(table, reference_families.sinusoids(np.arange(len(table)), config.model_dim))
        else:
            torch.nn.init.zeros_(table)
            write(table[2:], own.position[...])
        if own.norm is not None:
            copy_norm(half.layernorm_embedding, own.norm)
        if final_norm is not None:
            copy_norm(half.layer_norm, final_norm)
        for layer, block in enumerate(half.layers):
            copy_attention(block.self_attn, stack.blocks.attention, layer)
            copy_norm(block.self_attn_layer_norm, stack.blocks.attention_norm, layer)
            if stack is model.decoder:
                copy_attention(block.encoder_attn, stack.blocks.cross_attention, layer)
                copy_norm(block.encoder_attn_layer_norm, stack.blocks.cross_norm, layer)
            copy_linear(block.fc1, stack.blocks.mlp.up, layer)
            copy_linear(block.fc2, stack.blocks.mlp.down, layer)
            copy_norm(block.final_layer_norm, stack.blocks.mlp_norm, layer)
    return theirs.eval()


@pytest.mark.parametrize(("name", "variant"), [("Marian", "paper"), ("Bart", "learned"), ("Pegasus", "pre-norm")])
def test_logits_equal_hugging_face(name, variant):
    torch = pytest.importorskip("torch", reason="the extra `bench` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `bench` is not installed")
    model = make(variant)
    c = model.config
    config = getattr(transformers, f"{name}Config")(
        vocab_size=c.vocab_size, d_model=c.model_dim, encoder_layers=c.num_encoder_layers,
        decoder_layers=c.num_decoder_layers, encoder_attention_heads=c.num_heads, decoder_attention_heads=c.num_heads,
        encoder_ffn_dim=c.mlp_dim, decoder_ffn_dim=c.mlp_dim, activation_function=c.activation,
        max_position_embeddings=c.max_len, scale_embedding=c.scale_embeddings, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=2)
    kind = {"Marian": "MarianMTModel"}.get(name, f"{name}ForConditionalGeneration")
    theirs = copied_to_hugging_face(model, getattr(transformers, kind)(config))
    source, target = np.stack([tokens(9), tokens(9, seed=1)]), np.stack([tokens(7), tokens(7, seed=1)])
    source_mask = np.array([[1] * 9, [1] * 5 + [0] * 4])
    with torch.no_grad():
        wanted = theirs(**{key: torch.tensor(value.astype(np.int64)) for key, value in dict(
            input_ids=source, attention_mask=source_mask, decoder_input_ids=target).items()}).logits.numpy()
    assert_close(tj.forward(model, source, target, source_segment_ids_BS=source_mask), wanted)


@jax.jit
def start(model, source_BS, segment_ids_BS):
    return model.start(model.encode(source_BS, segment_ids_BS=segment_ids_BS), 8)


@jax.jit
def decode(model, target_BT, segment_ids_BT, cache):
    out = model.decode(target_BT, segment_ids_BT=segment_ids_BT, cache=cache)
    return out.logits, out.cache, out.trace


@pytest.mark.parametrize("variant", mostly_long(
    [name for name in VARIANTS if name != "learned, pre-norm"], "paper", "marian", "rope, pre-norm"))
def test_cached_decoding_equals_teacher_forcing(variant):
    check_cached_decoding(variant, make(variant), 4)


@pytest.mark.parametrize("variant", ["paper", "learned, pre-norm"])
def test_cached_decoding_by_a_model_prepared_for_it(variant):
    trace = check_cached_decoding(variant, prepared(make(variant)), 1)
    assert trace.encoder is None
    np.testing.assert_allclose(trace.cross.attention()[:, 0, :, 0], expected(variant, 9, 7)[1][2][:, :, 6], atol=3e-6)


def check_cached_decoding(variant, model, step):
    """A target of seven tokens and one of three with padding before them, so many tokens at
    once."""
    source, source_ids = np.stack([tokens(9), np.pad(tokens(4), (0, 5))]), np.array([[1] * 9, [1] * 4 + [0] * 5])
    target = np.stack([np.pad(tokens(7), (1, 0)), np.pad(tokens(3), (5, 0))])
    target_ids = np.array([[0] + [1] * 7, [0] * 5 + [1] * 3])
    cache = start(model, source, source_ids)
    assert len(cache.keys) == len(cache.memory_keys) == model.config.num_decoder_layers
    logits = []
    for first in range(0, 8, step):
        here = slice(first, first + step)
        part, cache, trace = decode(model, target[:, here], target_ids[:, here], cache)
        logits.append(part)
    logits = np.concatenate(logits, axis=1)
    assert_close(logits[0, 1:], expected(variant, 9, 7)[0])
    assert_close(logits[1, 5:], expected(variant, 4, 3)[0])
    return trace


def test_a_memory_serves_several_calls():
    model = make()
    memory = jax.jit(lambda model: model.encode(tokens(9)[None]))(model)
    assert memory.hidden.shape == (1, 9, 16)
    logits = jax.jit(lambda model, memory, target: model.decode(target, memory).logits)
    assert_close(logits(model, memory, tokens(7)[None])[0], expected("paper", 9, 7)[0])
    other = reference_families.translate(model, tokens(9), tokens(7, seed=3))[0]
    assert_close(logits(model, memory, tokens(7, seed=3)[None])[0], other)


@pytest.mark.parametrize("variant", ["paper", "rope, pre-norm", "alibi"])
def test_attention_of_the_trace(variant):
    model = make(variant)
    trace = run(model, SOURCES, TARGETS, MASKS).trace
    shapes = {"encoder": (3, 5, 4, 12, 12), "decoder": (2, 5, 4, 12, 12), "cross": (2, 5, 4, 12, 12)}
    read = {"encoder": SOURCE_SEGMENTS, "decoder": TARGET_SEGMENTS, "cross": TARGET_SEGMENTS}
    maps = {}
    for name, shape in shapes.items():
        part = getattr(trace, name)
        maps[name] = np.asarray(part.attention())
        assert maps[name].shape == shape
        sums = np.broadcast_to((read[name] != 0)[None, :, None], shape[:-1])
        np.testing.assert_allclose(maps[name].sum(-1), sums, atol=1e-6)
        for layer in range(shape[0]):
            direct = attention_weights(part.queries[layer], part.keys[layer], part.mask, bias=part.bias)
            np.testing.assert_allclose(maps[name][layer], direct, atol=1e-6)
    assert (maps["cross"][:, 4][..., SOURCE_SEGMENTS[4] == 0] == 0).all()
    for line, start, (source_length, target_length) in SINGLE:
        target = slice(start, start + target_length)
        first = int((SOURCE_SEGMENTS[line] != 0).argmax())
        source = slice(first, first + source_length)
        for name, wanted, rows, columns in zip(shapes, expected(variant, source_length, target_length)[1],
                                               (source, target, target), (source, target, source), strict=True):
            np.testing.assert_allclose(maps[name][:, line, :, rows, columns], wanted, atol=3e-6)


def test_one_map_of_cross_attention_can_be_asked_for():
    cross = run(make(), tokens(9)[None], tokens(7)[None], {}).trace.cross
    wanted = expected("paper", 9, 7)[1][2][-1, 2, 3]
    np.testing.assert_allclose(cross.attention(layers=-1, heads=2, queries=3)[0], wanted, atol=3e-6)
    with pytest.raises(ValueError, match="index 7 is out of range for 7 queries"):
        cross.attention(queries=7)


def test_the_streams_of_a_pre_norm_model_add_up():
    trace = run(make("pre-norm"), SOURCES, TARGETS, MASKS).trace
    layers, cross = trace.decoder.layers, trace.cross.layers
    assert layers.cross is None and cross.mlp_output is None
    assert trace.encoder.residual.shape == (4, 5, 12, 16) and trace.decoder.residual.shape == (3, 5, 12, 16)
    np.testing.assert_allclose(trace.decoder.residual[1:] - trace.decoder.residual[:-1],
                               layers.attention_output + cross.attention_output + layers.mlp_output, atol=3e-5)
    np.testing.assert_allclose(trace.cross.residual, layers.residual + layers.attention_output, atol=3e-5)
    np.testing.assert_allclose(layers.residual_middle, trace.cross.residual + cross.attention_output, atol=3e-5)


ATTENTION_SITES = ["queries", "keys", "values", "attention_bias", "head_output", "attention_output"]
DECODER_SITES = ["residual", *ATTENTION_SITES, *(f"cross_{site}" for site in ATTENTION_SITES),
                 "residual_middle", "mlp_input", "neurons", "mlp_output", "final"]
ENCODER_SITES = [f"encoder_{site}" for site in ("residual", *ATTENTION_SITES, "residual_middle", "mlp_input", "neurons",
                                              "mlp_output", "final")]


def test_interventions_see_every_site_and_the_identity_changes_nothing():
    values = []

    def identity(site, layer, value):
        values.append((site, value.shape))
        return value

    out = run(make("rope"), tokens(9)[None], tokens(7)[None], {}, identity)
    assert [site for site, _ in values] == ENCODER_SITES + DECODER_SITES
    shapes = dict(values)
    assert shapes["cross_attention_bias"] == (1, 4, 7, 9) and shapes["encoder_attention_bias"] == (1, 4, 9, 9)
    assert_close(out.logits[0], expected("rope", 9, 7)[0])
    for part, wanted in zip(parts(out.trace), expected("rope", 9, 7)[1], strict=True):
        np.testing.assert_allclose(part.attention()[:, 0], wanted, atol=3e-6)


def test_every_site_reaches_the_logits():
    sites = ENCODER_SITES + DECODER_SITES

    @jax.jit
    def logits(strengths):
        def move(site, layer, value):
            noise = np.random.default_rng(0).normal(size=value.shape).astype(np.float32)
            chosen = (layer == 1) | site.endswith("final")  # which is of the last layer
            return value + jnp.where(chosen, strengths[sites.index(site)], 0.0) * noise

        return make()(tokens(9)[None], tokens(7)[None], intervene=move).logits

    for site, strengths in zip(sites, np.eye(len(sites), dtype=np.float32), strict=True):
        assert np.abs(logits(strengths)[0] - expected("paper", 9, 7)[0]).max() > 1e-2, site


def test_a_silenced_cross_head_is_one_with_no_output_rows():
    def silence(site, layer, value):
        return jnp.where(layer == 1, value.at[:, :, 2].set(0.0), value) if site == "cross_head_output" else value

    edited = jax.tree.map(lambda leaf: leaf, make())
    kernel = edited.decoder.blocks.cross_attention.output.kernel
    kernel.set_value(kernel[...].at[1, 8:12].set(0.0))
    out = run(make(), tokens(9)[None], tokens(7)[None], {}, silence)
    assert_close(out.logits[0], reference_families.translate(edited, tokens(9), tokens(7))[0])


def test_knocked_out_cross_edges_carry_nothing():
    def knock_out(site, layer, value):
        return value.at[..., 5].set(-jnp.inf) if site == "cross_attention_bias" else value

    maps = np.asarray(run(make(), tokens(9)[None], tokens(7)[None], {}, knock_out).trace.cross.attention())
    assert (maps[..., 5] == 0).all()
    wanted = expected("paper", 9, 7)[1][2][0].copy()
    wanted[..., 5] = 0
    np.testing.assert_allclose(maps[0, 0], wanted / wanted.sum(-1, keepdims=True), atol=3e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_translation_loss_equals_plain_numpy(smoothing):
    rng = np.random.default_rng(2)
    targets, weights = rng.integers(0, 19, TARGETS.shape, np.int32), (TARGET_SEGMENTS != 0) * rng.random(TARGETS.shape)
    weights = weights.astype(np.float32)
    batch = dict(source=SOURCES, tokens=TARGETS, targets=targets, source_segment_ids=SOURCE_SEGMENTS,
                 segment_ids=TARGET_SEGMENTS, weights=weights)
    loss, weight = jax.jit(translation_loss(LossConfig(label_smoothing=smoothing)))(make(), batch)
    wanted = 0.0
    for line, start, lengths in SINGLE:
        here = line, slice(start, start + lengths[1])
        logits = expected("paper", *lengths)[0]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        target_log_p = log_p[np.arange(lengths[1]), targets[here]]
        wanted -= (weights[here] * ((1 - smoothing) * target_log_p + smoothing * log_p.mean(-1))).sum()
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_allclose(weight, weights.sum(), rtol=1e-6)
    without = {name: x for name, x in batch.items() if name != "weights"}
    assert jax.eval_shape(translation_loss(), make(), without)[1].dtype == jnp.float32


def test_the_loss_without_ids_or_weights_is_that_of_every_token():
    source, target, targets = tokens(9)[None], tokens(7)[None], tokens(7, seed=5)[None]
    loss, weight = jax.jit(translation_loss())(make(), dict(source=source, tokens=target, targets=targets))
    logits = expected("paper", 9, 7)[0]
    wanted = np.log(np.exp(logits).sum(-1)) - logits[np.arange(7), targets[0]]
    np.testing.assert_allclose(loss, wanted.sum(), rtol=1e-5)
    assert weight == 7


def without_trace(model, source_BS, target_BT):
    """The forward pass of the paper's model with nothing returned but the logits of its blocks."""
    def scan(stack, x, context):
        def layer(x, block_and_index):
            block, index = block_and_index
            return block(x, context, index)[0], None

        return jax.lax.scan(layer, x, (stack.blocks, jnp.arange(stack.num_layers)))[0]

    def embed(tokens_BT, segments_BT):
        return model.embeddings(tokens_BT, positions_in_segments(tokens_BT, segments_BT))

    source_ids = jnp.ones_like(source_BS)
    context = AttentionContext(mask=AttentionMask.segments(source_ids))
    memory = scan(model.encoder, embed(source_BS, source_ids), context)
    context = AttentionContext(mask=AttentionMask.causal(), memory_BSD=memory,
                               memory_mask=AttentionMask.segments(jnp.ones_like(target_BT), source_ids))
    return model.embeddings.unembed(scan(model.decoder, embed(target_BT, None), context))


def program(forward, gradient):
    """What a compiled program consists of: the instructions with their shapes, counted, and its
    memory."""
    def loss(model, source_BS, target_BT):
        return tj.ops.cross_entropy(forward(model, source_BS, target_BT), target_BT).mean()

    compiled = jax.jit(jax.grad(loss) if gradient else forward).lower(
        make(), tokens(9)[None], tokens(7)[None]).compile(QUICK)
    instructions = re.findall(r"= (\(.*?\)|\S+) ([a-z\-]+)\(", re.sub(r"\{[\d,]*\}", "", compiled.as_text()))
    return collections.Counter(instructions), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.long
@pytest.mark.parametrize("gradient", [False, True])
def test_the_compiled_program_holds_nothing_of_an_unread_trace(gradient):
    plain = program(lambda model, source, target: model(source, target).logits, gradient)
    assert plain == program(without_trace, gradient)
    if not gradient:
        def reads(model, source, target):
            out = model(source, target)
            return out.logits + out.trace.cross.queries.mean()

        instructions, memory = program(reads, gradient)
        assert instructions != plain[0] and memory > plain[1]


@functools.cache
def dropped(**changes):
    return run(make(**changes), tokens(9)[None], tokens(7)[None], {"key": key_of(1)})


def test_dropout_is_decided_by_the_key():
    model = make(dropout=0.5)
    plain, again, other = (run(model, tokens(9)[None], tokens(7)[None], options).logits
                           for options in ({}, {"key": key_of(1)}, {"key": key_of(2)}))
    first = dropped(dropout=0.5).logits
    assert_close(plain[0], expected("paper", 9, 7)[0])
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other, atol=1e-2) and not np.allclose(first, plain, atol=1e-2)
    np.testing.assert_array_equal(dropped().logits, plain)  # with rate 0 the key has no effect


@pytest.mark.long
def test_dropout_of_attention_weights_has_a_rate_of_its_own():
    """Compares the first layers, whose inputs are the same in both passes: the head outputs and the
    streams that enter."""
    def mixed(part):  # what the heads return when no weight is dropped
        return np.einsum("bnts,bsnh->btnh", part.attention(layers=0), part.values[0])

    plain, first = dropped().trace, dropped(dropout=0.0, attention_dropout=0.5).trace
    for whole, part in zip((plain.encoder, plain.decoder), (first.encoder, first.decoder), strict=True):
        np.testing.assert_array_equal(part.residual[0], whole.residual[0])
    for part in parts(first):
        assert np.abs(part.layers.head_output[0] - mixed(part)).max() > 1e-2

    first = dropped(dropout=0.5, attention_dropout=0.0).trace
    kept = np.asarray(first.decoder.residual[0] / plain.decoder.residual[0]).round(4)
    assert set(np.unique(kept)) == {0.0, 2.0}
    for part in parts(first):
        np.testing.assert_allclose(part.layers.head_output[0], mixed(part), atol=1e-5)

    for part in parts(dropped(dropout=0.5).trace):  # by default the rate is the same
        assert np.abs(part.layers.head_output[0] - mixed(part)).max() > 1e-2


def test_every_sub_layer_has_its_own_dropout():
    """Sub-layers that add 1, 10 and 100 leave digits of 2 and 0 in the stream, on average 1."""
    model = make("pre-norm", dropout=0.5, num_heads=1, num_encoder_layers=2)

    def ones(site, layer, value):
        added = {"attention_output": 1.0, "cross_attention_output": 10.0, "mlp_output": 100.0}
        site = site.removeprefix("encoder_")
        return jnp.full_like(value, added[site]) if site in added else value

    source, target = np.tile(tokens(9), (4, 1)), np.tile(tokens(7), (4, 1))
    trace = run(model, source, target, {"key": key_of(0)}, ones).trace
    masks = []
    for residual, powers in ((trace.encoder.residual, (0, 2)), (trace.decoder.residual, (0, 1, 2))):
        added = np.asarray(residual[1:] - residual[:-1]).round(2)
        for power in powers:
            digit = np.floor(added / 10**power + 0.01) % 10
            assert set(np.unique(digit)) == {0.0, 2.0}
            assert abs(digit.mean() - 1) < 5 / np.sqrt(digit.size)
            masks += list(digit.reshape(2, -1)[:, : 4 * 7 * 16])
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(((one - 1) * (other - 1)).mean()) < 5 / np.sqrt(one.size)


def test_dropout_of_attention_weights_shifts_no_mean():
    """With values of one, a head returns the sum of its dropped weights: one on average."""
    model = jax.tree.map(lambda leaf: leaf, make("paper", attention_dropout=0.5, dropout=0.0))
    blocks = model.decoder.blocks
    for attention in (model.encoder.blocks.attention, blocks.attention, blocks.cross_attention):
        attention.value.kernel.set_value(jnp.zeros_like(attention.value.kernel[...]))
        attention.value.bias.set_value(jnp.ones_like(attention.value.bias[...]))
    source, target = np.random.default_rng(0).integers(0, 19, (2, 32, 12), np.int32)
    for part in parts(run(model, source, target, {"key": key_of(0)}).trace):
        sums = np.asarray(part.layers.head_output)[..., 0]
        assert sums.std() > 0.1
        assert abs(sums.mean() - 1) < 5 * sums.std() / np.sqrt(sums.size)


def test_initial_weights():
    """Embeddings of deviation 1 / sqrt(D), and Glorot's sqrt(2 / (in + out)) for every matrix."""
    config = tj.presets.get("transformer-base").replace(vocab_size=999, num_layers=2, num_heads=4, model_dim=64)
    model = jax.jit(lambda key: tj.EncoderDecoder(config, key=key))(key_of(0))
    for parameter, std in (
            (model.embeddings.token, 1 / 8), (model.encoder.blocks.attention.query.kernel, 1 / 8),
            (model.decoder.blocks.cross_attention.output.kernel, 1 / 8),
            (model.decoder.blocks.mlp.down.kernel, np.sqrt(2 / (64 + 256)))):
        values = np.asarray(parameter[...])
        assert abs(values.std() / std - 1) < 5 / np.sqrt(2 * values.size)
    blocks = model.decoder.blocks
    kernels = [np.asarray(linear.kernel[...]) for attention in (blocks.attention, blocks.cross_attention)
               for linear in (attention.query, attention.output)]
    for i, one in enumerate(kernels):
        assert not np.allclose(one[0], one[1]) and all(not np.allclose(one, other) for other in kernels[:i])


def test_decode_needs_a_memory_or_a_cache():
    model = make()
    memory = jax.eval_shape(lambda: model.encode(tokens(9)[None]))
    cache = jax.eval_shape(lambda: start(model, tokens(9)[None], np.ones((1, 9), np.int32)))
    for given in ({}, {"memory": memory, "cache": cache}):
        with pytest.raises(ValueError, match=r"either a memory \(from encode\) or a cache \(from start\); .* given"):
            model.decode(tokens(7)[None], **given)


ERRORS = [
    (lambda: make()(jnp.zeros((1, 13), int), jnp.zeros((1, 2), int)), "13 tokens are longer than the 12"),
    (lambda: make()(jnp.zeros((1, 2), int), jnp.zeros((1, 13), int)), "13 tokens are longer than the 12"),
    (lambda: make()(jnp.zeros((1, 2)), jnp.zeros((1, 2), int)), r"but they are float32 \(1, 2\)"),
    (lambda: make()(jnp.zeros((1, 2), int), jnp.zeros(2, int)), r"but they are int32 \(2,\)"),
    (lambda: make().decode(jnp.zeros((1, 2), int), make().encode(jnp.zeros((1, 2), int)),
                           visible_BTS=jnp.ones((1, 2, 2), bool)), "visible_BTS was given without a cache"),
    (lambda: tj.forward(make(), [[19]], [[0]]), "token id 19 is outside"),
    (lambda: tj.forward(make(), [[0]], [[-1]]), "token id -1 is outside"),
    (lambda: tj.EncoderDecoder(BASE.replace(vocab_size=None), key=jax.random.key(0)), "vocab_size is not set"),
    (lambda: tj.EncoderDecoder(tj.ModelConfig(vocab_size=9), key=jax.random.key(0)), "needs family='encoder_decoder'"),
    (lambda: tj.ModelConfig(num_encoder_layers=2), "num_encoder_layers belongs to family='encoder_decoder'"),
    (lambda: BASE.replace(num_decoder_layers=0), "num_decoder_layers=0 must be a positive integer"),
    (lambda: BASE.replace(attention_dropout=1.0), r"attention_dropout=1.0 must be in \[0, 1\)"),
    (lambda: BASE.replace(family="encoder-decoder"), "family='encoder-decoder' is not one of .*did you mean 'encoder_"),
]


@pytest.mark.parametrize(("call", "words"), ERRORS, ids=[words[:30] for _, words in ERRORS])
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_layers_of_the_halves_follow_the_number_of_layers():
    config = BASE.replace(num_encoder_layers=None)
    assert (config.num_encoder_layers, config.num_decoder_layers) == (2, 2)
    deeper = config.replace(num_layers=5)
    assert (deeper.num_encoder_layers, deeper.num_decoder_layers) == (5, 5)
    assert BASE.replace(num_layers=5).num_encoder_layers == 3  # given explicitly, not derived
    assert from_dict(tj.ModelConfig, to_dict(BASE)) == BASE


def test_configs_from_before_the_families_still_load():
    config = ExperimentConfig(model=tj.ModelConfig(vocab_size=9, num_layers=3, positions="rope"))
    old = to_dict(config)
    for name in ("family", "num_encoder_layers", "num_decoder_layers", "num_token_types", "use_embedding_norm",
                 "scale_embeddings", "attention_dropout"):
        del old["model"][name]
    for name in ("generated", "source", "target", "mask_probability", "mask_whole_words"):
        del old["data"][name]
    del old["data"]["tokenizer"]["min_frequency"]
    assert from_dict(ExperimentConfig, old) == config
    assert len(old["model"]) == len(dataclasses.fields(tj.ModelConfig)) - 7
