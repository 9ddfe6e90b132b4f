"""The precision of matrix products: every product carries it, and bfloat16 learns what float32
does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import OptimConfig
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import abstract_state, init_state
from transformer_jax.training.step import make_train_step

CONFIG = tj.ModelConfig(vocab_size=32, max_len=16, num_layers=2, num_heads=2, model_dim=32, num_kv_heads=1)


def lowered_step(**changes):
    optimizer = make_optimizer(OptimConfig(), 10)
    config = CONFIG.replace(**changes)
    state = abstract_state(lambda key: tj.Decoder(config, key=key), optimizer)
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    return make_train_step(next_token_loss(), optimizer).lower(state, {"tokens": ids, "targets": ids}).as_text()


def products(text):
    return [line for line in text.splitlines() if "dot_general" in line]


@pytest.mark.long
@pytest.mark.parametrize("precision", ["high", "highest"])
@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_every_product_of_a_training_step_carries_it(precision, implementation):
    found = products(lowered_step(matmul_precision=precision, attention_implementation=implementation))
    assert len(found) > 15
    assert all(f"precision = [{precision.upper()}, {precision.upper()}]" in line for line in found)


def test_by_default_it_is_left_to_jax():
    assert all("precision = [DEFAULT, DEFAULT]" in line for line in products(lowered_step()))
    with jax.default_matmul_precision("highest"):
        found = products(lowered_step())
    assert sum("precision = [HIGHEST, HIGHEST]" in line for line in found) > 8  # those of the forward pass at least


def test_decoding_carries_it():
    model = tj.Decoder(CONFIG.replace(matmul_precision="highest"), key=jax.random.key(0))
    text = jax.jit(lambda model, tokens: model(tokens).logits).lower(model, jnp.ones((1, 4), int)).as_text()
    assert products(text) and all("HIGHEST" in line for line in products(text))


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_in_bfloat16_no_product_has_a_float32_operand(implementation):
    for line in products(lowered_step(dtype="bfloat16", attention_implementation=implementation)):
        operands = re.search(r": \((.*)\) ->", line).group(1)
        assert "xf32" not in operands, line


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="matmul_precision='float32'.*highest"):
        CONFIG.replace(matmul_precision="float32")


@pytest.mark.long
def test_bfloat16_learns_what_float32_does():
    """200 steps on texts that count up: no loss is off by more than 2 % of the first, and the last
    agree to 5 %."""
    def losses(dtype):
        optimizer = make_optimizer(OptimConfig(peak_lr=3e-3, warmup_steps=20), 200)
        config, step = CONFIG.replace(dtype=dtype), make_train_step(next_token_loss(), optimizer)
        state = init_state(lambda key: tj.Decoder(config, key=key), optimizer, jax.random.key(0))
        rng, found = np.random.default_rng(0), []
        for _ in range(200):
            row = (rng.integers(32, size=(8, 1)) + rng.integers(1, 4, size=(8, 1)) * np.arange(17)) % 32
            state, metrics = step(state, {"tokens": row[:, :-1], "targets": row[:, 1:]})
            found.append(metrics["loss"])
        return np.array(found)

    exact, rounded = losses("float32"), losses("bfloat16")
    assert exact[-20:].mean() < 0.3 * exact[0]
    assert np.abs(exact - rounded).max() < 0.02 * exact[0]
    assert abs(exact[-20:].mean() / rounded[-20:].mean() - 1) < 0.05
