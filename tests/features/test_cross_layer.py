"""Cross-layer transcoders: the formulas in float64, planted features that write to several layers,
exact resume, shardings, and their place in a language model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import CrossLayerTranscoderConfig, EvalConfig, MeshConfig, OptimConfig
from transformer_jax.features.objective import after_update, objective
from transformer_jax.sharding import make_mesh
from transformer_jax.training.loop import to_devices
from transformer_jax.training.optimizer import make_optimizer

OPTIM = OptimConfig(peak_lr=3e-3, weight_decay=0.0, warmup_steps=20, schedule="linear")
NAMES = [f"layers.{layer}.mlp_{end}" for end in ("input", "output") for layer in range(3)]


def randomized(tree, seed=1, scale=0.1):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(structure, [leaf + scale * jnp.abs(jax.random.normal(key, leaf.shape))
                                          for key, leaf in zip(keys, leaves, strict=True)])


def moved(activation="topk", **changes):
    """A small model of three layers whose weights are all different from zero."""
    settings = {"num_layers": 3, "input_dim": 6, "output_dim": 5, "num_features": 8, "k": 3, "activation": activation,
                "scales": (1.0, 0.5, 2.0), "target_scales": (2.0, 1.0, 4.0)} | changes
    model = randomized(tj.features.CrossLayerTranscoder(CrossLayerTranscoderConfig(**settings), key=jax.random.key(0)))
    model.silent.set_value(jnp.zeros_like(model.silent[...]))
    return model


def batch_of(num_rows=7, dims=(6, 5), seed=3):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=(num_rows, dims["output" in name])).astype(np.float32) for name in NAMES}


def computed64(model, batch):
    """Features ``[L, B, F]`` and outputs ``[L, B, E]`` in float64."""
    config, weights = model.config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model)
    encoder, bias, out_bias = (each[...] for each in (weights.encoder, weights.encoder_bias, weights.decoder_bias))
    features = []
    for layer in range(3):
        pre = batch[NAMES[layer]] * config.scales[layer] @ encoder[layer].T + bias[layer]
        relu = np.maximum(pre, 0)
        if config.activation == "topk":
            relu = np.where(pre >= np.sort(pre)[:, -config.k, None], relu, 0)
        elif config.activation == "jumprelu":
            relu = np.where(pre > weights.threshold[...][layer], relu, 0)
        features.append(relu)
    outputs = [sum(features[source] @ weights.decoder[source][...][:, target - source] for source in range(target + 1))
               + out_bias[target] for target in range(3)]
    return np.array(features), np.array(outputs)


@pytest.mark.long
@pytest.mark.parametrize("activation", ["relu", "topk", "jumprelu", "batch_topk"])
def test_features_outputs_and_losses_are_those_of_the_formulas(activation):
    model, batch = moved(activation, sparsity=0.7, revival=0.0), batch_of()
    x, y = model.read(batch)
    if activation == "batch_topk":  # in training the largest k of each row and layer on average
        plain = moved("relu", revival=0.0)
        pre = np.array(computed64(plain, batch)[0])
        features = np.where(pre >= np.sort(pre.ravel())[-3 * 7 * 3], pre, 0)
        outputs = [sum(features[source] @ np.asarray(plain.decoder[source][...])[:, target - source]
                       for source in range(target + 1)) + plain.decoder_bias[...][target] for target in range(3)]
        model = jax.tree.unflatten(jax.tree.structure(model), [*jax.tree.leaves(plain)[:-1], jnp.zeros(()),
                                                               jax.tree.leaves(plain)[-1]])
    else:
        features, outputs = computed64(model, batch)
        np.testing.assert_allclose(model.encode(x), features, atol=1e-5)
        np.testing.assert_allclose(model(x), np.array(outputs) / np.array([2.0, 1.0, 4.0])[:, None, None], atol=1e-5)
        np.testing.assert_allclose(model.encode_layer(1, x[1]), features[1], atol=1e-5)
        np.testing.assert_allclose(model.of_layer(2).encode(x[2]), features[2], atol=1e-5)
        scales = np.array([[1.0], [4.0]])  # of the targets 1 and 2
        np.testing.assert_allclose(model.of_layer(1).decoder[...],
                                   (np.asarray(model.decoder[1][...]) / scales).sum(1), atol=1e-6)
    penalty = {"relu": 0.7 * features.sum(), "jumprelu": 0.7 * (features > 0).sum()}.get(activation, 0.0)
    loss, weight, sums = objective(model, batch)
    expected = np.square(np.array(outputs) - np.asarray(y) * np.array([2.0, 1.0, 4.0])[:, None, None]).sum() + penalty
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert weight == 7 and sums["l0"] == (features > 0).sum() and sums["active_F"].shape == (3, 8)


@pytest.mark.long
def test_a_step_keeps_the_length_of_what_features_write_and_revives_dead_ones():
    model, batch = moved(dead_after=7, revival=1.0), batch_of()
    model.encoder_bias.set_value(model.encoder_bias[...].at[1, 4].set(-100.0))

    def step(model):
        gradient, (weight, sums) = jax.grad(lambda model: (lambda loss, *others: (loss, others))(
            *objective(model, batch)), has_aux=True)(model)
        return gradient, *after_update(model, jax.tree.map(lambda value: value / weight, sums), weight)

    gradient, model, metrics = step(model)
    assert metrics["dead"] > 0 and bool(model.is_dead[1, 4]) and not gradient.encoder[...][1, 4].any()
    for layer, decoder in enumerate(model.decoder):
        assert decoder.shape == (8, 3 - layer, 5)
        np.testing.assert_allclose(np.square(decoder[...]).sum((1, 2)), 1, atol=1e-5)
    assert float(jnp.abs(step(model)[0].encoder[...][1, 4]).max()) > 0


def planted(num_rows=4000, dim=24, num_features=20, k=2, seed=0):
    """Activations of two layers in which a feature of the first layer writes to both outputs."""
    random = np.random.default_rng(seed)
    unit = lambda values: values / np.linalg.norm(values, axis=-1, keepdims=True)
    read, written = unit(random.normal(size=(2, num_features, dim))), unit(random.normal(size=(3, num_features, dim)))
    values = np.zeros((2, num_rows, num_features))
    for layer in range(2):
        chosen = np.argsort(random.random((num_rows, num_features)), axis=1)[:, :k]
        np.put_along_axis(values[layer], chosen, random.uniform(0.5, 1.5, (num_rows, k)), 1)
    y = [values[0] @ written[0], values[0] @ written[1] + values[1] @ written[2]]
    arrays = {f"layers.{layer}.mlp_input": values[layer] @ read[layer] for layer in range(2)}
    arrays |= {f"layers.{layer}.mlp_output": y[layer] for layer in range(2)}
    return tj.features.Rows({name: each.astype(np.float32) for name, each in arrays.items()}), read, written


def config_of(rows, **changes):
    model = tj.features.fit_cross_layer_config(rows, **{"num_features": 20, "k": 2, "dead_after": 2000} | changes)
    return tj.ExperimentConfig(model=model, steps=1000, batch_size=128, log_every=1000, optim=OPTIM,
                               eval=EvalConfig(every=10_000))


@pytest.mark.long
def test_planted_features_are_recovered_with_what_they_write_to_both_layers(one_device):
    rows, _, written = planted()
    bundle = tj.train(config_of(rows, num_features=26), rows)
    model = bundle.model
    found = tj.features.measure(model, rows)
    assert found.explained_variance > 0.9 and found.l0 == pytest.approx(4, abs=0.01)
    assert set(found.by_target) == {"layers.0.mlp_output", "layers.1.mlp_output"} and found.density.shape == (2, 26)
    assert min(found.by_target.values()) > 0.9
    scales = np.array(model.config.target_scales)
    for layer, expected in ((0, written[:2].swapaxes(0, 1).reshape(20, -1)), (1, written[2])):
        directions = (np.asarray(model.decoder[layer][...]) / scales[layer:, None]).reshape(26, -1)
        unit = lambda rows: rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert (unit(expected) @ unit(directions).T).max(1).mean() > 0.95


@pytest.mark.long
def test_a_stopped_run_continues_to_the_same_bits(tmp_path, one_device):
    rows = planted(600)[0]
    config = config_of(rows).replace(steps=6, optim=dataclasses.replace(OPTIM, schedule="constant"))
    whole = tj.train(config, rows)
    tj.train(config, rows, steps=3, workdir=tmp_path)
    parts = tj.train(config, rows, steps=6, workdir=tmp_path)
    loaded = tj.load(tmp_path)
    for other in (parts, loaded):
        jax.tree.map(np.testing.assert_array_equal, other.model, whole.model)
    assert loaded.config == config.model
    assert tj.evaluate(loaded, rows)["l0"] == 4


@pytest.mark.long
@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_features_are_sharded_over_the_tensor_axis(activation):
    mesh_config = MeshConfig(data=2, fsdp=2, tensor=2)
    rows = planted(64)[0]
    config = config_of(rows, activation=activation, dead_after=1).replace(mesh=mesh_config)
    task, losses = tj.tasks.make(config), []
    for where in (None, make_mesh(mesh_config)):
        state = tj.init_training(config, task, mesh=where)
        step = tj.make_train_step(task.loss, make_optimizer(config.optim, config.steps),
                                  after_update=task.after_update())
        with jax.set_mesh(make_mesh(devices=jax.devices()[:1]) if where is None else where):
            for _ in range(2):
                state, metrics = step(state, to_devices(rows[np.arange(64)], where))
        losses.append((metrics["loss"], metrics["explained_variance"], metrics["dead"]))
        if where is not None:
            assert state.params.encoder[...].sharding.shard_shape((2, 20, 24)) == (2, 10, 12)
            assert state.params.decoder[0][...].sharding.shard_shape((20, 2, 24)) == (10, 2, 12)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.fixture(scope="module")
def language_model():
    config = tj.ModelConfig(vocab_size=19, max_len=12, num_layers=3, num_heads=2, model_dim=8, mlp_dim=16)
    return tj.Decoder(config, key=jax.random.key(0))


TOKENS = np.random.default_rng(5).integers(0, 19, (2, 9))


@pytest.mark.long
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_it_takes_the_place_of_all_feed_forward_layers(language_model, activation):
    made = moved(activation, input_dim=8, output_dim=8)
    replaced, edits = tj.features.spliced(language_model, [made])
    trace = tj.trace(replaced, TOKENS, intervene=edits)
    np.testing.assert_allclose(trace["mlp_output"], made(trace["mlp_input"]), atol=1e-5)
    stream = np.asarray(trace["residual"][0], np.float64)
    for layer in range(3):
        np.testing.assert_allclose(trace["residual"][layer], stream, atol=1e-5)
        stream = stream + trace["attention_output"][layer] + trace["mlp_output"][layer]
    plain = tj.trace(language_model, TOKENS)
    np.testing.assert_array_equal(trace["attention_output"][0], plain["attention_output"][0])
    assert float(jnp.abs(trace["final"] - plain["final"]).max()) > 0.01
    with pytest.raises(ValueError, match="has no cache"):
        tj.generate(replaced, TOKENS.tolist(), max_new_tokens=2, sampling=tj.Sampling(temperature=0))


@pytest.mark.long
def test_the_loss_recovered_is_that_of_three_passes(language_model):
    made, texts = moved(input_dim=8, output_dim=8), [[3, 4, 5, 6], [7, 8]]
    found = tj.features.loss_recovered(language_model, made, texts)

    def loss(model, intervene):
        total = count = 0
        for text in texts:
            logprobs = jax.nn.log_softmax(tj.forward(model, np.array([text]), intervene=intervene))[0]
            for place, token in enumerate(text[1:]):
                total, count = total - float(logprobs[place, token]), count + 1
        return total / count

    zero = tj.inspection.patch("mlp_output", range(3), 0.0)
    expected = [loss(language_model, None), loss(tj.features.spliced(language_model, [made])[0], None),
                loss(language_model, zero)]
    np.testing.assert_allclose([found.original, found.spliced, found.zeroed], expected, rtol=1e-5)


def test_what_does_not_fit_is_refused(language_model):
    for changes, message in (
            ({"scales": (1.0,)}, "scales has 1 numbers; expected one for each of the 12 layers"),
            ({"target_scales": (3.0,) * 12}, "target_scales=3.0 is not a power of two"),
            ({"activation": "gated"}, "activation='gated' is not available"),
            ({"k": 9, "num_features": 8}, "k=9 is more than num_features=8")):
        with pytest.raises(ValueError, match=message):
            CrossLayerTranscoderConfig(**changes)
    made = moved(input_dim=8, output_dim=8)
    with pytest.raises(ValueError, match="pass one, and no transcoders"):
        tj.features.spliced(language_model, [made, made])
    with pytest.raises(ValueError, match="has 3 layers of 6 values, but the model has 3 of 8"):
        tj.features.spliced(language_model, [moved()])
    with pytest.raises(ValueError, match="is not that of feed-forward layers"):
        tj.features.spliced(language_model, [moved(site="residual", input_dim=8, output_dim=8)])
    with pytest.raises(ValueError, match="this is a transcoder"):
        tj.features.splice(language_model, made)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp_output is not one of the activations given"):
        tj.features.fit_cross_layer_config(tj.features.Rows({name: np.ones((2, 6)) for name in NAMES[:5]}))
    with pytest.raises(ValueError, match="layer=3 is not from 0 to 2"):
        made.of_layer(3)
