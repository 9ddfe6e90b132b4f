"""Which kernel computes attention changes neither what a model returns nor its maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.ops import attention

CONFIG = tj.ModelConfig(vocab_size=32, max_len=128, num_layers=2, num_heads=2, model_dim=128, num_kv_heads=1)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (1, 128)))


def traced(implementation):
    config = CONFIG.replace(attention_implementation=implementation)
    return tj.trace(tj.Decoder(config, key=jax.random.key(0)), TOKENS)


@pytest.fixture(scope="module")
def plain():
    return traced("xla")


@pytest.mark.parametrize("implementation", ["auto", "chunked", "splash"])
def test_maps_are_the_same_under_every_kernel(implementation, plain, monkeypatch):
    if implementation == "splash":
        kernel = attention.splash_attend
        monkeypatch.setattr(attention, "platform", lambda: "tpu")
        monkeypatch.setattr(attention, "splash_attend", lambda *args: kernel(*args, interpret=True))
    found = traced(implementation)
    # The queries and keys of the first layer do not depend on the kernel; those of later layers
    # contain its rounding errors.
    np.testing.assert_array_equal(found.attention(layers=0), plain.attention(layers=0))
    np.testing.assert_allclose(found.attention(layers=1), plain.attention(layers=1), atol=2e-6)
    np.testing.assert_allclose(found.residual, plain.residual, atol=2e-5)


def test_a_kernel_that_cannot_run_here_is_refused():
    model = tj.Decoder(CONFIG.replace(attention_implementation="cudnn"), key=jax.random.key(0))
    with pytest.raises(ValueError, match="'cudnn' cannot compute this attention: it runs on a GPU, and this is a CPU"):
        tj.forward(model, TOKENS)


def test_an_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="attention_implementation='flash'.*'splash'"):
        CONFIG.replace(attention_implementation="flash")
