"""Interventions compared with edited weights, edited tokens and NumPy; and the number of compiled
programs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_biases import with_random_biases

import transformer_jax as tj
from tests.compiles import count_compiles
from transformer_jax.inspection.causal import head_ablation_table, mean_token_loss, patching_grid, path_effect
from transformer_jax.inspection.interventions import ablate_head, knock_out_edge, patch, steer, together
from transformer_jax.models.functional import make_model

L, N, T, D, V = 3, 2, 7, 8, 11
BASE = tj.ModelConfig(vocab_size=V, max_len=T, num_layers=L, num_heads=N, model_dim=D, init_std=0.5, positions="rope",
                      tie_embeddings=False)
RNG = np.random.default_rng(0)
CLEAN = RNG.integers(0, V, (1, T), np.int32)
CORRUPTED = np.where(np.arange(T) == 2, (CLEAN + 1) % V, CLEAN)


@functools.cache
def make(**changes):
    """A model whose biases and norms are random too."""
    return with_random_biases(make_model(BASE.replace(**changes), key=jax.random.key(1)))


def last_logit(logits_BTV):
    return logits_BTV[0, -1, 3]


def norm(x, module, layer=None):
    scale, bias = (np.asarray(p[...], np.float64) if layer is None else np.asarray(p[layer], np.float64)
                   for p in (module.scale, module.bias))
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def output_rows(model, layer, head):
    H = model.config.head_dim
    return np.asarray(model.stack.blocks.attention.output.kernel[layer], np.float64)[head * H : (head + 1) * H]


@functools.partial(jax.jit, static_argnames="first")
def continue_from(model, stream_1TD, first):
    """The logits when this stream enters layer ``first``, computed by a model of the later layers
    that gets the stream as embeddings."""
    tail = jax.tree.map(lambda leaf: leaf, model)
    tail.config = model.config.replace(num_layers=L - first, vocab_size=max(T, V))
    tail.stack.blocks = jax.tree.map(lambda leaf: leaf[first:], model.stack.blocks)
    tail.stack.num_layers = L - first
    tail.embeddings.config = tail.config
    tail.embeddings.token = model.embeddings.token.replace(stream_1TD[0].astype(jnp.float32))
    return tail(jnp.arange(T)[None]).logits


@pytest.mark.long
def test_one_program_for_every_layer_head_and_position():
    model, trace = make(), tj.trace(make(), CLEAN)
    edits = {
        "zero": lambda layer, head: ablate_head(layer, head),
        "patch": lambda layer, t: patch("residual", layer, np.ones((1, T, D), np.float32), positions=t),
        "edge": lambda layer, head: knock_out_edge(layer, head, query=layer + 3, key=head),
        "steer": lambda layer, t: steer(layer, np.arange(D, dtype=np.float32), scale=0.5 * t, positions=[-1]),
    }
    for edit in edits.values():
        first = tj.forward(model, CLEAN, intervene=edit(0, 0))
        with count_compiles() as compiles:
            results = [tj.forward(model, CLEAN, intervene=edit(layer, index)) for layer in range(L) for index in (0, 1)]
        assert compiles == []
        assert any(np.abs(result - first).max() > 1e-3 for result in results)
    with count_compiles() as compiles:
        tj.forward(model, CLEAN, intervene=together(ablate_head(1, 0), steer(1, np.arange(D, dtype=np.float32))))
    assert len(compiles) == 1  # the counter works
    with count_compiles() as compiles:
        tables = [head_ablation_table(model, tokens, last_logit, how="resample", reference=trace)
                  for tokens in (CLEAN, CORRUPTED)]
    assert len(compiles) == 1 and tables[0].shape == (L, N)
    with count_compiles() as compiles:
        for sender, receiver in (((0, 0), (1, 1)), ((0, 1), (2, 0)), ((1, 0), (2, 1))):
            path_effect(model, CLEAN, CORRUPTED, last_logit, sender=sender, receiver=receiver)
    assert len(compiles) == 1
    with count_compiles() as compiles:
        for pair in ((CLEAN, CORRUPTED), (CORRUPTED, CLEAN)):
            patching_grid(model, *pair, last_logit, at="mlp_output")
    assert len(compiles) == 1


@pytest.mark.parametrize("changes", [{}, dict(positions="alibi")], ids=str)
def test_the_identity_is_the_plain_program(changes):
    config = BASE.replace(max_len=300, **changes)
    shapes = jax.eval_shape(lambda key: tj.Decoder(config, key=key), jax.random.key(0))

    def program(intervene):
        def logits(model, tokens):
            return model(tokens, intervene=intervene).logits

        text = jax.jit(logits).lower(shapes, jax.ShapeDtypeStruct((2, 300), jnp.int32)).compile().as_text()
        return re.sub(r", metadata=\{[^}]*\}", "", text[text.index("\n%"):])  # without names of files and functions

    plain = program(None)
    assert program(lambda site, layer, value: value) == plain
    assert program(ablate_head(0, 1)) != plain  # the intervention has an effect


def test_zero_mean_and_resample():
    model = make()
    other = tj.trace(model, (CLEAN + 5) % V)
    outputs = np.asarray(other.layers.head_output)
    tables = {}
    for how, reference in (("zero", None), ("mean", other), ("resample", other)):
        table = head_ablation_table(model, CLEAN, last_logit, how=how, reference=reference)
        for layer, head in np.ndindex(L, N):
            new = {"zero": np.zeros(outputs.shape[2:]), "mean": outputs[layer].mean((0, 1)),
                   "resample": outputs[layer]}[how]
            # By hand: the stream that leaves this layer's attention, its feed-forward layer, and
            # the layers after it.
            trace = tj.trace(model, CLEAN)
            delta = (np.broadcast_to(new, outputs.shape[1:])
                     - np.asarray(trace.layers.head_output[layer]))[:, :, head] @ output_rows(model, layer, head)
            logits = after_attention(model, trace, layer, delta)
            np.testing.assert_allclose(table[layer, head], last_logit(logits) - last_logit(tj.forward(model, CLEAN)),
                                       atol=2e-5)
        tables[how] = table
    assert all(np.abs(tables["zero"] - tables[how]).max() > 1e-3 for how in ("mean", "resample"))


def after_attention(model, trace, layer, delta_1TD):
    """Logits when attention of one layer adds something more."""
    stream = np.asarray(trace.residual[layer] + trace.layers.attention_output[layer]) + delta_1TD
    mlp = model.stack.blocks.mlp
    up = norm(stream, model.stack.blocks.mlp_norm, layer) @ np.asarray(mlp.up.kernel[layer]) + mlp.up.bias[layer]
    stream = stream + jax.nn.gelu(up) @ np.asarray(mlp.down.kernel[layer]) + mlp.down.bias[layer]
    if layer + 1 < L:
        return continue_from(model, stream, layer + 1)
    return norm(np.asarray(stream, np.float64), model.final_norm) @ np.asarray(model.embeddings.output[...]).T


def test_the_mean_is_over_valid_tokens():
    trace = tj.trace(make(), np.concatenate([CLEAN, CORRUPTED]))
    valid = np.arange(T) < np.array([[4], [2]])
    edit = ablate_head(1, 1, "mean", reference=trace, valid_BT=valid)
    wanted = np.asarray(trace.layers.head_output[1])[valid].mean(0)
    np.testing.assert_allclose(edit.arguments["new"], wanted, atol=1e-6)


def test_knocked_out_edges():
    edit = knock_out_edge([0, 2], None, [-1, 4], [1, 3])
    maps = np.asarray(tj.trace(make(), CLEAN, intervene=edit).attention())
    plain = np.asarray(tj.trace(make(), CLEAN).attention())
    cut = np.zeros((T, T), bool)
    cut[np.ix_([6, 4], [1, 3])] = True
    assert (maps[[0, 2]][..., cut] == 0).all() and (maps[1][..., cut] > 0).all()
    wanted = plain[0] * ~cut
    np.testing.assert_allclose(maps[0], wanted / wanted.sum(-1, keepdims=True), atol=1e-6)


def test_steering_adds_the_vector_times_its_strength():
    direction = RNG.normal(size=D).astype(np.float32)
    plain, steered = (tj.trace(make(), CLEAN, intervene=edit) for edit in (
        None, steer(1, direction, 3.0, positions=[-1, 0])))
    moved = np.asarray(steered.residual[1] - plain.residual[1])
    wanted = np.where(np.isin(np.arange(T), [0, T - 1])[:, None], 3 * direction, 0)
    np.testing.assert_allclose(moved[0], wanted, atol=1e-5)
    np.testing.assert_allclose(steered.residual[0], plain.residual[0], atol=1e-6)
    both = tj.trace(make(), CLEAN, intervene=together(
        steer(1, direction), lambda site, layer, value: value, steer(1, direction, 2.0)))
    np.testing.assert_allclose(both.residual[1] - plain.residual[1], np.broadcast_to(3 * direction, (1, T, D)),
                               atol=1e-5)


def test_patching_grid():
    model = make()
    grid = patching_grid(model, CLEAN, CORRUPTED, last_logit)
    assert grid.shape == (L, T)
    corrupted = last_logit(tj.forward(model, CORRUPTED))
    # Before the first layer, patching the stream restores a token.
    np.testing.assert_allclose(grid[0, 2], last_logit(tj.forward(model, CLEAN)) - corrupted, atol=2e-5)
    assert np.abs(grid[0, 2]) > 1e-3
    np.testing.assert_allclose(np.delete(grid[0], 2), 0, atol=2e-5)  # the tokens that were not changed
    clean, other = tj.trace(model, CLEAN), tj.trace(model, CORRUPTED)
    for layer, t in ((1, 2), (2, 4), (2, T - 1)):
        stream = np.where((np.arange(T) == t)[:, None], clean.residual[layer], other.residual[layer])
        np.testing.assert_allclose(grid[layer, t], last_logit(continue_from(model, stream, layer)) - corrupted,
                                   atol=2e-5)
    attention = patching_grid(model, CLEAN, CORRUPTED, last_logit, at="attention_output")
    delta = np.asarray(clean.layers.attention_output[1] - other.layers.attention_output[1]) * (
        np.arange(T) == 4)[:, None]
    np.testing.assert_allclose(attention[1, 4], last_logit(after_attention(model, other, 1, delta)) - corrupted,
                               atol=2e-5)


def test_the_path_between_two_heads():
    model = make()
    clean, other = tj.trace(model, CLEAN), tj.trace(model, CORRUPTED)
    sent = (np.asarray(other.layers.head_output[0] - clean.layers.head_output[0])[:, :, 1]
            @ output_rows(model, 0, 1))
    metric = float(last_logit(tj.forward(model, CLEAN)))
    # The effect on the logits: the message is added to the last stream.
    final = np.asarray(clean.final, np.float64) + sent
    logits = norm(final, model.final_norm) @ np.asarray(model.embeddings.output[...], np.float64).T
    effect = path_effect(model, CLEAN, CORRUPTED, last_logit, sender=(0, 1))
    np.testing.assert_allclose(effect, last_logit(logits) - metric, atol=2e-5)
    # The effect on a head of the next layer: this head reads the stream with the message added.
    entering = jnp.asarray(np.asarray(clean.residual[1]) + sent, jnp.float32)
    told = tj.trace(model, CLEAN, intervene=lambda site, layer, value: jnp.where(
        layer == 1, entering, value) if site == "residual" else value)
    delta = (np.asarray(told.layers.head_output[1] - clean.layers.head_output[1])[:, :, 0] @ output_rows(model, 1, 0))
    effect = path_effect(model, CLEAN, CORRUPTED, last_logit, sender=(0, 1), receiver=(1, 0))
    np.testing.assert_allclose(effect, last_logit(after_attention(model, clean, 1, delta)) - metric, atol=2e-5)
    assert abs(effect) > 1e-4


@pytest.mark.long
def test_every_kind_of_an_encoder_decoder():
    model = make(family="encoder_decoder", num_encoder_layers=2, positions="sinusoidal", norm_position="post")
    source = RNG.integers(0, V, (1, 5), np.int32)
    pair, changed = (source, CLEAN), ((source + 1) % V, CORRUPTED)
    plain = tj.forward(model, *pair)
    for kind, stack in (("self", model.decoder), ("encoder", model.encoder), ("cross", model.decoder)):
        table = head_ablation_table(model, pair, kind=kind)
        assert table.shape == (stack.num_layers, N)
        # One head whose rows of the output projection are zero.
        edited = jax.tree.map(lambda leaf: leaf, model)
        blocks = (edited.encoder if kind == "encoder" else edited.decoder).blocks
        kernel = (blocks.cross_attention if kind == "cross" else blocks.attention).output.kernel
        kernel.set_value(kernel[...].at[1, D // N :].set(0.0))
        wanted = mean_token_loss(tj.forward(edited, *pair), CLEAN) - mean_token_loss(plain, CLEAN)
        np.testing.assert_allclose(table[1, 1], wanted, atol=1e-5)
        effect = path_effect(model, pair, changed, last_logit, sender=(0, 1), receiver=(1, 0), kind=kind)
        assert np.isfinite(effect) and effect != 0
    grid = patching_grid(model, pair, changed, last_logit, kind="encoder")
    assert grid.shape == (2, 5)
    swapped = np.where(np.arange(5) == 3, source, changed[0])
    np.testing.assert_allclose(grid[0, 3], last_logit(tj.forward(model, swapped, CORRUPTED))
                               - last_logit(tj.forward(model, *changed)), atol=2e-5)


@pytest.mark.parametrize(("call", "words"), [
    (lambda: ablate_head(0, 0, "half"), "how='half' is not one of 'zero', 'mean', 'resample'"),
    (lambda: ablate_head(0, 0, "mean"), "how='mean' needs reference"),
    (lambda: ablate_head(0, 0, reference=tj.trace(make(), CLEAN)), "how='zero' takes no reference"),
    (lambda: ablate_head(-1, 0), "layer=-1; expected layers counted from 0"),
    (lambda: patch("cross_residual", 0, 0.0), "site='cross_residual' is not one of residual, queries"),
    (lambda: steer(0, 1.0, site="mlp"), "site='mlp' is not one of"),
    (lambda: patch("residual", 0, 0.0, heads=1), "heads=1: the site 'residual' has no heads; .*head_output"),
    (lambda: make()(CLEAN, intervene=ablate_head(0, 2)), "index 2 is out of range for 2 heads"),
    (lambda: make()(CLEAN, intervene=knock_out_edge(0, 0, 7, 0)), "index 7 is out of range for 7 queries"),
    (lambda: tj.forward(make(), CLEAN, intervene=ablate_head(3, 0)), "index 3 is out of range for 3 layers"),
    (lambda: tj.forward(make(), CLEAN, intervene=lambda site, layer, value: None),
     "an intervention returns None at the site 'residual' in place of a value of shape"),
    (lambda: tj.forward(make(), CLEAN, intervene=lambda site, layer, value: value[:, :1]),
     "an intervention returns an array of shape .1, 1, 8. at the site 'residual' in place of a value of shape .1, 7"),
    (lambda: tj.forward(make(), CLEAN, intervene=ablate_head(0, 2)), "index 2 is out of range for 2 heads"),
    (lambda: tj.trace(make(), CLEAN, intervene=steer(0, 1.0, positions=7)), "index 7 is out of range for 7 positions"),
    (lambda: tj.forward(make(), CLEAN, intervene=together(ablate_head(0, 1), knock_out_edge(0, 0, 0, -8))),
     "index -8 is out of range for 7 keys"),
    (lambda: tj.forward(make(), CLEAN, intervene=ablate_head(0, 0, kind="cross")), "kind='cross' is not one of self"),
    (lambda: patching_grid(make(), CLEAN, CORRUPTED[:, :3], last_logit), r"differ in shape: \[\(1, 7\)\] and"),
    (lambda: patching_grid(make(), CLEAN, CORRUPTED, last_logit, at="logits"), "at='logits' is not one of"),
    (lambda: patching_grid(make(), CLEAN, CORRUPTED, last_logit, kind="cross"), "kind='cross' is not one of self"),
    (lambda: path_effect(make(), CLEAN, CORRUPTED, last_logit, sender=(1, 0), receiver=(1, 1)),
     "receiver's layer 1 is not after the sender's layer 1"),
    (lambda: path_effect(make(), CLEAN, CORRUPTED, last_logit, sender=(3, 0)), "index 3 is out of range for 3 layers"),
    (lambda: head_ablation_table(make(family="encoder"), CLEAN), "an encoder does not predict the next token"),
    (lambda: head_ablation_table(make(), CLEAN + V), "outside the vocabulary of 11"),
])
def test_wrong_arguments_raise_errors_that_say_what_to_pass(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_packed_rows_have_no_next_token_across_documents():
    segments = np.array([[1, 1, 1, 2, 2, 0, 0]])
    logits = tj.forward(make(), CLEAN, segment_ids_BT=segments)
    log_probabilities = np.asarray(jax.nn.log_softmax(logits))[0]
    wanted = -np.mean([log_probabilities[t, CLEAN[0, t + 1]] for t in (0, 1, 3)])
    np.testing.assert_allclose(mean_token_loss(logits, CLEAN, segments), wanted, rtol=1e-5)
    table = head_ablation_table(make(), CLEAN, segment_ids_BT=segments)
    logits = tj.forward(make(), CLEAN, segment_ids_BT=segments, intervene=ablate_head(2, 0))
    np.testing.assert_allclose(table[2, 0], mean_token_loss(logits, CLEAN, segments) - wanted, atol=1e-5)
