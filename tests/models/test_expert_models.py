"""Decoders with a mixture of experts: traces and interventions, padding, caches, mixed precision,
and training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.config import ExpertConfig, OptimConfig
from transformer_jax.inspection import patch
from transformer_jax.ops.routing import balance_loss, router_z_loss
from transformer_jax.training.objectives import next_token_loss
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

E, K = 4, 2
CONFIG = tj.ModelConfig(vocab_size=19, max_len=32, num_layers=2, num_heads=2, model_dim=16, mlp_dim=12,
                        positions="rope", norm="rmsnorm", activation="swiglu", use_bias=False, init_std=0.3,
                        moe=ExpertConfig(E, K))


@functools.cache
def model():
    return tj.Decoder(CONFIG, key=jax.random.key(0, impl="unsafe_rbg"))


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 19, shape), jnp.int32)


@pytest.mark.long
def test_the_trace_holds_the_choices_of_the_router():
    trace = tj.trace(model(), draw(2, 9))
    assert trace["router_logits"].shape == trace["router_probabilities"].shape == (2, 2, 9, E)
    assert trace["layers.1.experts"].shape == (2, 9, K) and "layers.1.neurons" not in trace.names()
    np.testing.assert_allclose(trace["router_probabilities"], jax.nn.softmax(trace["router_logits"]), rtol=1e-6)
    order = np.argsort(-np.asarray(trace["layers.0.router_probabilities"]), axis=-1)
    np.testing.assert_array_equal(trace["layers.0.experts"], order[..., :K])


@pytest.mark.long
@pytest.mark.parametrize("site", ["experts", "router_logits"])
def test_interventions_choose_experts(site):
    """Both interventions send all tokens of layer 1 to the experts 3 and 0."""
    value = [3, 0] if site == "experts" else [4.0, -9.0, -9.0, 5.0]
    tokens = draw(2, 9)
    trace = tj.trace(model(), tokens, intervene=patch(site, 1, jnp.broadcast_to(jnp.array(value), (
        2, 9, len(value)))))
    np.testing.assert_array_equal(trace["layers.1.experts"], np.broadcast_to([3, 0], (2, 9, K)))
    plain = tj.trace(model(), tokens)
    np.testing.assert_array_equal(trace["layers.0.experts"], plain["layers.0.experts"])
    assert np.abs(trace["layers.1.mlp_output"] - plain["layers.1.mlp_output"]).max() > 0.01


@pytest.mark.parametrize(("config", "site", "words"), [
    (CONFIG, "neurons", "no site 'neurons', because its feed-forward layers are mixtures of experts"),
    (CONFIG.replace(moe=None), "experts", "no site 'experts', because it has no mixture of experts"),
])
def test_sites_that_the_layers_do_not_have_are_refused(config, site, words):
    other = model() if config == CONFIG else tj.Decoder(config, key=jax.random.key(0, impl="unsafe_rbg"))
    with pytest.raises(ValueError, match=words):
        tj.forward(other, draw(1, 3), intervene=patch(site, 1, 0.0))
    with pytest.raises(ValueError, match=words):
        tj.models.site_gradients(other, draw(1, 3), sites=[site], metric=lambda logits: logits[0, 0, 0])


def test_indices_of_experts_have_no_gradient():
    with pytest.raises(ValueError, match="holds the indices of experts, which have no gradient"):
        tj.models.site_gradients(model(), draw(1, 3), sites=["experts"], metric=lambda logits: logits[0, 0, 0])
    found = tj.models.site_gradients(model(), draw(1, 3), sites=["router_logits"],
                                     metric=lambda logits: logits[0, -1, 2])
    assert found["router_logits"].shape == (2, 1, 3, E) and np.abs(found["router_logits"]).max() > 0


@pytest.mark.long
def test_the_cache_and_padding_change_nothing():
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    greedy = tj.Sampling(temperature=0)
    made = tj.generate(model(), prompts, max_new_tokens=8, end_ids=[], sampling=greedy).tokens
    for prompt, tokens in zip(prompts, made, strict=True):
        logits = tj.forward(model(), jnp.asarray([[*prompt, *tokens]]))
        assert np.argmax(logits[0, len(prompt) - 1:-1], -1).tolist() == tokens


@pytest.mark.long
def test_padding_does_not_influence_the_losses():
    """The same rows, with other tokens as padding on the left."""
    loss = jax.jit(jax.value_and_grad(lambda model, batch: next_token_loss()(model, batch, jax.random.key(0))[0]))
    segments = jnp.asarray(np.arange(12) >= [[4], [0]], jnp.int32)
    tokens, others = draw(2, 12), draw(2, 12, seed=1)
    batch = {"targets": draw(2, 12, seed=2), "segment_ids": segments, "weights": segments.astype(jnp.float32)}
    (value, grads), (padded, padded_grads) = (
        loss(model(), batch | {"tokens": jnp.where(segments == 1, tokens, padding)}) for padding in (others, 7))
    assert float(padded) == pytest.approx(float(value), rel=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(padded_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * np.abs(a).max())


@pytest.mark.long
def test_a_key_adds_the_losses_of_the_router():
    tokens = draw(2, 9)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    plain, weight = next_token_loss()(model(), batch)
    total, _, others = next_token_loss()(model(), batch, jax.random.key(0))
    trace = tj.trace(model(), batch["tokens"])
    balance = np.mean([balance_loss(trace[f"layers.{layer}.router_probabilities"], trace[f"layers.{layer}.experts"])
                       for layer in range(2)])
    z = np.mean([router_z_loss(trace[f"layers.{layer}.router_logits"]) for layer in range(2)])
    assert float((total - plain) / weight) == pytest.approx(0.01 * balance + 0.001 * z, rel=1e-4)
    means = {name: float(value / weight) for name, value in others.items()}
    assert means["balance_loss"] == pytest.approx(balance, rel=1e-5)
    assert means["router_z_loss"] == pytest.approx(z, rel=1e-5)
    counts = [np.bincount(np.ravel(trace[f"layers.{layer}.experts"]), minlength=E) for layer in range(2)]
    assert means["expert_load_max"] == pytest.approx(np.mean([c.max() for c in counts]) / (16 * K / E), rel=1e-5)
    assert means["expert_load_min"] == pytest.approx(np.mean([c.min() for c in counts]) / (16 * K / E), rel=1e-5)


@pytest.mark.long
def test_training_balances_experts_that_start_unbalanced():
    """Muon trains the experts too; weights are float32, products bfloat16, and layers are
    recomputed."""
    config = CONFIG.replace(dtype="bfloat16", remat="dots", moe=ExpertConfig(E, 1, balance_loss=0.1))
    optimizer = make_optimizer(OptimConfig(name="muon", peak_lr=3e-2, muon_lr=0.02, schedule="constant",
                                           warmup_steps=0), 40)

    def unbalanced(key):
        model = tj.Decoder(config, key=key)
        kernel = model.stack.blocks.mlp.router.kernel
        kernel[...] = kernel[...].at[..., 0].add(0.5)
        return model

    state = init_state(unbalanced, optimizer, jax.random.key(0, impl="unsafe_rbg"))
    step = make_train_step(next_token_loss(), optimizer)
    rows = (np.arange(17) + np.arange(16)[:, None]) % 19
    batch = {"tokens": jnp.asarray(rows[:, :-1]), "targets": jnp.asarray(rows[:, 1:])}
    before = np.asarray(state.params.stack.blocks.mlp.up[...])
    metrics = []
    for _ in range(40):
        state, found = step(state, batch)
        metrics.append({name: float(value) for name, value in found.items()})
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"] and metrics[-1]["skipped"] == 0
    assert metrics[-1]["balance_loss"] < metrics[0]["balance_loss"] - 0.1
    assert metrics[-1]["expert_load_max"] < metrics[0]["expert_load_max"]
    assert state.params.stack.blocks.mlp.up[...].dtype == jnp.float32
    assert (np.abs(np.asarray(state.params.stack.blocks.mlp.up[...]) - before).max((2, 3)) > 1e-3).all()
