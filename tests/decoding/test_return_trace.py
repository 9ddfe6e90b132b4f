"""The trace of a generation is that of a full pass over each finished text alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj

GREEDY = tj.Sampling(temperature=0)
CONFIG = tj.ModelConfig(vocab_size=20, max_len=24, num_layers=2, num_heads=2, model_dim=16, init_std=0.4)


@pytest.fixture(scope="module")
def model():
    return tj.Decoder(CONFIG, key=jax.random.key(0))


@pytest.mark.long
@pytest.mark.parametrize("silent_head", [None, 1])
def test_of_a_decoder(model, silent_head):
    def silence(site, layer, value):
        return value.at[:, :, silent_head].set(0) if site == "head_output" else value

    intervene = None if silent_head is None else silence
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    result = tj.generate(model, prompts, max_new_tokens=5, sampling=GREEDY, intervene=intervene, return_trace=True)
    options = {} if intervene is None else {"intervene": intervene}
    for row, prompt in enumerate(prompts):
        text = [prompt + result.tokens[row]]
        alone = tj.trace(model, jnp.asarray(text), **options)
        T = len(text[0])
        np.testing.assert_allclose(result.trace.residual[:, row, :T], alone.residual[:, 0], atol=2e-5)
        np.testing.assert_allclose(result.trace.attention()[:, row, :, :T, :T], alone.attention()[:, 0], atol=2e-6)
    assert tj.generate(model, prompts, max_new_tokens=5, sampling=GREEDY, intervene=intervene).trace is None


@pytest.mark.long
def test_of_an_encoder_decoder():
    model = tj.EncoderDecoder(CONFIG.replace(family="encoder_decoder"), key=jax.random.key(1))
    result = tj.generate(model, [[3, 4], [5, 6, 7]], start_id=1, max_new_tokens=4, sampling=GREEDY, return_trace=True)
    alone = tj.trace(model, jnp.asarray([[3, 4]]), jnp.asarray([[1, *result.tokens[0]]]))
    maps = result.trace.cross.attention()[:, 0, :, :5, :2]
    np.testing.assert_allclose(maps, alone.cross.attention()[:, 0], atol=2e-6)


def test_return_trace_refuses_sliding_and_prepared_models(model):
    for other, options in ((model, {"slide": True}), (tj.prepare_for_decoding(model), {})):
        with pytest.raises(ValueError, match="return_trace=True needs slide=False, and a model that is not"):
            tj.generate(other, [[1]], max_new_tokens=2, sampling=GREEDY, return_trace=True, **options)
