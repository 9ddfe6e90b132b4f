"""The losses of PPO and GRPO, against a plain re-derivation in float64, and their gradients at the
first update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.alignment.ppo import (
    clipped_policy_loss,
    clipped_value_loss,
    grpo_loss,
    kl_estimate,
    ppo_loss,
    with_value_head,
)
from transformer_jax.config import ReinforcementConfig

P, R, B = 6, 5, 4
PPO = ReinforcementConfig(clip=0.15, value_clip=0.3, value_coefficient=0.4, entropy_coefficient=0.02)
GRPO = ReinforcementConfig(algorithm="grpo", num_samples=2, clip=0.15, entropy_coefficient=0.02)


@pytest.mark.parametrize(("log_ratio", "advantage", "expected"), [
    (0.0, 2.0, -2.0), (np.log(1.1), 2.0, -2.2), (np.log(1.5), 2.0, -2.4), (np.log(0.5), 2.0, -1.0),
    (np.log(1.5), -2.0, 3.0), (np.log(0.5), -2.0, 1.6)])
def test_nothing_is_gained_beyond_the_clip(log_ratio, advantage, expected):
    assert float(clipped_policy_loss(jnp.float32(log_ratio), jnp.float32(advantage), 0.2)) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "expected"), [(1.1, 0.5 * 0.9**2), (1.9, 0.5 * 0.8**2), (0.1, 0.5 * 1.9**2)])
def test_the_value_must_not_run_ahead(value, expected):
    """The old value was 1, the return 2, the clip 0.2."""
    assert float(clipped_value_loss(*map(jnp.float32, (value, 1.0, 2.0)), 0.2)) == pytest.approx(expected)


def test_the_kl_estimate_is_that_of_the_distributions():
    """Its mean under p is KL(p || q), whatever p and q."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    estimates = np.asarray(kl_estimate(jnp.float32(np.log(q / p))))
    assert (p * estimates).sum() == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert (estimates >= 0).all()


@pytest.fixture(scope="module")
def policy(make_decoder):
    policy = with_value_head(make_decoder(1), key=jax.random.key(5))
    policy.value_head.kernel[...] = 10 * policy.value_head.kernel[...]
    return policy


@functools.cache
def batch():
    """Prompts are padded on the left and responses on the right. Arrays have random values wherever
    the mask is False."""
    rng = np.random.default_rng(2)
    lengths, prompt_lengths = np.array([5, 3, 1, 4]), np.array([6, 2, 3, 1])
    mask_BR = np.arange(R) < lengths[:, None]
    segment_ids = np.concatenate([np.arange(P) >= P - prompt_lengths[:, None], mask_BR], axis=1).astype(np.int32)
    arrays = {name: np.where(mask_BR, rng.normal(size=(B, R)), 1e3).astype(np.float32)
              for name in ("logprobs", "advantages", "values", "returns", "reference_logprobs")}
    arrays["logprobs"] = np.where(mask_BR, -3.0 + 0.2 * rng.normal(size=(B, R)), np.nan).astype(np.float32)
    arrays["reference_logprobs"] = np.where(mask_BR, arrays["logprobs"] - 0.3, 1e3)
    return {"tokens": rng.integers(6, 18, size=(B, P + R)).astype(np.int32), "segment_ids": segment_ids,
            "mask": mask_BR, "kl_coefficients": np.full((B, R), 0.7, np.float32), **arrays}


def read_rows(policy, batch):
    """Log-probabilities and values of each response, row by row without any padding, in float64."""
    log_p, values = [], []
    for tokens, ids in zip(batch["tokens"], batch["segment_ids"], strict=True):
        real = tokens[ids != 0]
        length = int(ids[P:].sum())
        out = policy(jnp.asarray(real)[None])
        logits = np.asarray(out.logits, np.float64)[0, len(real) - length - 1:-1]
        hidden = np.asarray(out.hidden, np.float64)[0, len(real) - length - 1:-1]
        log_p.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        head = policy.value_head
        values.append(hidden @ np.asarray(head.kernel[...], np.float64) + float(head.bias[...]))
    return log_p, values


def expected(policy, batch, config):
    """Token by token, with loops."""
    sums = dict.fromkeys(("policy_loss", "entropy", "clip_fraction", "step_kl", "value_loss", "reference_kl"), 0.0)
    for row, (log_p, values) in enumerate(zip(*read_rows(policy, batch), strict=True)):
        for t in range(len(log_p)):
            at = {name: float(batch[name][row, t]) for name in ("logprobs", "advantages", "values", "returns",
                                                               "reference_logprobs")}
            now = log_p[t, batch["tokens"][row, P + t]]
            ratio = np.exp(now - at["logprobs"])
            bounded = min(max(ratio, 1 - config.clip), 1 + config.clip)
            sums["policy_loss"] += -min(ratio * at["advantages"], bounded * at["advantages"])
            sums["entropy"] += -(np.exp(log_p[t]) * log_p[t]).sum()
            sums["clip_fraction"] += abs(ratio - 1) > config.clip
            sums["step_kl"] += ratio - 1 - np.log(ratio)
            near = at["values"] + min(max(values[t] - at["values"], -config.value_clip), config.value_clip)
            sums["value_loss"] += 0.5 * max((values[t] - at["returns"]) ** 2, (near - at["returns"]) ** 2)
            apart = at["reference_logprobs"] - now
            sums["reference_kl"] += np.exp(apart) - 1 - apart
    return sums


@pytest.mark.long
def test_ppo_against_float64(policy):
    loss, weight, sums = jax.jit(ppo_loss(PPO))(policy, batch())
    wanted = expected(policy, batch(), PPO)
    assert set(sums) == {"policy_loss", "entropy", "clip_fraction", "step_kl", "value_loss"}
    for name, value in sums.items():
        assert float(value) == pytest.approx(wanted[name], rel=1e-4, abs=1e-4), name
    assert 0 < float(sums["clip_fraction"]) < float(weight) == 13
    total = wanted["policy_loss"] + 0.4 * wanted["value_loss"] - 0.02 * wanted["entropy"]
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_grpo_against_float64(policy):
    loss, weight, sums = jax.jit(grpo_loss(GRPO))(policy, batch())
    wanted = expected(policy, batch(), GRPO)
    assert set(sums) == {"policy_loss", "entropy", "clip_fraction", "step_kl", "reference_kl"}
    for name, value in sums.items():
        assert float(value) == pytest.approx(wanted[name], rel=1e-4, abs=1e-4), name
    total = wanted["policy_loss"] + 0.7 * wanted["reference_kl"] - 0.02 * wanted["entropy"]
    assert float(loss) == pytest.approx(total, rel=1e-4) and float(weight) == 13


def test_gradients_ignore_what_the_mask_hides(policy):
    """NaN log-probabilities and values of 1000 outside the mask reach no gradient."""
    gradient = jax.jit(jax.grad(lambda policy, batch: ppo_loss(PPO)(policy, batch)[0]))
    found = gradient(policy, batch())
    cleaned = {name: np.where(batch()["mask"], x, 0.0) if x.dtype == np.float32 else x for name, x in batch().items()}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradient(policy, cleaned)), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found))
