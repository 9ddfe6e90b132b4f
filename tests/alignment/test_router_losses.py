"""The losses of reward models, DPO and reinforcement learning add those of the router in training,
over the layers that have experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.alignment.dpo import dpo_loss
from transformer_jax.alignment.ppo import grpo_loss
from transformer_jax.alignment.reward import reward_loss
from transformer_jax.config import ExpertConfig, PreferenceConfig, ReinforcementConfig
from transformer_jax.ops.routing import balance_loss, router_z_loss

CONFIG = tj.ModelConfig(vocab_size=19, max_len=16, num_layers=3, num_heads=2, model_dim=8, mlp_dim=12,
                        positions="rope", norm="rmsnorm", activation="swiglu", use_bias=False, init_std=0.3,
                        moe=ExpertConfig(4, 2, dense_layers=1, balance_loss=0.5, z_loss=0.1))
B, K, T = 2, 2, 9


@functools.cache
def model_and_batch():
    shapes = jax.eval_shape(lambda key: tj.Decoder(CONFIG, key=key), jax.random.key(0))
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.5, 0.3, leaf.shape), leaf.dtype), shapes)
    segments = jnp.asarray(np.arange(T) >= np.array([[[0], [3]], [[2], [0]]]), jnp.int32)
    tokens = jnp.asarray(rng.integers(0, 19, (B, K, T)), jnp.int32)
    batch = {"tokens": tokens, "segment_ids": segments, "mask": segments.astype(bool) & (jnp.arange(T) > 5),
             "ranks": jnp.array([[1, 2], [2, 1]]), "reference_logprobs": jnp.zeros((B, K))}
    return model, batch


def reward(model, batch, key):
    shapes = jax.eval_shape(lambda key: tj.RewardModel(CONFIG.replace(family="reward"), key=key), jax.random.key(0))
    rewarding = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    rewarding.trunk = model
    return reward_loss(rewarding, batch, key)


def policy(model, batch, key):
    rows = {name: batch[name].reshape(B * K, T) for name in ("tokens", "segment_ids")}
    zeros = jnp.zeros((B * K, 4))
    return grpo_loss(ReinforcementConfig(algorithm="grpo", num_samples=2))(model, rows | {
        "mask": batch["mask"].reshape(B * K, T)[:, -4:], "logprobs": zeros, "advantages": zeros + 1.0,
        "reference_logprobs": zeros, "kl_coefficients": zeros}, key)


@pytest.mark.long
@pytest.mark.parametrize("loss", [reward, dpo_loss(PreferenceConfig()), policy], ids=["reward", "dpo", "grpo"])
def test_a_key_adds_the_losses_of_the_router(loss):
    model, batch = model_and_batch()

    @jax.jit
    def both(model, batch):
        rows, segments = (batch[name].reshape(B * K, T) for name in ("tokens", "segment_ids"))
        layers = model(rows, segment_ids_BT=segments).trace.layers
        valid = segments != 0
        balance = jnp.mean(jax.vmap(lambda *layer: balance_loss(*layer, valid))(
            layers.router_probabilities, layers.experts))
        z = jnp.mean(jax.vmap(lambda logits: router_z_loss(logits, valid))(layers.router_logits))
        return loss(model, batch, None), loss(model, batch, jax.random.key(1)), balance, z

    (plain, weight, *_), (total, _, others), balance, z = both(model, batch)
    assert model_and_batch()[0].stack.blocks.mlp.up.shape[0] == 2  # of three layers
    assert float(total - plain) == pytest.approx(float(weight * (0.5 * balance + 0.1 * z)), rel=1e-3)
    assert float(others["balance_loss"]) == pytest.approx(float(weight * balance), rel=1e-5)
