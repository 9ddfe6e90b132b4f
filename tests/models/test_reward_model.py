"""The scalar head: read at the last real token, wherever the padding is; saved and loaded with its
model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import ModelConfig
from transformer_jax.models.heads import RewardModel
from transformer_jax.nn.layers import ScalarHead
from transformer_jax.training.bundle import Bundle

CONFIG = ModelConfig(family="reward", vocab_size=19, max_len=12, num_layers=2, num_heads=2, model_dim=16,
                     positions="rope", init_std=0.3)
LENGTHS = (12, 7, 1)


@pytest.fixture(scope="module")
def model():
    model = RewardModel(CONFIG, key=jax.random.key(0))
    model.head.kernel[...] = 10 * model.head.kernel[...]
    model.head.bias[...] = jnp.float32(0.5)
    return model


@pytest.fixture(scope="module")
def texts():
    return [jax.random.randint(jax.random.key(n), (length,), 0, 19) for n, length in enumerate(LENGTHS)]


def padded(texts, on_the_left):
    """Padding is token 7, which also occurs as an ordinary token."""
    tokens, segment_ids = np.full((len(texts), 12), 7, np.int32), np.zeros((len(texts), 12), np.int32)
    for row, text in enumerate(texts):
        place = slice(12 - len(text), 12) if on_the_left else slice(0, len(text))
        tokens[row, place], segment_ids[row, place] = text, 1
    return tokens, segment_ids


@pytest.mark.long
@pytest.mark.parametrize("on_the_left", [False, True])
def test_padding_does_not_change_a_score(model, texts, on_the_left):
    tokens, segment_ids = padded(texts, on_the_left)
    found = jax.jit(lambda model: model(tokens, segment_ids_BT=segment_ids))(model)
    alone = [float(model(text[None])[0]) for text in texts]
    np.testing.assert_allclose(found, alone, rtol=1e-5, atol=1e-6)
    assert np.ptp(alone) > 0.1


def test_the_score_is_linear_in_the_last_hidden_state(model, texts):
    hidden = np.asarray(model.trunk(texts[0][None]).hidden, np.float64)[0, -1]
    expected = hidden @ np.asarray(model.head.kernel[...], np.float64) + 0.5
    assert float(model(texts[0][None])[0]) == pytest.approx(expected, rel=1e-5)


def test_rewards_are_scores_brought_to_mean_and_std(model, texts):
    model = jax.tree.map(lambda x: x, model)
    model.mean[...], model.std[...] = jnp.float32(2.0), jnp.float32(4.0)
    score = float(model(texts[0][None])[0])
    assert float(model.rewards(texts[0][None])[0]) == pytest.approx((score - 2) / 4)


def test_it_begins_as_the_decoder_it_is_made_of(texts):
    decoder = tj.Decoder(CONFIG.replace(family="decoder"), key=jax.random.key(3))
    model = RewardModel.of(decoder, key=jax.random.key(4))
    assert model.config == CONFIG
    np.testing.assert_array_equal(model.trunk(texts[0][None]).logits, decoder(texts[0][None]).logits)


def test_saved_and_loaded(model, texts, tmp_path):
    tj.save(tmp_path, Bundle(model=model, tokenizer=None, config=CONFIG))
    loaded = tj.load(tmp_path)
    assert loaded.config == CONFIG and isinstance(loaded.model, RewardModel)
    np.testing.assert_array_equal(loaded.model(texts[0][None]), model(texts[0][None]))


def test_it_does_not_generate(model):
    with pytest.raises(ValueError, match=r"generate is for models of family decoder or encoder_decoder, not reward"):
        tj.generate(model, [[1, 2]], key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"the config has family='decoder', but this model needs family='reward'"):
        RewardModel(CONFIG.replace(family="decoder"), key=jax.random.key(0))


def test_its_decoder_is_traced_and_edited(model, texts):
    """The trace of a reward model is that of its decoder, and an intervention changes the score."""
    tokens = texts[0][None]
    trace = tj.trace(model, tokens)
    np.testing.assert_array_equal(trace.residual, tj.trace(model.trunk, tokens).residual)
    assert model.stacks() == {"self": model.trunk.stack}
    normed = model.trunk.final_norm(trace.final)
    np.testing.assert_allclose(model(tokens), model.head(normed[:, -1]), rtol=1e-5)
    ablated = model(tokens, intervene=tj.inspection.ablate_head(1, 0))
    expected = model.trunk(tokens, intervene=tj.inspection.ablate_head(1, 0)).hidden
    np.testing.assert_allclose(ablated, model.head(expected[:, -1]), rtol=1e-5)
    assert abs(float(ablated[0] - model(tokens)[0])) > 1e-3
    np.testing.assert_array_equal(tj.trace(model, texts[0].tolist()).residual, trace.residual)


@pytest.mark.long
def test_a_text_is_read_in_parts_with_a_cache(model, texts):
    tokens = texts[0][None]
    cache = model.step(tokens[:, :7], model.start_cache(1, 12)).cache
    hidden = model.step(tokens[:, 7:], cache).hidden
    np.testing.assert_allclose(model.head(hidden[:, -1]), model(tokens), rtol=1e-5, atol=1e-6)


def test_calls_that_need_logits_refuse_a_reward_model(model, texts):
    for call in (lambda: tj.forward(model, texts[0][None]), lambda: model.unembed(jnp.zeros((1, 16)))):
        with pytest.raises(ValueError, match=r"a reward model has no logits.* one number.*model\.trunk"):
            call()
    with pytest.raises(ValueError, match="a reward model scores texts and cannot generate them"):
        tj.prepare_for_decoding(model)
    for function in (tj.beam_search, tj.score, tj.fill_mask):
        with pytest.raises(ValueError, match="not reward"):
            function(model, [[1, 2]], tokenizer=None)


def test_the_head_keeps_float32_under_bfloat16():
    head = ScalarHead(CONFIG.replace(dtype="bfloat16", param_dtype="bfloat16"), key=jax.random.key(0))
    assert head(jnp.ones((2, 3, 16), jnp.bfloat16)).dtype == jnp.float32
    assert head(jnp.ones((2, 3, 16), jnp.bfloat16)).shape == (2, 3)
