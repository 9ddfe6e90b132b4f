"""A tokenizer with role tokens and small models that share it."""

import jax
import pytest

from transformer_jax.config import ModelConfig
from transformer_jax.data import Tokenizer
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.heads import RewardModel

TEXT = "the cat sat on a mat and it was good or bad"


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train([TEXT], kind="char", chat=True)


@pytest.fixture(scope="session")
def config(tokenizer):
    return ModelConfig(vocab_size=tokenizer.vocab_size, max_len=48, num_layers=2, num_heads=2, model_dim=16,
                       positions="rope", norm="rmsnorm", use_bias=False, init_std=0.3)


@pytest.fixture(scope="session")
def make_decoder(config):
    """Returns ``make_decoder(seed)``, which makes the same weights for the same seed."""
    make = jax.jit(lambda key: Decoder(config, key=key))
    return lambda seed: make(jax.random.key(seed))


@pytest.fixture(scope="session")
def reward_model(config):
    model = jax.jit(lambda key: RewardModel(config.replace(family="reward"), key=key))(jax.random.key(9))
    model.head.kernel[...] = 10 * model.head.kernel[...]
    return model
