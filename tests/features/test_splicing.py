"""Features in the place of activations: interventions, transcoders, and the loss that they
recover."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import SparseAutoencoderConfig
from transformer_jax.features.autoencoder import SparseAutoencoder
from transformer_jax.models.functional import make_model

CONFIG = tj.ModelConfig(vocab_size=19, max_len=12, num_layers=3, num_heads=2, model_dim=8, mlp_dim=16)
TOKENS = jax.random.randint(jax.random.key(5), (2, 9), 0, 19)


@pytest.fixture(scope="module")
def model():
    return tj.Decoder(CONFIG, key=jax.random.key(0))


def autoencoder(site="layers.1.mlp_output", **changes):
    settings = {"site": site, "input_dim": 8, "num_features": 20, "k": 4, "scale": 2.0} | changes
    made = SparseAutoencoder(SparseAutoencoderConfig(**settings), key=jax.random.key(3))
    made.decoder_bias.set_value(0.1 * jax.random.normal(jax.random.key(4), made.decoder_bias.shape))
    return made


def transcoder(layer, seed, **changes):
    settings = {"site": f"layers.{layer}.mlp_input", "target": f"layers.{layer}.mlp_output", "input_dim": 8, "k": 4,
                "num_features": 20, "subtract_bias": False, "scale": 0.5, "target_scale": 2.0 ** seed}
    return SparseAutoencoder(SparseAutoencoderConfig(**settings | changes), key=jax.random.key(seed))


def test_a_splice_puts_the_reconstruction_in_place(model):
    made, plain = autoencoder(), tj.trace(model, TOKENS)
    changed = tj.trace(model, TOKENS, intervene=tj.features.splice(model, made))
    np.testing.assert_allclose(changed["mlp_output"][1], made(plain["mlp_output"][1]), atol=1e-6)
    np.testing.assert_array_equal(changed["mlp_output"][0], plain["mlp_output"][0])
    assert float(jnp.abs(changed["final"] - plain["final"]).max()) > 0.01


def test_setting_a_feature_changes_that_feature_alone(model):
    made, plain = autoencoder(), tj.trace(model, TOKENS)["mlp_output"][1]
    features = made.encode(plain)
    for value in (0.0, 3.0):
        edit = tj.features.set_feature(model, made, 7, value)
        changed = tj.trace(model, TOKENS, intervene=edit)["mlp_output"][1]
        expected = plain + (value - features[..., 7, None]) * made.decoder[...][7] / 2.0
        np.testing.assert_allclose(changed, expected, atol=1e-6)


def test_transcoders_take_the_place_of_feed_forward_layers(model):
    made = [transcoder(0, 1), transcoder(2, 2)]
    replaced, edits = tj.features.spliced(model, [*made, autoencoder("layers.1.residual")])
    trace = tj.trace(replaced, TOKENS, intervene=edits)
    for each, layer in zip(made, (0, 2), strict=True):
        np.testing.assert_allclose(trace["mlp_output"][layer], each(trace["mlp_input"][layer]), atol=1e-5)
    block = jax.tree.map(lambda leaf: leaf[1], model.stack.blocks)
    np.testing.assert_allclose(trace["mlp_output"][1], block.mlp(trace["mlp_input"][1]), atol=1e-5)
    np.testing.assert_allclose(trace["residual"][1], autoencoder("layers.1.residual")(
        trace["residual"][0] + trace["attention_output"][0] + trace["mlp_output"][0]), atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("family", ["decoder", "encoder_decoder"])
def test_the_loss_recovered_is_that_of_three_passes(family):
    model = make_model(CONFIG.replace(family=family, positions="sinusoidal"), key=jax.random.key(0))
    made, texts = autoencoder(), [[3, 4, 5, 6], [7, 8]]
    if family == "encoder_decoder":
        texts = [([9, 2], text) for text in texts]
    found = tj.features.loss_recovered(model, made, texts)

    def loss(intervene):
        total = count = 0
        for text in texts:
            pair = ([text[0]], [[*model.config.start_ids, *text[1]]]) if family == "encoder_decoder" else ([text],)
            tokens = tuple(map(np.array, pair))
            logprobs = jax.nn.log_softmax(tj.forward(model, *tokens, intervene=intervene))[0]
            for place, token in enumerate(tokens[-1][0][1:]):
                total, count = total - float(logprobs[place, token]), count + 1
        return total / count

    splice, zero = tj.features.splice(model, made), tj.inspection.patch("mlp_output", 1, 0.0)
    expected = [loss(None), loss(splice), loss(zero)]
    np.testing.assert_allclose([found.original, found.spliced, found.zeroed], expected, rtol=1e-5)
    perfect = autoencoder(activation="relu", num_features=16, subtract_bias=False, scale=1.0)
    both_signs = jnp.concatenate([jnp.eye(8), -jnp.eye(8)])
    perfect.encoder.set_value(both_signs)
    perfect.decoder.set_value(both_signs)
    perfect.decoder_bias.set_value(jnp.zeros(8))
    assert tj.features.loss_recovered(model, perfect, texts).share == pytest.approx(1, abs=1e-4)


def test_what_cannot_be_spliced_is_refused(model):
    for made, message in ((transcoder(0, 1), "this is a transcoder"),
                          (autoencoder("layers.3.mlp_output"), "not an activation of one layer"),
                          (autoencoder("mlp_output"), "not an activation of one layer")):
        with pytest.raises(ValueError, match=message):
            tj.features.splice(model, made)
    for made, message in (([transcoder(0, 1), transcoder(0, 2)], "one transcoder for each layer"),
                          ([transcoder(0, 1), transcoder(1, 2, k=3)], "different settings"),
                          ([transcoder(0, 1, target="layers.1.mlp_output")], "not that of a feed-forward layer")):
        with pytest.raises(ValueError, match=message):
            tj.features.spliced(model, made)
    with pytest.raises(ValueError, match="feature=20 is not from 0 to 19"):
        tj.features.set_feature(model, autoencoder(), 20, 1.0)
    encoder = make_model(CONFIG.replace(family="encoder"), key=jax.random.key(0))
    with pytest.raises(ValueError, match="predicts next tokens"):
        tj.features.loss_recovered(encoder, autoencoder(), [[1, 2]])


@pytest.mark.parametrize("norm_position", ["both", "output"])
def test_transcoders_of_layers_whose_output_is_normalized_are_refused(norm_position):
    other = tj.Decoder(CONFIG.replace(norm_position=norm_position), key=jax.random.key(0))
    with pytest.raises(ValueError, match="a transcoder cannot take the place of the layer alone"):
        tj.features.spliced(other, [transcoder(0, 1)])
